"""ARCHITECTURE.md names every file, and the path of a request that it lists stays short enough to be read: at most 12 files and 2,000 lines."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def path_of_a_request() -> list[tuple[str, int]]:
    """The (file, lines) table rows under "The path of a request"."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    section = text.split("## The path of a request", 1)[1].split("\n## ", 1)[0]
    return [(name, int(count)) for name, count in re.findall(r"^\| `(\S+?)` \| (\d+) \|", section, re.MULTILINE)]


def test_path_is_short() -> None:
    listed = path_of_a_request()
    assert 0 < len(listed) <= 12
    assert len({name for name, _ in listed}) == len(listed)
    counted = {name: len((ROOT / name).read_text().splitlines()) for name, _ in listed}
    assert sum(counted.values()) <= 2000, counted


def test_line_counts_are_near_the_truth() -> None:
    for name, count in path_of_a_request():
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(lines - count) <= max(20, lines // 4), f"{name} has {lines} lines, ARCHITECTURE.md says {count}"


def test_eight_steps_name_the_files() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().split("## The path of a request", 1)[1].split("\n## ", 1)[0]
    assert re.findall(r"^(\d)\. ", section, re.MULTILINE) == list("12345678")
    steps = section.split("\n1. ", 1)[1]
    for name, _ in path_of_a_request():
        assert f"`{name.removeprefix('sglang_lora_moe/')}`" in steps, name


def test_every_file_is_explained() -> None:
    section = (ROOT / "ARCHITECTURE.md").read_text().split("## Every file", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"`([^`]+)`", section))
    package = [path.relative_to(ROOT / "sglang_lora_moe") for path in (ROOT / "sglang_lora_moe").rglob("*.py") if path.read_text().strip()]
    assert [str(path) for path in package if str(path) not in named] == []
    kernels = [path.relative_to(ROOT / "csrc") for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".cpp", ".h")]
    families = {re.sub(r"(_bindings|_int8)?$", "", path.stem) for path in kernels if str(path) not in named}  # `NAME` stands for all files of it
    assert sorted(families - named) == []
    for name in named:
        assert "." not in name or any((ROOT / folder / name).exists() for folder in ("", "sglang_lora_moe", "csrc")) or re.match(r"NAME|_int8|\.", name), name
