"""From what a recipe calls a model to a directory on this machine: a path, or a hub id fetched by `huggingface_hub`.

A hub id is `owner/name` with an optional `@revision`. With `HF_HUB_OFFLINE=1`, or without a network, the hub's local
cache serves it. Nothing else is ever fetched, and no code of a model is run.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from graftkit.checkpoints import adapters, masked, sources
from graftkit.errors import CheckpointError

Source = sources.Checkpoint | adapters.Adapter

WANTED = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm"]
PICKLED = ["*.bin"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def directory_of(name: str, relative_to: Path, *, allow_pickle: bool = False) -> Path:
    """The directory that holds a model. Paths are looked up beside the recipe first, then in the working directory.

    Raises CheckpointError when there is neither such a directory nor such a model on the hub or in its cache.
    """
    try:
        path = Path(name).expanduser()
        _ = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name[:200]}: not a path that can be looked up ({error})"[:400]) from error
    for candidate in (relative_to / path, path):
        if candidate.is_dir():
            return candidate
        if candidate.is_file():
            raise CheckpointError(
                f"{candidate} is a file; a model is a directory (a GGUF file becomes one by `graft convert`)"
            )
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise CheckpointError(
            f"{name}: no such directory" + ("" if path.is_absolute() else f" in {relative_to} or here")
        )
    return _from_hub(name, [*WANTED, *PICKLED] if allow_pickle else WANTED)


def cache_directory() -> Path:
    """Where results that can be made again are kept: `$GRAFTKIT_CACHE`, else `~/.cache/graftkit`."""
    return Path(os.environ.get("GRAFTKIT_CACHE") or Path.home() / ".cache" / "graftkit")


def _from_hub(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{name}: no such directory, and the hub does not give it either ({reason})") from error


def split_task(name: str, relative_to: Path) -> tuple[str, str]:
    """`OUT#task`, a unified model seen through a task's mask, as its two parts; any other name and no task."""
    model, mark, task = name.rpartition("#")
    if not mark or any((parent / name).is_dir() for parent in (relative_to, Path())):
        return name, ""
    return model, task


def open_source(directory: Path, *, task: str = "", allow_pickle: bool = False) -> Source:
    """Opens a model directory: an adapter where it holds `adapter_config.json`, else a checkpoint or its `task`."""
    try:
        os.listdir(directory)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be read ({error.strerror})") from error
    if (directory / adapters.CONFIG).is_file() and not task:
        return adapters.open_adapter(directory)
    if allow_pickle and not list(directory.glob("*.safetensors")) and sources.pickles(directory):
        from graftkit.checkpoints.pickles import converted

        directory = converted(directory, cache_directory())
    whole = sources.open_checkpoint(directory)
    return masked.open_masked(whole, task) if task else whole
