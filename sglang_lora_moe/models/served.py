"""A built model as the engine runs it: one step over the packed tokens of the `StepContext`, and what must be known of the model."""

from typing import TYPE_CHECKING, Any

import torch

from sglang_lora_moe.layers.attention import PagedAttention
from sglang_lora_moe.layers.step import StepContext
from sglang_lora_moe.models import recognise
from sglang_lora_moe.models.loader import NameTable

if TYPE_CHECKING:
    from sglang_lora_moe.models.decoder import FusedDecoder


class ServedModel:
    """A built model: transformers' module tree in `hf`, and what the engine must know of it."""

    def __init__(self, hf: Any, ctx: StepContext, dtype: torch.dtype, device: torch.device, attention: list[PagedAttention]) -> None:
        self.hf, self.ctx, self.dtype, self.device = hf, ctx, dtype, device
        self.config = hf.config.get_text_config()
        self.vocab_size = int(self.config.vocab_size)
        self.max_model_len = recognise.exact_length(hf, recognise.positions_of(self.config.to_dict()) or int(self.config.max_position_embeddings))
        self.eos_token_ids: list[int] = []
        self.refused_adapter_modules: dict[str, str] = {}  # suffix of a module name -> why no adapter may be on it
        self.unquantized_bytes = 0  # that all parameters would take unquantized
        self.moe_runner_backend = "auto"  # what runs the experts; two names joined by "+" where only some layers are quantized
        self._attention, self._names = attention, NameTable(hf)
        self.rename_adapter_module = self._names.rename_module  # from module paths of adapter files to this model's; it can be pickled
        self.kv_dtype = dtype  # of keys and values in the cache; set it before allocate_kv
        self._decoder: FusedDecoder | None = None
        self._backends = {id(layer.backend): layer.backend for layer in attention}
        self._checked = False  # that every attention layer went through the paged cache

    def allocate_kv(self, num_pages: int) -> None:
        """Give every attention layer `num_pages` pages of `ctx.page_size` tokens. Page 0 is where padding rows write."""
        for layer in self._attention:
            layer.allocate(num_pages, self.kv_dtype, self.device)

    def kv_bytes_per_token(self) -> int:
        return sum(kv.num_heads * (kv.k_dim + kv.v_dim) for kv in (layer.spec.kv for layer in self._attention)) * self.kv_dtype.itemsize

    @torch.inference_mode()
    def forward_logits(self) -> torch.Tensor:
        """Run the step that `ctx` describes; logits [num_logits, V] in the model's dtype."""
        ctx = self.ctx
        if self._decoder is not None:
            logits = self.logits_of(self.forward_hidden())
        else:
            self._begin_step()
            output = self.hf(
                input_ids=ctx.input_ids[: ctx.num_tokens].unsqueeze(0), position_ids=ctx.positions[: ctx.num_tokens].unsqueeze(0), use_cache=False,
                logits_to_keep=ctx.logit_rows[: ctx.num_logits],
            )  # fmt: skip
            logits = output.logits[0]
        if not self._checked:
            self._check_attention_ran()
        return logits

    @property
    def is_split(self) -> bool:
        """Whether `forward_hidden` and `logits_of` can be called: they are the two halves of `forward_logits`."""
        return self._decoder is not None

    @torch.inference_mode()
    def forward_hidden(self) -> torch.Tensor:
        """What the language-model head reads, for all tokens of the step: [num_tokens, H]."""
        assert self._decoder is not None
        self._begin_step()
        return self._decoder.hidden()

    @torch.inference_mode()
    def logits_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [num_logits, V] of the wanted rows of `forward_hidden`, in the model's dtype."""
        assert self._decoder is not None
        return self._decoder.logits_of(hidden)

    def _begin_step(self) -> None:
        """Fill in the tokens that the last step sampled and that only the device knows yet."""
        for backend in self._backends.values():
            backend.begin_step()
        ctx, rows = self.ctx, slice(0, self.ctx.num_tokens)
        if self.device.type == "cuda":
            from sglang_lora_moe.ops.take_sampled import take_sampled

            take_sampled(ctx.input_ids[rows], ctx.token_source[rows], ctx.sampled)
            return
        pending = (ctx.token_source[rows] >= 0).nonzero().squeeze(1)
        if pending.shape[0]:
            ctx.input_ids[pending] = ctx.sampled[ctx.token_source[pending].long()]

    def _check_attention_ran(self) -> None:
        """After the first step: a layer that did not go through the paged cache would forget what came before."""
        idle = [i for i, layer in enumerate(self._attention) if layer.calls != 1]
        if idle:
            raise recognise.UnsupportedModelError(f"{type(self.hf).__name__}: attention layers {idle[:8]} did not use the paged KV cache")
        self._checked = True
