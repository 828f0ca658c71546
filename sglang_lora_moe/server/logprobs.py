"""Text and bytes of single tokens, and OpenAI's two shapes of log-probabilities.

A token of a byte-level vocabulary may be a part of a character: its bytes are exact, its text shows U+FFFD for the part.
"""

import codecs
import re
from collections.abc import Sequence
from typing import Any

from sglang_lora_moe.core import TokenLogprob

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_FLOOR = -9999.0  # what OpenAI reports for a probability of zero; JSON has no -inf
# Byte-level BPE writes each byte as one printable character: printable Latin-1 as itself, the rest from U+0100 on
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(0x100 + i): byte for i, byte in enumerate(sorted({*range(256)} - _PRINTABLE))}


class TokenText:
    """Looks up tokens of one tokenizer, each once. Without a tokenizer a token reads "token_id:17"."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids if tokenizer is not None else ())
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._is_byte_level = "ByteLevel" in repr(getattr(backend, "decoder", None))
        self._raw: dict[int, bytes] = {}

    def text(self, token_id: int) -> str:
        return self.raw(token_id).decode("utf-8", "replace")

    def raw(self, token_id: int) -> bytes:
        if token_id not in self._raw:
            self._raw[token_id] = self._bytes_of(token_id)
        return self._raw[token_id]

    def opening(self, token_id: int) -> bytes:
        """As `raw`, for the token that a text begins with: of SentencePiece's marks decode() leaves out the first."""
        raw = self.raw(token_id)
        return raw[1:] if raw.startswith(b" ") and not self.decode([token_id]).startswith(" ") else raw

    def decode(self, ids: list[int]) -> str:
        """The text of a prompt that was given as ids."""
        return "" if self._tokenizer is None else str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _bytes_of(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b"token_id:%d" % token_id
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:  # an id of the padded part of the vocabulary
            return b""
        if token_id not in self.special:
            if self._is_byte_level and all(character in _BYTE_OF for character in piece):
                return bytes(_BYTE_OF[character] for character in piece)
            if match := _BYTE_TOKEN.fullmatch(piece):
                return bytes([int(match[1], 16)])
            if piece.startswith("\u2581"):  # SentencePiece's mark of a space, which decode() strips from a lone token
                return piece.replace("\u2581", " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()


def finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(_FLOOR, logprob)  # in this order the floor too where weights overflowed and it is NaN


def chat_logprobs(entries: Sequence[TokenLogprob], tokens: TokenText) -> list[dict[str, Any]]:
    """The `content` list of a chat choice's logprobs."""

    def item(token_id: int, logprob: float | None) -> dict[str, Any]:
        return {"token": tokens.text(token_id), "logprob": finite(logprob), "bytes": list(tokens.raw(token_id))}

    return [item(e.token_id, e.logprob) | {"top_logprobs": [item(i, value) for i, value in e.top]} for e in entries]


class CompletionLogprobs:
    """Builds the logprobs of one completion choice piece by piece, tracking where each token begins in the choice's text."""

    def __init__(self, tokens: TokenText, wants_top: bool, skips_special: bool = True) -> None:
        self._tokens, self._wants_top, self._skips_special = tokens, wants_top, skips_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset, self._begun = 0, False

    def piece(self, prompt: Sequence[TokenLogprob], answer: Sequence[TokenLogprob]) -> dict[str, Any]:
        """tokens, token_logprobs, top_logprobs and text_offset of the next tokens; an echoed prompt is shown without special tokens."""
        offsets, entries = [], [*prompt, *answer]
        for i, entry in enumerate(entries):
            offsets.append(self._offset)
            if not ((self._skips_special or i < len(prompt)) and entry.token_id in self._tokens.special):
                raw = self._tokens.raw if self._begun or i >= len(prompt) else self._tokens.opening
                self._offset += len(self._decoder.decode(raw(entry.token_id)))
                self._begun = True
        return {
            "tokens": [self._tokens.text(e.token_id) for e in entries], "token_logprobs": [finite(e.logprob) for e in entries],
            "top_logprobs": [self._top(e) for e in entries] if self._wants_top else None, "text_offset": offsets,
        }  # fmt: skip

    def _top(self, entry: TokenLogprob) -> dict[str, float | None] | None:
        """Alternatives by text, the chosen token always among them (OpenAI gives it beside the best `logprobs`)."""
        if entry.logprob is None:
            return None
        best: dict[str, float | None] = {}
        for token_id, value in [*entry.top, (entry.token_id, entry.logprob)]:
            best.setdefault(self._tokens.text(token_id), finite(value))  # parts of characters share a text: keep the likeliest
        return best
