"""What every Triton launch here needs to know of the device, and the argument checks of the ops."""

from functools import lru_cache

import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_INTERPRETED_BYTES = 227 * 1024
_INTERPRETED_PROGRAMS = 3  # persistent grids in the interpreter: few, but more than one


@lru_cache(maxsize=16)
def _properties(index: int | None) -> tuple[int, int, int]:
    """(multiprocessors, compute capability * 10, most bytes of shared memory of a block) of a CUDA device."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return found.multi_processor_count, found.major * 10 + found.minor, getattr(found, "shared_memory_per_block_optin")  # noqa: B009  (torch's stub lacks it)


def multiprocessors(device: torch.device) -> int:
    return _properties(device.index)[0] if device.type == "cuda" else _INTERPRETED_PROGRAMS


def shared_memory(device: torch.device) -> int:
    """Most bytes of a block: 163 KB on sm_80, 227 on sm_90 and sm_100, 99 on other GPUs."""
    return _properties(device.index)[2] if device.type == "cuda" else _INTERPRETED_BYTES


def has_tma(device: torch.device) -> bool:
    """Tensor descriptors and programmatic dependent launch; the interpreter has descriptors."""
    return device.type != "cuda" or _properties(device.index)[1] >= 90


def has_wgmma(device: torch.device) -> bool:
    """Hopper's own matrix instructions, which csrc/moe_wgmma_gemm.cu is written in; later families have others."""
    return device.type == "cuda" and _properties(device.index)[1] == 90


def options(device: torch.device) -> dict[str, bool]:
    """Programmatic dependent launch where there is a Hopper or newer GPU: kernels start before the one before has ended."""
    return {"PDL": True, "launch_pdl": True} if device.type == "cuda" and has_tma(device) else {"PDL": False}


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are exact to float32 (no TF32); 16-bit inputs do not care."""
    return "ieee" if dtype == torch.float32 else "tf32"


def expect(what: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless the tensor is contiguous and of this shape, dtype and device."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        layout = "" if tensor.is_contiguous() else f" with strides {tensor.stride()}"
        raise ValueError(f"{what}: expected contiguous {dtype} {shape} on {device}, got {tensor.dtype} {tuple(tensor.shape)}{layout} on {tensor.device}")


def expect_float(what: str, dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"{what}: expected one of {', '.join(str(d) for d in DTYPES)}, got {dtype}")
