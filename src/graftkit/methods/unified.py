"""One unified model for all, and for each of the models a bit mask that finds its own entries in it again."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.parts import per_model, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def agreeing(deltas: "Tensor", merged: "Tensor") -> "Tensor":
    """EMR's masks [models, *shape]: where a delta has the sign of the unified one."""
    return ((deltas > 0) & (merged > 0)) | ((deltas < 0) & (merged < 0))


@method(
    source="Huang et al. 2024, EMR-Merging (arXiv 2405.17461)",
    grain="element",
    masks=agreeing,
)
def emr(deltas: "Tensor", *, rescale: Literal["model", "means", "tensor", "none"] = "model") -> "Tensor":
    """Elect a sign per entry and the largest magnitude of that sign; a mask and a scale bring each model back.

    Formula: `f = sign(sum_t delta_t)`, minus for 0; `u = f max_{t: sign(delta_t) = f} |delta_t|`; the output is
    `W_0 + u`, and model t is `W_0 + r_t m_t u` with `m_t` 1 where `sign(delta_t) = sign(u)`, else 0, and
    `r_t = sum |delta_t| / sum |m_t u|`.

    Shapes: deltas [models, *shape] -> merged delta [*shape]; masks [models, *shape].

    Knobs:
        rescale: over what the sums of r_t run: the `model` (the paper), its tensors' `means` (the authors' code), each
            `tensor` by itself; `none` leaves it out.

    Source: Huang et al. 2024 (arXiv 2405.17461), section 3.

    Deviations: where a model agrees nowhere r_t is 0, not undefined; sums run over the tensors that this method merges.

    Use it when: one set of weights is to serve several tasks, and it is known at run time which: `OUT#task` reads
    a model back by its mask, one bit an entry. The unified weights alone are the largest entries of all, and go far
    from the base.

    Example: per entry the larger of the deltas that agree with their sum: 2, 1, 0.25 and -1.
        >>> get("emr").run(base=base, models=models)
        tensor([3.0000, 2.0000, 1.2500, 0.0000])
    """
    import torch

    positive = weighted_sum(deltas, 1.0) > 0
    largest = torch.where(positive, deltas.amax(dim=0), deltas.amin(dim=0))
    return torch.where((largest > 0) == positive, largest, torch.zeros_like(largest))


def needed(deltas: "Tensor", merged: "Tensor", selectivity: PerModel) -> "Tensor":
    """TALL masks [models, *shape]: where a model's own part of an entry is large beside the others'."""
    return deltas.abs() > per_model(selectivity, deltas) * (merged - deltas).abs()


@method(
    source="Wang et al. 2024, Localizing task information for improved model merging (arXiv 2405.07813)",
    grain="element",
    masks=needed,
)
def tall(deltas: "Tensor", *, selectivity: Annotated[PerModel, Range(0, search=(0.2, 0.6))] = 0.4) -> "Tensor":
    """The sum of the deltas, and for each model a mask of the entries that it needs of it.

    Formula: `tau = sum_t delta_t`; the output is `W_0 + tau`, and model t is `W_0 + m_t tau` with `m_t` 1 where
    `|delta_t| > selectivity_t |tau - delta_t|`, else 0.

    Shapes: deltas [models, *shape] -> merged delta [*shape]; masks [models, *shape].

    Knobs:
        selectivity: how large a model's own part of an entry must be beside the others' (the paper's lambda); 0: any.

    Source: Wang et al. 2024 (arXiv 2405.07813), TALL masks.

    Deviations: the paper chooses lambda for each task on validation data, from 0.2 to 0.6; the default is ours.

    Use it when: one set of weights is to serve several tasks, and it is known at run time which: `OUT#task` reads
    a model back by its mask, one bit an entry. The weights alone are task arithmetic.

    Example: the sum of the deltas; the first model's mask is 1, 1, 1, 0, as 0.5 > 0.4 * 1 in the second entry.
        >>> get("tall").run(base=base, models=models)
        tensor([4.0000, 1.5000, 1.2500, 0.0000])
    """
    return weighted_sum(deltas, 1.0)
