"""Text and bytes of tokens, also where a token is a part of a character."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_lora_moe.core import TokenLogprob
from sglang_lora_moe.server.logprobs import CompletionLogprobs, TokenText, chat_logprobs


@pytest.fixture(scope="module")
def byte_level() -> Any:
    """A byte-level BPE tokenizer whose merges are few, so that 'é' and an emoji fall into single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": 0} | {character: i + 1 for i, character in enumerate(alphabet)} | {"Ġt": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("Ġ", "t")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_byte_level_pieces_are_exact(byte_level: Any) -> None:
    tokens = TokenText(byte_level)
    ids = byte_level("a té 🙂", add_special_tokens=False).input_ids
    assert b"".join(tokens.raw(i) for i in ids) == "a té 🙂".encode()
    assert tokens.text(ids[1]) == " t" and tokens.raw(ids[1]) == b" t"
    assert len(ids) == 1 + 1 + 2 + 1 + 4 and tokens.text(ids[2]) == "\ufffd"
    assert tokens.raw(0) == b"<eos>"


def test_every_byte_has_its_character(byte_level: Any) -> None:
    tokens = TokenText(byte_level)
    assert sorted(tokens.raw(i) for i in range(1, 257)) == [bytes([byte]) for byte in range(256)]
    for code in (*range(0x80), 0xA0, 0xAD, 0xFF, 0x100, 0x7FF, 0xFFFF, 0x10FFFF):
        ids = byte_level(chr(code), add_special_tokens=False).input_ids
        assert b"".join(tokens.raw(i) for i in ids) == chr(code).encode(), hex(code)


def test_offsets_count_whole_characters(byte_level: Any) -> None:
    ids = byte_level("é🙂x", add_special_tokens=False).input_ids
    builder = CompletionLogprobs(TokenText(byte_level), wants_top=False)
    first = builder.piece([TokenLogprob(0, None), *(TokenLogprob(i, -1.0) for i in ids[:2])], [TokenLogprob(ids[2], -1.0)])
    second = builder.piece([], [TokenLogprob(i, -1.0) for i in ids[3:]])
    assert first["text_offset"] + second["text_offset"] == [0, 0, 0, 1, 1, 1, 1, 2]  # é, then the emoji's 4 bytes, then x
    with_special = CompletionLogprobs(TokenText(byte_level), wants_top=False, skips_special=False)
    pair = [TokenLogprob(0, None), TokenLogprob(ids[-1], -1.0)]
    assert with_special.piece(pair, pair)["text_offset"] == [0, 0, 1, 1 + len("<eos>")]  # x<eos>x: echo shows the prompt without <eos>


def test_sentencepiece_tokens() -> None:
    class Tokenizer:
        all_special_ids = [0]
        vocab = {0: "<s>", 1: "\u2581the", 2: "<0xE2>", 3: None}

        def convert_ids_to_tokens(self, token_id: int) -> str | None:
            return self.vocab[token_id]

        def decode(self, ids: list[int]) -> str:
            return {0: "<s>"}[ids[0]]

    tokens = TokenText(Tokenizer())
    assert [tokens.raw(i) for i in range(4)] == [b"<s>", b" the", b"\xe2", b""]


def test_offsets_of_an_echoed_sentencepiece_prompt() -> None:
    """Its text has no space where its first token has SentencePiece's mark; an answer alone keeps the space it begins with."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<s>", "\u2581the", "\u2581", "cat"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokens = TokenText(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"))
    for prompt, answer in [([0, 1, 3], [1]), ([2, 1, 3], [2, 1])]:
        entries = [[TokenLogprob(i, -1.0) for i in ids] for ids in (prompt, answer)]
        offsets = CompletionLogprobs(tokens, wants_top=False).piece(*entries)["text_offset"]
        answer_begins = len(tokens.decode(prompt))
        assert offsets[len(prompt)] == answer_begins and offsets[0] == 0
        answered = ["".join(map(tokens.text, answer[:n])) for n in range(len(answer))]
        assert offsets == [len(tokens.decode(prompt[:n])) for n in range(len(prompt))] + [answer_begins + len(text) for text in answered]


@pytest.mark.parametrize("value", ["-inf", "nan"])  # no chance at all; and an adapter whose weights overflow
def test_what_json_has_no_number_for(byte_level: Any, value: str) -> None:
    tokens = TokenText(byte_level)
    entry = TokenLogprob(1, float(value), [(2, float(value))])
    assert chat_logprobs([entry], tokens)[0]["logprob"] == -9999.0
    assert chat_logprobs([entry], tokens)[0]["top_logprobs"][0]["logprob"] == -9999.0
    assert CompletionLogprobs(tokens, True).piece([], [entry])["token_logprobs"] == [-9999.0]
