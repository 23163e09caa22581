"""The examples that the demo's experts are asked about before they are merged: training records of the orchard.

    python examples/demo/make_data.py

Twenty-four of each expert's own training split, drawn once; the functions are those of Python 3.11.7 (PSF License
Agreement) and short, so that the demo stays one of minutes.
"""

from __future__ import annotations

import random
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "orchard"))

from experts import SOURCES
from records import Record, write_lines

HERE = Path(__file__).resolve().parent
COUNT, SEED, LONGEST = 24, 18, 460  # items, seed, characters of an item


def drawn(skill: str) -> list[Record]:
    """Records of a skill's training split."""
    short = [one for one in SOURCES[skill].load("train") if len(one.prompt) + len(one.answer) < LONGEST]
    return random.Random(SEED).sample(short, COUNT)


def main() -> None:
    (HERE / "data").mkdir(exist_ok=True)
    for skill in ("math", "code"):
        write_lines(HERE / "data" / f"{skill}.jsonl", map(asdict, drawn(skill)))
        card = {
            "name": f"{skill}_examples",
            "kind": "answer_loss",
            "data": f"{skill}.jsonl",
            "chat": SOURCES[skill].chat,
        }
        (HERE / "data" / f"{skill}.yaml").write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
