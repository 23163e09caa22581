"""Preparations: what is left of each delta before a method merges them."""

from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, parts
from graftkit.methods.composition import preparation

if TYPE_CHECKING:
    from torch import Tensor

    from graftkit.methods.random import Keyed

Density = Annotated[PerModel, Range(0, 1)]

LEAST = 1e-3  # keep probability below which an entry is not scaled up further: its factor would be noise


@preparation(
    source="Yadav et al. 2023, TIES-Merging (arXiv 2306.01708)",
    grain="element",
    kernel="graftkit.methods.preparation_kernels:trim",
)
def trim(
    deltas: "Tensor", threshold: "Tensor", *, density: Density = 0.2, scope: Literal["tensor", "model"] = "tensor"
) -> "Tensor":
    """Keep the largest entries of each delta.

    Formula: `d_t` = delta_t where its magnitude is among the top `density`, else 0.

    Shapes: deltas [models, *shape], threshold [models] -> deltas [models, *shape].

    Knobs:
        density: share of entries kept; 1 keeps all, 0 none.
        scope: count the share within each tensor, or over all tensors that the same settings prepare.

    Source: Yadav et al. 2023 (arXiv 2306.01708), section 4, first step.

    Deviations: every entry that ties with the k-th is kept.

    Use it when: another method than TIES is to see only the largest entries of each delta.

    Example: of the first delta 2 and -0.5 are kept, of the second the three that tie; then all are added up.
        >>> run("task_arithmetic", base=base, models=models, prepare=[("trim", {"density": 0.5})])
        tensor([4.0000, 1.5000, 1.0000, 0.0000])
    """
    return parts.trim(deltas, threshold)


@preparation(
    source="Yu et al. 2024, Language models are Super Mario (arXiv 2311.03099)",
    grain="element",
    kernel="graftkit.methods.preparation_kernels:dare",
)
def dare(deltas: "Tensor", rng: "Keyed", *, density: Density = 0.5, rescale: bool = True) -> "Tensor":
    """Drop entries of each delta at random, divide the rest by the share kept.

    Formula: `d_t = mask_t * delta_t / density_t`, mask entries independent and 1 with probability `density_t`.

    Shapes: deltas [models, *shape] -> deltas [models, *shape].

    Knobs:
        density: probability to keep an entry (1 minus the paper's drop rate); 1 keeps all, 0 none.
        rescale: divide by the density, so that the expected delta is the full one.

    Source: Yu et al. 2024 (arXiv 2311.03099), section 3.

    Deviations: none; where nothing before it draws random numbers, its masks are those of the method `dare`.

    Use it when: DARE's sparse deltas are to be merged by another method; for when they suit, see the method `dare`.

    Example: this seed keeps 2 and 0.25 of the first delta and the first 1 of the second, each doubled; of 4 and 2
    TIES takes the mean.
        >>> from graftkit.methods.random import Keyed
        >>> rng, knobs = Keyed.of(seed=3, models=2), {"density": 0.5}
        >>> run("ties", base=base, models=models, prepare=[("dare", knobs)], rng=rng, density=1)
        tensor([4.0000, 1.0000, 1.5000, 1.0000])
    """
    return parts.drop(deltas, rng.uniform(deltas), density, rescale)


@preparation(
    source="Davari and Belilovsky 2024, Model Breadcrumbs (arXiv 2312.06795)",
    grain="element",
    kernel="graftkit.methods.preparation_kernels:breadcrumbs",
)
def breadcrumbs(
    deltas: "Tensor",
    band: "Tensor",
    *,
    density: Density = 0.9,
    outliers: Annotated[PerModel, Range(0, 1, search=(0, 0.05))] = 0.01,
) -> "Tensor":
    """Leave out the largest and the smallest entries of each delta.

    Formula: `d_t` = delta_t where its magnitude is below the top `outliers` and among the top `outliers + density`,
    else 0.

    Shapes: deltas [models, *shape], band [2, models] -> deltas [models, *shape].

    Knobs:
        density: share of entries kept; 1 keeps all, outliers too, 0 none.
        outliers: share of largest entries left out (the paper's gamma); 0 trims.

    Source: Davari and Belilovsky 2024 (arXiv 2312.06795).

    Deviations: as the method `breadcrumbs`: shares are of the tensor, what ties with the last entry kept is kept.

    Use it when: breadcrumbs are to be merged by another method than a sum or a vote.

    Example: of the first delta 2 and 0 are left out; then deltas are averaged.
        >>> knobs = {"density": 0.5, "outliers": 0.25}
        >>> run("average", base=base, models=models, prepare=[("breadcrumbs", knobs)])
        tensor([1.5000, 1.2500, 1.1250, 0.5000])
    """
    return parts.within(deltas, band)


@preparation(source="Deep et al. 2024, DELLA-Merging (arXiv 2406.11617)", grain="row")
def magprune(
    deltas: "Tensor",
    rng: "Keyed",
    *,
    density: Density = 0.5,
    epsilon: Annotated[PerModel, Range(0, 0.5, search=(0, 0.2))] = 0.15,
    rescale: bool = True,
) -> "Tensor":
    """Drop entries at random, small ones more often, and divide the rest by their chance.

    Formula: `d_t = b_t delta_t / q_t`, b_t 1 with probability q_t; the entry of rank r among the n of its row, by
    magnitude and from 0 at the smallest, has `q = density - epsilon + 2 epsilon r / (n - 1)`.

    Shapes: deltas [models, *shape] -> deltas [models, *shape]; rows run along the last axis.

    Knobs:
        density: mean probability to keep an entry (1 minus the paper's drop rate); 1 keeps all, 0 none.
        epsilon: half the window of probabilities; 0 is DARE. Narrowed where it would leave the range 0 to 1.
        rescale: divide by the probability, so that the expected delta is the full one.

    Source: Deep et al. 2024 (arXiv 2406.11617), MagPrune.

    Deviations: a row of one entry is kept with probability `density`, and entries kept against odds of more than 1000
    to 1 are scaled by 1000 at most.

    Use it when: as `prepare.dare`, where large entries should stay more often than small ones.

    Example: kept are 2, -0.5 and 0.25 of the first delta, by chances of 0.8, 0.67 and 0.53, and the first 1 of the
    second, by 0.53; each is divided by its chance.
        >>> from graftkit.methods.random import Keyed
        >>> rng, knobs = Keyed.of(seed=3, models=2), {"density": 0.6, "epsilon": 0.2}
        >>> run("task_arithmetic", base=base, models=models, prepare=[("magprune", knobs)], rng=rng)
        tensor([5.3750, 0.2500, 1.4688, 1.0000])
    """
    import torch

    chance = keep_probability(deltas, density, epsilon)
    kept = torch.where(rng.uniform(deltas) < chance, deltas, torch.zeros_like(deltas))
    return kept / chance.clamp(min=LEAST).to(deltas.dtype) if rescale else kept


def keep_probability(deltas: "Tensor", density: PerModel, epsilon: PerModel) -> "Tensor":
    """MagPrune's q, float64 [models, *shape]: rises with the rank of a magnitude in its row; ties rank by position."""
    import torch

    rows = deltas.detach().abs() if deltas.ndim > 1 else deltas.detach().abs()[:, None]
    count = rows.shape[-1]
    order = _by_magnitude(rows)  # [models, ..., row]
    steps = torch.arange(count, dtype=torch.float64, device=rows.device).expand(order.shape)
    rank = torch.empty_like(order, dtype=torch.float64).scatter_(-1, order, steps)
    place = 2 * rank / (count - 1) - 1 if count > 1 else torch.zeros_like(rank)
    middle = parts.per_model(density, place)
    window = torch.minimum(parts.per_model(epsilon, place), torch.minimum(middle, 1 - middle))
    return (middle + window * place).reshape(deltas.shape)


def _by_magnitude(rows: "Tensor") -> "Tensor":
    """The positions of each row from its smallest entry to its largest, equal ones as they stand; of magnitudes.

    On the CPU one sort of whole numbers, the float's bits before the position: a fifth of the time of torch's argsort.
    """
    import torch

    if rows.device.type != "cpu" or rows.dtype != torch.float32:
        return rows.argsort(dim=-1, stable=True)
    import numpy as np

    bits = rows.contiguous().numpy().view(np.uint32).astype(np.uint64) << np.uint64(32)
    keys = np.sort(bits | np.arange(rows.shape[-1], dtype=np.uint64), axis=-1)
    return torch.from_numpy((keys & np.uint64(0xFFFFFFFF)).view(np.int64))
