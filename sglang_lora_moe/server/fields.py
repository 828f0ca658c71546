"""Building blocks of request types: strict fields, and refusal of what is not implemented.

A field of OpenAI's (or SGLang's) API that this server does not implement is accepted only at a value that changes nothing;
otherwise a sentence says so. A field nobody defined is refused by name. So no parameter is taken and ignored.
"""

from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from sglang_lora_moe.core import SamplingParams
from sglang_lora_moe.engine.validate import MAX_SAMPLES, MAX_STOPS, shown
from sglang_lora_moe.server.errors import UNKNOWN, UNSUPPORTED, printable

NOT_IMPLEMENTED = "is not implemented by this server"
MAX_TOP_LOGPROBS = 20
# What SGLang's own benchmark and gateway send with every request
_INSIDES = ("hidden_states", "routed_experts", "entropy", "bytes")
INSIDES = {f"return_{what}": ((False,), f"returning {what.replace('_', ' ')} {NOT_IMPLEMENTED}") for what in _INSIDES}
T = TypeVar("T")
Listed = Annotated[list[T], Field(fail_fast=True)]  # a list that is read no further than its first bad element


class RequestModel(BaseModel):
    """A request body. `null` means "not given", as in OpenAI's API. The first unknown field is an error, and the first bad element of a list.

    `unsupported` maps a field to (values that are accepted and dropped, why others are refused).
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    unsupported: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.unsupported:
                neutral, reason = cls.unsupported[name]
                if value is not None and not any(value == other and type(value) is type(other) for other in neutral):
                    raise PydanticCustomError(UNSUPPORTED, "{reason}", {"name": name, "reason": reason})
            elif name not in cls.model_fields:
                raise PydanticCustomError(UNKNOWN, "unknown field", {"name": printable(name)})
            elif value is not None or cls.model_fields[name].is_required():
                kept[name] = value
        return kept


def _stop_list(value: Any) -> Any:
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list) and any(entry == "" for entry in value):
        raise ValueError("a stop string must not be empty")
    return value


def _bias(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if len(value) > 1024:  # not left to pydantic, which would first collect what is wrong with each
        raise ValueError(f"at most 1024 biases are allowed, not {len(value)}")
    biases = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit()):
            raise ValueError(f"keys must be token ids, got {shown(key)}")
        biases[int(key)] = bias
    return biases


_OF_TEXT = {"stop", "n", "skip_special_tokens", "no_stop_trim"}
Penalty = Annotated[float, Field(ge=-2, le=2)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
RequestId = Annotated[str, Field(pattern=r"^[!-~]{1,256}$")]
NewTokens = Annotated[int, Field(ge=0, lt=2**31)]


class SamplingFields(RequestModel):
    """What OpenAI's bodies, with the extras of SGLang and vLLM, and SGLang's `sampling_params` have in common."""

    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] = -1  # -1 and 0 = all
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    seed: Seed | None = None
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_bias)] = {}
    stop: Annotated[Listed[Annotated[str, Field(max_length=1024)]], BeforeValidator(_stop_list), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[Listed[Annotated[int, Field(ge=0)]], Field(max_length=1024)] = []
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = 1
    skip_special_tokens: bool = True
    no_stop_trim: bool = False

    def text_options(self) -> dict[str, Any]:
        """The fields that are the front's, as `GenerateRequest` has them."""
        return self.model_dump(include=_OF_TEXT)

    def engine_params(self, max_new_tokens: int, min_new_tokens: int) -> SamplingParams:
        """The others, as the engine takes them."""
        values = self.model_dump(include=set(SamplingFields.model_fields) - _OF_TEXT)
        return SamplingParams(max_new_tokens, min_new_tokens, **values | {"top_k": self.top_k or -1})
