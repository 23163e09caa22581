"""The module that a live merge writes into, and which of its parameters each tensor on disk is.

Names are paired by `layout.live_names`, then every pair is checked by its values: a tensor of the checkpoint that the
module was loaded from must be the parameter, to the bit. Where names say too little, equal values decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from graftkit.errors import CheckpointError, PlanError
from graftkit.recipes import layout

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import Tensor

TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
"""torch's names of a file's dtypes."""


PROCESSORS = ("processor_config.json", "preprocessor_config.json")
"""Files that tell that a model reads more than text."""


def tensor_of(raw: np.ndarray, dtype: str) -> Tensor:
    """A file's bytes as a flat tensor that shares them."""
    import torch

    return torch.from_numpy(raw.view(np.uint8)).view(getattr(torch, TORCH[dtype]))


def empty(dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of a file's dtype, to be filled."""
    import torch

    return torch.empty(shape, dtype=getattr(torch, TORCH[dtype]))


def load(directory: Path, dtype: str, device: str) -> Any:
    """The model of a directory as transformers loads it, in evaluation mode, without gradients."""
    import torch
    from transformers import AutoConfig

    with _quiet():
        try:
            config = AutoConfig.from_pretrained(directory)
            model = class_of(config).from_pretrained(directory, **{_dtype_key(): getattr(torch, dtype)})
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{directory}: transformers cannot load it: {str(error).splitlines()[0]}") from error
    return model.to(device).eval().requires_grad_(False)


def build(config: Mapping[str, Any], tensors: dict[str, Tensor], dtype: str, device: str) -> Any:
    """A model of a configuration that stands nowhere on disk, with these tensors."""
    import torch
    from transformers import AutoConfig

    made = AutoConfig.for_model(config["model_type"], **{k: v for k, v in config.items() if k != "model_type"})
    with _quiet():
        concrete = class_of(made)._model_mapping[type(made)]
        model = concrete.from_pretrained(
            None, config=made, state_dict=dict(tensors), **{_dtype_key(): getattr(torch, dtype)}
        )
    return model.to(device).eval().requires_grad_(False)


def _dtype_key() -> str:
    import transformers

    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    return "dtype" if version >= (4, 56) else "torch_dtype"


def reader(source: str | Path) -> Any:
    """The processor of a model that takes images, where it has one, else the tokenizer."""
    from pathlib import Path

    from transformers import AutoProcessor, AutoTokenizer

    place = Path(source)
    if not place.is_dir() or any((place / name).is_file() for name in PROCESSORS):
        try:
            found = AutoProcessor.from_pretrained(source)
        except (OSError, ValueError, ImportError):  # no processor there, or none without Pillow: texts can be read
            found = None
        if getattr(found, "image_processor", None) is not None and getattr(found, "tokenizer", None) is not None:
            return found
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(":")
        raise CheckpointError(
            f"{source}: no tokenizer that transformers reads; copy that of its base there ({reason})"
        ) from error


def class_of(config: Any) -> Any:
    """The auto class of a configuration: with images where its architecture takes them, else of text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    text_only = str((getattr(config, "architectures", None) or [""])[0]).endswith("ForCausalLM")
    images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images and not text_only else AutoModelForCausalLM


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def places(model: Any, shapes: Mapping[str, tuple[int, ...]], values: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """For each tensor on disk the parameter that it is; a head that is tied to its embedding has none of its own.

    `values` gives a tensor's values, flat. Raises PlanError where a tensor is no parameter, as where transformers joins
    several in one, and where a parameter comes from no tensor.
    """
    held: dict[str, Tensor] = model.state_dict(keep_vars=True)
    paired = layout.live_names(shapes, held)
    found: dict[str, Tensor] = {}
    for name in shapes:
        parameter = held[paired[name]] if name in paired and _is(held[paired[name]], values(name)) else None
        if parameter is None:
            parameter = _by_values(name, shapes[name], held, values)
        if parameter is not None:
            found[name] = parameter
        elif not (layout.BUFFERS.search(name) or _shared(held.get(paired.get(name, "")), found)):
            raise PlanError(
                f"{name!r}: no parameter of the loaded {type(model).__name__} has its values (transformers may join "
                "tensors as it loads); a merge into a live model cannot place it, so merge to disk"
            )
    _check_all_come_from_disk(held, found)
    return _once(found)


def _once(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the heads that share their embedding's memory, so that a parameter is written once."""
    first: dict[int, str] = {}
    for name in sorted(found, key=lambda name: layout.role(name) == "head"):
        first.setdefault(found[name].data_ptr(), name)
    return {name: parameter for name, parameter in found.items() if first[parameter.data_ptr()] == name}


def _is(parameter: Tensor, values: Tensor) -> bool:
    import torch

    same_size = parameter.numel() == values.numel() and parameter.is_contiguous()
    return same_size and torch.equal(parameter.detach().reshape(-1), values.to(parameter.device, parameter.dtype))


def _by_values(
    name: str, shape: tuple[int, ...], held: Mapping[str, Tensor], values: Callable[[str], Tensor]
) -> Tensor | None:
    """The parameter of the same shape and values whose name ends most alike."""
    alike = [own for own, parameter in held.items() if tuple(parameter.shape) == shape]
    for own in sorted(alike, key=lambda own: -_common_end(own, name)):
        if _common_end(own, name) and _is(held[own], values(name)):
            return held[own]
    return None


def _common_end(one: str, other: str) -> int:
    """How many of the last parts two names share."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return next((k for k, (a, b) in enumerate(pairs) if a != b), min(one.count("."), other.count(".")) + 1)


def _shared(parameter: Tensor | None, found: Mapping[str, Tensor]) -> bool:
    return parameter is not None and any(parameter.data_ptr() == one.data_ptr() for one in found.values())


def _check_all_come_from_disk(held: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    known = {parameter.data_ptr() for parameter in found.values()}
    lost = [name for name, parameter in held.items() if parameter.numel() and parameter.data_ptr() not in known]
    if lost:
        raise PlanError(
            f"the loaded model has {lost[0]!r}, which is in no file of the checkpoint: transformers would make it up"
        )
