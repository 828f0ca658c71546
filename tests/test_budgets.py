"""Size budgets, so that a reader can hold any part of the package in mind. Raising one is a reviewed change of this file.

A function may be longer or take more parameters than the budget if a comment `# budget: REASON` stands in its signature.
"""

from __future__ import annotations

import ast
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE_LINES, KERNEL_FILE_LINES, FUNCTION_LINES, PARAMETERS, PACKAGE_LINES = 400, 800, 60, 8, 16_000
SOURCES = {".py", ".cu", ".cuh", ".cpp", ".h"}


def source_files() -> list[Path]:
    """Sources of the package and the kernels (all files, not only tracked ones: a budget holds before the commit)."""
    return sorted(p for top in ("sglang_lora_moe", "csrc") for p in (ROOT / top).rglob("*") if p.suffix in SOURCES)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def has_reason(source: list[str], function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("# budget:" in line for line in source[function.lineno - 1 : function.body[0].lineno])


def is_kernel_file(path: Path) -> bool:
    return path.is_relative_to(ROOT / "csrc") or path.is_relative_to(ROOT / "sglang_lora_moe" / "ops")


def test_files_are_short() -> None:
    found = {}
    for path in source_files():
        lines, limit = len(path.read_text().splitlines()), KERNEL_FILE_LINES if is_kernel_file(path) else FILE_LINES
        if lines > limit:
            found[str(path.relative_to(ROOT))] = f"{lines} lines, budget {limit}"
    assert not found


def test_functions_are_short() -> None:
    found = {}
    for path in source_files():
        source = path.read_text().splitlines()
        for function in functions(path) if path.suffix == ".py" else ():
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > FUNCTION_LINES and not has_reason(source, function):
                found[f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"] = f"{lines} lines, budget {FUNCTION_LINES}"
    assert not found


def test_functions_take_few_parameters() -> None:
    found = {}
    for path in source_files():
        source = path.read_text().splitlines()
        for function in functions(path) if path.suffix == ".py" else ():
            if any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list):
                continue  # kernels take pointers, sizes and strides one by one
            arguments = function.args
            count = len([a for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg not in ("self", "cls")])
            if count > PARAMETERS and not has_reason(source, function):
                found[f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"] = f"{count} parameters, budget {PARAMETERS}"
    assert not found


def test_package_is_small() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in source_files() if path.is_relative_to(ROOT / "sglang_lora_moe")}
    assert sum(lines.values()) <= PACKAGE_LINES, f"{sum(lines.values())} lines, budget {PACKAGE_LINES}"


def test_nothing_large_is_committed() -> None:
    """The demo and the quantized checkpoints of the tests are the only binary data, and are small."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
    files = [ROOT / name for name in listed.splitlines()]  # none outside a checkout
    weights = list((ROOT / "examples").rglob("*.safetensors"))
    assert sum(p.stat().st_size for p in weights) <= 4 * 2**20
    assert sum(p.stat().st_size for p in (ROOT / "tests" / "data").rglob("*.safetensors")) <= 2**20
    assert not [p for p in files if p.exists() and p.stat().st_size > 2**18 and p not in weights]
