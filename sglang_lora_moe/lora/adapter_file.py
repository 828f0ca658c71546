"""The tensors of an adapter, read one at a time: from a file, checked as a whole when opened, or from memory.

Ordinary reads instead of a memory map: a trainer that overwrites the file while it is being read gives an error here,
whereas a map would end the process. Each read also hashes the bytes, from which `revision` identifies the content.
"""

import hashlib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class AdapterError(ValueError):
    """An adapter that cannot be served: names file, tensor or field, what was expected, what was found and the way out."""


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor; bytes [start, end) count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class AdapterTensors:
    """Named tensors: `entries` and `metadata` say what there is; `path` names their origin in errors."""

    def __init__(self, path: Path, metadata: dict[str, str], entries: dict[str, TensorEntry]) -> None:
        self.path, self.metadata, self.entries = path, metadata, entries
        self._digests: dict[str, str] = {}

    def read(self, name: str) -> Tensor:
        """The tensor as stored, float64 as float32, on the CPU. Refuses types that are not floating point, NaN, infinity and what float32 does not hold."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise AdapterError(f"{self.path}: {name}: expected one of {', '.join(DTYPES)}, found {entry.dtype}. Save LoRA weights unquantized.")
        raw = self._bytes(name)
        self._digests[name] = hashlib.sha256(raw.numpy().data).hexdigest()
        stored = raw.view(DTYPES[entry.dtype]).view(entry.shape)
        tensor = stored.float() if stored.dtype is torch.float64 else stored
        if not math.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():  # a sum is ten times faster than a look at each weight
            position = tuple(int(i) for i in (~torch.isfinite(tensor)).nonzero()[0])
            found = float(stored[position])
            raise AdapterError(f"{self.path}: {name}: expected finite weights, found {found} at {list(position)}. The training run diverged; use another step.")
        return tensor

    def revision(self, config: dict[str, Any]) -> str:
        """sha256 over `config` and (name, dtype, shape, digest of the bytes) of every tensor that was read."""
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name in sorted(self._digests):
            entry = self.entries[name]
            digest.update(json.dumps([name, entry.dtype, entry.shape, self._digests[name]]).encode())
        return digest.hexdigest()

    def _bytes(self, name: str) -> Tensor:
        """The bytes of a tensor, uint8 [n]."""
        raise NotImplementedError


class AdapterMemory(AdapterTensors):
    """Tensors that a program holds, on any device; `name` stands for their origin."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        names = {dtype: short for short, dtype in DTYPES.items()}
        for key, tensor in tensors.items():
            if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_meta:
                found = f"{type(tensor).__name__} on {getattr(tensor, 'device', 'no device')}"
                raise AdapterError(f"tensors of {name}: {key}: expected a torch.Tensor with all values, found {found}. Of a DTensor pass full_tensor().")
        entries = {key: TensorEntry(names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape), 0, tensor.nbytes) for key, tensor in tensors.items()}
        super().__init__(Path(f"tensors of {name}"), {}, entries)
        self._tensors = tensors

    def _bytes(self, name: str) -> Tensor:
        return self._tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)


class AdapterFile(AdapterTensors):
    """The safetensors file at `path`, open as `file`. `entries` and `metadata` come from its header; AdapterError for a truncated or corrupt one."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        metadata, entries, self._data_start = _read_header(path, file)
        super().__init__(path, metadata, entries)
        self._file = file

    def _bytes(self, name: str) -> Tensor:
        entry = self.entries[name]
        raw = torch.empty(entry.end - entry.start, dtype=torch.uint8)
        self._file.seek(self._data_start + entry.start)
        count = self._file.readinto(raw.numpy().data)
        if count != raw.numel():
            raise AdapterError(f"{self.path}: {name}: expected {raw.numel()} bytes, found {count}: the file was changed while it was read. Load it again.")
        return raw


def _read_header(path: Path, file: io.BufferedReader) -> tuple[dict[str, str], dict[str, TensorEntry], int]:
    """(metadata, entries, place of the first byte behind the header)."""
    head, size = file.read(8), os.fstat(file.fileno()).st_size
    length = int.from_bytes(head, "little")
    text = file.read(min(length, size, MAX_HEADER))
    with tempfile.TemporaryFile(buffering=0) as copy:  # as large, and empty behind the header: safe_open maps what it checks
        copy.write(head + text)
        copy.truncate(size)
        try:
            with safe_open(f"/proc/self/fd/{copy.fileno()}" if sys.platform == "linux" else path, framework="pt") as checked:
                metadata = checked.metadata() or {}
        except SafetensorError as error:
            found = f"expected a whole one, found {size} bytes: {error}"
            raise AdapterError(f"{path}: truncated or not a safetensors file: {found}. Copy or download it again.") from error
    header = json.loads(text)
    header.pop("__metadata__", None)
    return metadata, {name: TensorEntry(item["dtype"], tuple(item["shape"]), *item["data_offsets"]) for name, item in header.items()}, 8 + length
