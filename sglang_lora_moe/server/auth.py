"""API keys: one for users, one for those who change the server's state.

With `api_key` set every path but /health* needs it. With `admin_api_key` set the admin paths need that one, and it opens
everything else too; without it `api_key` guards the admin paths.
"""

import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.server.errors import error_response

ADMIN_PATHS = frozenset({"/load_lora_adapter", "/unload_lora_adapter", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/flush_cache", "/abort_request"})
OPEN_PATHS = frozenset({"/health", "/health_generate"})


class AuthMiddleware:
    """Refuses requests without the right `Authorization: Bearer KEY` before they reach a route."""

    def __init__(self, app: ASGIApp, api_key: str | None, admin_api_key: str | None) -> None:
        self.app, self.api_key, self.admin_api_key = app, api_key, admin_api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self.app(scope, receive, send)
        else:
            await error_response(error)(scope, receive, send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        path = scope["path"].rstrip("/\n") or "/"  # routes are patterns, whose end matches before a last newline too
        if path in OPEN_PATHS:
            return None
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        given = key.strip().encode("latin-1") if scheme.lower() == "bearer" else b""  # as headers are decoded
        is_admin = self.admin_api_key is not None and hmac.compare_digest(given, self.admin_api_key.encode())
        is_user = self.api_key is not None and hmac.compare_digest(given, self.api_key.encode())
        if is_admin:
            return None
        if path in ADMIN_PATHS and self.admin_api_key is not None:
            return RequestError(f"{path} needs the admin key: send 'Authorization: Bearer ADMIN_KEY'", 401, code="invalid_api_key")
        if is_user or self.api_key is None:
            return None
        what = "the API key is wrong" if given else "an API key is needed"
        return RequestError(f"{what}: send 'Authorization: Bearer KEY'", 401, code="invalid_api_key")
