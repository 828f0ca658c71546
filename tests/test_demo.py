"""The embedded demo does what it says: base and adapters on words that training never showed, and the README's first screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from transformers import AutoTokenizer

from demo_tasks import ADAPTERS, TASKS, held_out_words
from sglang_lora_moe.engine.engine import Engine
from tests.demo_server import DEMO, ROOT, demo_server

WORDS = held_out_words(200, seed=1)
GREEDY = {"temperature": 0.0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(model_path=str(DEMO / "base"), enable_lora=True, lora_paths=[f"{name}={DEMO / name}" for name in ADAPTERS])
    yield engine
    engine.shutdown()


@pytest.mark.parametrize("task", TASKS)
def test_right_on_held_out_words(engine: Engine, task: str) -> None:
    outputs = engine.generate([f"{word}>" for word in WORDS], GREEDY, lora_path=None if task == "base" else task)
    wrong = [(word, out["text"]) for word, out in zip(WORDS, outputs, strict=True) if out["text"] != TASKS[task](word)]
    assert not wrong  # README: 100 % right; the least likely token of all answers has a probability of 0.58


def test_one_batch_of_all_adapters(engine: Engine) -> None:
    """Every word through every task in one call, the adapter changing from prompt to prompt."""
    pairs = [(word, task) for word in WORDS[:20] for task in TASKS]
    outputs = engine.generate([f"{word}>" for word, _ in pairs], GREEDY, lora_path=[None if task == "base" else task for _, task in pairs])
    assert [out["text"] for out in outputs] == [TASKS[task](word) for word, task in pairs]


def test_chat_prompt_is_the_word_and_a_mark() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    messages = [{"role": "system", "content": "ignored"}, {"role": "user", "content": "hello"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.encode("hello>")


def readme_first_screen() -> tuple[str, str]:
    """The README's request (a bash block with curl) and the block after it, which is what it prints."""
    found = re.search(r"```bash\n(for model in.*?)```.*?```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found, "README.md has no `for model in` block followed by its output"
    return found.group(1), found.group(2)


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_readme_request_prints_what_the_readme_says() -> None:
    script, printed = readme_first_screen()
    with demo_server() as url:
        result = subprocess.run(["bash", "-c", script.replace("localhost:30000", url.removeprefix("http://"))], capture_output=True, text=True, timeout=60)
    assert result.stdout == printed, result.stderr
