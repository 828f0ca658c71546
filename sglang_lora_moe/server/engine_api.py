"""What the server needs of an engine: the only thing it knows about one.

`engine/process.py` gives the real one, `tests/server/fake_engine.py` one without a model. Refusals are `RequestError`s,
raised by the awaited call, or by the first step of the iterator that `generate` returns.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

from sglang_lora_moe.config import Config
from sglang_lora_moe.engine.front import Chunk, GenerateRequest

__all__ = ["AsyncEngineAPI", "Chunk", "GenerateRequest"]


class AsyncEngineAPI(Protocol):
    """An engine seen from the event loop of the server."""

    @property
    def config(self) -> Config: ...

    @property
    def model_info(self) -> dict[str, Any]:
        """Facts of the loaded model: model_path, served_model_name, max_model_len, eos_token_ids, vocab_size, dtype, ..."""

    @property
    def tokenizer(self) -> Any:
        """The Hugging Face tokenizer, for chat templates and for the text of single tokens."""

    @property
    def healthy(self) -> bool:
        """The engine process lives and answers."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Chunk, None]:
        """Chunks of all `request.n` samples as they come; closing the iterator aborts the request."""

    async def load_adapter(self, name: str, path: str, pinned: bool = False, load_inplace: bool = False) -> dict[str, Any]:
        """`load_inplace`: other content replaces what the name stands for; requests that run keep what they began with."""

    async def unload_adapter(self, name: str) -> dict[str, Any]:
        """Returns when the last running request of the adapter has ended and its memory is free."""

    async def adapters(self) -> list[dict[str, Any]]:
        """One dict per loaded adapter: name, path, revision, rank, nbytes, pinned, resident, state, running."""

    async def flush_cache(self) -> dict[str, Any]: ...

    async def abort(self, rid: str) -> None:
        """Abort one request; "" aborts all."""

    async def stats(self) -> dict[str, Any]:
        """The books of scheduler, KV pool, adapter pool."""
