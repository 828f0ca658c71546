"""SGLang's native endpoint /generate: its request, its response."""

import time
from collections.abc import Iterable
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from sglang_lora_moe.core import LogprobOptions, RequestError
from sglang_lora_moe.engine.front import Chunk, GenerateRequest, Triple, native_result
from sglang_lora_moe.engine.validate import refuse, same_value, spread
from sglang_lora_moe.server import fields as f
from sglang_lora_moe.server.errors import validate
from sglang_lora_moe.server.job import Job, ResponseFormat
from sglang_lora_moe.server.logprobs import TokenText, finite
from sglang_lora_moe.server.openai_protocol import Prompt, split_prompts
from sglang_lora_moe.server.service import Service, new_id


class NativeSampling(f.SamplingFields):
    """`sampling_params` of /generate, with SGLang's defaults."""

    unsupported = {
        **dict.fromkeys(("json_schema", "regex", "ebnf", "structural_tag"), ((), f"constrained output {f.NOT_IMPLEMENTED}")),
        "stop_regex": (([],), f"stopping at a regular expression {f.NOT_IMPLEMENTED}"),
        "custom_params": (({},), f"custom logit processors {f.NOT_IMPLEMENTED}"),
        "spaces_between_special_tokens": ((True, False), "tokenizers that have a choice are not supported"),
    }
    max_new_tokens: f.NewTokens = 128
    min_new_tokens: f.NewTokens = 0
    sampling_seed: f.Seed | None = None  # SGLang's name of `seed`

    @model_validator(mode="after")
    def _check_seeds(self) -> "NativeSampling":
        self.seed = same_value(seed=self.seed, sampling_seed=self.sampling_seed)
        return self


class NativeRequest(f.RequestModel):
    """POST /generate. Every field but `stream` may be one value for all prompts or a list of one per prompt."""

    unsupported = {
        "input_embeds": ((), f"input embeddings {f.NOT_IMPLEMENTED}"),
        **{f"{kind}_data": ((), f"{kind} input {f.NOT_IMPLEMENTED}") for kind in ("image", "audio", "video")},
        "token_ids_logprob": ((), f"log-probabilities of chosen token ids {f.NOT_IMPLEMENTED}; use top_logprobs_num"),
        **f.INSIDES,
        "priority": ((0,), f"a priority {f.NOT_IMPLEMENTED}"),
        **dict.fromkeys(("background", "no_logs"), ((False,), f.NOT_IMPLEMENTED)),
        "session_params": ((), f"sessions {f.NOT_IMPLEMENTED}; the prefix cache shares equal prefixes anyway"),
        "log_metrics": ((True,), "metrics are always counted"),
    }
    text: Any = None
    input_ids: Any = None
    sampling_params: Any = None
    lora_path: str | f.Listed[str | None] | None = None
    return_logprob: bool | f.Listed[bool] = False
    logprob_start_len: Annotated[int, Field(ge=-1)] | f.Listed[Annotated[int, Field(ge=-1)]] = -1  # -1 = output tokens only
    top_logprobs_num: Annotated[int, Field(ge=0, le=f.MAX_TOP_LOGPROBS)] | f.Listed[Annotated[int, Field(ge=0, le=f.MAX_TOP_LOGPROBS)]] = 0
    return_text_in_logprobs: bool = False
    stream: bool = False
    rid: f.RequestId | f.Listed[f.RequestId] | None = None

    def prompts(self, most: int) -> tuple[list[Prompt], bool]:
        """The prompts, at most `most`, and whether they came as a batch."""
        if (self.text is None) == (self.input_ids is None):
            raise RequestError("text: exactly one of text and input_ids must be given", param="text", code="invalid_value")
        param = "text" if self.input_ids is None else "input_ids"
        value = self.text if self.input_ids is None else self.input_ids
        prompts = split_prompts(value, param, most)
        if any(isinstance(prompt, str) != (param == "text") for prompt in prompts):
            raise RequestError(f"{param}: must hold {'texts' if param == 'text' else 'token ids'} only", param=param, code="invalid_value")
        return prompts, isinstance(value, list) and (param == "text" or isinstance(value[0], list))

    def sampling(self, count: int) -> list[NativeSampling]:
        """The sampling parameters of each prompt; all ask for the same `n`."""
        given = self.sampling_params if self.sampling_params is not None else {}
        if isinstance(given, list):
            parsed = [validate(NativeSampling, one, f"sampling_params.{i}") for i, one in enumerate(spread(given, count, "sampling_params"))]
        else:
            parsed = [validate(NativeSampling, given, "sampling_params")] * count
        if len({one.n for one in parsed}) > 1:
            raise RequestError("sampling_params: n must be the same for all prompts of a batch", param="sampling_params", code="invalid_value")
        return parsed


class NativeFormat(ResponseFormat):
    """SGLang's objects {text, output_ids, meta_info}: one, or a list for a batch or n > 1. Events hold all text so far."""

    def __init__(self, requests: list[GenerateRequest], is_batch: bool, tokens: TokenText, with_text: bool) -> None:
        super().__init__(len(requests), requests[0].n)
        self._requests, self._tokens, self._with_text = requests, tokens, with_text
        self._is_list = is_batch or self.n > 1
        self._begin = time.perf_counter()

    def whole(self) -> Any:
        outputs = [self._output(i, k) for i in range(len(self._requests)) for k in range(self.n)]
        return outputs if self._is_list else outputs[0]

    def events(self, prompt: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        self.add(prompt, chunk)
        if chunk.token_ids or chunk.finish_reason is not None:
            index = {"index": prompt * self.n + chunk.index} if self._is_list else {}
            yield self._output(prompt, chunk.index) | index

    def _output(self, prompt: int, k: int) -> dict[str, Any]:
        return native_result(self._requests[prompt], self.samples[prompt][k], time.perf_counter() - self._begin, self._triple)

    def _triple(self, logprob: float | None, token_id: int) -> Triple:
        return finite(logprob), token_id, self._tokens.text(token_id) if self._with_text else None


async def native_job(service: Service, body: NativeRequest) -> Job:
    """One engine request of `n` samples per prompt."""
    prompts, is_batch = body.prompts(service.max_samples)
    count = len(prompts)
    sampling = body.sampling(count)
    wants, starts, tops = (spread(getattr(body, name), count, name) for name in ("return_logprob", "logprob_start_len", "top_logprobs_num"))
    if any(tops) and not any(wants):
        raise refuse("top_logprobs_num", "0 without return_logprob=true", body.top_logprobs_num)
    paths = spread(body.lora_path, count, "lora_path")
    base_rid = body.rid if isinstance(body.rid, str) else new_id()
    rids = spread(body.rid, count, "rid") if isinstance(body.rid, list) else [base_rid if count == 1 else f"{base_rid}-{i}" for i in range(count)]
    requests = [
        GenerateRequest(
            prompt=prompt if isinstance(prompt, str) else None,
            input_ids=None if isinstance(prompt, str) else prompt,
            sampling=sampling[i].engine_params(sampling[i].max_new_tokens, sampling[i].min_new_tokens),
            **sampling[i].text_options(),
            adapter=await service.names.resolve(paths[i], "lora_path"),
            logprobs=LogprobOptions(tops[i], starts[i] if starts[i] >= 0 else None) if wants[i] else None,
            stream=body.stream,
            rid=rids[i],
        )
        for i, prompt in enumerate(prompts)
    ]
    names = {name: f"sampling_params.{name}" for name in NativeSampling.model_fields}
    names |= {"prompt": "text", "input_ids": "text" if body.input_ids is None else "input_ids", "model": "lora_path"}
    answer = NativeFormat(requests, is_batch, service.tokens, body.return_text_in_logprobs)
    return Job(base_rid, requests, answer, body.stream, names)


def native_routes(service: Service) -> APIRouter:
    """The route, bound to one service."""
    router = APIRouter()

    @router.put("/generate", include_in_schema=False)
    @router.post("/generate")
    async def generate(body: NativeRequest, request: Request) -> Response:
        return await service.respond(request, await native_job(service, body))

    return router
