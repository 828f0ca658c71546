"""Loading and unloading adapters while serving: SGLang's endpoints, and vLLM's names for them."""

from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.responses import JSONResponse, Response

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.validate import check_text
from sglang_lora_moe.server.errors import error_response
from sglang_lora_moe.server.fields import RequestModel
from sglang_lora_moe.server.model_names import check_adapter_name
from sglang_lora_moe.server.service import Service


class LoadAdapterRequest(RequestModel):
    """`pinned` keeps the adapter on the device; with `load_inplace` (vLLM's name) other content may replace what the name stands for."""

    unsupported = {"is_3d_lora_weight": ((True, False), "the file's layout is read from its tensors")}
    lora_name: str
    lora_path: str = Field(min_length=1, max_length=4096)
    pinned: bool = False
    load_inplace: bool = False


class UnloadAdapterRequest(RequestModel):
    unsupported = {"lora_int_id": ((), "adapters are known by their names")}
    lora_name: str = Field(max_length=256)


def adapter_routes(service: Service) -> APIRouter:
    """The routes, bound to one service."""
    router = APIRouter()

    @router.post("/load_lora_adapter")
    @router.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapterRequest) -> Response:
        try:
            name = check_adapter_name(body.lora_name, service.names.base)
            path = check_text(body.lora_path, "lora_path")
            return await _success(service, await service.engine.load_adapter(name, path, body.pinned, body.load_inplace))
        except RequestError as error:
            return await _failure(service, error)

    @router.post("/unload_lora_adapter")
    @router.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapterRequest) -> Response:
        try:
            result = await service.engine.unload_adapter(check_text(body.lora_name, "lora_name"))
            if body.lora_name not in await service.names.refresh():  # or else it was loaded anew while its last requests ran
                service.metrics.forget(body.lora_name)
            return await _success(service, result)
        except RequestError as error:
            return await _failure(service, error)

    return router


async def _success(service: Service, result: dict[str, Any]) -> Response:
    return JSONResponse(result | {"success": True, "error_message": "", "loaded_adapters": await _loaded(service)})


async def _failure(service: Service, error: RequestError) -> Response:
    """SGLang's fields and OpenAI's error object, so that clients of either kind find theirs."""
    error.param = {"name": "lora_name", "model": "lora_name", "path": "lora_path"}.get(error.param or "", error.param)
    error.code = error.code or "adapter_refused"
    return error_response(error, {"success": False, "error_message": error.message, "loaded_adapters": await _loaded(service)})


async def _loaded(service: Service) -> dict[str, str]:
    return {name: record["path"] for name, record in (await service.names.refresh()).items()}
