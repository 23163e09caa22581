"""`experts.json`: what every expert learnt from, how, and how well; and the same as tables for the README."""

from __future__ import annotations

import hashlib
import json
import platform
from pathlib import Path
from typing import Any

from experts import EXPERTS, SOURCES, SPLITS, data_fingerprint

HERE = Path(__file__).resolve().parent
MANIFEST, ADAPTERS = HERE / "experts.json", HERE / "adapters"
WEIGHTS = ("adapter_model.safetensors", "model.safetensors")
FROM_TRAINING = (
    "steps", "tokens", "answer_tokens", "seconds", "threads", "final_train_loss", "dev_loss", "packages"
)  # fmt: skip


def read() -> dict[str, Any]:
    """What `experts.json` says; no experts where there is none yet."""
    return dict(json.loads(MANIFEST.read_text())) if MANIFEST.is_file() else {"experts": {}}


def write(base: str, places: dict[str, Path], scores: dict[str, dict[str, Any]]) -> None:
    """Write `experts.json`; what it holds of experts that are not at hand stays, where their settings are today's."""
    entries = {
        name: one
        for name, one in read()["experts"].items()
        if name in EXPERTS and one["fingerprint"] == EXPERTS[name].fingerprint(base)
    }
    entries |= {name: entry(name, folder, scores[name]) for name, folder in places.items()}
    entries = {name: entries[name] for name in EXPERTS if name in entries}
    written = {"base": base, "python": platform.python_version(), "sources": sources(), "experts": entries}
    MANIFEST.write_text(json.dumps(written, indent=1) + "\n")


def fingerprint(name: str, folder: Path) -> str | None:
    """The fingerprint that a finished training wrote, or that `experts.json` holds of a committed one; else None."""
    record = folder / "training.json"
    if not record.is_file() or weights(folder) is None:
        return None
    known = read()["experts"].get(name, {}).get("fingerprint") if folder.parent == ADAPTERS else None
    found = json.loads(record.read_text()).get("fingerprint", known)
    return None if found is None else str(found)


def weights(folder: Path) -> Path | None:
    """The file of the weights."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def entry(name: str, folder: Path, test: dict[str, Any]) -> dict[str, Any]:
    """One expert: what it is, its file, its training and its test scores."""
    expert, record, file = EXPERTS[name], json.loads((folder / "training.json").read_text()), weights(folder)
    assert file is not None
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return {
        "skill": expert.skill,
        "source": expert.source,
        "note": expert.note,
        "kind": "full" if expert.settings.full else "lora",
        "preset": expert.preset,
        "changes": expert.changes,
        "seed": expert.seed,
        "fingerprint": fingerprint(name, folder),
        "weights": {"path": str(file.relative_to(HERE.parents[1])), "bytes": file.stat().st_size, "sha256": digest},
        **{key: record[key] for key in FROM_TRAINING},
        "test": test,
    }


def sources() -> dict[str, Any]:
    """What the experts learnt from: the size and the fingerprint of each split."""
    return {
        name: {
            "description": source.description,
            "chat": source.chat,
            **{
                split: {"records": len(source.load(split)), "sha256": data_fingerprint(name, split)} for split in SPLITS
            },
        }
        for name, source in SOURCES.items()
    }


def training_table(experts: dict[str, Any]) -> str:
    """Experts by what they learnt and what it took."""
    lines = ["| expert | goes by | learnt | kind | seed | steps | tokens (answers) | time | dev loss: base | expert |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, one in experts.items():
        dev, tokens = one["dev_loss"], f"{one['tokens']} ({one['answer_tokens']})"
        cells = (name, one["skill"], one["source"], one["kind"], one["seed"], one["steps"], tokens)
        lines.append(_row(*cells, f"{one['seconds']} s", f"{dev['base']:.3f}", f"{dev['expert']:.3f}"))
    return "\n".join(lines)


def test_table(experts: dict[str, Any]) -> str:
    """Experts beside the base on the tasks of the skill that they go by, and on general questions."""
    lines = ["| expert | task | items | base | expert | expert - base | verdict |", "|---|---|---|---|---|---|---|"]
    for name, one in experts.items():
        for task, result in one["test"].items():
            scores = (_interval(result[key]) for key in ("base", "expert", "expert_minus_base"))
            lines.append(_row(name, f"{task} ({result['metric']})", result["items"], *scores, result["verdict"]))
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _interval(values: list[float]) -> str:
    value, low, high = (f"{number:.3f}" for number in values)
    return f"{value} [{low}, {high}]"
