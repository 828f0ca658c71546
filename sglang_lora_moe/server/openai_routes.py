"""OpenAI's endpoints: chat, completions, models."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sglang_lora_moe.core import LogprobOptions
from sglang_lora_moe.engine.front import GenerateRequest
from sglang_lora_moe.engine.validate import same_value, spread
from sglang_lora_moe.server.job import Job
from sglang_lora_moe.server.openai_format import ChatFormat, CompletionFormat
from sglang_lora_moe.server.openai_protocol import ChatRequest, CompletionRequest, split_prompts
from sglang_lora_moe.server.service import Service, new_id

COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for completions; a chat may go on until the context is full
_SAMPLING_FIELDS = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}
_COMPLETION_FIELDS = _SAMPLING_FIELDS | {"input_ids": "prompt"}
_CHAT_FIELDS = _SAMPLING_FIELDS | {"input_ids": "messages", "prompt": "messages"}


def openai_routes(service: Service) -> APIRouter:
    """The routes, bound to one service."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.respond(request, await chat_job(service, body))

    @router.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.respond(request, await completion_job(service, body))

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": await service.names.cards()}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        return await service.names.card(model)

    return router


async def chat_job(service: Service, body: ChatRequest) -> Job:
    """One engine request of `n` samples over the rendered conversation; RequestError for an unknown model or a template that refuses."""
    adapter = await service.names.choose(body.model, body.lora_path)
    limit = same_value(max_tokens=body.max_tokens, max_completion_tokens=body.max_completion_tokens)
    if limit is None:
        limit = service.engine.model_info["max_model_len"]  # less what the prompt takes, which the engine sees to
    rid = body.rid or f"chatcmpl-{new_id()}"
    generate = GenerateRequest(
        prompt=service.chat.render(body), add_special_tokens=False, sampling=body.engine_params(limit, body.min_tokens), **body.text_options(), adapter=adapter,
        logprobs=LogprobOptions(top=body.top_logprobs or 0) if body.logprobs else None, stream=body.stream, rid=rid,
    )  # fmt: skip
    return Job(rid, [generate], ChatFormat(body, rid, service.names.base, service.tokens), body.stream, _CHAT_FIELDS)


async def completion_job(service: Service, body: CompletionRequest) -> Job:
    """One engine request of `n` samples per prompt; RequestError for an unknown model or prompts that are neither texts nor token ids."""
    prompts = split_prompts(body.prompt, "prompt", service.max_samples)
    paths = spread(body.lora_path, len(prompts), "lora_path")
    rid = body.rid or f"cmpl-{new_id()}"
    limit = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    requests = [
        GenerateRequest(
            prompt=prompt if isinstance(prompt, str) else None, input_ids=None if isinstance(prompt, str) else prompt,
            sampling=body.engine_params(limit, body.min_tokens), **body.text_options(), adapter=await service.names.choose(body.model, paths[i]),
            logprobs=None if body.logprobs is None else LogprobOptions(body.logprobs, 0 if body.echo else None), stream=body.stream,
            rid=rid if len(prompts) == 1 else f"{rid}-{i}",
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    return Job(rid, requests, CompletionFormat(body, rid, service.names.base, service.tokens, prompts), body.stream, _COMPLETION_FIELDS)
