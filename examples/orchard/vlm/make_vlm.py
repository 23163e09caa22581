"""Put the test bed together: each VLM as an ordinary LLaVA checkpoint, its pictures as files, its tasks.

    OMP_NUM_THREADS=1 python examples/orchard/vlm/make_vlm.py

From the parts (committed under `parts/`, else trained: `train_vlm.py`) to `.cache/orchard/vlm/NAME`, float32, 540 MB
each; pictures and tasks to `.cache/orchard/vlm/tasks`. What is there already is left.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import vlm_parts
from pictures import Picture, pictures, write_pictures
from train_text_experts import EXPERTS
from train_vlm import PARTS, VLMS
from wording import DIGITS, OWN, SCENARIOS, Ask

from records import write_lines
from train import CACHE

HERE = Path(__file__).resolve().parent
MADE, TASKS = CACHE / "vlm", CACHE / "vlm" / "tasks"
SPLITS = ("dev", "test")
DESCRIPTIONS = {
    "digits": "handwritten digits, named in English",
    "shapes": "coloured shapes, named in English",
    "language": "handwritten digits, named in French and German",
    "instruction": "handwritten digits, named in a form that is asked for",
    "arithmetic": "handwritten digits and one, two or three more",
}


def place(kind: str, name: str, grown: Path) -> Path:
    """Where a trained part stands: committed, else in the cache."""
    committed = HERE / kind / name
    return committed if committed.is_dir() else grown / name


def expert(name: str) -> Path:
    """The directory of a text expert."""
    return place("experts", name, EXPERTS)


def make(name: str) -> Path:
    """One VLM: the base with the backbone's adapter merged in, the tower, the projector."""
    import peft
    import torch
    from safetensors.torch import load_file

    out, parts = MADE / name, place("parts", name, PARTS)
    if (out / "config.json").is_file():
        return out
    lm = peft.PeftModel.from_pretrained(vlm_parts.language_model(), parts / "backbone").merge_and_unload()
    vision = vlm_parts.tower()
    model = vlm_parts.assembled(lm, vision)
    for part, module in (("tower", vision), ("projector", model.model.multi_modal_projector)):
        held = {key: value.float() for key, value in load_file(parts / f"{part}.safetensors").items()}
        module.load_state_dict(held)
    vlm_parts.save(model.to(torch.float32), out)
    return out


def rows(asks: tuple[Ask, ...], shown: tuple[Picture, ...], files: dict[str, str]) -> list[dict[str, Any]]:
    """One question a picture, the ways to ask in turn."""
    asked = [(picture, asks[number % len(asks)]) for number, picture in enumerate(shown)]
    return [{"prompt": f"{ask.prompt}<image>", "answer": _answer(ask, picture), "subtask": ask.subtask,
             "images": [files[picture.name]]} for picture, ask in asked]  # fmt: skip


def _answer(ask: Ask, picture: Picture) -> str:
    return ask.answers[DIGITS.index(picture.label[0])] if len(picture.label) == 1 else " ".join(picture.label)


def write_tasks() -> None:
    """For dev and test: digits (the VLM's own task), shapes (its second), and each scenario, on the same scans."""
    for split in SPLITS:
        folder = TASKS / split
        files = {name: f"pictures/{file}" for name, file in write_pictures(split, folder / "pictures").items()}
        scans = tuple(one for one in pictures(split) if len(one.label) == 1)
        shapes = tuple(one for one in pictures(split) if len(one.label) == 2)
        asked = {"digits": rows((OWN,), scans, files), "shapes": rows((OWN,), shapes, files)}
        asked |= {scenario: rows(asks, scans, files) for scenario, asks in SCENARIOS.items()}
        for name, records in asked.items():
            write_lines(folder / f"{name}.jsonl", records)
            card = {"name": name, "kind": "exact_match", "data": f"{name}.jsonl", "chat": True, "max_new_tokens": 12,
                    "normalise": ["strip"], "description": f"{DESCRIPTIONS[name]}; {split} pictures"}  # fmt: skip
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(VLMS), default=list(VLMS))
    for name in parser.parse_args().only:
        trained = place("parts", name, PARTS).is_dir()
        print(make(name) if trained else f"{name}: not trained; run train_vlm.py {name}", flush=True)
    write_tasks()
    print(TASKS)


if __name__ == "__main__":
    main()
