"""OpenAI's answers: completions and chat completions, whole and as stream events."""

import time
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from sglang_lora_moe.core import TokenLogprob
from sglang_lora_moe.engine.front import Chunk
from sglang_lora_moe.server.job import ResponseFormat
from sglang_lora_moe.server.logprobs import CompletionLogprobs, TokenText, chat_logprobs
from sglang_lora_moe.server.openai_protocol import ChatRequest, CompletionRequest, OpenAIRequest, Prompt


class OpenAIFormat(ResponseFormat):
    """What both endpoints share: the envelope and the usage event."""

    whole_object = ""
    event_object = ""

    def __init__(self, num_prompts: int, body: OpenAIRequest, rid: str, base: str, tokens: TokenText) -> None:
        super().__init__(num_prompts, body.n)
        self._head = {"id": rid, "created": int(time.time()), "model": body.model or base}
        self._tokens = tokens
        options = body.stream_options
        self._include_usage = options is not None and options.include_usage
        self._usage_in_all = options is not None and options.continuous_usage_stats

    def whole(self) -> dict[str, Any]:
        choices = [self.choice(i * self.n + k, sample) for i, samples in enumerate(self.samples) for k, sample in enumerate(samples)]
        return self._head | {"object": self.whole_object, "choices": choices, "usage": self.usage()}

    def last_events(self) -> Iterable[dict[str, Any]]:
        if self._include_usage:
            yield self._head | {"object": self.event_object, "choices": [], "usage": self.usage()}

    def event(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": self.usage() if self._usage_in_all else None} if self._include_usage else {}
        return self._head | {"object": self.event_object, "choices": [choice]} | usage

    @abstractmethod
    def choice(self, index: int, sample: Chunk) -> dict[str, Any]:
        """One entry of `choices`, of which `sample` is all, or what is new."""


class ChatFormat(OpenAIFormat):
    """/v1/chat/completions."""

    whole_object = "chat.completion"
    event_object = "chat.completion.chunk"

    def __init__(self, body: ChatRequest, rid: str, base: str, tokens: TokenText) -> None:
        super().__init__(1, body, rid, base, tokens)
        self._wants_logprobs = body.logprobs
        self._begun: set[int] = set()

    def choice(self, index: int, sample: Chunk) -> dict[str, Any]:
        return {
            "index": index, "message": {"role": "assistant", "content": sample.text, "refusal": None}, "logprobs": self._logprobs(sample.logprobs),
            "finish_reason": sample.finish_reason, "matched_stop": sample.matched_stop,
        }  # fmt: skip

    def events(self, prompt: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        self.add(prompt, chunk)
        if chunk.index not in self._begun:
            self._begun.add(chunk.index)
            yield self._delta(chunk.index, {"role": "assistant", "content": ""})
        if chunk.text or chunk.logprobs:
            yield self._delta(chunk.index, {"content": chunk.text}, self._logprobs(chunk.logprobs))
        if chunk.finish_reason is not None:
            yield self._delta(chunk.index, {}, None, chunk)

    def _delta(self, index: int, delta: dict[str, Any], logprobs: dict[str, Any] | None = None, last: Chunk | None = None) -> dict[str, Any]:
        end = {"finish_reason": None} if last is None else {"finish_reason": last.finish_reason, "matched_stop": last.matched_stop}
        return self.event({"index": index, "delta": delta, "logprobs": logprobs} | end)

    def _logprobs(self, entries: list[TokenLogprob]) -> dict[str, Any] | None:
        return {"content": chat_logprobs(entries, self._tokens), "refusal": None} if self._wants_logprobs else None


class CompletionFormat(OpenAIFormat):
    """/v1/completions. With `echo` the text of a prompt is put before each of its samples."""

    whole_object = event_object = "text_completion"

    def __init__(self, body: CompletionRequest, rid: str, base: str, tokens: TokenText, prompts: list[Prompt]) -> None:
        super().__init__(len(prompts), body, rid, base, tokens)
        self._echoes = [prompt if body.echo else "" for prompt in prompts for _ in range(self.n)]  # by choice, "" once it has been sent
        self._logprobs = None
        if body.logprobs is not None:
            self._logprobs = [CompletionLogprobs(tokens, body.logprobs > 0, body.skip_special_tokens) for _ in self._echoes]

    def choice(self, index: int, sample: Chunk) -> dict[str, Any]:
        echo, self._echoes[index] = self._echoes[index], ""
        text = (echo if isinstance(echo, str) else self._tokens.decode(echo)) + sample.text  # the engine has taken its ids by now
        logprobs = self._logprobs[index].piece(sample.prompt_logprobs, sample.logprobs) if self._logprobs is not None else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": sample.finish_reason, "matched_stop": sample.matched_stop}

    def events(self, prompt: int, chunk: Chunk) -> Iterable[dict[str, Any]]:
        self.add(prompt, chunk)
        choice = self.choice(prompt * self.n + chunk.index, chunk)
        if choice["text"] or chunk.logprobs or chunk.prompt_logprobs or chunk.token_ids or chunk.finish_reason is not None:  # ids without text: no tokenizer
            yield self.event(choice)
