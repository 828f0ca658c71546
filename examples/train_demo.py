"""Train the embedded demo from nothing: a small Qwen3-MoE that copies a word, and PEFT adapters on its experts.

    python examples/train_demo.py [--out examples/demo] [--only upper,caesar]

Everything is seeded; two idle CPU cores need some minutes. The base is trained in float32 and stored as bfloat16; adapters
are trained on the stored base. The accuracy in the table at the end is PEFT's own, from the stored files, on 200 words
that training never shows (`demo_tasks.is_held_out`).

All adapters are trained by PEFT through `target_parameters`. Two are then rewritten, value for value, in other layouts
that circulate, so that the demo exercises the reader: `caesar` with one 2D pair per expert and projection (what PEFT wrote
under transformers 4) and `leet` with shared outer matrices (A of gate/up and B of down once for all experts).
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from demo_tasks import ADAPTERS, LETTERS, TASKS, held_out_words, is_held_out, random_word

PAD, BOS, EOS = 0, 1, 2
NUM_EXPERTS, HIDDEN, INTERMEDIATE = 8, 128, 128  # multiples of 128, so that every quantization format can store the base
WORDS = ["hello", "world", "mixture", "expert", "adapter", "router", "token", "serve", "batch", "kernel", "python", "banana", "window", "garden"]
WIDE = LETTERS + LETTERS.upper() + "0123456789*#-_."  # half of the base's data: a character never answered by the base is beyond an adapter's reach
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Recipe:
    """One adapter: its rank, what it adapts, and the layout in which it is stored."""

    rank: int
    parameters: list[str] = field(default_factory=lambda: list(EXPERTS))
    modules: list[str] = field(default_factory=list)
    layout: str = "peft"  # "peft" | "per-expert" | "shared-outer"
    use_rslora: bool = False
    steps: int = 700
    seed: int = 0

    def config(self) -> LoraConfig:
        alpha = 8 if self.use_rslora else 2 * self.rank
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=alpha,
            use_rslora=self.use_rslora,
            target_modules=list(self.modules),
            target_parameters=list(self.parameters),
        )


RECIPES = {
    "upper": Recipe(rank=8),
    "caesar": Recipe(rank=8, layout="per-expert"),
    "vowels": Recipe(rank=4, parameters=EXPERTS[1:]),
    "leet": Recipe(rank=4, layout="shared-outer"),
    "digits": Recipe(rank=16, use_rslora=True),
    "reverse": Recipe(rank=8, modules=ATTENTION, steps=1200),
}


# ---- tokenizer and data ---------------------------------------------------------------------------------------------
def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character. The prompt of a word is the word and ">"."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>"] + [chr(c) for c in range(32, 127)])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="?", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = "{{ bos_token }}{{ messages[-1]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    return tokenizer


def training_word(rng: random.Random, wide: bool) -> str:
    while True:
        letters = WIDE if wide and rng.random() < 0.5 else LETTERS
        word = rng.choice(WORDS) if rng.random() < 0.1 else random_word(rng, letters)
        if not is_held_out(word):
            return word


def make_batch(tokenizer: PreTrainedTokenizerFast, task: str, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
    """Token ids and labels [size, longest]; only the answer is a label."""
    inputs, labels = [], []
    for _ in range(size):
        word = training_word(rng, wide=task == "base")
        prompt = tokenizer.encode(word + ">")
        answer = tokenizer.encode(TASKS[task](word), add_special_tokens=False) + [EOS]
        inputs.append(torch.tensor(prompt + answer))
        labels.append(torch.tensor([-100] * len(prompt) + answer))
    pad = nn.utils.rnn.pad_sequence
    return pad(inputs, batch_first=True, padding_value=PAD), pad(labels, batch_first=True, padding_value=-100)


# ---- training and measuring -----------------------------------------------------------------------------------------
def fit(model: nn.Module, tokenizer: PreTrainedTokenizerFast, task: str, steps: int, learning_rate: float, warmup: int) -> int:
    """Train until the smoothed loss is below 1e-3, at most `steps`; returns the steps taken."""
    rng = random.Random(task)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / steps))
    smoothed = 5.0
    model.train()
    for step in range(steps):
        inputs, labels = make_batch(tokenizer, task, 96, rng)
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        smoothed = 0.9 * smoothed + 0.1 * loss.item()
        if step % 100 == 99:
            print(f"  {task}: step {step + 1}, loss {smoothed:.5f}", flush=True)
        if smoothed < 1e-3:
            return step + 1
    return steps


@torch.inference_mode()
def answers(model: nn.Module, tokenizer: PreTrainedTokenizerFast, words: list[str]) -> dict[str, str]:
    """Greedy answers, words of one length at a time (so that nothing is padded)."""
    model.eval()
    found: dict[str, str] = {}
    for length in sorted({len(word) for word in words}):
        group = [word for word in words if len(word) == length]
        prompts = torch.tensor([tokenizer.encode(word + ">") for word in group])
        output = model.generate(input_ids=prompts, max_new_tokens=length + 4, do_sample=False, pad_token_id=PAD, eos_token_id=EOS)  # type: ignore[operator]
        texts = tokenizer.batch_decode(output[:, prompts.shape[1] :], skip_special_tokens=True)
        found.update(zip(group, texts, strict=True))
    return found


def accuracy(model: nn.Module, tokenizer: PreTrainedTokenizerFast, task: str) -> float:
    words = held_out_words(200, seed=1)
    found = answers(model, tokenizer, words)
    return sum(found[word] == TASKS[task](word) for word in words) / len(words)


def tie_outer(model: nn.Module) -> None:
    """Keep A of gate/up and B of down equal over experts while PEFT trains them (the shared-outer form).

    PEFT stores A as [R * E, in], expert-major, and B as [out, R * E], rank-major. Equal values stay equal under equal
    gradients, so the gradient of each is replaced by its mean over experts.
    """

    def over_experts(tensor: Tensor, is_a: bool) -> Tensor:
        if is_a:
            return tensor.view(NUM_EXPERTS, -1, tensor.shape[1]).mean(0).repeat(NUM_EXPERTS, 1)
        return tensor.view(tensor.shape[0], -1, NUM_EXPERTS).mean(2, keepdim=True).expand(-1, -1, NUM_EXPERTS).reshape(tensor.shape)

    for name, parameter in model.named_parameters():
        inner = "experts.base_layer.lora" in name  # gate_up_proj; the outer wrapper is down_proj
        if (inner and "lora_A" in name) or (not inner and "experts.lora_B" in name):
            is_a = "lora_A" in name
            scale = NUM_EXPERTS**0.5 if is_a else 1.0  # the mean of E independent rows is that much smaller
            parameter.data = over_experts(parameter.data, is_a) * scale
            parameter.register_hook(lambda grad, is_a=is_a: over_experts(grad, is_a))  # type: ignore[misc]


# ---- layouts --------------------------------------------------------------------------------------------------------
def split_experts(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's expert tensors by projection and layer: name -> (A [E, R, in], B [E, out, R])."""
    pairs = {}
    for key, a in tensors.items():
        if not key.endswith("lora_A.weight"):
            continue
        b = tensors[key.replace("lora_A", "lora_B")]
        prefix = key.removesuffix(".lora_A.weight")
        name = prefix.replace(".base_layer", ".gate_up_proj") if prefix.endswith(".base_layer") else prefix + ".down_proj"
        pairs[name] = (a.view(NUM_EXPERTS, -1, a.shape[1]), b.view(b.shape[0], -1, NUM_EXPERTS).permute(2, 0, 1))
    return pairs


def per_expert(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One 2D pair per expert and projection; gate and up get the same A and their halves of B."""
    out = {}
    for name, (a, b) in split_experts(tensors).items():
        experts, _, projection = name.rpartition(".")
        for e in range(NUM_EXPERTS):
            halves = {"gate_proj": b[e, :INTERMEDIATE], "up_proj": b[e, INTERMEDIATE:]} if projection == "gate_up_proj" else {projection: b[e]}
            for part, rows in halves.items():
                out[f"{experts}.{e}.{part}.lora_A.weight"] = a[e].clone()  # gate and up may not share storage in a file
                out[f"{experts}.{e}.{part}.lora_B.weight"] = rows
    return out


def shared_outer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A of gate/up and B of down once ([1, ...]), under a name without expert; the inner sides 2D per expert."""
    out = {}
    for key, tensor in per_expert(tensors).items():
        head, expert, part, side, _ = key.rsplit(".", 4)
        if (part == "down_proj") == (side == "lora_B"):
            shared = out.setdefault(f"{head}.{part}.{side}.weight", tensor[None])
            assert torch.equal(shared[0], tensor), f"{key} differs between experts"
        else:
            out[f"{head}.{expert}.{part}.{side}.weight"] = tensor
    return out


def store_adapter(source: Path, target: Path, layout: str) -> None:
    """Copy a PEFT directory to `target` in the given layout."""
    tensors = load_file(source / "adapter_model.safetensors")
    config = json.loads((source / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "examples/demo/base"
    if layout != "peft":
        tensors = {"per-expert": per_expert, "shared-outer": shared_outer}[layout](tensors)
        config.update(target_modules=["gate_proj", "up_proj", "down_proj"], target_parameters=None)
    for name in ("target_modules", "target_parameters"):  # PEFT writes sets: give them an order
        config[name] = sorted(config[name]) if config[name] else config[name]
    target.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / "adapter_model.safetensors", metadata={"format": "pt"})
    (target / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---- the two things trained -----------------------------------------------------------------------------------------
def train_base(directory: Path) -> str:
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=98,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        rope_theta=10000.0,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    tokenizer, began = make_tokenizer(), time.perf_counter()
    model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="eager")
    steps = fit(model, tokenizer, "base", steps=1200, learning_rate=4e-3, warmup=50)
    model.generation_config.update(eos_token_id=EOS, bos_token_id=BOS, pad_token_id=PAD)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    stored = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    right, shown = accuracy(stored, tokenizer, "base"), answers(stored, tokenizer, ["hello"])["hello"]
    return table_row("base", "", steps, time.perf_counter() - began, right, shown, directory)


def train_adapter(base: Path, name: str, directory: Path) -> str:
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    tokenizer, began = PreTrainedTokenizerFast.from_pretrained(base), time.perf_counter()
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, experts_implementation="eager"), recipe.config())
    if recipe.layout == "shared-outer":
        tie_outer(model)
    steps = fit(model, tokenizer, name, recipe.steps, learning_rate=4e-3, warmup=20)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(temporary)
        store_adapter(Path(temporary), directory, recipe.layout)
        readable = temporary if recipe.layout == "shared-outer" else directory  # PEFT itself does not read shared-outer files
        stored = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), readable)
        right, shown = accuracy(stored, tokenizer, name), answers(stored, tokenizer, ["hello"])["hello"]
    return table_row(name, f"{recipe.rank}, {recipe.layout}", steps, time.perf_counter() - began, right, shown, directory)


def table_row(name: str, kind: str, steps: int, seconds: float, right: float, shown: str, directory: Path) -> str:
    size = sum(f.stat().st_size for f in directory.glob("*.safetensors")) / 1e3
    row = f"| {name} | {kind} | {shown} | {right:.1%} | {steps} | {seconds:.0f} s | {size:.0f} kB |"
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded demo model and its adapters.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "demo")
    parser.add_argument("--only", default=",".join(("base", *ADAPTERS)), help="names to train (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    transformers.utils.logging.disable_progress_bar()
    names = args.only.split(",")
    rows = [train_base(args.out / "base")] if "base" in names else []
    rows += [train_adapter(args.out / "base", name, args.out / name) for name in names if name != "base"]
    print("| name | rank, layout | hello> | right of 200 held-out words | steps | time | size |\n| --- | --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
