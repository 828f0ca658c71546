"""The builder of the CUDA operators: what it compiles passes the gates, caches by content, and says what is missing."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_lora_moe.ops import build
from tests.ops import ahead


@pytest.fixture
def nvcc() -> Path:
    try:
        build.find_cxx()  # which nvcc needs
        return build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A csrc/ of one small kernel and one small binding beside a package, and an empty cache."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "answer.cu").write_text('#include "answer.h"\n__global__ void kernel(int* p) { *p = ANSWER; }\nextern "C" int answer() { return ANSWER; }\n')
    (csrc / "answer.h").write_text("#define ANSWER 42\n")
    (csrc / "bindings.cpp").write_text("")
    monkeypatch.setattr(build, "PACKAGE", tmp_path / "sglang_lora_moe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build.source_hash.cache_clear()
    yield tmp_path
    build.source_hash.cache_clear()


def gate(nvcc: Path, arch: str, source: str) -> ahead.Command:
    """Compiles one file for one family of GPUs, sm_120 beside sm_100, and reports what its kernels take."""
    command = build.compile_command(nvcc, build.find_cxx(), build.sources_folder() / source, ahead.FOLDER / f"{source}-{arch}.fatbin", [arch])
    other = {"-c": "-fatbin", "-gencode=arch=compute_100,code=sm_100": "-gencode=arch=compute_100,code=[sm_100,sm_120]"}
    return ahead.command(*(other.get(part, part) for part in command), "-Xptxas", "-v")


def waits_for(item: pytest.Function) -> ahead.Command | None:
    if item.originalname != "test_kernels_compile_without_spills":
        return None
    try:
        return gate(build.find_nvcc(), **item.callspec.params)
    except build.BuildError:
        return None


@pytest.mark.parametrize("source", [p.name for p in build.sources() if p.suffix == ".cu"])
@pytest.mark.parametrize("arch", ["90a", "80", "100"])  # the longest first
def test_kernels_compile_without_spills(nvcc: Path, arch: str, source: str) -> None:
    """Each kernel file for each family of GPUs: code, no spilled registers, no local memory."""
    run = ahead.finished(gate(nvcc, arch, source))
    assert run.returncode == 0, run.stderr[-2000:]
    report = run.stdout + run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    compiled = re.findall(r"Compiling entry function .* for 'sm_(\w+)'", report)
    assert 0 < len(spills) == len(compiled) and set(compiled) == ({"100", "120"} if arch == "100" else {arch})
    assert all(found == ("0", "0", "0") for found in spills), f"{source} for sm_{arch}:\n{report}"


def test_blocks_know_their_rank_on_every_family_that_has_clusters(nvcc: Path, tmp_path: Path) -> None:
    """It must be read, not taken for 0, where a norm's blocks share a row: not on Hopper alone."""
    command = build.compile_command(nvcc, build.find_cxx(), build.sources_folder() / "norm_rope.cu", tmp_path / "out.ptx", ["100"])
    ptx = {"-c": "-ptx", "-gencode=arch=compute_100,code=sm_100": "-arch=compute_100"}
    subprocess.run([ptx.get(part, part) for part in command], check=True, capture_output=True)
    kernels = (tmp_path / "out.ptx").read_text().split(".entry")[1:]
    waiting = [kernel for kernel in kernels if "barrier.cluster.wait" in kernel]
    assert waiting and all("%cluster_ctarank" in kernel for kernel in waiting)


def test_sources_ask_for_no_family_beyond_hopper() -> None:
    """So that the PTX of sm_100 and sm_120 is the same, and code for both is compiled from one."""
    asked = [re.findall(r"__CUDA_ARCH__\b(?! (?:>=|<) 900\b|\))", p.read_text()) for p in build.sources_folder().glob("*.[ch]*")]
    assert len(asked) > 20 and not any(asked)


def test_emulator_cases_compile_for_the_gpu(nvcc: Path, tmp_path: Path) -> None:
    source = Path(__file__).parent / "emulator_cases.cu"
    command = build.compile_command(nvcc, build.find_cxx(), source, tmp_path / "out.o", ["80"])
    subprocess.run([*command, f"-I{build.sources_folder()}"], check=True, capture_output=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """All sources compiled by the host's compiler: nvcc takes long for the large kernels, and the binding does not see the difference."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ on this machine")
    folder, found = tmp_path_factory.mktemp("objects"), []
    for source in build.sources():
        found.append(folder / f"{source.name}.o")
        includes = [*build.DEFINES, f"-I{build.torch_folder() / 'include'}"] if source.suffix == ".cpp" else ["-x", "c++"]
        subprocess.run([build.find_cxx(), "-std=c++17", "-O0", "-fPIC", "-w", *includes, "-c", source, "-o", found[-1]], check=True)
    return found


@pytest.mark.parametrize("stdcxx", [["-lstdc++"], ["-Wl,-Bstatic", "-lstdc++", "-Wl,-Bdynamic"]], ids=["shared libstdc++", "its archive"])
def test_library_loads_into_this_torch(objects: list[Path], stdcxx: list[str], tmp_path: Path) -> None:
    """The stable-ABI library registers its CUDA implementations even with CPU torch, leaves the CPU ones alone, and refuses with a sentence."""
    library = tmp_path / "ops.so"
    libraries = [part for name in build.LIBRARIES for part in (stdcxx if name == "-lstdc++" else [name])]
    subprocess.run([build.find_cxx(), "-shared", *build.LINK_FLAGS, *objects, f"-L{build.torch_folder() / 'lib'}", *libraries, "-o", library], check=True)
    script = f"""
import ctypes, torch
from sglang_lora_moe.ops.moe_lora_align import moe_lora_align_block_size, workspace_elements
torch.ops.load_library({str(library)!r})
assert torch._C._dispatch_has_kernel_for_dispatch_key("sglang_lora_moe::moe_lora_align_block_size", "CUDA")
ids, slots = torch.tensor([[0, 2], [2, 0], [2, -1]]), torch.tensor([1, -1, -1], dtype=torch.int32)
found = moe_lora_align_block_size(ids, slots, 3, 2, 2, 16)
assert found.counts.tolist() == [5, 3, 2, 2]
size = ctypes.CDLL({str(library)!r}).moe_lora_align_workspace
size.argtypes, size.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
for pairs, experts in ((0, 1), (8, 128), (8191, 8), (8192, 8), (70000, 1024)):
    assert size(pairs, experts) == workspace_elements(pairs, experts), (pairs, experts)
tensors = (found.sorted_pairs, found.base_tiles, found.lora_tiles, found.counts, found.counts)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
try:
    torch.ops.sglang_lora_moe.moe_lora_align_block_size.default.redispatch(cuda, ids, slots, 1025, 2, 2, 16, *tensors)
except RuntimeError as error:
    assert "expected num_experts in 1..1024, got 1025" in str(error), error
else:
    raise AssertionError("1,025 experts were not refused")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, f"{run.returncode}: {run.stderr[-2000:]}"


def _build_and_time(package: Path, results: multiprocessing.Queue[tuple[str, int]]) -> None:
    build.PACKAGE = package
    path = build.library_path(("90a",))
    results.put((str(path), path.stat().st_ino))


def test_concurrent_processes_build_once(nvcc: Path, checkout: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[tuple[str, int]] = context.Queue()
    processes = [context.Process(target=_build_and_time, args=(build.PACKAGE, results)) for _ in range(3)]
    for process in processes:
        process.start()
    found = {results.get(timeout=600) for _ in processes}
    for process in processes:
        process.join()
    assert ctypes.CDLL(found.copy().pop()[0]).answer() == 42
    assert len(found) == 1, "two processes built the library, or one saw another's half of it"
    assert [p.suffix for p in build.cache_folder().iterdir() if p.name.startswith(".build")] == []


def test_cache_is_keyed_by_content_and_flags(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []

    def fake_build(target: Path, architectures: object) -> None:
        built.append(target)
        target.write_text("library")

    monkeypatch.setattr(build, "build", fake_build)
    first = build.library_path(("90a",))
    assert build.library_path(("90a",)) == first and built == [first]
    assert build.library_path(("80",)) != first
    (checkout / "csrc" / "answer.h").write_text("#define ANSWER 43\n")
    build.source_hash.cache_clear()
    assert build.library_path(("90a",)) not in built[:2]
    assert len(built) == 3


def test_a_library_in_the_wheel_is_used_where_it_fits(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build", lambda target, architectures: target.parent.mkdir(parents=True, exist_ok=True) or target.write_text("library"))
    shipped = build.build_ahead_of_time(str(checkout))
    assert build.library_path(("90a",)) == shipped
    assert build.library_path(("86",)) == shipped and build.library_path(("103", "80")) == shipped
    assert build.library_path(("110",)) != shipped  # no code for this family: built at first use
    (checkout / "csrc" / "answer.h").write_text("#define ANSWER 43\n")
    build.source_hash.cache_clear()
    assert build.library_path(("90a",)) != shipped


def test_architectures_are_those_of_the_gpus_and_old_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(9, 0), (8, 6)]
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(found))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda i: found[i])
    assert build.device_architectures() == ("86", "90a")
    found.append((7, 5))
    with pytest.raises(build.BuildError, match=r"compute capability 8\.0 \(Ampere\) or newer, this GPU has 7\.5"):
        build.device_architectures()


def test_missing_compilers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(build.os, "access", lambda path, mode: False)
    with pytest.raises(build.BuildError, match=r"pip install 'sglang-lora-moe\[cuda-compiler\]'"):
        build.find_nvcc()
    with pytest.raises(build.BuildError, match="apt install g"):
        build.find_cxx()


def test_the_extra_named_in_the_message_exists() -> None:
    pyproject = Path(__file__).parent.parent.parent / "pyproject.toml"
    assert re.search(rf"^{build.COMPILER_EXTRA} = \[", pyproject.read_text(), re.MULTILINE)


def test_compiler_errors_are_shown(nvcc: Path, checkout: Path) -> None:
    (checkout / "csrc" / "answer.cu").write_text("this is no CUDA\n")
    with pytest.raises(build.BuildError, match=r"answer.cu"):
        build.library_path(("90a",))
    assert not list(build.cache_folder().glob("*.so"))


def test_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A container may run as a user without a name or a home."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build.cache_folder().parent == tmp_path


def test_wheel_compiler_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    real = build.os.access
    monkeypatch.setattr(build.os, "access", lambda path, mode: real(path, mode) and "/usr/local" not in str(path))
    assert build.find_nvcc() == compiler
    (compiler.parent.parent / "lib").mkdir()
    (compiler.parent.parent / "lib" / "libcudart_static.a").write_text("")
    assert f"-L{compiler.parent.parent / 'lib'}" in build.link_command(compiler, "g++", [], tmp_path / "x.so")
