"""Our server on a real shape with random weights, adapters and tokenizer, which need no files: something for bench_serving to ask.

    python -m benchmarks.dummy_server --port 30000                            Qwen3-30B-A3B in bfloat16, 4 adapters of rank 16
    python -m benchmarks.dummy_server --weights int4-g128 --adapters 8 --max-running-requests 64
    python -m benchmarks.dummy_server --layers 1 --experts 8                  anywhere, to try it

Other flags are the server's. Everything on the way of a request is the real thing but the reading of adapters: the engine process
makes one image of random weights, which stands for all of them. The tokenizer has the model's vocabulary of byte-level words.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.dummy_model import CONFIGS, QUANTIZATIONS, make_adapters, write_config
from sglang_lora_moe.engine import child
from sglang_lora_moe.engine.process import run_engine_process
from sglang_lora_moe.launch_server import main as launch
from sglang_lora_moe.lora.packed import PackedAdapter
from sglang_lora_moe.lora.reader import AdapterReader

RANK = "SGLANG_LORA_MOE_DUMMY_RANK"  # tells the engine process


def run_engine() -> int:
    """Main function of the engine process: adapters come from nowhere."""
    made: list[PackedAdapter] = []

    def read(self: AdapterReader, path: str) -> PackedAdapter:
        if not made:
            made.extend(make_adapters(self.layout, int(os.environ[RANK]), 1, "cuda" if torch.cuda.is_available() else "cpu"))
        return replace(made[0], path=path, revision=f"dummy-{path}")

    AdapterReader.read = read  # type: ignore[method-assign]
    return run_engine_process()


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level tokenizer of so many different words, each with the space before it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocab = {chr(code): number for number, code in enumerate(range(33, 127))}

    def word(number: int) -> str:
        return "Ġ" + "".join(letters[number // 26**place % 26] for place in range(4))

    vocab |= {word(number): number for number in range(len(vocab), vocab_size)}
    coder: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False, "vocab": vocab, "merges": []}
    parts = {"version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": coder, "post_processor": None, "decoder": coder, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(parts))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--shape", default="qwen3-30b-a3b", choices=sorted(CONFIGS))
    parser.add_argument("--weights", default="bf16", choices=sorted(QUANTIZATIONS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--experts", type=int)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args, rest = parser.parse_known_args()
    overrides = {name: value for name, value in {"num_hidden_layers": args.layers, "num_experts": args.experts}.items() if value}
    os.environ[RANK] = str(args.rank)
    child.ENTRY = f"from {Path(__file__).parent.name}.{Path(__file__).stem} import run_engine as run"
    flags = ["--load-format", "dummy"]
    if args.adapters:
        flags += ["--max-loras-per-batch", str(args.adapters), "--max-lora-rank", str(args.rank), "--lora-paths", *(f"a{i}={i}" for i in range(args.adapters))]
    with tempfile.TemporaryDirectory() as folder:
        model = write_config(args.shape, Path(folder) / args.shape, **QUANTIZATIONS[args.weights], **overrides)
        write_tokenizer(model, CONFIGS[args.shape]["vocab_size"])
        return launch(["--model-path", str(model), *flags, *rest])


if __name__ == "__main__":
    raise SystemExit(main())
