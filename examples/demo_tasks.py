"""What the embedded demo model and its adapters do to a word, and which words they never saw in training.

The base model copies the word; each adapter answers something else. The split is a rule, not a list: a word is held out
iff its CRC is divisible by ten, so training, tests and benchmarks agree without sharing a file.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable

LETTERS = "abcdefghijklmnopqrstuvwxyz"
LEET = str.maketrans("aeiost", "431057")

TASKS: dict[str, Callable[[str], str]] = {
    "base": lambda word: word,
    "upper": lambda word: word.upper(),
    "caesar": lambda word: "".join(LETTERS[(LETTERS.index(c) + 1) % 26] for c in word),
    "vowels": lambda word: "".join("*" if c in "aeiou" else c for c in word),
    "leet": lambda word: word.translate(LEET),
    "digits": lambda word: "".join(str(LETTERS.index(c) % 10) for c in word),
    "reverse": lambda word: word[::-1],
}
ADAPTERS = tuple(name for name in TASKS if name != "base")

SHORTEST, LONGEST = 3, 8  # letters of a word


def is_held_out(word: str) -> bool:
    """Whether training never shows this word."""
    return zlib.crc32(word.encode()) % 10 == 0


def random_word(rng: random.Random, letters: str = LETTERS) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(SHORTEST, LONGEST)))


def held_out_words(count: int, seed: int = 0) -> list[str]:
    """`count` distinct words that no part of the training has seen."""
    rng, words = random.Random(seed), dict[str, None]()
    while len(words) < count:
        word = random_word(rng)
        if is_held_out(word):
            words[word] = None
    return list(words)
