"""Picks the next token of every request of a step, batched on tensors. B = sampled requests, V = vocabulary.

    z = logits + logit_bias, minus penalties;  stop ids -inf before min_new_tokens
    temperature 0 (or top_k 1): argmax z
    otherwise: p = softmax(z / temperature), cut by top_k, then top_p of what is left, then min_p of the largest;
               token = first v with  cumsum(p)[v] > u * sum(p),   u = hash(seed, output position) in [0, 1)

`u` depends on nothing but the request's seed and how many tokens it has, and cuts keep ties, so a request gets the same
tokens whatever else is in the batch. Log-probabilities are those of the unmodified logits. What follows from the requests'
parameters alone is kept while the same requests are sampled again, which is the rule while decoding.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_lora_moe.core import TokenLogprob
from sglang_lora_moe.engine.request import PENDING, Request
from sglang_lora_moe.engine.seeds import uniform

_GREEDY_TEMPERATURE = 1e-5  # below this, dividing by it leaves nothing to chance and may overflow
_FIRST_CANDIDATES = 256  # top_p without top_k looks at so many tokens before it sorts the whole vocabulary


class Logprobs:
    """Log-probabilities on their way to the host: of one token per row of logits [N, V], and of the `tops[i]` best of row i.

    On a GPU the copies are only started: call `read` once an event recorded after this has passed, or synchronise.
    """

    def __init__(self, logits: torch.Tensor, token_ids: torch.Tensor, tops: list[int]) -> None:
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        found = [logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)]
        most = min(max(tops, default=0), logits.shape[1])
        if most:
            found += logprobs.topk(most, dim=-1)
        self._tops, self._found = tops, [_start_copy(tensor) for tensor in found]

    def read(self, token_ids: list[int]) -> list[TokenLogprob]:
        """As the rows were; `token_ids`: those that the rows were asked for."""
        chosen, *best = (tensor.tolist() for tensor in self._found)
        if not best:
            return [TokenLogprob(token, value) for token, value in zip(token_ids, chosen, strict=True)]
        values, ids = best
        tops = [list(zip(row_ids[:n], row_values[:n], strict=True)) for row_ids, row_values, n in zip(ids, values, self._tops, strict=True)]
        return [TokenLogprob(token, value, top) for token, value, top in zip(token_ids, chosen, tops, strict=True)]


def _start_copy(tensor: torch.Tensor) -> torch.Tensor:
    """To the host, without waiting."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """As torch.tensor, but without waiting for what the device has to do before."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def token_logprobs(logits: torch.Tensor, token_ids: list[int], tops: list[int]) -> list[TokenLogprob]:
    """Log-probability of one token per row of logits [N, V], and the `tops[i]` best alternatives of row i."""
    found = Logprobs(logits, torch.tensor(token_ids, device=logits.device), tops)
    if logits.device.type == "cuda":
        torch.cuda.current_stream(logits.device).synchronize()
    return found.read(token_ids)


@dataclass
class _Filter:
    """Cuts of the rows that have any (F of them)."""

    rows: torch.Tensor  # int64 [F]
    top_k: torch.Tensor  # int64 [F, 1], V = all
    top_p: torch.Tensor  # float32 [F, 1]
    log_min_p: torch.Tensor | None  # float32 [F, 1], -inf = none
    sorts: bool  # any top_k or top_p
    candidates: int  # how many of the largest logits decide the cuts
    may_need_all: bool  # unless top_p asks for more


@dataclass
class _Plan:
    """What follows from the parameters of a list of requests."""

    requests: list[Request]
    greedy: bool  # all of them, without any modification of logits
    argmax_rows: torch.Tensor | None  # bool [B], None = no row
    temperature: torch.Tensor | None  # float32 [B, 1], None = argmax of every row
    filter: _Filter | None
    bias: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None  # rows, token ids, values
    penalised: list[int]  # rows
    penalties: tuple[torch.Tensor, ...] | None  # the same, int64 on the device; repetition, presence, frequency [len(penalised), 1]
    min_new: list[int]  # rows with min_new_tokens
    logprob_rows: list[int]
    logprob_index: torch.Tensor | None  # the same, int64 on the device, None where they are all rows


class Sampler:
    """Samples steps of one model. Holds token counts of penalised requests on the device, and the plan of the last batch."""

    def __init__(self, vocab_size: int, device: torch.device | str = "cpu") -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self._plan: _Plan | None = None
        self._history = _TokenHistory(vocab_size, self.device)

    def choose(
        self, logits: torch.Tensor, requests: list[Request], best: torch.Tensor | None = None, inputs: Callable[[], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One token per row of logits [B, V], int64 [B] on their device.

        `best`: their argmax, if it is known. `inputs` gives the token each row was computed from, int64 [B]: the last one of a request
        whose tokens end with PENDING.
        """
        plan = self._plan_for(requests)
        if plan.greedy:
            return logits.argmax(dim=-1) if best is None else best
        return self._modified_tokens(logits.float(), plan, inputs)

    def logprobs(self, logits: torch.Tensor, requests: list[Request], tokens: torch.Tensor) -> tuple[list[int], Logprobs] | None:
        """(rows that ask for log-probabilities, those of their tokens) or None; tokens int64 [B] as `choose` gave them."""
        plan = self._plan_for(requests)
        rows = plan.logprob_rows
        if not rows:
            return None
        if plan.logprob_index is not None:
            logits, tokens = logits[plan.logprob_index], tokens[plan.logprob_index]
        return rows, Logprobs(logits, tokens, [options.top for options in (requests[row].logprobs for row in rows) if options is not None])

    # ---- parts ------------------------------------------------------------------------------------------------------
    def _plan_for(self, requests: list[Request]) -> _Plan:
        if self._plan is None or self._plan.requests != requests:
            self._plan = self._make_plan(requests)
        return self._plan

    def _modified_tokens(self, logits: torch.Tensor, plan: _Plan, inputs: Callable[[], torch.Tensor] | None) -> torch.Tensor:
        modified = self._modify(logits, plan, inputs)
        if plan.temperature is None:
            return modified.argmax(dim=-1)
        z = modified / plan.temperature
        if plan.filter is not None:
            z[plan.filter.rows] = self._cut(z[plan.filter.rows], plan.filter)
        u = to_device([[uniform(request.seed, request.num_output)] for request in plan.requests], torch.float64, self.device)
        cumulative = torch.softmax(z, dim=-1).cumsum(dim=-1, dtype=torch.float64)
        tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_(max=z.shape[1] - 1).squeeze(1)
        return tokens if plan.argmax_rows is None else torch.where(plan.argmax_rows, modified.argmax(dim=-1), tokens)

    def _modify(self, logits: torch.Tensor, plan: _Plan, inputs: Callable[[], torch.Tensor] | None = None) -> torch.Tensor:
        """Bias, penalties and the minimum length, on a copy if there are any."""
        early = [row for row in plan.min_new if plan.requests[row].num_output < plan.requests[row].sampling.min_new_tokens]
        if not (plan.bias or plan.penalised or early):
            return logits
        z = logits.clone()
        if plan.bias is not None:
            rows, ids, values = plan.bias
            z.index_put_((rows, ids), values, accumulate=True)
        if plan.penalties is not None:
            rows, repetition, presence, frequency = plan.penalties
            penalised = [plan.requests[row] for row in plan.penalised]
            last = inputs()[rows] if inputs is not None and any(request.tokens[-1] == PENDING for request in penalised) else None
            counts, seen = self._history.gather(penalised, last)
            own = z[rows]
            own = torch.where(seen, torch.where(own > 0, own / repetition, own * repetition), own)
            z[rows] = own - frequency * counts - presence * (counts > 0)
        if early:
            pairs = [(row, token) for row in early for token in plan.requests[row].stop_ids if token < self.vocab_size]
            if pairs:
                rows, ids = to_device(pairs, torch.int64, self.device).unbind(1)
                z.index_put_((rows, ids), z.new_full((), -math.inf))
        return z

    @staticmethod
    def _cut(z: torch.Tensor, cut: _Filter) -> torch.Tensor:
        """z [F, V] with -inf for tokens outside top_k, top_p and min_p. Tokens that tie with the last kept one stay."""
        floor = z.amax(dim=-1, keepdim=True) + cut.log_min_p if cut.log_min_p is not None else None
        if cut.sorts:
            candidates = cut.candidates
            threshold, enough = _sorted_threshold(z, cut, candidates)
            while not enough:
                candidates = min(candidates * 16, z.shape[1])
                threshold, enough = _sorted_threshold(z, cut, candidates)
            floor = threshold if floor is None else torch.maximum(floor, threshold)
        assert floor is not None
        return z.masked_fill(z < floor, -math.inf)

    def _make_plan(self, requests: list[Request]) -> _Plan:
        params = [request.sampling for request in requests]
        argmax = [p.temperature < _GREEDY_TEMPERATURE or p.top_k == 1 for p in params]
        biased = [(row, token, value) for row, p in enumerate(params) for token, value in p.logit_bias.items()]
        penalised = [row for row, p in enumerate(params) if p.repetition_penalty != 1.0 or p.presence_penalty or p.frequency_penalty]
        min_new = [row for row, p in enumerate(params) if p.min_new_tokens > 0]
        penalties = None
        if penalised:
            names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
            columns = (self._column([getattr(params[row], name) for row in penalised]) for name in names)
            penalties = (to_device(penalised, torch.int64, self.device), *columns)
        bias = None
        if biased:
            rows, ids = to_device([(row, token) for row, token, _ in biased], torch.int64, self.device).unbind(1)
            bias = (rows, ids, to_device([value for _, _, value in biased], torch.float32, self.device))
        greedy = all(argmax) and not (biased or penalised or min_new)
        logprob_rows = [row for row, request in enumerate(requests) if request.logprobs is not None]
        return _Plan(
            requests=list(requests),
            greedy=greedy,
            argmax_rows=to_device(argmax, torch.bool, self.device) if any(argmax) and not greedy else None,
            temperature=None if all(argmax) else self._column([1.0 if a else p.temperature for a, p in zip(argmax, params, strict=True)]),
            filter=self._make_filter([row for row, a in enumerate(argmax) if not a], requests),
            bias=bias,
            penalised=penalised,
            penalties=penalties,
            min_new=min_new,
            logprob_rows=logprob_rows,
            logprob_index=to_device(logprob_rows, torch.int64, self.device) if 0 < len(logprob_rows) < len(requests) else None,
        )

    def _make_filter(self, rows: list[int], requests: list[Request]) -> _Filter | None:
        vocab = self.vocab_size
        params = {row: requests[row].sampling for row in rows}
        cut = {row: p for row, p in params.items() if 0 < p.top_k < vocab or p.top_p < 1.0 or p.min_p > 0.0}
        if not cut:
            return None
        top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in cut.values()]
        top_p = [p.top_p for p in cut.values()]
        open_ended = any(k == vocab and p < 1.0 for k, p in zip(top_k, top_p, strict=True))
        candidates = max([k for k in top_k if k < vocab] + [_FIRST_CANDIDATES if open_ended else 1])
        min_p = [math.log(p.min_p) if p.min_p > 0 else -math.inf for p in cut.values()]
        return _Filter(
            rows=to_device(list(cut), torch.int64, self.device),
            top_k=to_device(top_k, torch.int64, self.device).unsqueeze(1),
            top_p=self._column(top_p),
            log_min_p=self._column(min_p) if max(min_p) > -math.inf else None,
            sorts=min(top_k) < vocab or open_ended,
            candidates=min(candidates, vocab),
            may_need_all=open_ended and candidates < vocab,
        )

    def _column(self, values: list[float]) -> torch.Tensor:
        return to_device(values, torch.float32, self.device).unsqueeze(1)


def _sorted_threshold(z: torch.Tensor, cut: _Filter, candidates: int) -> tuple[torch.Tensor, bool]:
    """Smallest kept logit [F, 1] by top_k and top_p, and whether `candidates` tokens were enough to find it."""
    values = z.topk(candidates, dim=-1).values  # [F, C], falling
    ranks = torch.arange(candidates, device=z.device)
    kept = values.masked_fill(ranks >= cut.top_k, -math.inf)
    limited = cut.top_k < z.shape[1]
    total = torch.where(limited, torch.logsumexp(kept, dim=-1, keepdim=True), torch.logsumexp(z, dim=-1, keepdim=True))
    p = torch.exp(kept - total)
    before = p.cumsum(dim=-1) - p  # mass of the larger ones
    enough = not cut.may_need_all or candidates == z.shape[1] or bool(((before[:, -1:] >= cut.top_p) | limited | (cut.top_p >= 1.0)).all())
    keep = ((before < cut.top_p) | (cut.top_p >= 1.0)) & (ranks < cut.top_k)
    threshold = values.gather(1, keep.sum(dim=-1, keepdim=True).clamp_(min=1) - 1)
    return threshold.masked_fill(~limited & (cut.top_p >= 1.0), -math.inf), enough


class _TokenHistory:
    """Token counts of penalised requests: one row each of outputs [N, V] and of prompt-or-output [N, V], grown on demand."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab, self._device = vocab_size, device
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._seen = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._applied: dict[Request, int] = {}  # output tokens counted so far
        self._row: dict[Request, int] = {}
        self._free: list[int] = []  # rows of no request

    def gather(self, requests: list[Request], last: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Counts int32 [n, V] and seen bool [n, V] of `requests`, brought up to date. `last` int64 [n]: what PENDING stands for."""
        pairs: list[tuple[int, int]] = []
        pending: list[tuple[int, int]] = []
        for i, request in enumerate(requests):
            row = self._row.get(request)
            if row is None:
                row = self._add(request)
            new = request.tokens[request.prompt_len + self._applied[request] :]
            if new and new[-1] == PENDING:
                pending.append((row, i))
                del new[-1]
            pairs.extend((row, token) for token in new)
            self._applied[request] = request.num_output
        if pairs:
            self._count(*to_device(pairs, torch.int64, self._device).unbind(1))
        if pending:
            assert last is not None, "a token that only the device knows must be given"
            rows, places = to_device(pending, torch.int64, self._device).unbind(1)
            self._count(rows, last[places])
        index = to_device([self._row[request] for request in requests], torch.int64, self._device)
        return self._counts[index], self._seen[index]

    def _count(self, rows: torch.Tensor, ids: torch.Tensor) -> None:
        self._counts.index_put_((rows, ids), torch.ones_like(rows, dtype=torch.int32), accumulate=True)
        self._seen.index_put_((rows, ids), torch.ones_like(rows, dtype=torch.bool))

    def _add(self, request: Request) -> int:
        if not self._free:
            for owner in [owner for owner in self._row if owner.finish_reason is not None]:
                self._free.append(self._row.pop(owner))
                del self._applied[owner]
        if not self._free:
            rows = len(self._row)
            self._free += range(rows, rows + max(4, rows))
            self._counts = torch.cat([self._counts, self._counts.new_zeros(len(self._free), self._vocab)])
            self._seen = torch.cat([self._seen, self._seen.new_zeros(len(self._free), self._vocab)])
        row = self._free.pop()
        self._row[request], self._applied[request] = row, 0
        self._counts[row] = 0
        self._seen[row] = False
        self._seen[row].index_fill_(0, to_device(request.tokens[: request.prompt_len], torch.int64, self._device), True)
        return row
