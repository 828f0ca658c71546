"""What `model` (or `lora_path`) of a request means: the base model, or one adapter on it.

Names are the served name of the base, the name of an adapter, or "base:adapter" (an empty adapter is the base). The engine owns the adapters; this keeps the
last list it gave, so that the usual request needs no question to the engine. A name that has gone meanwhile is refused by the engine itself.
"""

import time
from typing import Any

from sglang_lora_moe import __name__ as OWNER
from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.process import AsyncEngine
from sglang_lora_moe.engine.validate import shown


class ModelNames:
    """Names of one engine."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._created = int(time.time())
        self.base: str = engine.model_info["served_model_name"]
        self.adapters: dict[str, dict[str, Any]] = {}

    async def refresh(self) -> dict[str, dict[str, Any]]:
        """Ask the engine for its adapters, by name."""
        self.adapters = {record["name"]: record for record in await self._engine.adapters()}
        return self.adapters

    async def resolve(self, model: str | None, param: str = "model") -> str | None:
        """The adapter that `model` names, None for the base model; RequestError 404 with the loaded names otherwise."""
        if model is None or model in (self.base, f"{self.base}:"):
            return None
        name = model.removeprefix(f"{self.base}:")
        if name in self.adapters or name in await self.refresh():
            return name
        raise self.not_found(model, param)

    async def choose(self, model: str | None, lora_path: str | None) -> str | None:
        """The adapter of an OpenAI request, which may name one in `model` and, as SGLang allows, in `lora_path`."""
        adapter = await self.resolve(model)
        if lora_path is None:
            return adapter
        other = await self.resolve(lora_path, "lora_path")
        if adapter is not None and other != adapter:
            raise RequestError(f"lora_path: names {lora_path!r}, but model already names the adapter {adapter!r}", param="lora_path", code="invalid_value")
        return other

    def not_found(self, model: str, param: str) -> RequestError:
        hint = "" if self._engine.config.enable_lora else " (adapters need --enable-lora or --lora-paths at the start of the server)"
        return RequestError(f"{shown(model)} is not loaded; loaded are: {', '.join([self.base, *sorted(self.adapters)])}{hint}", 404, param, "model_not_found")

    async def cards(self) -> list[dict[str, Any]]:
        """The model cards of /v1/models: base first, then adapters by name."""
        adapters, info = await self.refresh(), self._engine.model_info
        models = [(self.base, str(info["model_path"]), None), *((name, adapters[name]["path"], self.base) for name in sorted(adapters))]
        common = {"object": "model", "created": self._created, "owned_by": OWNER, "max_model_len": info["max_model_len"]}
        return [{"id": name, "root": root, "parent": parent} | common for name, root, parent in models]

    async def card(self, model: str) -> dict[str, Any]:
        name = await self.resolve(model) or self.base
        for card in await self.cards():
            if card["id"] == name:
                return card
        raise self.not_found(model, "model")


def check_adapter_name(name: str, base: str) -> str:
    """`name` if requests can address it; RequestError 400 otherwise."""
    reason = None
    if not name or name != name.strip() or len(name) > 256 or not name.isprintable():
        reason = "must have 1 to 256 printable characters without spaces around them"
    elif ":" in name:
        reason = "must not contain ':', which separates base and adapter in a model name"
    elif name == base:
        reason = "is the name of the base model"
    if reason:
        raise RequestError(f"lora_name: {shown(name)} {reason}", param="lora_name", code="invalid_value")
    return name
