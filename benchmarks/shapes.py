"""The real model shapes that benchmarks name, and the sweep every kernel benchmark runs over."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MoEShape:
    name: str  # as in results files
    peer_name: str  # as in the peers' recorded tables
    experts: int  # E
    hidden: int  # H
    inter: int  # I, of one rank
    top_k: int  # K


SHAPES: dict[str, MoEShape] = {
    shape.name: shape
    for shape in (
        MoEShape("qwen3-30b-a3b", "qwen3", 128, 2048, 768, 8),
        MoEShape("mixtral-8x7b", "mixtral", 8, 4096, 14336, 2),
        MoEShape("deepseek-v3-tp8", "dsv3tp8", 256, 7168, 256, 8),
        MoEShape("gpt-oss-20b", "gptoss", 32, 2880, 2880, 4),
    )
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)  # M
RANKS = (16, 64)
ACTIVE = (0, 1, 4, 16)  # active adapters A; min(M, 64) distinct comes on top
