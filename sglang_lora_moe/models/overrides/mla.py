"""Multi-head latent attention (DeepSeek-V2 2024) in absorbed form: the cache holds one latent row per token.

With c the normalised latent, k_n = W_UK c and v = W_UV c per head. Since q_n . (W_UK c) = (W_UK^T q_n) . c, queries move into
latent space, attention runs over [c, k_rope] as over one shared key head whose first columns are also the values, and
W_UV is applied to the result. A token costs kv_lora_rank + rope columns instead of heads * (key + value) columns.
"""

import torch
from torch import nn

from sglang_lora_moe.layers.attention import PagedAttention, rotate
from sglang_lora_moe.layers.linear import Linear

Tables = tuple[torch.Tensor, torch.Tensor] | torch.Tensor  # cos and sin [1, T, dr], or complex cos + i sin [1, T, dr/2]
KV_B_REASON = "kv_b_proj is absorbed into the queries and outputs of latent attention, so an adapter on it cannot be applied"


class AbsorbedMLA(nn.Module):
    """Replaces transformers' latent attention module. dn, dr, dv: columns of a head's plain key, rotary key and value; r: latent rank.

    `qkv` has two parts over the same input: q_a_proj (or q_proj, then `q_b` is None) and kv_a_proj_with_mqa.
    """

    def __init__(
        self,
        qkv: Linear,
        q_norm: nn.Module | None,
        q_b: Linear | None,
        kv_norm: nn.Module,
        kv_b_proj: nn.Linear,
        o_proj: Linear,
        paged: PagedAttention,
        *,
        nope_dim: int,
        v_dim: int,
        interleaved: bool,
    ) -> None:  # budget: the seven parts of latent attention, each swapped before, and their sizes
        super().__init__()
        self.qkv, self.q_a_layernorm, self.q_b, self.kv_a_layernorm, self.kv_b_proj, self.o_proj = qkv, q_norm, q_b, kv_norm, kv_b_proj, o_proj
        self.paged, self.interleaved, self.nope_dim, self.v_dim = paged, interleaved, nope_dim, v_dim
        self.q_width = qkv.parts[0][1]  # read here: adapters may wrap the linear later
        self.rank = paged.spec.value_dim
        self.rope_dim = paged.spec.kv.k_dim - self.rank

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Tables, **_: object) -> tuple[torch.Tensor, None]:
        """hidden_states [1, T, H] -> ([1, T, H], None)."""
        heads = self.paged.spec.num_heads
        q, latent, k_rope = self.qkv(hidden_states[0]).split([self.q_width, self.rank, self.rope_dim], dim=-1)
        if self.q_b is not None and self.q_a_layernorm is not None:
            q = self.q_b(self.q_a_layernorm(q))
        q_nope, q_rope = q.unflatten(-1, (heads, -1)).split([self.nope_dim, self.rope_dim], dim=-1)  # [T, heads, dn], [T, heads, dr]
        latent = self.kv_a_layernorm(latent)
        cos, sin = self.tables(position_embeddings)
        w_uk, w_uv = self.kv_b_proj.weight.view(heads, -1, self.rank).split([self.nope_dim, self.v_dim], dim=1)  # [heads, dn, r], [heads, dv, r]
        queries = torch.cat([torch.einsum("thn,hnr->thr", q_nope, w_uk), self._rotate(q_rope, cos, sin)], dim=-1)
        keys = torch.cat([latent, self._rotate(k_rope.unsqueeze(1), cos, sin).squeeze(1)], dim=-1)
        out = self.paged(queries, keys.unsqueeze(1), None)  # [T, heads, r]
        return self.o_proj(torch.einsum("thr,hvr->thv", out, w_uv).flatten(1))[None], None

    def tables(self, position_embeddings: Tables) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [T, dr/2]; DeepSeek-V2 hands over complex numbers cos + i sin."""
        if isinstance(position_embeddings, torch.Tensor):
            return position_embeddings[0].real, position_embeddings[0].imag
        cos, sin = position_embeddings
        return cos[0, :, : self.rope_dim // 2], sin[0, :, : self.rope_dim // 2]

    def _rotate(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """x [T, heads, dr]. Interleaved pairs are brought into halves; queries and keys alike, so products do not change."""
        if self.interleaved:
            x = torch.cat([x[..., 0::2], x[..., 1::2]], dim=-1)
        return rotate(x, cos.to(x.dtype), sin.to(x.dtype))
