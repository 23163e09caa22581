"""Methods that merge matrices by their singular directions: TSV-M, isotropic merging, KnOTS.

What is no matrix of a linear layer (norms, biases, embeddings, output embeddings) gets the mean of the deltas: rows
that are looked up, and vectors, have no directions in this sense.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.decomposition import NOISE, Spectrum, eigen, orthonormal, sketched, spectrum
from graftkit.methods.parts import combined, per_model, threshold_of, trim, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[PerModel, Range(search=(0, 2))]
Scale = Annotated[float, Range(search=(0, 2))]
Inputs = Literal["family", "columns", "rows"]


@method(
    source="Gargiulo et al. 2025, Task singular vectors (arXiv 2412.00081), TSV-M",
    grain="tensor",
    rotations="both",
    matrices=True,
)
def tsv(
    deltas: "Tensor",
    shape: tuple[int, ...],
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    svd: Literal["exact", "sketched"] = "exact",
) -> "Tensor":
    """Keep the first singular directions of each delta, make those of all models orthogonal, add up.

    Formula: `weight_t delta_t = U_t S_t V_t^T`, of which the first `k = min(out, in) / T` stay, T models;
    `U = [U_1 .. U_T]`, `V = [V_1 .. V_T]`; `scale * U' diag(S_1 .. S_T) V'^T` with `X' = X (X^T X)^(-1/2)`.

    Shapes: deltas [models, out, in] -> merged delta [out, in]; of another shape: the mean of the deltas.

    Knobs:
        weight: factor of each delta; 0 leaves the model out, and leaves its directions to the others.
        scale: factor on the merged delta (the paper's alpha); 0 returns the base.
        svd: `exact`, or `sketched`: nearly the first k directions, found from random ones in float32, in less time: 5.6
            times faster than full SVDs of eight 4096 x 4096 deltas. It held 99.9 % of the energy of the first k where
            singular values fall as those of a tuned model, and 99 % of a random matrix, where they are all alike.

    Source: Gargiulo et al. 2025 (arXiv 2412.00081), section 4.2 and algorithm 1.

    Deviations: a model that leaves a matrix alone is not counted in T, and k is at least 1; the inverse root is a
    pseudo-inverse, so that directions that models share are defined (theirs: arbitrary); singular values below 1e-6
    of the largest are rounding and are left out. Embeddings and output embeddings get the mean of the deltas.

    Use it when: several models were tuned for different things, and the plain sum of their deltas interferes: each
    gets its share of orthogonal directions. With one model it is that model.

    Example: deltas that are diagonal already keep one direction each: 3 of the first, 4 of the second.
        >>> experts = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 4.0]))])
        >>> get("tsv").run(base=torch.zeros(2, 2), models=experts)
        tensor([[3., 0.],
                [0., 4.]])
    """

    def merge(live: "list[Tensor]") -> "Tensor":
        if len(live) == 1:
            return live[0]
        most = max(1, min(shape) // len(live))
        if svd == "exact":
            return joined([spectrum(delta, most) for delta in live])
        return joined([sketched(delta, most) for delta in live])

    return by_matrix(deltas, weight, scale, merge, wide=svd == "exact")


@method(
    source="Marczak et al. 2025, No task left behind: isotropic model merging (arXiv 2502.04959), Iso-C",
    grain="tensor",
    rotations="both",
    matrices=True,
)
def iso_c(deltas: "Tensor", *, weight: Weight = 1.0, scale: Scale = 1.0) -> "Tensor":
    """Give all directions of the summed delta the same size, the mean of their singular values.

    Formula: `sum_t weight_t delta_t = U S V^T`; `scale * mean(S) U V^T`.

    Shapes: deltas [models, out, in] -> merged delta [out, in]; of another shape: the mean of the deltas.

    Knobs:
        weight: factor of each delta in the sum; 0 leaves it out.
        scale: factor on the merged delta (the paper's alpha, searched up to 3); 0 returns the base.

    Source: Marczak et al. 2025 (arXiv 2502.04959), section 4.1.

    Deviations: the mean and the directions are those of singular values above 1e-6 of the largest, so that a sum
    of low rank, such as of adapters, keeps its rank (theirs fills up with arbitrary directions); equal for full rank.

    Use it when: what few strong directions share drowns what is particular to each model. One model alone does not
    come back: its spectrum is flattened.

    Example: singular values 3 and 1 become 2 and 2.
        >>> get("iso_c").run(base=torch.zeros(2, 2), models=torch.diag(torch.tensor([3.0, 1.0]))[None])
        tensor([[2., 0.],
                [0., 2.]])
    """
    return by_matrix(deltas, weight, scale, lambda live: flattened([spectrum(_sum(live))]))


@method(
    source="Marczak et al. 2025, No task left behind: isotropic model merging (arXiv 2502.04959), Iso-CTS",
    grain="tensor",
    rotations="both",
    matrices=True,
)
def iso_cts(
    deltas: "Tensor",
    shape: tuple[int, ...],
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    common: Annotated[float, Range(0, 1)] = 0.8,
    inputs: Inputs = "family",
) -> "Tensor":
    """Flatten as `iso_c`, with the weakest shared directions replaced by those that each model has for itself.

    Formula: `D = sum_t weight_t delta_t`; its first c left directions `U_c`; of each `delta_t - U_c U_c^T delta_t`
    the first k triplets; all these and the c of D with their directions made orthogonal as in `tsv`, and all singular
    values set to their mean. `c = common * min(out, in)`, rounded so that k = (min(out, in) - c) / T is whole.

    Shapes: deltas [models, out, in] -> merged delta [out, in]; of another shape: the mean of the deltas.

    Knobs:
        weight: factor of each delta; 0 leaves the model out.
        scale: factor on the merged delta (the paper's alpha); 0 returns the base.
        common: share of directions that come from the sum; 1 is `iso_c`, 0 gives all to the models one by one.
        inputs: where a matrix keeps its inputs: `columns` (torch's Linear), `rows`, or as the model's family does.

    Source: Marczak et al. 2025 (arXiv 2502.04959), section 4.2.

    Deviations: as for `iso_c`, a model that leaves a matrix alone is not counted, and what a model's own directions
    lack above rounding is not made up; c is never negative. Matrices kept as [in, out] are turned.

    Use it when: `iso_c` is right, and there are many or very different models whose own directions the sum hides.

    Example: two models, half of the directions common: one of the sum's, which is 5 along the second axis.
        >>> experts = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([1.0, 4.0]))])
        >>> get("iso_cts").run(base=torch.zeros(2, 2), models=experts, common=1)
        tensor([[4.5000, 0.0000],
                [0.0000, 4.5000]])
    """

    def merge(live: "list[Tensor]") -> "Tensor":
        shared, own = shares(min(shape), len(live), common)
        total = spectrum(_sum(live), shared)
        pieces = []
        for delta in live:
            rest = delta - total.left @ (total.left.T @ delta)
            pieces.append(spectrum(rest, own, floor=NOISE * float(delta.detach().norm())))
        return flattened([*pieces, total])

    return by_matrix(deltas, weight, scale, merge, transposed=inputs == "rows")


@method(
    source="Stoica et al. 2025, Model merging with SVD to tie the knots (arXiv 2410.19735)",
    grain="tensor",
    rotations="output",
    matrices=True,
)
def knots(
    deltas: "Tensor",
    *,
    weight: Weight = 1.0,
    density: Annotated[PerModel, Range(0, 1)] = 0.2,
    scale: Scale = 1.0,
    elect: Literal["none", "sign"] = "sign",
    combine: Literal["mean", "sum"] = "mean",
    weighted_election: bool = False,
) -> "Tensor":
    """Turn all deltas to directions of outputs that they share, and merge them there as TIES does.

    Formula: `[delta_1 .. delta_T] = U S [V_1 .. V_T]`; TIES on `S V_t = U^T delta_t`, entry by entry, giving Y;
    `scale * U Y`.

    Shapes: deltas [models, out, in] -> merged delta [out, in]; of another shape: the weighted mean of the deltas.

    Knobs:
        weight: weight of each model in the combination.
        density: share of entries of each `S V_t` that is kept; 1 keeps all, 0 returns the base.
        scale: factor on the merged delta.
        elect: `sign` combines only entries of the elected sign, `none` adds up what is kept.
        combine: with an election, mean over the agreeing models (the paper), or sum.
        weighted_election: weights count in the election already, instead of after it.

    Source: Stoica et al. 2025 (arXiv 2410.19735), section 4; the top 20 %, as the authors for vision models.

    Deviations: entries are counted within each matrix (theirs: over all), one weight per model (theirs: one for all),
    and directions below 1e-6 of the first are rounding (theirs: 1e-5, whatever the scale). With `density: 1` and
    `elect: none` it is task arithmetic.

    Use it when: adapters are to be merged by TIES: their entries do not line up from one to another as those of
    fine-tuned models do, and in shared directions they do. Adapters are merged without forming their products.

    Example: the first direction is that of the larger rows; what stays there is the larger half of the entries.
        >>> experts = torch.tensor([[[4.0, 1.0], [0.0, 0.0]], [[2.0, -1.0], [0.0, 0.0]]])
        >>> get("knots").run(base=torch.zeros(2, 2), models=experts, density=0.5)
        tensor([[3., 0.],
                [0., 0.]])
    """
    if not are_matrices(deltas):
        return mean_of(deltas, weight, scale)
    wide = deltas.double()
    rows = wide.transpose(1, 2).reshape(-1, wide.shape[1])  # [models * in, out]
    _, left = eigen(rows, NOISE * NOISE)
    turned = left.T @ wide  # [models, k, in]
    kept = trim(turned, threshold_of(turned, density))
    merged = combined(kept, weight, elect=elect, normalize=False, combine=combine, weighted_election=weighted_election)
    return (scale * (left @ merged)).to(deltas.dtype)


def are_matrices(deltas: "Tensor") -> bool:
    """Whether the deltas [models, *shape] are matrices with something in them."""
    return deltas.ndim == 3 and deltas.numel() > 0


def mean_of(deltas: "Tensor", weight: PerModel, scale: float) -> "Tensor":
    """What all methods here do with a vector: `scale / T * sum_t weight_t delta_t`."""
    return weighted_sum(deltas, weight) * (scale / len(deltas))


def by_matrix(
    deltas: "Tensor",
    weight: PerModel,
    scale: float,
    merge: "Callable[[list[Tensor]], Tensor]",
    *,
    transposed: bool = False,
    wide: bool = True,
) -> "Tensor":
    """A merge of weighted deltas, `wide` in float64, those of zeros left out; the mean where they are no matrices."""
    if not are_matrices(deltas):
        return mean_of(deltas, weight, scale)
    factors = per_model(weight, deltas).reshape(-1)
    pairs = zip(deltas, factors, strict=True)
    weighted = [delta.double() * factor.double() if wide else delta * factor for delta, factor in pairs]
    live = [delta.T if transposed else delta for delta in weighted if bool((delta != 0).any())]
    merged = merge(live) if live else _sum(weighted)
    return (scale * (merged.T if transposed and live else merged)).to(deltas.dtype)


def _sum(live: "list[Tensor]") -> "Tensor":
    total = live[0]
    for delta in live[1:]:
        total = total + delta
    return total


def joined(pieces: list[Spectrum]) -> "Tensor":
    """The sum of some spectra after all their directions were made orthogonal."""
    import torch

    left = orthonormal(torch.cat([piece.left for piece in pieces], dim=1))
    right = orthonormal(torch.cat([piece.right for piece in pieces]).T)
    return (left * torch.cat([piece.sizes for piece in pieces])) @ right.T


def flattened(pieces: list[Spectrum]) -> "Tensor":
    """The same with the mean of their singular values in place of each."""
    import torch

    sizes = torch.cat([piece.sizes for piece in pieces])
    mean = sizes.sum() / max(len(sizes), 1)
    return joined([Spectrum(piece.left, mean.expand(len(piece.sizes)), piece.right) for piece in pieces])


def shares(rank: int, count: int, common: float) -> tuple[int, int]:
    """How many directions Iso-CTS takes from the sum, and from each model."""
    apart = rank - int(rank * common)
    own = round(apart / count)
    own -= own * count > rank
    return rank - own * count, own
