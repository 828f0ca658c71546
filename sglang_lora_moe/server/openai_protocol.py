"""The request bodies of /v1/completions and /v1/chat/completions, with the extras of SGLang and vLLM.

What OpenAI defines but this server lacks is listed in `unsupported` and refused unless at its neutral value.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from sglang_lora_moe.core import RequestError
from sglang_lora_moe.engine.validate import check_ids, check_text, shown
from sglang_lora_moe.server import fields as f

Prompt = str | list[int]
_TOOLS = f"{f.NOT_IMPLEMENTED}; describe the tools in the messages instead"
_CONSTRAINED = f"constrained output {f.NOT_IMPLEMENTED}; only type 'text' is"
_COMMON_UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "response_format": (({"type": "text"},), _CONSTRAINED),
    "service_tier": (("auto", "default"), "there is one service tier here"),
    "store": ((False,), f"storing answers {f.NOT_IMPLEMENTED}"),
    "use_beam_search": ((False,), f"beam search {f.NOT_IMPLEMENTED}"),
    "length_penalty": ((1, 1.0), f"beam search {f.NOT_IMPLEMENTED}"),
    "spaces_between_special_tokens": ((True, False), "tokenizers that have a choice are not supported"),
    "best_of": ((1,), f"choosing among more samples {f.NOT_IMPLEMENTED}"),
    "priority": ((0,), f"a priority {f.NOT_IMPLEMENTED}"),
    **f.INSIDES,
    **dict.fromkeys(("regex", "ebnf", "guided_json", "guided_regex", "guided_choice", "structured_outputs"), ((), _CONSTRAINED)),
}


class StreamOptions(f.RequestModel):
    unsupported = {"include_obfuscation": ((False,), f"obfuscation of streams {f.NOT_IMPLEMENTED}")}
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's extra: with include_usage, in every event


class OpenAIRequest(f.SamplingFields):
    """What both endpoints share. `model` None = the base model."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: f.NewTokens | None = None
    # taken and without effect on the answer, as OpenAI defines them
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    # SGLang's and vLLM's extras
    min_tokens: f.NewTokens = 0
    include_stop_str_in_output: bool = False  # vLLM's name of no_stop_trim
    rid: f.RequestId | None = None

    @model_validator(mode="after")
    def _check_options(self) -> "OpenAIRequest":
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options: only allowed with stream=true", param="stream_options", code="invalid_value")
        self.no_stop_trim |= self.include_stop_str_in_output
        return self


class CompletionRequest(OpenAIRequest):
    """POST /v1/completions. `prompt`: a text, a list of token ids, or a list of either. `lora_path` names an adapter for all, or one (or null) per prompt."""

    unsupported = _COMMON_UNSUPPORTED | {"suffix": (("",), f"filling in before a suffix {f.NOT_IMPLEMENTED}")}
    prompt: Any
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=f.MAX_TOP_LOGPROBS)] | None = None
    lora_path: str | f.Listed[str | None] | None = None


class ChatMessage(f.RequestModel):
    """One message; what replies of this server hold (`refusal`: null, ...) may be sent back as it is."""

    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {
        "tool_calls": (([],), _TOOLS),
        **dict.fromkeys(("tool_call_id", "function_call"), ((), _TOOLS)),
        **dict.fromkeys(("refusal", "audio"), ((), f.NOT_IMPLEMENTED)),
        "annotations": (([],), f.NOT_IMPLEMENTED),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None  # a text, or a list of parts; `plain` checks it, with better sentences than a union gives
    name: str | None = None
    reasoning_content: str | None = None

    def plain(self, where: str) -> dict[str, str]:
        """The message as chat templates take it, its text parts joined by newlines."""
        param, content = f"{where}.content", self.content
        if content is None and self.role == "assistant":
            content = ""
        if isinstance(content, list):
            content = "\n".join(_part_text(part, f"{param}.{i}") for i, part in enumerate(content))
        if not isinstance(content, str):
            raise RequestError(f"{param}: must be a text or a list of content parts, got {shown(content)}", param=param, code="invalid_value")
        message = {"role": self.role, "content": check_text(content, param)}
        extras = {"name": self.name, "reasoning_content": self.reasoning_content}
        return message | {key: check_text(value, f"{where}.{key}") for key, value in extras.items() if value is not None}


def _part_text(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind is None:
        raise RequestError(f"{where}: a content part is an object with a type, got {shown(part)}", param=where, code="invalid_value")
    if kind != "text":
        raise RequestError(f"{where}: a content part of type {shown(kind)} {f.NOT_IMPLEMENTED}; only type 'text' is", param=where, code="unsupported_parameter")
    if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
        raise RequestError(f"{where}: a text part has the fields type and text, got {shown(part)}", param=where, code="invalid_value")
    return str(part["text"])


class ChatRequest(OpenAIRequest):
    """POST /v1/chat/completions."""

    unsupported = _COMMON_UNSUPPORTED | {
        **dict.fromkeys(("tools", "functions"), (([],), _TOOLS)),
        **dict.fromkeys(("tool_choice", "function_call"), (("none", "auto"), _TOOLS)),
        "parallel_tool_calls": ((True, False), _TOOLS),
        "modalities": ((["text"],), "this server answers in text only"),
        "audio": ((), "this server answers in text only"),
        **dict.fromkeys(("prediction", "web_search_options", "moderation"), ((), f.NOT_IMPLEMENTED)),
        **dict.fromkeys(("separate_reasoning", "stream_reasoning"), ((True, False), "reasoning is a part of the text")),
        "verbosity": (("medium",), f.NOT_IMPLEMENTED),
    }
    messages: Annotated[f.Listed[ChatMessage], Field(min_length=1)]
    max_completion_tokens: f.NewTokens | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=f.MAX_TOP_LOGPROBS)] | None = None
    reasoning_effort: str | None = None
    lora_path: str | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs: only allowed with logprobs=true", param="top_logprobs", code="invalid_value")
        if self.continue_final_message and self.add_generation_prompt and "add_generation_prompt" in self.model_fields_set:
            raise RequestError("continue_final_message: needs add_generation_prompt=false", param="continue_final_message", code="invalid_value")
        return self


def split_prompts(value: Any, param: str, most: int) -> list[Prompt]:
    """str | [int] | [str] | [[int]] as a list of at most `most` prompts; anything else, mixtures included, is refused."""
    if isinstance(value, str):
        return [check_text(value, param)]
    if not isinstance(value, list) or not value:
        raise RequestError(f"{param}: must be a text, a list of token ids, or a list of either that is not empty", param=param, code="invalid_value")
    if isinstance(value[0], str | list) and len(value) > most:  # refused before anything is made of them
        raise RequestError(f"{param}: {len(value)} prompts are more than --max-queued-requests lets wait", param=param, code="invalid_value")
    kinds = set(map(type, value))
    if kinds == {str}:
        return [check_text(item, param) for item in value]
    if kinds == {list}:
        return [check_ids(item, param) for item in value]
    if str in kinds or list in kinds:
        raise RequestError(f"{param}: all prompts of a batch must be texts, or all lists of token ids", param=param, code="invalid_value")
    return [check_ids(value, param)]
