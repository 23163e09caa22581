"""Averages of weights, and paths between them: methods that need no common ancestor."""

from typing import TYPE_CHECKING, Annotated

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import per_model, spread, weighted_sum

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PARALLEL = 0.9995  # cosine above which SLERP is the straight line, as in the peers


def _mean_factors(count: int, weight: PerModel, normalize: bool) -> "np.ndarray":
    weights = spread(weight, count)
    return weights / weights.sum() if normalize else weights  # type: ignore[no-any-return]


def _arc_factors(norms: "np.ndarray", dots: "np.ndarray", t: float) -> "np.ndarray":
    import numpy as np

    return np.array(slerp_coefficients(norms.tolist(), dots.tolist(), t))


def _one_factor(count: int, take: int, scale: float) -> "np.ndarray":
    import numpy as np

    if take >= count:
        raise ValueError(f"take is {take}, but there are {count} models, counted from 0")
    return np.where(np.arange(count) == take, scale, 0.0)


@method(
    source="Wortsman et al. 2022, Model soups (arXiv 2203.05482)",
    grain="element",
    rotations="both",
    factors=_mean_factors,
)
def average(
    models: "Tensor", *, weight: Annotated[PerModel, Range(search=(0, 1))] = 1.0, normalize: bool = True
) -> "Tensor":
    """Weighted mean of the models' weights.

    Formula: `sum_t weight_t W_t / sum_t weight_t`; without `normalize` the division is left out.

    Shapes: models [models, *shape] -> [*shape].

    Knobs:
        weight: share of each model, any unit; equal values give the uniform soup, 0 leaves a model out.
        normalize: divide by the sum of the weights, so that only their ratios count.

    Source: Wortsman et al. 2022, Model soups (arXiv 2203.05482), uniform soup.

    Deviations: none; the division is done once, after the sum.

    Use it when: the models come from one ancestor and were tuned for the same thing (other seeds, other settings,
    checkpoints of one run), or no base is at hand. Each model's change is divided by the number of models:
    different skills weaken each other.

    Example: the first model counts three times as much as the second.
        >>> get("average").run(models=models, weight=[3, 1])
        tensor([2.7500, 0.8750, 1.1875, 0.7500])
    """
    total = weighted_sum(models, weight)
    return total / per_model(weight, models).sum() if normalize else total


@method(
    source="Shoemake 1985, Animating rotation with quaternion curves; as used by the peers on whole tensors",
    grain="element",
    rotations="both",
    ordered=True,
    model_count=(2, 2),
    factors=_arc_factors,
)
def slerp(models: "Tensor", norms: "Tensor", dots: "Tensor", *, t: Annotated[float, Range(0, 1)] = 0.5) -> "Tensor":
    """Spherical interpolation between two models, each tensor taken as one vector.

    Formula: `sin((1-t) a)/sin(a) W_1 + sin(t a)/sin(a) W_2` with the angle `a` between the two; the straight line
    where they are parallel (cosine beyond 0.9995) or one is zero.

    Shapes: models [2, *shape] -> [*shape]; norms [2]; dots [2, 2].

    Knobs:
        t: position on the path; 0 is the first model, 1 the second.

    Source: Shoemake 1985; the raw tensors are combined, so norms are not interpolated, as in mergekit.

    Deviations: a zero tensor gives the straight line (mergekit: sin((1-t) pi/2), sin(t pi/2), which shrinks the
    other model); a scalar's angle is that of its sign.

    Use it when: two models are to be blended at a place between them, with a norm between theirs: the straight line
    is shorter in its middle, the more the models differ in direction.

    Example: the norm is 3.22, between the models' 3.44 and 3; their mean has 3.05.
        >>> get("slerp").run(models=models, t=0.5)
        tensor([2.6351, 1.3176, 1.1858, 0.5270])
    """
    first, second = slerp_coefficients(norms.tolist(), dots.tolist(), t)
    return first * models[0] + second * models[1]


def slerp_coefficients(norms: list[float], dots: list[list[float]], t: float) -> tuple[float, float]:
    """The two factors of SLERP, in float64."""
    import math

    scale = norms[0] * norms[1]
    cosine = max(-1.0, min(1.0, dots[0][1] / scale)) if scale > 0 else 1.0
    if abs(cosine) > PARALLEL or t in (0.0, 1.0):
        return 1.0 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


@method(source="-", grain="element", rotations="both", ordered=True, factors=_one_factor)
def passthrough(
    models: "Tensor", *, take: Annotated[int, Range(0, 1000)] = 0, scale: Annotated[float, Range()] = 1.0
) -> "Tensor":
    """One model's tensor as it is, or scaled: the building block of rules that keep part of a model.

    Formula: `scale * W_take`.

    Shapes: models [models, *shape] -> [*shape].

    Knobs:
        take: which model, counted from 0 in the recipe's order.
        scale: factor on the weights; 1 copies them.

    Source: mergekit's method of the same name.

    Deviations: chooses among several models, so that a rule can keep some tensors of one of them.

    Use it when: a rule is to keep some tensors of one model as they are: an embedding, a head, a vision tower.

    Example: the second model, as it is.
        >>> get("passthrough").run(models=models, take=1)
        tensor([2., 2., 1., 0.])
    """
    if take >= models.shape[0]:
        raise ValueError(f"take is {take}, but there are {models.shape[0]} models, counted from 0")
    return scale * models[take]
