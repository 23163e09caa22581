"""Train the test bed's text experts: LoRA adapters on SmolLM2 that never see a picture.

    OMP_NUM_THREADS=1 python examples/orchard/vlm/train_text_experts.py language

Each learns to follow an instruction about a digit's *name* (`wording.text_records`); what it reaches on names alone
stands in its `training.json` as `text_check`: the share of answers that greedy decoding would give, of all digits in
all ways to ask. Written to `.cache/orchard/vlm/experts/NAME`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from vlm_parts import language_model, tokenizer
from wording import text_checks, text_records

from encoding import collate, encode
from presets import Preset
from records import Record
from train import CACHE, PACKAGES, add_adapter, base_name, fit, round_to_bfloat16, save_adapter

EXPERTS = CACHE / "vlm" / "experts"
TURN_END = "<|im_end|>"


@dataclass(frozen=True)
class Expert:
    """What it learns, for how many steps, from which seed."""

    scenario: str
    steps: int
    seed: int = 0

    @property
    def preset(self) -> Preset:
        """The orchard's settings with short rows in larger batches."""
        return Preset(full=False, rate=8e-4, batch=16, warmup=10, steps=self.steps, rank=4)


TEXT_EXPERTS = {
    "language": Expert("language", steps=90),
    "instruction": Expert("instruction", steps=45),
    "arithmetic": Expert("arithmetic", steps=80),
    "language-seed1": Expert("language", steps=90, seed=1),
}


@torch.no_grad()
def share_right(model: Any, tokens: Any, records: list[Record]) -> dict[str, float]:
    """The share of answers whose every token, and the end of the turn, is the likeliest one: by way to ask."""
    items = [encode([Record(one.prompt, one.answer + TURN_END, "")], tokens, chat=False)[0] for one in records]
    found: dict[str, list[bool]] = {}
    for low in range(0, len(items), 15):
        batch = collate(items[low : low + 15], tokens.pad_token_id)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        wanted = batch["labels"][:, 1:]
        right = ((logits.argmax(-1) == wanted) | (wanted < 0)).all(1)
        for record, one in zip(records[low : low + 15], right, strict=True):
            found.setdefault(record.subtask, []).append(bool(one))
    return {subtask: sum(rights) / len(rights) for subtask, rights in found.items()}


def train(name: str, expert: Expert, out: Path) -> None:
    """Train one text expert and check it, and the base, on text."""
    torch.set_num_threads(1)
    torch.manual_seed(expert.seed)
    start, tokens, model = time.process_time(), tokenizer(), language_model()
    checks = text_checks(expert.scenario)
    before = share_right(model, tokens, checks)
    records = text_records(expert.scenario, expert.seed, 16 * expert.steps)
    ended = [Record(one.prompt, one.answer + TURN_END, one.subtask) for one in records]
    wrapped = add_adapter(model, expert.preset.rank)
    items = encode(ended, tokens, chat=False)
    progress = fit(model, items, expert.preset, tokens.pad_token_id, expert.seed, out)
    round_to_bfloat16(wrapped)
    after = share_right(model.eval(), tokens, checks)
    save_adapter(
        wrapped, out, f"Text expert `{name}` of the test bed for injecting skills into a VLM: digits' names.\n"
    )
    record = {
        "expert": name, "scenario": expert.scenario, "base": base_name(), "seed": expert.seed,
        "settings": asdict(expert.preset), "steps": progress.steps, "tokens": progress.tokens,
        "text_check": {"base": before, "expert": after}, "final_train_loss": round(progress.final_loss, 4),
        "cpu_seconds": round(time.process_time() - start),
        "packages": {package: version(package) for package in PACKAGES},
    }  # fmt: skip
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record["text_check"]), record["final_train_loss"], record["cpu_seconds"], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("expert", choices=list(TEXT_EXPERTS))
    parser.add_argument("--out", type=Path, help="default: .cache/orchard/vlm/experts/NAME")
    arguments = parser.parse_args()
    train(arguments.expert, TEXT_EXPERTS[arguments.expert], arguments.out or EXPERTS / arguments.expert)


if __name__ == "__main__":
    main()
