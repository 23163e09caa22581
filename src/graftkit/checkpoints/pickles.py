"""Pickle checkpoints, for those who ask for them: read with weights-only loading, kept as safetensors in the cache.

A pickle can run code when it is loaded. Weights-only loading admits tensors and nothing else; what it refuses is
refused here. Conversion happens once, one file at a time from mapped memory, and never touches the model's directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.headers import ITEMSIZE, METADATA, encode_header, inside
from graftkit.checkpoints.sources import INDEX, WEIGHTS, read_json
from graftkit.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FORMAT = "1"  # of what is kept in the cache; part of its names
TAKEN = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".py")
"""Endings of the small files that go along: configuration, tokenizer, chat template, code that the config refers to."""
LARGEST = 256 << 20  # bytes; what is larger is no configuration
MARGIN = 16 << 20  # bytes of room beside the tensors

DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""torch's names of dtypes to the file format's."""

BROKEN = (OSError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, zipfile.BadZipFile)
"""What torch.load raises for a file that is damaged."""


def converted(directory: Path, cache: Path) -> Path:
    """The safetensors twin of a pickle checkpoint, made under `cache` unless it is there already.

    Its name comes from the path, size and time of every file that went into it, so a changed model is read anew. One
    file a pickle, and an index; of tensors that share their memory one is kept, as `transformers` does when it saves.
    Raises CheckpointError for what weights-only loading refuses, OutputError where the cache has no room.
    """
    shards, places = _shards(directory)
    beside = _side_files(directory)
    target = cache / "pickles" / _name(directory, [*shards, *beside])
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        _prepare(partial, shards)
        _write_shards(partial, shards, places)
        for file in beside:
            shutil.copyfile(file, partial / file.name)
        _take_name(partial, target)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
        raise OutputError(
            f"{partial.parent}: cannot be written ({reason}); set GRAFTKIT_CACHE to a place with room"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _shards(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """The pickle files in the order of their names; and the file of each tensor, as far as there is an index."""
    index = directory / PICKLE_INDEX
    if not index.is_file():
        if not (directory / PICKLE).is_file():
            raise CheckpointError(
                f"{directory}: neither {PICKLE} nor {PICKLE_INDEX}; pickles of other names are not read"
            )
        return [directory / PICKLE], {}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map; copy it anew")
    files = [inside(directory, shard) for shard in sorted({str(shard) for shard in places.values()})]
    missing = next((file.name for file in files if not file.is_file()), None)
    if missing:
        raise CheckpointError(f"{index}: names the shard {missing!r}, which is missing; download the model again")
    return files, {str(name): str(shard) for name, shard in places.items()}


def _side_files(directory: Path) -> list[Path]:
    found = [path for path in sorted(directory.iterdir()) if path.suffix in TAKEN and path.name != PICKLE_INDEX]
    return [path for path in found if path.is_file() and path.stat().st_size <= LARGEST]


def _name(directory: Path, files: Iterable[Path]) -> str:
    """A hash of the path, size and modification time of every file."""
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([FORMAT, str(directory.resolve()), stats])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _prepare(partial: Path, shards: list[Path]) -> None:
    """Makes the directory to work in; refuses where its disk has no room."""
    partial.mkdir(parents=True)
    needed, free = MARGIN + sum(file.stat().st_size for file in shards), shutil.disk_usage(partial).free
    if free < needed:
        raise OutputError(
            f"{partial.parent}: reading the pickles needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB; "
            "free some, or set GRAFTKIT_CACHE to a place with room"
        )


def _take_name(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was faster, and made the same
            raise


def _write_shards(partial: Path, shards: list[Path], places: Mapping[str, str]) -> None:
    """One safetensors file a pickle; and the index where there are several."""
    written: dict[str, str] = {}
    total = 0
    for k, shard in enumerate(shards):
        tensors = _load(shard)
        absent = next((name for name, file in places.items() if file == shard.name and name not in tensors), None)
        if absent is not None:
            raise CheckpointError(
                f"{shard.parent / PICKLE_INDEX}: places tensor {absent!r} in {shard.name!r}, which does not hold it"
            )
        twice = next((name for name in tensors if name in written), None)
        if twice is not None:
            raise CheckpointError(
                f"{shard}: holds tensor {twice!r}, which another shard holds too; download the model again"
            )
        file = WEIGHTS if len(shards) == 1 else f"model-{k + 1:05d}-of-{len(shards):05d}.safetensors"
        kept = without_aliases(tensors)
        total += _write(partial / file, kept)
        written |= dict.fromkeys(kept, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": written}
        (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _load(file: Path) -> dict[str, Tensor]:
    """The tensors of one pickle, mapped from the file where its format allows it."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a protocol that it goes on to refuse
            held = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise CheckpointError(
            f"{file}: weights-only loading refuses it: it holds more than tensors{what}, which could run code"
        ) from error
    except BROKEN as error:
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{file}: cannot be read ({reason}); copy it anew") from error
    if not isinstance(held, dict) or not held:
        raise CheckpointError(f"{file}: holds a {type(held).__name__}, expected tensors by name")
    for name, tensor in held.items():
        _check(file, name, tensor)
    return dict(held)


def _check(file: Path, name: Any, tensor: Any) -> None:
    import torch

    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        kind = type(tensor).__name__
        raise CheckpointError(f"{file}: entry {name!r} is a {kind}, expected a tensor as transformers saves them")
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = f"{dtype}, {tensor.layout}, {tensor.device.type}"
        raise CheckpointError(f"{file}: tensor {name!r} ({kind}) cannot be kept as safetensors")
    held = tensor.untyped_storage().nbytes()
    if tensor.nbytes > held:
        raise CheckpointError(f"{file}: tensor {name!r} claims {tensor.nbytes} bytes and holds {held}; refused")


def without_aliases(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of names for the same memory one: the first in sorted order that is not an output embedding (`lm_head`)."""
    groups: dict[Any, list[str]] = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        groups.setdefault(view if tensor.numel() else name, []).append(name)
    kept = {min(names, key=lambda name: ("lm_head" in name, name)) for names in groups.values()}
    return {name: tensor for name, tensor in tensors.items() if name in kept}


def _write(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """A safetensors file, one tensor in memory at a time; returns the bytes of its tensors."""
    import torch

    entries = [(name, DTYPES[str(t.dtype).removeprefix("torch.")], tuple(t.shape)) for name, t in tensors.items()]
    header, offsets = encode_header(entries, METADATA)
    with open(file, "wb") as handle:
        handle.write(header)
        for name in sorted(offsets, key=lambda name: offsets[name]):
            if tensors[name].numel():
                handle.write(tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sum(tensors[name].numel() * ITEMSIZE[dtype] for name, dtype, _ in entries)
