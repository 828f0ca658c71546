"""Text in pieces equals text at once; stop strings are found wherever they are cut."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sglang_lora_moe.engine.detokenizer import Detokenizer, StopStrings, make_decode, silent_ids
from tests.tiny_models import make_tokenizer

TEXTS = [
    "plain ascii text, long enough to move the window a few times over",
    "naïve café — “quotes” … ünïcödé",
    "日本語のテキスト 🙂🚀👩‍👩‍👧 mixed with ascii 한국어",
    "a\ufffdb\ufffd\ufffd end",
]


def byte_level_tokenizer() -> Any:
    """A byte-level BPE tokenizer: tokens are bytes, or merges of two, so characters are cut everywhere."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(a, b) for a in "aeiouĠ" for b in "nrst"]
    vocab = {token: i for i, token in enumerate(["<eos>", *alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def sentencepiece_tokenizer(*words: str) -> Any:
    """A tokenizer of whole words that encodes and decodes as Llama's and Mixtral's do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, **{f"▁{word}": i for i, word in enumerate(words, 1)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, "<s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", clean_up_tokenization_spaces=False)


class SpaceStripping:
    """Decodes as SentencePiece does: the space before the first word is dropped."""

    words = ["▁the", "▁quick", "bro", "wn", "▁fox", "▁", "▁▁", "s"]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[i] for i in ids).replace("▁", " ").removeprefix(" ")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_make_the_whole_text(text: str) -> None:
    tokenizer = byte_level_tokenizer()
    decode = make_decode(tokenizer)
    ids = tokenizer.encode(text * 3)
    for seed in range(5):
        rng = random.Random(seed)
        detokenizer, pieces, rest = Detokenizer(decode), [], list(ids)
        while rest:
            count = rng.choice([1, 1, 1, 2, 5])
            pieces.append(detokenizer.push(rest[:count]))
            assert "".join(pieces) == (text * 3)[: len("".join(pieces))]  # never a half character
            rest = rest[count:]
        pieces.append(detokenizer.push([], last=True))
        assert "".join(pieces) == text * 3 == tokenizer.decode(ids)


def test_bytes_that_are_no_text_come_at_the_end() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("ok é")[:-1]
    detokenizer = Detokenizer(make_decode(tokenizer))
    assert "".join(detokenizer.push([i]) for i in ids) == "ok "
    assert detokenizer.push([], last=True) == "\ufffd"


def test_random_bytes_equal_the_whole_decode() -> None:
    tokenizer = byte_level_tokenizer()
    rng = random.Random(0)
    for _ in range(30):
        ids = [rng.randrange(1, 280) for _ in range(rng.randrange(1, 120))]
        detokenizer = Detokenizer(make_decode(tokenizer))
        assert "".join([detokenizer.push([i]) for i in ids] + [detokenizer.push([], last=True)]) == tokenizer.decode(ids)


def test_spaces_survive_a_moving_window() -> None:
    tokenizer, rng = SpaceStripping(), random.Random(1)
    for _ in range(30):
        ids = [rng.randrange(len(tokenizer.words)) for _ in range(100)]
        detokenizer = Detokenizer(make_decode(tokenizer))
        assert "".join([detokenizer.push([i]) for i in ids] + [detokenizer.push([], last=True)]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["text", "silent", "no text"])
def test_the_window_stays_short(kind: str) -> None:
    """Of text, of special tokens that the text leaves out, and of bytes that are no character: otherwise each token costs more than the one before."""
    lengths = []

    def decode(ids: list[int]) -> str:
        lengths.append(len(ids))
        return "".join("\ufffd" if kind == "no text" and token_id == 1 else "x" for token_id in ids)

    detokenizer = Detokenizer(decode, [5, 6], silent=frozenset({1}) if kind == "silent" else frozenset())
    said = sum(len(detokenizer.push([1])) for _ in range(1000))
    assert said + len(detokenizer.push([], last=True)) == (0 if kind == "silent" else 1000) and said in (0, 997, 1000)
    assert max(lengths) <= 27 and len(lengths) < 1100


def test_special_tokens_are_silent() -> None:
    tokenizer = make_tokenizer()
    silent = silent_ids(tokenizer)
    assert {1, 2} <= silent and 75 not in silent and not silent_ids(None)
    detokenizer = Detokenizer(make_decode(tokenizer), silent=silent)
    assert "".join(detokenizer.push([i]) for i in [1, 75, *[2] * 50, 76]) == make_decode(tokenizer)([75, 76])
    assert len(detokenizer._ids) == 2


def test_a_prompt_that_ends_inside_a_character() -> None:
    tokenizer = byte_level_tokenizer()
    ids = tokenizer.encode("so é!")
    detokenizer = Detokenizer(make_decode(tokenizer), ids[:-2])
    assert [detokenizer.push([i]) for i in ids[-2:]] == ["é", "!"]


def test_special_tokens_are_left_out() -> None:
    tokenizer = make_tokenizer()
    assert make_decode(tokenizer)([1, 75, 2]) == "h"
    assert make_decode(tokenizer, skip_special_tokens=False)([1, 75, 2]) == "<bos>h<eos>"


def reference_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    for end in range(len(text) + 1):
        found = [(text[:end].find(stop), -len(stop), stop) for stop in stops if stop in text[:end]]
        if found:
            return text[: min(found)[0]], min(found)[2]
    return text, None


@pytest.mark.parametrize("stops", [["END"], ["ab", "bca"], ["aaa"], ["\n\n", "\nQ:"], ["abab", "ba"], ["x" * 10]])
def test_stop_strings_across_pieces(stops: list[str]) -> None:
    rng = random.Random(str(stops))
    alphabet = sorted(set("".join(stops))) + ["z"]
    for _ in range(300):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randrange(0, 30)))
        finder, said, found = StopStrings(stops), "", None
        for character in text:
            piece, found = finder.push(character)
            said += piece
            if found is not None:
                break
            assert len(text) >= len(said) and text.startswith(said)
        if found is None:
            said += finder.finish()
        assert (said, found) == reference_stop(text, stops)


def test_only_a_possible_beginning_is_held_back() -> None:
    finder = StopStrings(["STOP"])
    assert finder.push("no S") == ("no ", None)
    assert finder.push("T") == ("", None)
    assert finder.push("A") == ("STA", None)
    assert finder.push("bc") == ("bc", None)
    assert finder.push("xSTO") == ("x", None)
    assert finder.finish() == "STO"


def test_a_stop_inside_one_piece_trims_the_rest() -> None:
    assert StopStrings(["</s>", "s>"]).push("answer</s>more") == ("answer", "</s>")
