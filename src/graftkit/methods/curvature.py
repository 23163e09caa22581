"""Methods that weigh each model by what examples of its domain show: Fisher, RegMean, regression in a core space.

What they read (`fisher`, `gram`, `core_gram`) is measured by `graft statistics` and stored beside the recipe.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from graftkit.methods import PerModel, Range, method
from graftkit.methods.decomposition import eigen
from graftkit.methods.parts import per_model
from graftkit.methods.spectral import are_matrices

if TYPE_CHECKING:
    from torch import Tensor

Weight = Annotated[PerModel, Range(0, search=(0, 2))]
Scale = Annotated[float, Range(search=(0, 2))]
ROUNDING = 1e-6
"""Moments are stored in float32: where the ridge is below its rounding, directions with a smaller share of the largest
moment keep the mean of the deltas."""

SPAN = 1e-12
"""Of core_regmean: directions with a smaller share of the largest moment were not measured."""


@method(
    source="Matena and Raffel 2022, Merging models with Fisher-weighted averaging (arXiv 2111.09832)",
    grain="element",
    base_optional=True,
)
def fisher(
    deltas: "Tensor",
    fisher: "Tensor",
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    floor: Annotated[float, Range(1e-12, search=(1e-9, 1e-2))] = 1e-6,
) -> "Tensor":
    """Average every weight over the models, each counting by how much its own predictions depend on that weight.

    Formula: `scale * sum_t weight_t (F_t + floor) delta_t / sum_t weight_t (F_t + floor)` for each entry, F_t the
    diagonal of model t's Fisher information, over its root mean square.

    Shapes: deltas, fisher [models, *shape] -> merged delta [*shape].

    Knobs:
        weight: how much each model counts; 0 leaves it out.
        scale: factor on the merged delta; 0 returns the base. Without a base it must stay 1.
        floor: what every entry counts at least, in units of the root mean square of the model's Fisher information;
            large values give the plain average, small ones leave weights that no model needs to rounding.

    Source: Matena and Raffel 2022 (arXiv 2111.09832), section 3, with the norm of each Fisher divided out as in their
    code.

    Deviations: the information is of tokens drawn from the model's own predictions, one backward pass a sequence (see
    docs/statistics.md), not a sum over all labels; the floor is relative and is given to all models, where the
    authors' is absolute and given to the first. Where no model counts, the base.

    Use it when: there are examples of each model's domain and memory for gradients, but no room for matrices of
    second moments. RegMean costs no gradients and looks at whole inputs.

    Example: the first weight matters three times as much to the first model, the second to nobody.
        >>> models = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> get("fisher").run(models=models, fisher=torch.tensor([[3.0, 0.0], [1.0, 0.0]]))
        tensor([1.5000, 3.0000])
    """
    import torch

    counts = per_model(weight, deltas) * (fisher.reshape(deltas.shape).to(deltas.dtype) + floor)
    total = counts.sum(dim=0)
    some = total > 0
    return scale * (counts * deltas).sum(dim=0) / torch.where(some, total, torch.ones_like(total))


@method(
    source="Jin et al. 2023, Dataless knowledge fusion (arXiv 2212.09849), RegMean",
    grain="tensor",
    base_optional=True,
    matrices=True,
)
def regmean(
    deltas: "Tensor",
    gram: "Tensor",
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    alpha: Annotated[float, Range(0, 1)] = 0.9,
    ridge: Annotated[float, Range(1e-12, search=(1e-9, 1e-2))] = 1e-6,
    inputs: Literal["family", "columns", "rows"] = "family",
) -> "Tensor":
    """For each linear layer, the matrix that answers each model's inputs most nearly as that model does.

    Formula: `G_t` the mean of `x x^T` over the inputs of model t's domain, its off-diagonal entries times `alpha`,
    plus `ridge` times the mean diagonal entry of all; `scale * (sum_t weight_t delta_t G_t) (sum_t weight_t G_t)^-1`.

    Shapes: deltas [models, out, in], gram [models, in, in] -> merged delta [out, in]; other tensors: the mean of the
    deltas.

    Knobs:
        weight: how much each model's inputs count; 0 leaves it out.
        scale: factor on the merged delta; 0 returns the base. Without a base it must stay 1.
        alpha: how much of the off-diagonal entries stays; 0 averages column by column, 1 trusts the examples wholly.
        ridge: added to the diagonal, in units of its mean; with few tokens what keeps the solution near the mean.
        inputs: where a matrix keeps its inputs: `columns` (torch's Linear), `rows`, or as the model's family does.

    Source: Jin et al. 2023 (arXiv 2212.09849), section 3 and appendix; 0.9 as in the paper's text (its released
    settings are 0.1 and 0.9 by model).

    Deviations: padding is left out of the moments, which are means over tokens, so that every model counts alike
    however many examples it has; the ridge is added to each model's own, so that equal models stay as they are.
    Norms, biases, embeddings, output embeddings and the experts of a mixture get the mean of the deltas.

    Use it when: a few hundred examples of each domain are at hand, without labels. Its statistics hold a square
    matrix for each layer's inputs; `core_regmean` needs a fraction of that.

    Example: each model answers for the input that its domain has most of.
        >>> models = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> gram = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> get("regmean").run(models=models, gram=gram)
        tensor([[0.7500, 0.8000]])
    """
    if not are_matrices(deltas):
        return scale * _mean(deltas, weight)

    def shrunk(moments: "Tensor") -> "Tensor":
        diagonal = moments.diagonal(dim1=-2, dim2=-1)
        return alpha * moments + (1 - alpha) * diagonal.diag_embed()

    turned = inputs == "rows"
    wide = (deltas.mT if turned else deltas).double()
    merged = scale * _regression(wide, gram.double(), weight, ridge, shrunk)
    return (merged.mT if turned else merged).to(deltas.dtype)


@method(
    source="RegMean++, 2025 (fusion-bench 0.2.33)",
    grain="tensor",
    base_optional=True,
    matrices=True,
)
def regmean_plus(
    deltas: "Tensor",
    merged_gram: "Tensor",
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    alpha: Annotated[float, Range(0, 1)] = 0.95,
    ridge: Annotated[float, Range(1e-12, search=(1e-9, 1e-2))] = 1e-6,
    inputs: Literal["family", "columns", "rows"] = "family",
) -> "Tensor":
    """RegMean++: RegMean whose inputs come out of the merged layers before, as they will in the merged model.

    Formula: as `regmean`, `G_t` the moments of what model t's own layer gets and makes within itself when it stands
    behind the merged layers, on the examples of its domain.

    Shapes: deltas [models, out, in], merged_gram [models, in, in] -> merged delta [out, in]; other tensors: the mean
    of the deltas.

    Knobs:
        weight: how much each model's inputs count; 0 leaves it out.
        scale: factor on the merged delta; 0 returns the base. Without a base it must stay 1.
        alpha: how much of the off-diagonal entries stays; 0 averages column by column, 1 trusts the examples wholly.
        ridge: added to the diagonal, in units of its mean.
        inputs: where a matrix keeps its inputs: `columns` (torch's Linear), `rows`, or as the model's family does.

    Source: RegMean++ as in fusion-bench 0.2.33; `graft statistics` goes through the layers, merges each and sends all
    examples on through it.

    Deviations: those of `regmean`; the examples of all models are read as the base's tokenizer reads them.

    Use it when: `regmean` is worth its cost, and layers far from the input are to see what they will really get. The
    statistics belong to one recipe: another knob, and they are measured anew.

    Example: the formula is that of `regmean`.
        >>> models = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> gram = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 4.0]]])
        >>> get("regmean_plus").run(models=models, merged_gram=gram)
        tensor([[0.7500, 0.8000]])
    """
    knobs = {"weight": weight, "scale": scale, "alpha": alpha, "ridge": ridge, "inputs": inputs}
    return regmean(deltas, merged_gram, **knobs)  # type: ignore[arg-type]


@method(
    source="graftkit: RegMean (Jin et al. 2023, arXiv 2212.09849) on a few directions of the inputs",
    grain="tensor",
    rotations="both",
    matrices=True,
)
def core_regmean(
    deltas: "Tensor",
    core_gram: "Tensor",
    *,
    weight: Weight = 1.0,
    scale: Scale = 1.0,
    balance: Annotated[float, Range(0, 1)] = 0.5,
    ridge: Annotated[float, Range(1e-12, search=(1e-6, 1e-1))] = 1e-4,
    rank: Annotated[int, Range(1)] = 16,
    probes: Annotated[int, Range(0)] = 32,
    outside: Annotated[float, Range(search=(0, 1.5))] = 1.0,
) -> "Tensor":
    """RegMean that looks at a few directions of the inputs only: those that some model's delta reads, and random ones.

    Formula: `P` [in, k] an orthonormal basis of what was measured, `C_t = P^T G_t P`, over
    `(E_t |delta_t P P^T x|^2)^balance`, plus `ridge` times the mean diagonal entry of all;
    `scale * ((sum_t weight_t delta_t P C_t) (sum_t weight_t C_t)^-1 P^T + outside sum_t weight_t delta_t (1 - P P^T))`.

    Shapes: deltas [models, out, in], core_gram [models, features, in], of which `G_t` is the square `S_t^T S_t`
    -> merged delta [out, in]; of adapters, of at most the sum of their ranks.

    Knobs:
        weight: how much each model's inputs count; 0 leaves it out.
        scale: factor on the merged delta; 0 returns the base.
        balance: 0 counts every model's squared errors alike, so that models that change much win; 1 divides them by
            what the model's delta answers to its own inputs, so that each loses the same share.
        ridge: added to the diagonal, in units of its mean: large values lead to the mean of the deltas.
        rank: directions that are measured of what a full model's delta reads; of an adapter all are.
        probes: random directions that are measured beside them; more tell more of the inputs, and the statistics
            grow with the square of all directions.
        outside: factor on the sum of the deltas in directions that were not measured. Adapters have nothing there.

    Source: ours; the regression of Jin et al. 2023.

    Deviations: from RegMean: what lies outside of the measured directions is added up, so the statistics are k x k
    numbers a matrix, k the sum of the ranks and the probes; the models are balanced. Of adapters the base's weights
    are never read. No shrinking of off-diagonal entries, which depends on the basis.

    Use it when: several models of one base, adapters above all, are to become one, and a few dozen examples of each
    domain are at hand.

    Example: two adapters that read one input each, and never each other's: the sum.
        >>> experts = torch.tensor([[[2.0, 0.0]], [[0.0, 3.0]]])
        >>> roots = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
        >>> get("core_regmean").run(base=torch.zeros(1, 2), models=experts, core_gram=roots)
        tensor([[1.9999, 2.9998]])
    """
    import torch

    if not are_matrices(deltas):
        return scale * _mean(deltas, weight)
    added = outside * (per_model(weight, deltas) * deltas).sum(dim=0)
    seen = core_gram.double()
    if not bool(seen.any()):
        return scale * added
    basis = eigen(torch.cat(list(seen / seen.abs().max())), SPAN)[1]
    moments, own = (seen @ basis).mT @ (seen @ basis), deltas.double() @ basis
    answered = ((own.detach() @ moments) * own.detach()).sum(dim=(1, 2))  # [models]
    counts = torch.where(answered > 0, answered, torch.ones_like(answered)) ** -balance
    merged = _regression(own, moments * counts[:, None, None], weight, ridge, lambda one: one)
    inside = (merged - added.double() @ basis) @ basis.mT
    return scale * (added + inside.to(deltas.dtype))


def _mean(deltas: "Tensor", weight: PerModel) -> "Tensor":
    """What norms, biases and embeddings get: `sum_t weight_t delta_t / sum_t weight_t`; zero where no model counts."""
    weights = per_model(weight, deltas)
    total = weights.sum()
    return (weights * deltas).sum(dim=0) / (total if bool(total > 0) else 1)


def _regression(
    deltas: "Tensor", moments: "Tensor", weight: PerModel, ridge: float, shrunk: "Callable[[Tensor], Tensor]"
) -> "Tensor":
    """`(sum_t w_t delta_t G_t) (sum_t w_t G_t)^-1` of [models, out, n] and [models, n, n], each G_t with the ridge."""
    import torch

    level = moments.diagonal(dim1=-2, dim2=-1).mean()
    level = torch.where(level > 0, level, torch.ones_like(level))
    ridged = shrunk(moments / level) + ridge * torch.eye(moments.shape[-1], dtype=deltas.dtype, device=deltas.device)
    weights = per_model(weight, deltas)
    if not bool((weights > 0).any()):
        return deltas.sum(dim=0) * 0
    total, pull = (weights * ridged).sum(dim=0), (weights * (deltas @ ridged)).sum(dim=0)
    factor, failed = torch.linalg.cholesky_ex(total)
    if not int(failed):
        return torch.cholesky_solve(pull.mT, factor).mT
    values, vectors = torch.linalg.eigh(total)
    known = vectors[:, values > ROUNDING * values[-1]]
    mean = (weights * deltas).sum(dim=0) / weights.sum()
    return mean + ((pull - mean @ total) @ known / values[-known.shape[1] :]) @ known.mT
