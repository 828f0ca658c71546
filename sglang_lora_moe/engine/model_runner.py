"""Runs one batch: fills the step context, computes logits, samples, and returns plain host values."""

from __future__ import annotations

from typing import Protocol

import torch

from sglang_lora_moe.core import TokenLogprob
from sglang_lora_moe.engine.request import Batch, StepResult
from sglang_lora_moe.engine.sampler import Sampler, token_logprobs
from sglang_lora_moe.engine.step_inputs import StepInputs
from sglang_lora_moe.layers.step import StepContext


class Model(Protocol):
    """What the runner needs of `models.build.ServedModel`."""

    ctx: StepContext
    vocab_size: int

    def forward(self) -> torch.Tensor: ...  # float32 [num_logits, V]


class ModelRunner:
    """One model on one device."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.inputs = StepInputs(model.ctx)
        self.sampler = Sampler(model.vocab_size, model.ctx.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> StepResult:
        wanted = self.inputs.fill(batch)
        logits = self.model.forward()
        requests = batch.requests
        sampled = [b for b, request in enumerate(requests) if request.num_computed + batch.query_lens[b] == len(request.tokens)]
        result = StepResult(sampled, [])
        count = sum(map(len, wanted))
        if count > len(sampled):
            sample_rows = self._score_prompts(logits, batch, wanted, result)
            logits = logits[sample_rows]
        if sampled:
            result.token_ids, logprobs = self.sampler.sample(logits[: len(sampled)], [requests[b] for b in sampled])
            result.logprobs = {sampled[row]: value for row, value in logprobs.items()}
        return result

    @staticmethod
    def _score_prompts(logits: torch.Tensor, batch: Batch, wanted: list[list[int]], result: StepResult) -> list[int]:
        """Log-probabilities of prompt tokens into `result`; returns the rows of `logits` to sample from."""
        sample_rows: list[int] = []
        prompt_rows: list[int] = []
        targets: list[int] = []
        tops: list[int] = []
        row = 0
        for b, (request, count, rows) in enumerate(zip(batch.requests, batch.query_lens, wanted, strict=True)):
            end = request.num_computed + count
            positions = request.prompt_logit_positions(end)
            if request.logprobs is not None and request.prompt_logit_start is not None:
                first = request.logprobs.prompt_start == 0 and request.num_computed == 0
                result.prompt_logprobs[b] = [TokenLogprob(request.tokens[0], None)] if first else []
                targets += [request.tokens[position + 1] for position in positions]
                tops += [request.logprobs.top] * len(positions)
            prompt_rows += range(row, row + len(positions))
            sample_rows += range(row + len(positions), row + len(rows))
            row += len(rows)
        if prompt_rows:
            values = iter(token_logprobs(logits[prompt_rows], targets, tops))
            for b in result.prompt_logprobs:
                request = batch.requests[b]
                count = len(request.prompt_logit_positions(request.num_computed + batch.query_lens[b]))
                result.prompt_logprobs[b] += [next(values) for _ in range(count)]
        return sample_rows
