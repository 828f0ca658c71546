"""What one HTTP request asks of the engine, and what has come back so far. No HTTP, no asyncio."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sglang_lora_moe.engine.front import Chunk, GenerateRequest


class ResponseFormat(ABC):
    """Writes one protocol: the whole answer, or events as chunks arrive. `samples[i][k]` is sample k of prompt i."""

    def __init__(self, num_prompts: int, n: int) -> None:
        self.n = n
        self.samples = [[Chunk("", k) for k in range(n)] for _ in range(num_prompts)]

    def add(self, prompt: int, chunk: Chunk) -> None:
        self.samples[prompt][chunk.index].add(chunk)

    @abstractmethod
    def whole(self) -> Any:
        """The answer of a request that does not stream, after the last `add`."""

    @abstractmethod
    def events(self, prompt: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        """Adds `chunk` and returns the events to send for it."""

    def last_events(self) -> Iterable[dict[str, Any]]:
        """Events after the last chunk."""
        return ()

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object. A prompt counts once however many samples it has; cached tokens are its first sample's."""
        prompt = sum(samples[0].prompt_tokens for samples in self.samples)
        completion = sum(sample.completion_tokens for samples in self.samples for sample in samples)
        cached = sum(samples[0].cached_tokens for samples in self.samples)
        return {
            "prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, "prompt_tokens_details": {"cached_tokens": cached},
        }  # fmt: skip


@dataclass(slots=True)
class Job:
    """One HTTP request: its prompts as engine requests, and how to answer.

    `rid` is the name a client may abort it by; `fields` maps the engine's names of fields to those of this protocol, for errors.
    """

    rid: str
    requests: list[GenerateRequest]
    format: ResponseFormat
    stream: bool
    fields: dict[str, str]
