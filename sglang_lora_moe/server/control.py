"""Health, facts, books and controls of the server."""

import asyncio
import dataclasses
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from sglang_lora_moe import __version__
from sglang_lora_moe.core import RequestError, SamplingParams
from sglang_lora_moe.engine.front import GenerateRequest
from sglang_lora_moe.server.fields import RequestModel
from sglang_lora_moe.server.service import Service, new_id

HEALTH_SECONDS = 20.0
_SECRETS = ("api_key", "admin_api_key")  # of which only is said whether there is one


class AbortRequest(RequestModel):
    """`rid` as given in the request, or the id of an OpenAI answer."""

    rid: str = ""
    abort_all: bool = False


def control_routes(service: Service) -> APIRouter:
    """The routes, bound to one service."""
    router = APIRouter()
    engine = service.engine

    @router.get("/health")
    async def health() -> dict[str, str]:
        if not engine.healthy:
            raise RequestError("the engine does not run", 503, code="unhealthy")
        return {"status": "ok"}

    @router.get("/health_generate")
    async def health_generate() -> dict[str, str]:
        try:
            await asyncio.wait_for(_generates(service), HEALTH_SECONDS)
        except asyncio.TimeoutError as error:
            raise RequestError(f"no token within {HEALTH_SECONDS:g} seconds", 503, code="unhealthy") from error
        return await health()

    @router.get("/model_info")
    @router.get("/get_model_info")
    async def model_info() -> dict[str, Any]:
        return {"tokenizer_path": engine.config.tokenizer_path or engine.config.model_path, "is_generation": True} | engine.model_info

    @router.get("/server_info")
    @router.get("/get_server_info")
    async def server_info() -> dict[str, Any]:
        adapters, config = await service.names.refresh(), dataclasses.asdict(engine.config)
        config |= {name: "***" for name in _SECRETS if config[name] is not None}
        return {"version": __version__, "config": config, "stats": await engine.stats(), "adapters": list(adapters.values())}

    @router.get("/flush_cache", include_in_schema=False)
    @router.post("/flush_cache")
    async def flush_cache() -> dict[str, Any]:
        return {"success": True} | await engine.flush_cache()

    @router.post("/abort_request")
    async def abort_request(body: AbortRequest) -> dict[str, Any]:
        if not body.rid and not body.abort_all:
            raise RequestError("rid: the id of a request is needed, or abort_all=true", param="rid", code="invalid_value")
        await service.abort("" if body.abort_all else body.rid)
        return {"success": True}

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.render(await engine.stats(), await service.names.refresh()), media_type=CONTENT_TYPE_LATEST)

    return router


async def _generates(service: Service) -> None:
    """Wait until a token comes: of a request made for this or, as that may have to wait for its turn or find the queue full, of any other."""
    engine, before = service.engine, service.engine.num_outputs
    ids = engine.model_info["eos_token_ids"][:1] or [0]
    request = GenerateRequest(input_ids=list(ids), sampling=SamplingParams(max_new_tokens=1, temperature=0.0, ignore_eos=True), rid=f"health-{new_id()}")
    chunks = engine.generate(request)
    own = asyncio.ensure_future(anext(chunks))
    try:
        while engine.healthy and engine.num_outputs == before:
            await asyncio.sleep(0.01)
    finally:
        own.cancel()
        await asyncio.gather(own, return_exceptions=True)
        await chunks.aclose()
