"""Methods for the matrices of linear layers: what every other tensor gets instead, and matrices kept as [in, out]."""

from __future__ import annotations

from dataclasses import replace

from graftkit import methods
from graftkit.checkpoints.headers import TensorInfo
from graftkit.errors import PlanError
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
    if method.measured_with_examples and not (is_matrix(info) and is_measured(info.name)):
        return _weighted_mean(context, info, setting)
    if not is_matrix(info):
        count = max(1, sum(info.name in member.names for member in context.models))
        values = {"weight": setting.knobs["weight"], "scale": setting.knobs["scale"] / count, "normalize": False}
        return replace(setting, method=MEAN, knobs=values)
    if setting.knobs.get("inputs") != "family":
        return setting
    return replace(setting, knobs={**setting.knobs, "inputs": "rows" if _is_turned(context, info) else "columns"})


def _weighted_mean(context: Context, info: TensorInfo, setting: Setting) -> Setting:
    """The weighted mean of the deltas of those models that have the tensor; of the models where there is no base."""
    weight, scale = setting.knobs["weight"], setting.knobs["scale"]
    if context.base is None:
        if scale != 1:
            raise PlanError(
                f"recipe.knobs.scale: {setting.method} scales deltas; name the models' `base`, or leave it 1"
            )
        return replace(setting, method="average", knobs={"weight": weight, "normalize": True})
    each = zip(weight, context.models, strict=True)
    values = {"weight": tuple(w * (info.name in member.names) for w, member in each), "scale": scale}
    return replace(setting, method=MEAN, knobs={**values, "normalize": any(values["weight"])})


def is_measured(name: str) -> bool:
    """Whether inputs of a matrix can be listened to: those of a mixture's experts, and of its router, cannot."""
    return not (layout.EXPERTS.search(name) or experts.STACK.search(name) or experts.ROUTER.search(name))


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
