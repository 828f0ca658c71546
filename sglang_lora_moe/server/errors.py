"""Every error leaves the server as OpenAI's object {"error": {message, type, param, code}} with the right status.

`RequestError` carries its own status; what pydantic, routing or a bug raise is translated here. Nothing else in the server builds an error body.
"""

import logging
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.validate import shown

logger = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)
UNSUPPORTED, UNKNOWN = "unsupported_parameter", "unknown_parameter"  # types of our own that pydantic reports, and OpenAI's codes
MAX_BODY = 64 << 20  # bytes; the ids of a million tokens take 7 MB

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 405: "invalid_request_error", 429: "rate_limit_error"}
# Names that pydantic puts into an error's location for the member of a union it tried; they name no field of the request.
_UNION_MEMBERS = {"str", "int", "float", "bool", "dict", "constrained-str", "constrained-int", "function-after", "function-before"}


class BodyLimit:
    """Middleware: a body that is too large is read no further, and answered 413."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = MAX_BODY

        async def limited() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413)
            return message

        await self.app(scope, limited, send)


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def error_object(message: str, status: int = 400, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object, without the envelope."""
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = code or ("invalid_value" if status == 400 and param else None)
    return {"message": printable(message), "type": kind, "param": param and printable(param), "code": code}


def printable(text: str) -> str:
    """JSON allows lone surrogates in strings, UTF-8 does not: an error may quote what was sent."""
    return text.encode("utf-8", "backslashreplace").decode()


def error_response(error: RequestError, extra: dict[str, Any] | None = None) -> JSONResponse:
    """The response that says `error`; `extra` are further fields beside the error object (native endpoints have some)."""
    headers = {}
    if error.retry_after is not None or error.status == 503:
        headers["Retry-After"] = str(error.retry_after or 1)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = {"error": error_object(error.message, error.status, error.param, error.code)} | (extra or {})
    return JSONResponse(body, error.status, headers)


def validation_error(errors: list[Any]) -> RequestError:
    """Pydantic's complaints as one sentence that names the first field at fault."""
    first = errors[0]
    kind, message = first["type"], first["msg"]
    if kind == "json_invalid":
        return RequestError(f"the body is not valid JSON: {first.get('ctx', {}).get('error', message)}", code="invalid_json")
    location = [part for part in first["loc"] if part not in ("body", "query", "path")]
    names = [part for i, part in enumerate(map(str, location)) if i == 0 or not (part in _UNION_MEMBERS or "[" in part or part[:1].isupper())]
    if kind in (UNSUPPORTED, UNKNOWN):
        names.append(first["ctx"]["name"])
    field = ".".join(names)
    if not field:
        if kind in ("model_attributes_type", "dict_type", "missing"):
            return RequestError("the body must be a JSON object, sent with the header 'Content-Type: application/json'", code="invalid_json")
        return RequestError(message.removeprefix("Value error, "))
    if kind in (UNSUPPORTED, UNKNOWN):
        return RequestError(f"{field}: {message}", param=field, code=kind)
    if kind == "missing":
        return RequestError(f"the field {field!r} is required", param=field, code="missing_required_parameter")
    return RequestError(f"{field}: {message.removeprefix('Value error, ')} (got {shown(first.get('input'))})", param=field, code="invalid_value")


def validate(model: type[M], data: Any, where: str) -> M:
    """`data` as a `model`; errors are `RequestError`s that name the field below `where`."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise validation_error([first | {"loc": (*where.split("."), *first["loc"])} for first in error.errors()]) from error
    except RequestError as error:
        error.param = f"{where}.{error.param}"
        raise


def install_error_handlers(app: FastAPI) -> None:
    """Give `app` the translation of each kind of exception."""

    @app.exception_handler(RequestError)
    async def on_request_error(request: Request, error: Any) -> Response:
        return error_response(error)

    @app.exception_handler(RequestValidationError)
    async def on_validation(request: Request, error: Any) -> Response:
        return error_response(validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: Any) -> Response:
        path, status = request.url.path, error.status_code
        if status == 400:  # FastAPI's word for a body that it cannot read
            return error_response(RequestError("the body is not valid JSON in UTF-8", code="invalid_json"))
        messages = {
            404: f"there is no {path} here; see /docs for the endpoints of this server",
            405: f"{request.method} is not allowed for {path}",
            413: f"the body is larger than {MAX_BODY} bytes",
        }
        response = error_response(RequestError(messages.get(status, str(error.detail)), status))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(ClientGone)
    async def on_client_gone(request: Request, error: Any) -> Response:
        return Response(status_code=499)  # nobody reads it; the access log shows nginx's number for this

    @app.exception_handler(Exception)
    async def on_bug(request: Request, error: Any) -> Response:
        logger.error("%s %s failed: %r", request.method, request.url.path, error)  # the traceback follows from the HTTP server
        return error_response(RequestError(f"internal error: {type(error).__name__}", 500))
