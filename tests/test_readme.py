"""README.md and ARCHITECTURE.md state only what is true: flags, commands, links and JSON in them are checked."""

from __future__ import annotations

import dataclasses
import json
import re
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from sglang_lora_moe.config import Config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = ("README.md", "ARCHITECTURE.md")


def flag_table() -> str:
    """The flags as a Markdown table, as README has it."""
    rows = ["| flag | default | meaning |", "| --- | --- | --- |"]
    for f in dataclasses.fields(Config):
        default = "" if f.default in (None, "", dataclasses.MISSING) else f"`{f.default}`"
        choices = f" ({', '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        rows.append(f"| `--{f.name.replace('_', '-')}` | {default} | {f.metadata['help']}{choices} |")
    return "\n".join(rows)


FLAGS = set(re.findall(r"`(--[a-z-]+)`", flag_table()))
OTHER_FLAGS = {"--help"}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_flag_table_is_the_configuration() -> None:
    found = re.search(r"<!-- flags -->\n(.*?)\n<!-- end of flags -->", README, re.DOTALL)
    assert found, "README.md lacks the markers of the flag table"
    assert found.group(1) == flag_table(), f"put this between the markers:\n{flag_table()}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    commands = set(re.findall(r"^  ([a-z-]+)\)$", (ROOT / "run").read_text(), re.MULTILINE))
    assert set(re.findall(r"\./run ([a-z-]+)", text)) <= commands
    for name in re.findall(r"\./run bench ([a-z_]+)", text):
        assert (ROOT / "benchmarks" / f"bench_{name}.py").exists(), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str) -> None:
    mentioned = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]+)", (ROOT / document).read_text()))
    assert mentioned - FLAGS - OTHER_FLAGS == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_resolve(document: str) -> None:
    text = (ROOT / document).read_text()
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target.partition("#")[0]).exists(), target


def tree_paths() -> list[str]:
    """Paths of the annotated tree: an indented name opens a level, `{a,b}` is not used."""
    found = re.search(r"## Tree\n.*?```\n(.*?)```", README, re.DOTALL)
    assert found, "README.md has no tree"
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in found.group(1).splitlines():
        match = re.match(r"( *)(\S+)", line)
        if not match or line.startswith(" " * 20):
            continue
        indent, name = len(match.group(1)), match.group(2)
        while parents and parents[-1][0] >= indent:
            parents.pop()
        path = (parents[-1][1] if parents else "") + name
        paths.append(path)
        if name.endswith("/"):
            parents.append((indent, path))
    return paths


def test_tree_is_the_tree() -> None:
    paths = tree_paths()
    assert paths and not [path for path in paths if not (ROOT / path).exists()]


def test_json_parses() -> None:
    """JSON blocks, and the bodies of curl's -d."""
    bodies = re.findall(r"-d '(\{.*?\})'(?=\s|$)", re.sub(r"'\$\w+'", "name", "\n".join(blocks(README, "bash"))), re.DOTALL | re.MULTILINE)
    assert bodies
    for body in [*blocks(README, "json"), *bodies]:
        json.loads(body)


def test_python_compiles() -> None:
    found = blocks(README, "python")
    assert found
    for block in found:
        compile(block, "README.md", "exec")


def test_run_asks_for_a_python_that_the_pinned_versions_take() -> None:
    found = re.search(r"sys.version_info < \((\d+), (\d+)\)", (ROOT / "run").read_text())
    assert found
    oldest = ".".join(found.groups())
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    here = [distribution for distribution in distributions() if distribution.version == pins.get(distribution.name)]
    assert here, "none of the pinned versions is installed"
    needs = {f"{one.name} {one.version}": one.metadata["Requires-Python"] or "" for one in here}
    refusing = {name: need for name, need in needs.items() if oldest not in SpecifierSet(need)}
    assert not refusing, f"these do not install on the Python {oldest} that ./run accepts: {refusing}"
