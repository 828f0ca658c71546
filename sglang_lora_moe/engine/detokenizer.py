"""Text of a growing list of token ids, piece by piece, and stop strings in it. No torch.

Tokenizers give text only for whole lists: a token may be part of a character (byte-level), and the same token reads
differently at the beginning of a text (SentencePiece drops its space there). So a short window of recent tokens is decoded
again with every new token, and what is new at its end is the text so far unsaid.
"""

from collections.abc import Callable

Decode = Callable[[list[int]], str]

_WINDOW = 24  # tokens after which the window moves on; long enough that moving costs little, short enough to be cheap
_REPLACEMENT = "\ufffd"  # what decoders write for a character of which bytes are missing


def make_decode(tokenizer: object, skip_special_tokens: bool = True) -> Decode:
    """A function from token ids to text. Fast tokenizers are asked directly, which is several times cheaper."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    decode = tokenizer.decode  # type: ignore[attr-defined]
    return lambda ids: decode(ids, skip_special_tokens=skip_special_tokens)


class Detokenizer:
    """`push` takes new ids and returns new text; bytes of an unfinished character wait for more ids, unless these are the `last`."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token of the window
        self._said = 0  # characters of the window's text that have been returned

    def push(self, ids: list[int], last: bool = False) -> str:
        self._ids += ids
        text = self._decode(self._ids[self._start :])
        if text.endswith(_REPLACEMENT) and not last:
            # The character may be completed by later tokens. What stands before it is certain.
            stable = len(text.rstrip(_REPLACEMENT))
            delta = text[self._said : stable]
            self._said = max(self._said, stable)
            return delta
        delta, self._said = text[self._said :], len(text)
        if len(self._ids) - self._start > _WINDOW:
            self._move_window(text)
        return delta

    def _move_window(self, text: str) -> None:
        """Let the window begin later, if its text is then the end of the present text: then nothing can be told apart."""
        start = len(self._ids) - _WINDOW // 4
        tail = self._decode(self._ids[start:])
        if tail and text.endswith(tail):
            self._start, self._said = start, len(tail)


class StopStrings:
    """Looks for stop strings in text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may be said, the stop string found). After a match nothing more may be pushed; its text is trimmed."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = [(text.find(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if found:
            position, _, stop = min(found)  # the earliest; of those that begin there, the longest
            self._held = ""
            return text[:position], stop
        keep = self._possible_beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def finish(self) -> str:
        """The text that was held back: no stop string came of it."""
        text, self._held = self._held, ""
        return text

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
