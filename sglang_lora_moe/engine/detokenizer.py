"""Text of a growing list of token ids, piece by piece, and stop strings in it. No torch.

Tokenizers give text only for whole lists: a token may be part of a character (byte-level), and the same token reads
differently at the beginning of a text (SentencePiece drops its space there). So a short window of recent tokens is decoded
again with every new token, and what is new at its end is the text so far unsaid.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_WINDOW = 24  # tokens after which the window moves on; long enough that moving costs little, short enough to be cheap
CONTEXT = _WINDOW // 4  # tokens before the new ones that decide how these read
_REPLACEMENT = "\ufffd"  # what decoders write for a character of which bytes are missing
_UNSURE = 3  # of these at the end of a text: a character has at most four bytes, and its missing ones may come


def make_decode(tokenizer: object, skip_special_tokens: bool = True) -> Decode:
    """A function from token ids to text. Fast tokenizers are asked directly, which is several times cheaper."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return lambda ids: backend.decode(ids, skip_special_tokens=skip_special_tokens)
    decode = tokenizer.decode  # type: ignore[attr-defined]
    return lambda ids: decode(ids, skip_special_tokens=skip_special_tokens)


def silent_ids(tokenizer: object) -> frozenset[int]:
    """Special tokens, of which nothing is seen in a text that leaves them out."""
    return frozenset(token_id for token_id, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)


class Detokenizer:
    """`push` takes new ids and returns new text; bytes of an unfinished character wait for more ids, unless these are the `last`.

    `before`: the last ids of what the new ones continue, at most `CONTEXT` of them. `silent`: ids that `decode` leaves out.
    """

    def __init__(self, decode: Decode, before: Sequence[int] = (), silent: frozenset[int] = frozenset()) -> None:
        self._decode, self._silent = decode, silent
        self._ids = [token_id for token_id in before if token_id not in silent]
        self._start = 0  # first token of the window
        self._said: int | None = None  # characters of the window's text that have been returned, or are of `before`

    def push(self, ids: list[int], last: bool = False) -> str:
        if self._said is None:
            self._said = _certain(self._decode(self._ids)) if self._ids else 0
        self._ids += [token_id for token_id in ids if token_id not in self._silent]
        text = self._decode(self._ids[self._start :])
        end = len(text) if last else _certain(text)
        delta, self._said = text[self._said : end], end if end == len(text) else max(self._said, end)
        if len(self._ids) - self._start > _WINDOW:
            self._move_window(text, len(text) - self._said)
        return delta

    def _move_window(self, text: str, unsaid: int) -> None:
        """Let the window begin later, if its text is then the end of the present text: then nothing can be told apart."""
        start = len(self._ids) - CONTEXT
        tail = self._decode(self._ids[start:])
        if len(tail) > unsaid and text.endswith(tail):
            self._start, self._said = start, len(tail) - unsaid


def _certain(text: str) -> int:
    """Characters of `text` that no later token changes."""
    return len(text[:-_UNSURE]) + len(text[-_UNSURE:].rstrip(_REPLACEMENT))


class StopStrings:
    """Looks for stop strings in text that comes in pieces; holds back what may be the beginning of one."""

    def __init__(self, stops: list[str]) -> None:
        self._stops = stops
        self._held = ""  # what a stop string may begin with
        self._said = 0  # characters of it that have been said all the same

    def push(self, text: str, may_end: bool = True) -> tuple[str, str | None]:
        """(text that may be said, the stop string found). After a match nothing more may be pushed; what is unsaid of it is trimmed.

        Without `may_end` no stop string ends with this text, but one that ends later may begin in it.
        """
        if not self._stops:
            return text, None
        text, said = self._held + text, self._said
        ends = [(text.find(stop, max(0, said - len(stop) + 1)), -len(stop), stop) for stop in self._stops] if may_end else []
        found = [end for end in ends if end[0] >= 0]
        if found:
            position, _, stop = min(found)  # the earliest; of those that begin there, the longest
            return text[said : max(said, position)], stop
        longest = max(map(len, self._stops)) - 1
        begins = (i for i in range(max(0, len(text) - longest), len(text)) if any(stop.startswith(text[i:]) for stop in self._stops))
        keep = next(begins, len(text))
        end = max(said, keep) if may_end else len(text)
        self._held, self._said = text[keep:], max(0, end - keep)
        return text[said:end], None

    def finish(self) -> str:
        """The text that was held back: no stop string came of it."""
        return self._held[self._said :]
