"""Who gets how much memory: weights, adapters, workspace, KV cache, graphs. What does not fit is one sentence with the way out.

The limit is what is free at start, on a GPU less what `--mem-fraction-static` leaves alone of the whole, on a CPU times it. The
parts come in the order in which they are made; the KV cache gets what is left. Graphs lie beside the limit.
"""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from sglang_lora_moe.config import Config
from sglang_lora_moe.lora.packed import PoolLayout

logger = logging.getLogger(__name__)

CPU_CONTEXT = 4096  # tokens per running request that the KV cache of a CPU is sized for
USEFUL_TOKENS = 4096  # of a KV cache, which suggestions leave room for
MOST_OF_GPU = 0.95  # of --mem-fraction-static that is suggested: graphs and libraries need the rest
GIB = float(2**30)
CGROUP = Path("/sys/fs/cgroup")  # as a container of Linux sees its own limits


class MemoryBudget:
    """The memory of one engine while it is built. `config` has been resolved."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.is_gpu = config.device == "cuda"
        self.free, self.total = torch.cuda.mem_get_info() if self.is_gpu else main_memory()
        fraction = config.mem_fraction_static
        self.limit = int(self.free - self.total * (1.0 - fraction) if self.is_gpu else self.free * fraction)
        self.parts: dict[str, int] = {}  # bytes, in the order of making
        self._notes: dict[str, str] = {}

    @property
    def left(self) -> int:
        return self.limit - sum(self.parts.values())

    def note(self, part: str, nbytes: int, text: str = "") -> None:
        """`part` takes so much; ValueError if that is more than there is."""
        self.parts[part], self._notes[part] = nbytes, text
        if self.left < 0:
            raise ValueError(self._sentence("it does not fit", -self.left))

    def plan_adapters(self, layout: PoolLayout) -> None:
        """Note the adapter pool before it is made."""
        slots, rank = self.config.max_loras_per_batch, self.config.max_lora_rank
        self.note("adapters", slots * layout.slot_bytes, f"{slots} slots of rank {rank}, {_size(layout.slot_bytes)} each")

    def measure_workspace(self) -> None:
        """Note what else has been taken by now. Comes after the largest step, so that scratch memory has its final size."""
        if self.is_gpu:
            taken = max(self.free - torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved())  # others may have given back memory meanwhile
            self.note("workspace", max(taken - sum(self.parts.values()), 0), f"--chunked-prefill-size {self.config.chunked_prefill_size}")

    def plan_kv_cache(self, bytes_per_token: int) -> int:
        """Tokens of the KV cache, a multiple of the page size: as given, else what is left, on a CPU no more than the running requests suggest."""
        config = self.config
        assert config.context_length is not None, "resolve() comes first"
        fit, page = max(self.left, 0) // bytes_per_token, config.page_size
        tokens = fit if config.max_total_tokens is None else config.max_total_tokens
        if tokens < 2 * page and config.max_total_tokens is not None:
            raise ValueError(f"--max-total-tokens {tokens} is less than two pages (--page-size {page})")
        if not self.is_gpu and config.max_total_tokens is None:
            wanted = max(config.max_running_requests * min(config.context_length, CPU_CONTEXT), config.context_length)
            tokens = min(wanted, fit, self.free // 4 // bytes_per_token)
        if tokens > fit or tokens < 2 * page:
            needed = config.max_total_tokens or min(config.context_length, USEFUL_TOKENS)
            what = f"a KV cache of {needed} tokens ({_size(needed * bytes_per_token)}) does not fit: {max(self.left, 0) // bytes_per_token} tokens do"
            ways = [f"--max-total-tokens {fit // page * page}"] if tokens > fit and fit >= 2 * page else []
            raise ValueError(self._sentence(what, needed * bytes_per_token - self.left, ways))
        tokens = tokens // page * page
        self.note("KV cache", tokens * bytes_per_token, f"{tokens} tokens of {bytes_per_token} bytes, {tokens // page} pages of {page}")
        return tokens

    @contextlib.contextmanager
    def guard(self, doing: str, *ways: str) -> Iterator[None]:
        """Turn running out of memory while `doing` something into the sentence; `ways` are flags that help, beside the usual ones."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
                raise
            said = ". ".join(str(error).split(". ")[:2]) or type(error).__name__
            raise ValueError(self._sentence(f"memory ran out while {doing} ({said})", 0, list(ways))) from error

    def arithmetic(self) -> str:
        """The sum as a text: total, limit, parts, rest."""
        fraction = f"--mem-fraction-static {self.config.mem_fraction_static:g}"
        kind, free, limit = ("GPU", "free", self.limit) if self.is_gpu else ("main", "available", max(self.limit, 0))
        head = f"{kind} memory {_size(self.total)}, {_size(self.free)} {free} at start, of which {fraction} gives {_size(limit)}"
        shown = [f"{part} {_size(nbytes)}" + (f" ({self._notes[part]})" if self._notes[part] else "") for part, nbytes in self.parts.items()]
        return f"{head}: {' + '.join([*shown, f'{_size(self.left)} left'])}" if self.left >= 0 else f"{head}, needed: {' + '.join(shown)}"

    def log(self, graphs: int) -> None:
        """Say how memory is divided."""
        logger.info("memory: %s%s", self.arithmetic(), f"; graphs {_size(graphs)} beside it" if graphs else "")

    def _sentence(self, what: str, missing: int, ways: list[str] | None = None) -> str:
        ways = (ways or []) + (self._ways_out(missing) if missing else [])
        text = f"Set {', or '.join(ways)}" if ways else "Use a smaller or a quantized model, or a device with more memory"
        return f"{what}: {self.arithmetic()}. {text}."

    def _ways_out(self, missing: int) -> list[str]:
        """Flags with values, each of which alone gives `missing` bytes more, and the least of a KV cache."""
        config, ways = self.config, []
        missing += 0 if "workspace" in self.parts else min(missing, self.limit) // 8  # what is not known yet
        share = missing / (self.total if self.is_gpu else max(self.free, 1))
        fraction = math.ceil((config.mem_fraction_static + share) * 100) / 100
        if fraction <= MOST_OF_GPU:
            ways.append(f"--mem-fraction-static {fraction:g}")
        adapters, slots, rank = self.parts.get("adapters", 0), config.max_loras_per_batch, config.max_lora_rank or 0
        if adapters:
            fewer = slots - math.ceil(missing / (adapters / slots))
            if fewer >= 1:
                ways.append(f"--max-loras-per-batch {fewer}")
            lower = int(rank * (adapters - missing) / adapters)
            lower = lower // 8 * 8 if lower >= 8 else lower
            if lower >= 1 and not config.lora_paths:  # else the adapters given at start need the rank
                ways.append(f"--max-lora-rank {lower}")
        if self.parts.get("workspace", 0) // 2 > missing and config.chunked_prefill_size >= 1024:
            ways.append(f"--chunked-prefill-size {config.chunked_prefill_size // 2}")
        return ways


def main_memory() -> tuple[int, int]:
    """(available without swapping, all) of main memory, bytes: of the machine, or of the container where that may use less."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            found = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)}
        available, total = found["MemAvailable"], found["MemTotal"]
    except (OSError, KeyError):  # not Linux
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = total // 2
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        idle = int((CGROUP / "memory.stat").read_text().partition("inactive_file ")[2].split()[0])  # of files' content, given up when memory is short
    except (OSError, ValueError, IndexError):  # no container, or one without a limit
        return available, total
    return min(available, limit - used + idle), min(total, limit)


def _size(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / 2**20:.1f} MiB"
