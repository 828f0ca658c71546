"""A request as the engine sees it (token ids, pages, a slot), and the batch of one step. Host only, no tensors."""

from dataclasses import dataclass, field

from sglang_lora_moe.core import LogprobOptions, SamplingParams, TokenLogprob
from sglang_lora_moe.engine.kv_cache import page_key, root_key

PENDING = -1  # stands in `tokens` for a token that the device is about to sample


class Request:
    """One sample being generated. `tokens` = prompt + output; the first `num_computed` of them are in the KV cache.

    A request is *waiting* (no pages, no slot) or *running* (it holds pages for all its tokens, and a slot if it has an adapter); a running request whose tokens
    are not all but one computed is in prefill. Retraction makes a running request wait again; its tokens stay, and are computed anew as if they were a prompt.
    """

    def __init__(self, rid: str, input_ids: list[int], sampling: SamplingParams, *, eos_ids: frozenset[int] = frozenset(), seed: int = 0) -> None:
        self.rid = rid
        self.tokens = list(input_ids)
        self.prompt_len = len(input_ids)
        self.sampling = sampling
        self.seed = seed
        self.stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)
        self.max_len = self.prompt_len + sampling.max_new_tokens  # the scheduler lowers it to what can ever fit
        self.logprobs: LogprobOptions | None = None
        self.adapter: str | None = None
        self.revision: str | None = None
        self.root = root_key(None)
        # scheduling
        self.order = -1  # arrival
        self.running = False
        self.finish_reason: str | None = None
        self.slot = -1
        self.pages: list[int] = []
        self.page_keys: list[bytes] = []  # keys of the full pages of `tokens`, as far as computed
        self.num_computed = 0
        self.num_committed = 0  # leading pages that have been offered to the prefix cache
        self.num_cached = 0  # prompt tokens that came from the prefix cache at the first admission
        self.first_scheduled = True
        self.blocked_since = -1  # scheduling pass in which it was first passed over, -1 = not blocked
        self.prompt_logprobs: list[TokenLogprob] = []
        self.sampled_row = -1  # where on the device the last token is while `tokens` ends with PENDING

    def bind(self, adapter: str, revision: str) -> None:
        """Fix the adapter revision that this request runs under."""
        self.adapter, self.revision, self.root = adapter, revision, root_key(revision)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def prompt_logit_start(self) -> int | None:
        """First row of the prompt whose logits are wanted for prompt log-probabilities, None if there is none left to give.

        The logits of row i are the distribution of token i + 1. They are given once, with the first output.
        """
        if self.logprobs is None or self.logprobs.prompt_start is None or len(self.tokens) > self.prompt_len:
            return None
        return max(self.logprobs.prompt_start - 1, 0)

    def prompt_logit_positions(self, end: int) -> range:
        """Positions of this step (`num_computed` .. end - 1) whose logits are wanted because the next token is a prompt token."""
        start = self.prompt_logit_start
        return range(0) if start is None else range(max(start, self.num_computed), min(end, self.prompt_len - 1))

    def extend_keys(self, page_size: int, num_pages: int) -> None:
        """Compute the keys of the first `num_pages` pages."""
        keys = self.page_keys
        for i in range(len(keys), num_pages):
            keys.append(page_key(keys[-1] if keys else self.root, self.tokens[i * page_size : (i + 1) * page_size]))


@dataclass(slots=True)
class Batch:
    """One step: `query_lens[b]` tokens of each request, from its `num_computed` on, packed in this order."""

    requests: list[Request]
    query_lens: list[int]
    num_tokens: int
    lora_active: bool  # some request of the step has an adapter
    ends: list[int] | None = None  # `num_computed` of each request after the step, once it is launched


@dataclass(slots=True)
class StepResult:
    """What a step produced: one token for each request whose last token was computed, in batch order."""

    sampled: list[int]  # indices into batch.requests
    token_ids: list[int]
    logprobs: dict[int, TokenLogprob] = field(default_factory=dict)  # by index into batch.requests, where asked for
    prompt_logprobs: dict[int, list[TokenLogprob]] = field(default_factory=dict)  # of the prompt rows of this step
