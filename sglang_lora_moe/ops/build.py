"""Builds csrc/ into one shared library of CUDA operators, once for each content of the sources, and loads it.

nvcc compiles the `.cu` files and g++ the binding; no build system, no torch extension machinery. The library is kept in the user's cache folder under a hash of
sources and flags, or lies in an installed wheel that was built with a compiler at hand (`build_ahead_of_time`, called by setup.py, which loads this file alone:
it imports nothing of the package). Nothing here runs on a machine without a GPU unless a test asks for it.
"""

import concurrent.futures
import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
AHEAD_OF_TIME = ("80", "90a", "100", "120")  # one for each family since Ampere; code for 8.0 runs on 8.x, for 10.0 on 10.x
COMPILER_EXTRA = "cuda-compiler"  # the extra in pyproject.toml that brings nvcc as wheels
DEFINES = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DUSE_CUDA")  # LibTorch's stable ABI as of 2.11
CXX_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-Wall")
NVCC_FLAGS = ("-O3", "-std=c++17", "-Xcompiler", "-fPIC")
# torch's own libraries are loaded without global symbols, so the library must name them as needed; which CUDA symbols they have
# depends on the build of torch, so undefined ones are allowed (the binding declares them weak). A compiler that comes without the
# shared libstdc++ links its archive: exported, that copy mixes with the one the process has, and the first number in an error
# message is a segmentation fault. So archives are not exported, and libstdc++ comes before torch, which exports parts of it too.
LINK_FLAGS = ("-Xlinker", "--no-as-needed", "-Xlinker", "--allow-shlib-undefined", "-Xlinker", "--exclude-libs", "-Xlinker", "ALL")
LIBRARIES = ("-lstdc++", "-ltorch", "-ltorch_cpu")


class BuildError(ValueError):
    """The CUDA operators cannot be built here; the message says what to install or what the compiler said."""


@functools.cache
def load() -> None:
    """Make the CUDA implementations of all our operators known to torch, building them first if need be."""
    import torch

    if not torch.cuda.is_available():
        raise BuildError("the CUDA operators need an NVIDIA GPU, and torch sees none: use --moe-runner-backend torch_native")
    torch.ops.load_library(str(library_path(device_architectures())))


def device_architectures() -> tuple[str, ...]:
    """The architectures of the visible GPUs as nvcc names them."""
    import torch

    capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    oldest = min(capabilities)
    if oldest < (8, 0):
        raise BuildError(f"the CUDA operators need compute capability 8.0 (Ampere) or newer, this GPU has {oldest[0]}.{oldest[1]}")
    return tuple(sorted({"90a" if c == (9, 0) else f"{c[0]}{c[1]}" for c in capabilities}))


def library_path(architectures: Sequence[str]) -> Path:
    """The library for these architectures: from the installed wheel, from the cache, or built now."""
    for shipped in sorted((PACKAGE / "ops").glob(f"cuda_ops-*-{source_hash(())}.so")):
        if all(_covered(arch, shipped.name.split("-")[1].split("_")) for arch in architectures):
            return shipped
    target = cache_folder() / f"cuda_ops-{'_'.join(architectures)}-{source_hash(architectures)}.so"
    if not target.exists():
        with open(target.with_suffix(".lock"), "w") as lock:  # other processes wait here for the one that builds
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                build(target, architectures)
    return target


def build_ahead_of_time(build_lib: str) -> Path:
    """For setup.py: the library for all families of GPUs, into the wheel's copy of the package."""
    target = Path(build_lib) / "sglang_lora_moe" / "ops" / f"cuda_ops-{'_'.join(AHEAD_OF_TIME)}-{source_hash(())}.so"
    build(target, AHEAD_OF_TIME)
    return target


def build(target: Path, architectures: Sequence[str]) -> None:
    """Compile and link into `target`, which appears whole or not at all."""
    nvcc, cxx = find_nvcc(), find_cxx()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        objects = [Path(scratch) / f"{source.name}.o" for source in sources()]
        commands = [compile_command(nvcc, cxx, source, out, architectures) for source, out in zip(sources(), objects, strict=True)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        library = Path(scratch) / target.name
        _run(link_command(nvcc, cxx, objects, library))
        os.replace(library, target)


def compile_command(nvcc: Path, cxx: str, source: Path, out: Path, architectures: Sequence[str]) -> list[str]:
    if source.suffix == ".cu":
        # -arch=sm_90a alone would run a plain sm_90 pass too, which rejects wgmma
        codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
        return [str(nvcc), *NVCC_FLAGS, "-ccbin", cxx, *codes, "-c", str(source), "-o", str(out)]
    return [cxx, *CXX_FLAGS, *DEFINES, f"-I{torch_folder() / 'include'}", "-c", str(source), "-o", str(out)]


def link_command(nvcc: Path, cxx: str, objects: Sequence[Path], library: Path) -> list[str]:
    wheel_lib = nvcc.parent.parent / "lib"  # the compiler from wheels keeps libcudart_static.a here, where nvcc does not look
    found = [f"-L{wheel_lib}"] if (wheel_lib / "libcudart_static.a").exists() else []
    return [str(nvcc), "-shared", "-ccbin", cxx, *LINK_FLAGS, *map(str, objects), *found, f"-L{torch_folder() / 'lib'}", *LIBRARIES, "-o", str(library)]


def find_nvcc() -> Path:
    """CUDACXX, then PATH, CUDA_HOME, the toolkit's usual place, and the wheels of the compiler extra."""
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [os.path.join(os.environ[name], "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    candidates += ["/usr/local/cuda/bin/nvcc"]
    candidates += [os.path.join(entry, "nvidia", "cu13", "bin", "nvcc") for entry in sys.path]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return Path(candidate)
    raise BuildError(
        "no CUDA compiler (nvcc) found in CUDACXX, PATH, CUDA_HOME, /usr/local/cuda or this Python's packages: "
        f"`pip install 'sglang-lora-moe[{COMPILER_EXTRA}]'` installs one"
    )


def find_cxx() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise BuildError("no C++ compiler found in CXX or as g++: install one (Debian and Ubuntu: apt install g++)")
    return found


def sources_folder() -> Path:
    """csrc/ beside the package in a checkout, inside it in an installed wheel."""
    for folder in (PACKAGE.parent / "csrc", PACKAGE / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(f"csrc/ is neither beside {PACKAGE} nor inside it: this installation of sglang_lora_moe is incomplete")


def sources() -> list[Path]:
    return sorted(p for p in sources_folder().iterdir() if p.suffix in (".cu", ".cpp"))


@functools.cache
def source_hash(architectures: Sequence[str]) -> str:
    """Of everything that decides what the library does: names and contents of the sources, and the flags."""
    digest = hashlib.sha256(repr((DEFINES, CXX_FLAGS, NVCC_FLAGS, LINK_FLAGS, LIBRARIES, tuple(architectures))).encode())
    for path in sorted(p for p in sources_folder().iterdir() if p.suffix in (".cu", ".cpp", ".cuh", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """The user's cache folder, or one in the temporary folder where there is no writable home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = (Path(base) if base else Path.home() / ".cache") / "sglang_lora_moe"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass  # a read-only or missing home, or a user without one: the temporary folder serves
    folder = Path(tempfile.gettempdir()) / f"sglang_lora_moe-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise BuildError(f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of yours")
    return folder


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch is not installed: the CUDA operators are compiled against its headers")
    return Path(spec.origin).parent


def _covered(arch: str, built: Sequence[str]) -> bool:
    """Whether code for one of `built` runs on `arch`: the same, or an older minor version of the family (a suffix `a` binds to exactly one)."""
    return arch in built or any(b.isdigit() and arch.isdigit() and b[:-1] == arch[:-1] and int(b) <= int(arch) for b in built)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"building the CUDA operators failed:\n{' '.join(command)}\n{(done.stderr or done.stdout)[-4000:]}")
