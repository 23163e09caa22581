"""Methods for the matrices of linear layers: what every other tensor gets instead, and matrices kept as [in, out]."""

from __future__ import annotations

from dataclasses import replace

from graftkit import methods
from graftkit.checkpoints.headers import TensorInfo
from graftkit.recipes import experts, layout
from graftkit.recipes.adapters import CONV1D
from graftkit.recipes.knobs import Setting
from graftkit.recipes.steps import Context

MEAN = "task_arithmetic"
"""The method that takes the mean of deltas, its scale divided by how many there are."""


def fitted(context: Context, info: TensorInfo, setting: Setting) -> Setting:
    """The setting that a tensor really has: of a method for matrices, the mean of the deltas where it is none.

    Of the deltas of those models that have the tensor: an adapter that leaves it alone does not count.
    """
    method = methods.get(setting.method)
    if not method.matrices:
        return setting
    if not is_matrix(info):
        count = max(1, sum(info.name in member.names for member in context.models))
        values = {"weight": setting.knobs["weight"], "scale": setting.knobs["scale"] / count, "normalize": False}
        return replace(setting, method=MEAN, knobs=values)
    if setting.knobs.get("inputs") != "family":
        return setting
    return replace(setting, knobs={**setting.knobs, "inputs": "rows" if _is_turned(context, info) else "columns"})


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor is the matrix of a linear layer, or holds one for each expert."""
    if experts.is_stack(info):
        return len(info.shape) == 3
    looked_up = layout.role(info.name) in ("embedding", "head", "norm") or "embed" in info.name
    return len(info.shape) == 2 and info.name.endswith("weight") and not looked_up


def _is_turned(context: Context, info: TensorInfo) -> bool:
    """Whether the family of the output keeps the matrix as [in, out]."""
    config = context.sources[context.like.source].source.config
    return config.get("model_type") in (experts.TRANSPOSED if experts.is_stack(info) else CONV1D)
