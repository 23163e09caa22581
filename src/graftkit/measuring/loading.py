"""Models to be measured: a checkpoint directory or hub id, an adapter on its base, or a live model as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from graftkit.checkpoints.resolve import cache_directory, directory_of, open_source, split_task
from graftkit.checkpoints.sources import read_json
from graftkit.errors import CheckpointError, DataError, missing_extra
from graftkit.execution.module import class_of, reader

LiveModel = tuple[str, Any, Any]
"""A name, a `transformers` language model, and its tokenizer; of a vision-language model its processor."""

ModelLike = str | Path | LiveModel
"""A checkpoint directory, a task of a unified model (`OUT#task`), an adapter directory, a hub id, or a live model."""


def model_names(models: Sequence[ModelLike]) -> tuple[str, ...]:
    """A name for each model: its directory's, with as many parents as tell them apart. Refuses a model given twice."""
    paths = [(model[0],) if isinstance(model, tuple) else _parts(model) for model in models]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise DataError(f"two models are called {str(Path(*twice))!r}; give each once, and live models different names")
    return tuple("/".join(path[-_depth(path, paths) :]) for path in paths)


def source_of(model: ModelLike) -> str:
    """Where a model comes from, as text."""
    return "in memory" if isinstance(model, tuple) else str(model)


def is_adapter(source: str) -> bool:
    """Whether a model is an adapter's directory."""
    return (Path(source) / "adapter_config.json").is_file()


@contextmanager
def opened(
    model: ModelLike, *, device: str, dtype: str, adapter_base: str | Path | None = None
) -> Iterator[tuple[Any, Any]]:
    """A model in evaluation mode and its tokenizer, or its processor where it takes images; a live model stays where it
    is, and gets its mode back afterwards.

    Raises CheckpointError where nothing can be loaded, GraftError where an adapter needs the extra `lora`, DataError
    for a live model with learned prompts; GraftError for a device that is not there.
    """
    if not isinstance(model, tuple):
        live, tokenizer = _load(str(model), device, dtype, None if adapter_base is None else str(adapter_base))
        yield live, tokenizer
        return
    _, live, tokenizer = model
    training = live.training
    live.eval()
    try:
        yield _unwrapped(live), tokenizer
    finally:
        live.train(training)


def on_disk(source: str) -> str:
    """A task of a unified model (`OUT#task`) as a checkpoint in the cache, made once; any other source as it is."""
    model, task = split_task(source, Path())
    if not task:
        return source
    from graftkit.execution.local import merge

    view = open_source(directory_of(model, Path()), task=task)
    copy = cache_directory() / "views" / view.fingerprint()
    view.close()
    if not copy.is_dir():
        merge({"method": "passthrough", "models": [source]}, copy)
    return str(copy)


def default_device() -> str:
    """`cuda` where there is one, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """float32 on a CPU (where bfloat16 is slower), bfloat16 on a GPU."""
    return "float32" if device == "cpu" else "bfloat16"


def _load(source: str, device: str, dtype: str, adapter_base: str | None) -> tuple[Any, Any]:
    import torch

    from graftkit.execution.local import check_device

    check_device(device)
    source = on_disk(source)
    if not is_adapter(source):
        return _pretrained(source, dtype).to(device).eval(), reader(source)
    base = adapter_base or read_json(Path(source) / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{source}: this adapter does not name its base; give it as adapter_base")
    # The delta is added in float32 and rounded once, as a merge would do it.
    merged = _adapted(_pretrained(base, "float32"), source)
    has_tokenizer = (Path(source) / "tokenizer_config.json").is_file()
    return merged.to(device=device, dtype=getattr(torch, dtype)).eval(), reader(source if has_tokenizer else base)


def _unwrapped(model: Any) -> Any:
    """The `transformers` model inside a PEFT one, its adapter's layers in place."""
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise DataError("a model with learned prompts cannot be evaluated; only adapters of weights can")
    return model.get_base_model()


def _adapted(model: Any, adapter: str) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise missing_extra("lora", "peft") from error
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


def _pretrained(source: str, dtype: str) -> Any:
    import torch
    import transformers
    from safetensors import SafetensorError
    from transformers.utils import logging

    _refuse_missing(source)
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    key = "dtype" if version >= (4, 56) else "torch_dtype"
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return class_of(transformers.AutoConfig.from_pretrained(source)).from_pretrained(
            source, **{key: getattr(torch, dtype)}
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{source}: {_first_line(error)}") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _refuse_missing(source: str) -> None:
    path = Path(source)
    looks_local = path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    if looks_local and not path.is_dir():
        raise CheckpointError(f"{source}: no such directory; a model is a checkpoint or adapter directory or a hub id")


def _parts(model: str | Path) -> tuple[str, ...]:
    parts = Path(model).parts
    return parts if parts else (str(model),)


def _depth(path: tuple[str, ...], paths: Sequence[tuple[str, ...]]) -> int:
    """How many trailing parts tell a path from all the others."""
    others = [other for other in paths if other != path]
    depths = range(1, len(path) + 1)
    return next((depth for depth in depths if all(path[-depth:] != other[-depth:] for other in others)), len(path))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
