"""A GGUF file becomes a checkpoint directory, de-quantised by `transformers`.

What was quantised stays rounded: the result holds the GGUF's values, not those of the model that it was made from.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftkit.checkpoints.headers import DTYPE_NAMES, ITEMSIZE
from graftkit.errors import CheckpointError, GraftError, OutputError, missing_extra, unknown

MAGIC = b"GGUF"
DTYPES = ("float32", "bfloat16", "float16")
MARGIN = 64 << 20  # bytes of room beside the tensors: tokenizer and configuration
SHARD = "5GB"
TESTED = "SmolLM2 (llama)"


def convert_gguf(gguf: Path, out: Path, dtype: str = "float32", *, overwrite: bool = False) -> Path:
    """De-quantises a GGUF file into a directory that `transformers` loads as it is, with tokenizer and chat template.

    Goes through `transformers`, so the model is held in memory once, in `dtype`. SmolLM2 (llama) is what we test; the
    other architectures that its loader knows are tried as they come. Written beside `out`, renamed at the end.
    Raises CheckpointError for a file that is no whole GGUF model, OutputError where `out` exists or has no room,
    GraftError for an architecture that the loader does not know, and where the package `gguf` is missing.
    """
    if dtype not in DTYPES:
        raise GraftError(f"--dtype: {unknown('dtype', dtype, DTYPES)}")
    _check_free_name(out, overwrite)
    parameters = _checked(gguf)
    partial = out.parent / f".{out.name}.graft-convert"
    try:
        _prepare(partial, out, parameters * ITEMSIZE[DTYPE_NAMES[dtype]])
        _transform(gguf, partial, dtype)
        _take_name(partial, out)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise OutputError(f"{out}: cannot be written ({reason})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _check_free_name(out: Path, overwrite: bool) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out}: exists and is not a directory; choose another name")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise OutputError(f"{out}: holds files already; choose another name, or pass --overwrite to replace it whole")


def _checked(gguf: Path) -> int:
    """The number of parameters of a GGUF file that is whole, and of one part."""
    try:
        with open(gguf, "rb") as handle:
            magic = handle.read(len(MAGIC))
    except OSError as error:
        raise CheckpointError(f"{gguf}: cannot be read ({error.strerror})") from error
    if magic != MAGIC:
        raise CheckpointError(f"{gguf}: not a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise missing_extra("gguf", "gguf")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
        parts = reader.fields["split.count"].contents() if "split.count" in reader.fields else 1
    except (ValueError, LookupError, OverflowError) as error:
        raise CheckpointError(f"{gguf}: truncated or malformed ({_first_line(error)}); copy it anew") from error
    if parts > 1:
        raise CheckpointError(f"{gguf}: one of {parts} parts; join them first (llama-gguf-split --merge)")
    return sum(int(tensor.n_elements) for tensor in reader.tensors)


def _prepare(partial: Path, out: Path, size: int) -> None:
    """An empty directory to work in; refuses where its disk has no room."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    needed, free = size + MARGIN, shutil.disk_usage(partial).free
    if free < needed:
        raise OutputError(
            f"{out}: the checkpoint needs {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB; "
            "free some, write elsewhere, or choose a shorter --dtype"
        )


def _take_name(partial: Path, out: Path) -> None:
    old = out.parent / f".{out.name}.graft-old"
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _transform(gguf: Path, partial: Path, dtype: str) -> None:
    """Loads by transformers, refuses what the file lacks, and saves."""
    with _refusals(gguf):
        tokenizer, model, loading = _load(gguf, dtype)
    absent = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if absent:
        raise CheckpointError(
            f"{gguf}: gives no value for {len(absent)} tensors of {type(model).__name__}, {absent[0]!r} first; "
            "transformers' loader does not know this variant"
        )
    _clean(model.config, model.generation_config)
    model.save_pretrained(partial, max_shard_size=SHARD)
    tokenizer.save_pretrained(partial)
    _drop_marks(partial / "config.json")


def _load(gguf: Path, dtype: str) -> tuple[Any, Any, dict[str, Any]]:
    import torch
    import transformers

    models: Any = transformers.AutoModelForCausalLM
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    place: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    keywords = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, dtype), "output_loading_info": True}
    if hasattr(transformers, "GgufConfig"):  # releases before it hand back dense weights unasked
        keywords["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **place)
    model, loading = models.from_pretrained(str(gguf.parent), **place, **keywords)
    return tokenizer, model, loading


@contextmanager
def _refusals(gguf: Path) -> Iterator[None]:
    """What transformers refuses, in our words."""
    try:
        yield
    except (ValueError, NotImplementedError, LookupError) as error:
        if "not supported" in str(error) or "Unknown" in str(error) or "not implemented" in str(error).lower():
            raise GraftError(
                f"{gguf}: {_first_line(error)} transformers' GGUF loader knows: {', '.join(_architectures())}; "
                f"{TESTED} is what graftkit tests"
            ) from error
        raise CheckpointError(f"{gguf}: transformers cannot read it ({_first_line(error)})") from error


def _architectures() -> list[str]:
    """The architectures that the loader lists."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted(set(GGUF_SUPPORTED_ARCHITECTURES) - {"general", "tokenizer"})


def _clean(config: Any, generation: Any) -> None:
    """Drops the marks of quantisation and of this machine's paths, and settles the token ids that generation needs."""
    for mark in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(config, mark):
            delattr(config, mark)
    config._name_or_path = ""
    if generation is None:
        return
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, key, None)
        if value is not None:
            setattr(generation, key, value)
    if not generation.do_sample:
        generation.temperature = generation.top_p = generation.top_k = None


def _drop_marks(config: Path) -> None:
    """Takes out what the GGUF's own metadata left behind in the config."""
    told = json.loads(config.read_text(encoding="utf-8"))
    for mark in ("_model_name_or_path", "_name_or_path"):
        told.pop(mark, None)
    config.write_text(json.dumps(told, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
