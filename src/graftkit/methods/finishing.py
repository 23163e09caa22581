"""Finishers: what is done to a merged delta before the base is added."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import Range
from graftkit.methods.composition import finisher

if TYPE_CHECKING:
    from torch import Tensor


@finisher(source="no paper; a length taken back after averaging", grain="element")
def rescale(
    delta: "Tensor",
    norm: "Tensor",
    norms: "Tensor",
    *,
    to: Literal["mean", "itself"] = "mean",
    factor: Annotated[float, Range(search=(0, 2))] = 1.0,
) -> "Tensor":
    """Give the merged delta the mean length of the models' deltas, tensor by tensor.

    Formula: `factor * delta * mean_t |delta_t| / |delta|`, without the ratio for `to: itself`.

    Shapes: delta [*shape], norm [], norms [models] -> delta [*shape].

    Knobs:
        to: the length before the factor: the mean of the models' (Frobenius norms), or the merged delta's own.
        factor: what the length is multiplied by; 0 returns the base.

    Source: no paper; averaging nearly orthogonal deltas shortens them, and this gives the length back.

    Deviations: none; a merged delta of zero stays zero.

    Use it when: a method made the merged delta shorter than those that went in, as a mean of different ones does,
    and it is to have their length again.

    Example: the mean of the deltas is 1.61 long and becomes 1.90, the mean of their lengths.
        >>> run("average", base=base, models=models, finish=["rescale"])
        tensor([2.7790, 1.2965, 1.1483, 0.4070])
    """
    gain = norms.mean() / norm if to == "mean" and norm > 0 else 1.0
    return (delta.double() * (factor * gain)).to(delta.dtype)


@finisher(
    source="Singular value calibration, 2026 (arXiv 2602.05536)",
    grain="tensor",
    matrices=True,
)
def svc(delta: "Tensor", deltas: "Tensor", *, alpha: Annotated[float, Range(0, search=(0.5, 2))] = 1.0) -> "Tensor":
    """Shrink the directions of a merged delta in which the models' deltas pile up.

    Formula: `delta = U S V^T`; for each direction r and model t `a = u_r^T delta`, `a_t = u_r^T delta_t`,
    `p_t = <a, a_t> / <a_t, a_t>`; `s_r` becomes `s_r T / sum_t max(alpha, p_t)`.

    Shapes: delta [out, in], deltas [models, out, in] -> delta [out, in]; a tensor of another shape stays as it is.

    Knobs:
        alpha: least share that counts for each model; 1 never lengthens a direction, less may, by up to 1 / alpha.

    Source: arXiv 2602.05536.

    Deviations: a model without any part in a direction counts as alpha, and where nothing counts the direction stays.
    In a recipe, embeddings and output embeddings are left alone: their rows are looked up, not multiplied.

    Use it when: models share directions, so that a sum of their deltas counts these several times.

    Example: the same model twice: the sum of its deltas would count double, and comes out as one.
        >>> twins = models[[0, 0]].reshape(2, 2, 2)
        >>> run("task_arithmetic", base=base.reshape(2, 2), models=twins, finish=["svc"])
        tensor([[3.0000, 0.5000],
                [1.2500, 1.0000]])
    """
    import torch

    if delta.ndim != 2 or not delta.numel():
        return delta
    left, sizes, right = torch.linalg.svd(delta.double(), full_matrices=False)  # [out, r], [r], [r, in]
    parts = left.T @ deltas.double()  # [models, r, in]
    energy = parts.square().sum(dim=2)
    toward = (parts * right).sum(dim=2) * sizes  # <a, a_t>: a is s_r v_r
    share = torch.where(energy > 0, toward / torch.where(energy > 0, energy, 1.0), alpha).clamp(min=alpha)
    total = share.sum(dim=0)
    gain = torch.where(total > 0, len(deltas) / torch.where(total > 0, total, 1.0), 1.0)
    return (delta.double() + (left * (sizes * (gain - 1))) @ right).to(delta.dtype)
