"""Means of directions: each tensor counts as one vector, and inner products are all that is needed of it.

The mathematics happens in the space of coefficients, on a [models, models] matrix in float64; what is left for the
tensors is one weighted sum.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import per_model, spread, weighted_sum

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Weight = Annotated[PerModel, Range(search=(0, 1))]

CANCELLED = 1e-7  # length of a mean of unit vectors below which it has no direction: rounding is about 1e-8
STRAIGHT = 1e-7  # squared sine of an angle below which the arc is its chord
SINGULAR = 1e-6  # divisor of Model Stock below which it says nothing: the models cancel


def _stock_factors(count: int, dots: "np.ndarray", extrapolate: bool) -> "np.ndarray":
    return spread(float(stock_share(dots, extrapolate)) / count, count)


def _mean_direction_factors(count: int, dots: "np.ndarray", weight: PerModel, normalize: bool) -> "np.ndarray":
    return multislerp_factors(spread(weight, count), dots, normalize)  # type: ignore[no-any-return]


def _share_factors(count: int, dots: "np.ndarray", weight: PerModel) -> "np.ndarray":
    import numpy as np

    t = second_share(spread(weight, count))
    return np.array(arc_factors(float(t), angle_between(dots.tolist()), math.sin))


@method(
    source="Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522)",
    grain="element",
    rotations="both",
    model_count=(2, None),
    factors=_stock_factors,
)
def model_stock(deltas: "Tensor", dots: "Tensor", *, extrapolate: bool = False) -> "Tensor":
    """Mean of the models, drawn back towards the base by as much as they disagree.

    Formula: `t * mean_t delta_t` with `t = T c / (1 + (T - 1) c)`, where c is the mean cosine of all pairs of the T
    deltas; t lies between 0 (the base) and 1 (the mean).

    Shapes: deltas [models, *shape], dots [models, models] -> merged delta [*shape].

    Knobs:
        extrapolate: follow the formula where the mean cosine is negative, past the base and away from all models
            (mergekit), instead of returning the base.

    Source: Jang et al. 2024 (arXiv 2403.19522), layer-wise; the formula for N models.

    Deviations: by default a negative mean cosine gives the base; a pair with a zero delta counts as a right angle; no
    norm is too small (mergekit 0.1.5 has a floor of 1e-6 on products).

    Use it when: two or more models were tuned for the same task from the same base, and their mean goes too far
    where they disagree. It expects noise around one solution: deltas of unrelated tasks are nearly at right angles,
    and it then stays near the base.

    Example: the cosine of the two deltas is 0.42, so their mean goes in by 2 * 0.42 / 1.42 = 0.59.
        >>> get("model_stock").run(base=base, models=models)
        tensor([1.8829, 1.1471, 1.0736, 0.7057])
    """
    share = stock_share(dots.cpu().numpy(), extrapolate)
    return weighted_sum(deltas, [float(share) / len(deltas)] * len(deltas))


@method(
    source="Jang et al. 2024, Model Stock: All we need is just a few fine-tuned models (arXiv 2403.19522)",
    grain="row",
    model_count=(2, None),
)
def model_stock_rows(deltas: "Tensor", *, extrapolate: bool = False) -> "Tensor":
    """Model Stock for each output channel by itself.

    Formula: as `model_stock`, with the cosines of the same row of all deltas.

    Shapes: deltas [models, out, ...] -> merged delta [out, ...]; a vector is one row.

    Knobs:
        extrapolate: as for `model_stock`.

    Source: Jang et al. 2024 (arXiv 2403.19522), filter-wise; mergekit's `filter_wise: true`.

    Deviations: as `model_stock`.

    Use it when: as `model_stock`, where some channels agree and others do not.

    Example: the second rows of the two deltas are at right angles, and stay the base's.
        >>> get("model_stock_rows").run(base=base.reshape(2, 2), models=models.reshape(2, 2, 2))
        tensor([[2.0191, 1.1699],
                [1.0000, 1.0000]])
    """
    import torch

    rows = deltas.flatten(2) if deltas.ndim > 2 else deltas.reshape(len(deltas), 1, -1)
    wide = rows.detach().to(torch.float64).transpose(0, 1)  # [out, models, in]
    share = torch.from_numpy(stock_share((wide @ wide.transpose(1, 2)).cpu().numpy(), extrapolate))
    mean = weighted_sum(rows, 1 / len(deltas))
    return (share.to(mean)[:, None] * mean).reshape(deltas.shape[1:])


def stock_share(dots: "np.ndarray", extrapolate: bool) -> "np.ndarray":
    """How far to go from the base to the mean of the models; dots [..., models, models] -> [...]."""
    import numpy as np

    count = dots.shape[-1]
    norms = np.sqrt(np.diagonal(dots, axis1=-2, axis2=-1))
    scales = norms[..., :, None] * norms[..., None, :]
    cosines = dots / np.where(scales > 0, scales, 1.0)
    pairs = np.triu_indices(count, 1)
    cosine = np.clip(cosines[..., pairs[0], pairs[1]].mean(axis=-1), -1.0 if extrapolate else 0.0, 1.0)
    divisor = 1 + (count - 1) * cosine
    singular = np.abs(divisor) < SINGULAR
    return np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))


@method(
    source="Karcher 1977, Riemannian center of mass and mollifier smoothing; as mergekit uses it on whole tensors",
    grain="element",
    rotations="both",
    base_optional=True,
    factors=lambda dots, iterations, tolerance: karcher_factors(dots, iterations, tolerance),
)
def karcher(
    deltas: "Tensor",
    dots: "Tensor",
    *,
    iterations: Annotated[int, Range(0, 10_000)] = 100,
    tolerance: Annotated[float, Range(0, 1)] = 1e-12,
) -> "Tensor":
    """Mean on the sphere: the direction from which the angles to all models are least, with their mean norm.

    Formula: `mean_t |W_t| * mu` with the unit vector mu that has the least sum of squared angles to `W_t / |W_t|`;
    iterated from their normalised mean.

    Shapes: deltas [models, *shape], dots [models, models] -> [*shape]; the models themselves without a base.

    Knobs:
        iterations: most steps; 0 is the normalised mean direction (mergekit: 10).
        tolerance: length of a step, in radians, at which it stops (mergekit: 1e-5).

    Source: Karcher 1977; mergekit 0.1.5, method `karcher`.

    Deviations: with a base it works on deltas (mergekit ignores the base; leave it out to do so here); by default it
    iterates until it stands still; directions that cancel give the mean of the tensors.

    Use it when: several models are to count alike in direction, whatever their norms, and none is the first or the
    last.

    Example: two models without a base; the norm is 3.22, the mean of theirs.
        >>> get("karcher").run(models=models)
        tensor([2.6114, 1.3776, 1.1823, 0.4935])
    """
    return weighted_sum(deltas, karcher_factors(dots.cpu().numpy(), iterations, tolerance).tolist())


def karcher_factors(dots: "np.ndarray", iterations: int, tolerance: float) -> "np.ndarray":
    """The factor of each tensor in the Karcher mean of all; dots [models, models] -> [models]."""
    import numpy as np

    norms = np.sqrt(np.diagonal(dots))
    real = norms > 0  # a zero tensor has no direction, and counts in the mean norm
    units = np.where(real, 1 / np.where(real, norms, 1), 0.0)
    cosines = dots * units[:, None] * units
    point = real / max(real.sum(), 1)  # the mean direction, as coefficients of the unit vectors
    length = _length(point, cosines)
    if length <= CANCELLED:
        return np.full(len(dots), 1 / len(dots))
    point = point / length
    for _ in range(iterations):
        tangent = _tangent(point, cosines, real)
        step = _length(tangent, cosines)
        if step <= tolerance:
            break
        point = math.cos(step) * point + math.sin(step) / step * tangent
        point = point / _length(point, cosines)
    return norms.mean() * point * units  # type: ignore[no-any-return]


def _length(coefficients: "np.ndarray", cosines: "np.ndarray") -> float:
    return math.sqrt(max(float(coefficients @ cosines @ coefficients), 0.0))


def _tangent(point: "np.ndarray", cosines: "np.ndarray", real: "np.ndarray") -> "np.ndarray":
    """The mean of the directions, as seen from a point: where they pull it, as coefficients."""
    import numpy as np

    seen = np.clip(cosines @ point, -1.0, 1.0)
    sines = np.sqrt(1 - seen**2)
    pull = np.where(real & (sines > CANCELLED), np.arccos(seen) / np.maximum(sines, CANCELLED), 0.0) / real.sum()
    return pull - (pull @ seen) * point  # type: ignore[no-any-return]


@method(
    source="mergekit, method `multislerp`",
    grain="element",
    rotations="both",
    base_optional=True,
    factors=_mean_direction_factors,
)
def multislerp(deltas: "Tensor", dots: "Tensor", *, weight: Weight = 1.0, normalize: bool = True) -> "Tensor":
    """Weighted mean direction of any number of models, with their weighted mean norm.

    Formula: `(sum_t w_t |W_t|) * mu`, mu the unit vector along `sum_t w_t W_t / |W_t|`; `w_t = weight_t / sum weight`
    with `normalize`.

    Shapes: deltas [models, *shape], dots [models, models] -> [*shape]; the models themselves without a base.

    Knobs:
        weight: share of each model, any unit; 0 leaves a model out.
        normalize: divide the weights by their sum; without it they scale the norm too.

    Source: mergekit 0.1.5, method `multislerp`; no paper.

    Deviations: mergekit adds a step in the tangent space at mu, which is zero in exact arithmetic; here it is left out.
    Directions that cancel give the weighted mean of the tensors (mergekit refuses more than two).

    Use it when: SLERP is wanted of more than two models, or with weights.

    Example: with a base it is the deltas' directions that are averaged.
        >>> get("multislerp").run(base=base, models=models, weight=[3, 1])
        tensor([2.9515, 0.9184, 1.2033, 0.6750])
    """
    weights = per_model(weight, dots).reshape(-1)
    return weighted_sum(deltas, multislerp_factors(weights, dots, normalize))


def multislerp_factors(weights: Any, dots: Any, normalize: bool) -> Any:
    """The factor of each tensor, [models]; of numpy arrays or of tensors."""
    weights = weights / weights.sum() if normalize else weights
    norms = dots.diagonal() ** 0.5
    directions = weights * (norms > 0) / (norms + (norms == 0))
    squared = abs(directions @ dots @ directions)
    if squared <= (CANCELLED * abs(weights).sum()) ** 2:
        return weights
    return directions * ((weights * norms).sum() / squared**0.5)


@method(
    source="mergekit, method `nuslerp`",
    grain="element",
    rotations="both",
    model_count=(2, 2),
    base_optional=True,
    factors=_share_factors,
)
def nuslerp(deltas: "Tensor", dots: "Tensor", *, weight: Weight = 1.0) -> "Tensor":
    """Spherical interpolation between two models, or between their deltas, at the point that their weights name.

    Formula: SLERP at `t = weight_2 / (weight_1 + weight_2)`; the straight line where the two are parallel, opposite,
    or zero.

    Shapes: deltas [2, *shape], dots [2, 2] -> [*shape]; the models themselves without a base.

    Knobs:
        weight: share of each model, any unit; weights of either sign go beyond the end of the path.

    Source: mergekit 0.1.5, method `nuslerp` with `nuslerp_flatten: true`; no paper.

    Deviations: the line is taken for a squared sine up to 1e-7 (mergekit: 1e-16, below float32's rounding), and weights
    that sum to zero are refused (mergekit: the middle). Single rows and columns have methods of their own.

    Use it when: SLERP is wanted of deltas, or by two weights instead of a place.

    Example: a quarter of the way from the first delta to the second.
        >>> get("nuslerp").run(base=base, models=models, weight=[3, 1])
        tensor([2.9706, 0.8942, 1.2076, 0.6905])
    """
    import torch

    t = second_share(per_model(weight, dots).reshape(-1))
    factors: Any = torch.stack(arc_factors(t, angle_between(dots.tolist()), torch.sin))
    return weighted_sum(deltas, factors)


@method(
    source="mergekit, method `nuslerp`",
    grain="row",
    model_count=(2, 2),
    base_optional=True,
)
def nuslerp_rows(deltas: "Tensor", *, weight: Weight = 1.0) -> "Tensor":
    """NuSLERP of each row by itself.

    Formula: as `nuslerp`, with the angle between the same row of both, along the last axis.

    Shapes: deltas [2, *shape] -> [*shape]; a vector is one row.

    Knobs:
        weight: as for `nuslerp`.

    Source: mergekit 0.1.5, method `nuslerp` with `nuslerp_flatten: false`; no paper.

    Deviations: as `nuslerp`; a row that is zero in one model gives the line (mergekit: sin((1-t) pi/2), sin(t pi/2)).

    Use it when: as `nuslerp`, where rows should turn independently, each by its own angle.

    Example: the second rows of the two deltas are at right angles: each goes in by sin 45 = 0.71.
        >>> get("nuslerp_rows").run(base=base.reshape(2, 2), models=models.reshape(2, 2, 2))
        tensor([[2.7237, 1.2873],
                [1.1768, 0.2929]])
    """
    return _arcs_along(deltas, weight, -1)


@method(
    source="mergekit, method `nuslerp`",
    grain="tensor",
    model_count=(2, 2),
    base_optional=True,
)
def nuslerp_columns(deltas: "Tensor", *, weight: Weight = 1.0) -> "Tensor":
    """NuSLERP of each column by itself.

    Formula: as `nuslerp`, with the angle between the same column of both, along the first axis.

    Shapes: deltas [2, *shape] -> [*shape]; a vector is one column.

    Knobs:
        weight: as for `nuslerp`.

    Source: mergekit 0.1.5, method `nuslerp` with `nuslerp_flatten: false` and `nuslerp_row_wise: true`; no paper.

    Deviations: as `nuslerp_rows`.

    Use it when: as `nuslerp_rows`, where columns (what one input feeds) should turn independently.

    Example: the columns [2, 0.25] and [1, 0] of the deltas are nearly parallel, and give nearly their mean.
        >>> get("nuslerp_columns").run(base=base.reshape(2, 2), models=models.reshape(2, 2, 2))
        tensor([[ 2.5029,  1.6533],
                [ 1.1252, -0.3066]])
    """
    return _arcs_along(deltas, weight, 0)


def _arcs_along(deltas: "Tensor", weight: PerModel, axis: int) -> "Tensor":
    import torch

    t = second_share(per_model(weight, deltas).reshape(-1))
    whole = deltas if deltas.ndim > 1 else deltas[:, None]
    lines = whole.movedim(axis + 1 if axis >= 0 else axis, -1)  # [2, ..., line]
    wide = lines.detach().double()
    scale = wide.norm(dim=-1, keepdim=True).prod(dim=0)
    cosine = torch.where(scale > 0, wide.prod(dim=0).sum(dim=-1, keepdim=True) / scale.clamp(min=1e-300), 1.0)
    straight = 1 - cosine.clamp(-1, 1) ** 2 <= STRAIGHT
    angle = torch.acos(torch.where(straight, 0.0, cosine)).to(deltas.dtype)
    arc = [torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)]
    first, second = (torch.where(straight, line, part) for line, part in zip((1 - t, t), arc, strict=True))
    return (first * lines[0] + second * lines[1]).movedim(-1, axis).reshape(deltas.shape[1:])


def second_share(weights: Any) -> Any:
    """The second of two weights as a share of both. Raises ValueError where they sum to zero."""
    total = weights.sum()
    if abs(total) <= 1e-12 * abs(weights).sum():
        raise ValueError(f"nuslerp divides by the sum of its weights, and {weights.tolist()} sum to zero")
    return weights[1] / total


def angle_between(dots: list[list[float]]) -> float:
    """The angle between two tensors; 0 where the arc is not longer than its chord, or has no direction."""
    scale = math.sqrt(dots[0][0] * dots[1][1])
    cosine = max(-1.0, min(1.0, dots[0][1] / scale)) if scale > 0 else 1.0
    return math.acos(cosine) if 1 - cosine**2 > STRAIGHT else 0.0


def arc_factors(t: Any, angle: float, sine: Any) -> list[Any]:
    """The factors of both ends at the place t of an arc; `sine` is of the kind of t."""
    if angle == 0:
        return [1 - t, t]
    return [sine((1 - t) * angle) / math.sin(angle), sine(t * angle) / math.sin(angle)]
