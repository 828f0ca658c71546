"""The HTTP application over one engine."""

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from sglang_lora_moe import __version__
from sglang_lora_moe.engine.process import AsyncEngine
from sglang_lora_moe.server.adapters import adapter_routes
from sglang_lora_moe.server.auth import AuthMiddleware
from sglang_lora_moe.server.control import control_routes
from sglang_lora_moe.server.errors import BodyLimit, install_error_handlers
from sglang_lora_moe.server.native import native_routes
from sglang_lora_moe.server.openai_routes import openai_routes
from sglang_lora_moe.server.service import Service


def create_app(engine: AsyncEngine) -> FastAPI:
    """An application that serves `engine`. Apps share nothing, so a test may make as many as it likes."""
    app = FastAPI(title="sglang_lora_moe", version=__version__)
    service = Service(engine)
    for routes in (openai_routes, native_routes, adapter_routes, control_routes):
        app.include_router(routes(service))
    install_error_handlers(app)
    app.add_middleware(BodyLimit)
    config = engine.config
    if config.api_key is not None or config.admin_api_key is not None:
        app.add_middleware(AuthMiddleware, api_key=config.api_key, admin_api_key=config.admin_api_key)
    if config.allowed_origins:  # outside the check of keys, which preflight requests do not carry
        app.add_middleware(CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"])
    return app
