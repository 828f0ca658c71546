"""Runs one batch: fills the step context, computes logits and samples.

`launch` starts a step and `collect` waits for its tokens, so that the engine can prepare a step while the one before runs.
Sampled tokens stay on the device for the next step and reach the host with an event.
"""

import functools
from dataclasses import dataclass

import torch

from sglang_lora_moe.core import TokenLogprob
from sglang_lora_moe.engine.cuda_graph import DecodeGraphs, PrefillGraphs
from sglang_lora_moe.engine.request import Batch, StepResult
from sglang_lora_moe.engine.sampler import Logprobs, Sampler, token_logprobs
from sglang_lora_moe.engine.step_inputs import StepInputs
from sglang_lora_moe.models.served import ServedModel


@dataclass
class Launched:
    """A step on its way. `token_ids` is host memory that is valid once `done` has passed, or None if nothing is sampled."""

    result: StepResult
    token_ids: torch.Tensor | None
    done: torch.cuda.Event | None
    can_overlap: bool  # the next step needs nothing of this one on the host
    logprobs: tuple[list[int], Logprobs] | None = None  # of these samples, valid as token_ids


class ModelRunner:
    """One model on one device. `graphs` None = decode steps are eager, `prefill_graphs` None = so are the others."""

    def __init__(self, model: ServedModel, graphs: DecodeGraphs | None = None, prefill_graphs: PrefillGraphs | None = None) -> None:
        self.model, self.graphs, self.prefill_graphs = model, graphs, prefill_graphs
        self.inputs = StepInputs(model.ctx)
        self.sampler = Sampler(model.vocab_size, model.ctx.device)
        self._cuda = model.ctx.device.type == "cuda"
        pinned = [torch.empty(model.ctx.max_requests, dtype=torch.int64, pin_memory=self._cuda) for _ in range(2)]
        self._ring = [(buffer, torch.cuda.Event() if self._cuda else None) for buffer in pinned]
        self._turn = 0

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launched:
        """Start the step. Its requests' tokens may be pending: then they are what the last launched step sampled."""
        # Tokens and requests of the graph that fits, filled up with padding; 0 of a step that runs without one
        size = self.graphs.padded_size(batch) if self.graphs is not None else 0
        tokens, count = (size, size) if size or self.prefill_graphs is None else self.prefill_graphs.padded_size(batch)
        wanted = self.inputs.fill(batch, tokens, count)
        best: torch.Tensor | None = None
        if size and self.graphs is not None:
            logits, best = self.graphs.replay(size, batch.lora_active)
        elif tokens and self.prefill_graphs is not None:
            logits = self.prefill_graphs.logits((tokens, count), batch.lora_active)
        else:
            logits = self.model.forward_logits()
        ends = zip(batch.requests, batch.query_lens, strict=True)
        sampled = [b for b, (request, count) in enumerate(ends) if request.num_computed + count == len(request.tokens)]
        result = StepResult(sampled, [])
        ctx, rows = self.model.ctx, self.model.ctx.logit_rows[: len(sampled)]
        if any(request.prompt_logit_start is not None for request in batch.requests):  # prompts are scored, of which the first token needs no logits
            sample_rows = self._score_prompts(logits, batch, wanted, result)
            logits, best, rows = logits[sample_rows], None, ctx.logit_rows[sample_rows]
        if not sampled:
            return Launched(result, None, None, False)
        requests = [batch.requests[b] for b in sampled]
        logits = logits[: len(sampled)]
        inputs = functools.partial(torch.index_select, ctx.input_ids, 0, rows)
        chosen = self.sampler.choose(logits, requests, None if best is None else best[: len(sampled)], inputs)
        return self._send_tokens(chosen, result, self.sampler.logprobs(logits, requests, chosen))

    def collect(self, launched: Launched) -> StepResult:
        """Wait for the step's tokens."""
        if launched.done is not None:
            launched.done.synchronize()
        if launched.token_ids is not None:
            launched.result.token_ids = launched.token_ids.tolist()
        if launched.logprobs is not None:
            rows, found = launched.logprobs
            result = launched.result
            values = found.read([result.token_ids[row] for row in rows])
            result.logprobs = {result.sampled[row]: value for row, value in zip(rows, values, strict=True)}
        return launched.result

    def _send_tokens(self, tokens: torch.Tensor, result: StepResult, logprobs: tuple[list[int], Logprobs] | None) -> Launched:
        """Leave the tokens for the next step on the device and start their way to the host."""
        count = len(result.sampled)
        sampled = self.model.ctx.sampled[:count]
        if sampled.data_ptr() != tokens.data_ptr():
            sampled.copy_(tokens)
        buffer, event = self._ring[self._turn]
        self._turn = 1 - self._turn
        buffer[:count].copy_(sampled, non_blocking=True)
        if event is not None:
            event.record()
        return Launched(result, buffer[:count], event, not result.prompt_logprobs, logprobs)

    @staticmethod
    def _score_prompts(logits: torch.Tensor, batch: Batch, wanted: list[list[int]], result: StepResult) -> list[int]:
        """Log-probabilities of prompt tokens into `result`; returns the rows of `logits` to sample from."""
        sample_rows: list[int] = []
        prompt_rows: list[int] = []
        targets: list[int] = []
        tops: list[int] = []
        owners: list[int] = []  # index of the request of each prompt row
        row = 0
        for b, (request, count, rows) in enumerate(zip(batch.requests, batch.query_lens, wanted, strict=True)):
            positions = request.prompt_logit_positions(request.num_computed + count)
            if request.logprobs is not None and request.prompt_logit_start is not None:
                first = request.logprobs.prompt_start == 0 and request.num_computed == 0
                result.prompt_logprobs[b] = [TokenLogprob(request.tokens[0], None)] if first else []
                targets += [request.tokens[position + 1] for position in positions]
                tops += [request.logprobs.top] * len(positions)
                owners += [b] * len(positions)
            prompt_rows += range(row, row + len(positions))
            sample_rows += range(row + len(positions), row + len(rows))
            row += len(rows)
        if prompt_rows:
            for b, value in zip(owners, token_logprobs(logits[prompt_rows].float(), targets, tops), strict=True):
                result.prompt_logprobs[b].append(value)
        return sample_rows
