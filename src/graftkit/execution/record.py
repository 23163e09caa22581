"""What stands beside the weights: the record `graft.json`, the model card, and files taken over from the like model."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import graftkit
from graftkit.checkpoints.headers import DTYPE_NAMES
from graftkit.checkpoints.sources import read_json
from graftkit.errors import CheckpointError
from graftkit.recipes import chat_templates, configuration, mapping, statistics, words
from graftkit.recipes.gates import told
from graftkit.recipes.plan import Plan
from graftkit.recipes.vocabulary import Vocabulary, translation

FILE = "graft.json"
TAKEN = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".py")
"""Endings of the small files that an output takes over from the model that it is like: configuration, tokenizer,
chat template, processor, and code that the model's own config refers to (copied, never run)."""
LEFT = (
    "graft.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "training_args.json",
    "trainer_state.json",
    "adapter_config.json",
)
TEMPLATES = "additional_chat_templates"  # where transformers keeps those of a tokenizer that has several
LARGEST = 256 << 20  # bytes; what is larger is no configuration


def build(
    plan: Plan,
    done: Mapping[str, Mapping[str, Any]],
    stages: Sequence[Mapping[str, Any]],
    seconds: float,
    resumed: int,
    workers: int,
    device: str,
) -> dict[str, Any]:
    """The record of a merge: recipe, plan, inputs by content, versions, time and memory, and every tensor."""
    return {
        "format": 1,
        "graftkit": graftkit.__version__,
        "recipe": plan.recipe.to_dict(),
        "recipe_yaml": plan.recipe.to_yaml(),
        "plan": {
            "hash": plan.hash,
            "steps": len(plan.steps),
            "bytes_read": plan.bytes_read,
            "bytes_written": plan.bytes_written,
        },
        "inputs": [
            {
                "role": n.role,
                "source": n.name,
                "kind": n.kind,
                "fingerprint": n.fingerprint,
                "directory": str(n.source.directory.resolve()),
            }
            for n in plan.sources
        ],
        "like": plan.sources[plan.like].name,
        **({"gates": told(plan.gates)} if plan.gates else {}),
        **({"backbone": mapping.told(plan.backbone)} if plan.backbone else {}),
        **({"statistics": statistics.told(plan.statistics)} if plan.statistics else {}),
        "notes": list(plan.notes),
        "versions": versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "execution": {
            "workers": workers,
            "device": device,
            "resumed_steps": resumed,
            "seconds": round(seconds, 4),
            "peak_memory_bytes": peak_memory(),
            "stages": list(stages),
        },
        "tensors": [
            {
                "name": s.name,
                "dtype": s.dtype,
                "shape": list(s.shape),
                **({"part": s.part} if s.part else {}),
                **done[s.key],
            }
            for s in plan.steps
        ],
    }


def versions() -> dict[str, str | None]:
    """Versions of what computes; torch only where it was used."""
    found: dict[str, str | None] = {"python": platform.python_version(), "graftkit": graftkit.__version__}
    for package in ("numpy", "numba", "torch"):
        used = package in sys.modules
        found[package] = metadata.version(package) if used else None
    return found


def peak_memory() -> int:
    """The most resident memory that this process has had, mapped pages included, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def side_files(plan: Plan, made: Mapping[str, Any]) -> dict[str, bytes]:
    """Everything beside the weights, by name."""
    if plan.recipe.output.as_ == "adapter":
        return _told(plan, made, "peft")
    directory = plan.sources[plan.like].source.directory
    try:
        taken = {
            str(path.relative_to(directory)): path.read_bytes()
            for path in [*sorted(directory.iterdir()), *sorted((directory / TEMPLATES).glob("*.jinja"))]
            if path.suffix in TAKEN and path.name not in LEFT and path.is_file() and path.stat().st_size <= LARGEST
        }
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read any more ({error.strerror})") from error
    if "config.json" in taken and (plan.config or plan.recipe.output.dtype):
        config = dict(plan.config or read_json(directory / "config.json"))
        taken["config.json"] = _with_dtype(config, plan.recipe.output.dtype)
    if plan.vocabulary:
        taken = _with_vocabulary(plan, plan.vocabulary, taken)
    return taken | _chat_template(plan, taken) | _told(plan, made)


def _chat_template(plan: Plan, taken: Mapping[str, bytes]) -> dict[str, bytes]:
    """The chat template that the recipe asks for, in a file of its own, and no longer in the tokenizer's config."""
    wanted = plan.recipe.output.chat_template
    checkpoints = [named.source.directory for named in plan.sources if named.kind == "checkpoint"]
    text = chat_templates.text_of(wanted, checkpoints) if wanted else ""
    if not text:
        return {}
    config = json.loads(taken.get(chat_templates.CONFIG, b"{}"))
    config.pop("chat_template", None)
    told = {chat_templates.CONFIG: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()} if config else {}
    return {chat_templates.FILE: text.encode(), **told}


def _told(plan: Plan, made: Mapping[str, Any], library: str = "transformers") -> dict[str, bytes]:
    """The model card and the record."""
    told = json.dumps(made, indent=1, ensure_ascii=False) + "\n"
    return {"README.md": card(plan, made, library).encode(), FILE: told.encode()}


def _with_vocabulary(plan: Plan, vocabulary: Vocabulary, taken: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer's files are those of the chosen vocabulary; generation settings name its special tokens."""
    named = plan.sources[vocabulary.source]
    translate = translation(vocabulary, plan.like, plan.sources)
    kept = {n: content for n, content in taken.items() if n not in words.FILES and not n.startswith(TEMPLATES)}
    if "generation_config.json" in kept and translate:
        own, other = (
            read_json(plan.sources[k].source.directory / "generation_config.json", missing={})
            for k in (plan.like, vocabulary.source)
        )
        changed = {key: configuration.special(key, value, other, translate) for key, value in own.items()}
        kept["generation_config.json"] = (json.dumps(changed, indent=2) + "\n").encode()
    return {**kept, **words.write(named.source.directory, vocabulary.words, named.label)}


def _with_dtype(config: dict[str, Any], dtype: str | None) -> bytes:
    """A config that names the output's dtype, under the key that it uses (old: `torch_dtype`), nested ones too."""
    if dtype is None:
        return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
    assert dtype in DTYPE_NAMES

    def changed(part: dict[str, Any], top: bool) -> dict[str, Any]:
        named = {k: (dtype if k in ("dtype", "torch_dtype") else v) for k, v in part.items()}
        nested = {
            k: changed(v, False) if isinstance(v, dict) and k.endswith("_config") else v for k, v in named.items()
        }
        return nested if not top or {"dtype", "torch_dtype"} & set(nested) else {**nested, "dtype": dtype}

    return (json.dumps(changed(config, True), indent=2, ensure_ascii=False) + "\n").encode()


def card(plan: Plan, made: Mapping[str, Any], library: str = "transformers") -> str:
    """The model card: what was merged, how, and the recipe that makes it again."""
    models = "\n".join(f"- {n.role}: `{n.name}` ({n.kind}, content {n.fingerprint[:12]})" for n in plan.sources)
    base = [
        n.name
        for n in plan.sources
        if n.kind == "checkpoint" and not n.name.startswith((".", "/")) and n.name.count("/") == 1
    ]
    front = f"---\nlibrary_name: {library}\ntags:\n- merge\n- graftkit\n"
    front += "base_model:\n" + "".join(f"- {name}\n" for name in base) if base else ""
    return (
        f"{front}---\n# A merge by {plan.recipe.method}\n\nMade by graftkit {graftkit.__version__} from\n\n{models}\n\n"
        f"```yaml\n{made['recipe_yaml']}```\n\nPlan {plan.hash}. What was done to each tensor stands in `{FILE}`.\n"
    )
