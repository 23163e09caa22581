"""What tells without a merge whether two models go together: measured while they run on data, and on their deltas.

    similarity      linear CKA between what the two models' modules answer, by sample: each sample is the mean over its
                    tokens. Debiased (Nguyen et al. 2021, arXiv 2010.15327; Song et al. 2012), so that few samples of
                    many channels do not look alike by themselves; the mean over modules.
    interference    of t with s, on data that s runs on: E |D_t x|^2 / E |D_s x|^2, D the deltas, x what s's modules get
                    there; the mean over matrices. 0: t leaves s's answers alone; 1: it moves them as much as s does.

What is kept of a run is a Gram matrix of samples for each module, and for each matrix and other model two numbers a
channel; activations are not kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError
from graftkit.execution.blocks import Workspace
from graftkit.measuring.activations import Listener, linear_layers
from graftkit.measuring.compatibility import factors_of
from graftkit.measuring.compatibility_observing import HearSample
from graftkit.measuring.passes import Opened, open_model
from graftkit.measuring.responses import Delta
from graftkit.recipes import layout
from graftkit.recipes.adapters import CONV1D

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
LEAST = 4  # samples that a debiased similarity needs


class SampleMeans:
    """The mean of each sample over its tokens, by module; in the end the Gram matrix of samples of each module."""

    def __init__(self, modules: Sequence[str], samples: int) -> None:
        self.modules, self.samples = tuple(modules), samples
        self._held: dict[str, dict[int, Array]] = {name: {} for name in modules}

    def hearers(self) -> dict[str, HearSample]:
        """Who hears each module's values."""

        def hear(name: str) -> HearSample:
            def keep(sample: int, values: Tensor) -> None:
                self._held[name][sample] = values.double().mean(dim=0).cpu().numpy()

            return keep

        return {name: hear(name) for name in self.modules}

    def grams(self) -> Array:
        """`x_k . x_l` of the samples' means, [modules, samples, samples]."""
        means = [np.stack([self._held[name][k] for k in range(self.samples)]) for name in self.modules]
        return np.stack([own @ own.T for own in means])


def similarity(one: Array, other: Array) -> float | None:
    """Debiased linear CKA from Gram matrices [modules, samples, samples] of the same samples, the mean over modules.

    At most 1; about 0, or a little below, where nothing is shared. None for fewer than four samples; modules that
    answer every sample alike are left out.
    """
    if one.shape[-1] < LEAST:
        return None
    found = []
    for a, b in zip(one, other, strict=True):
        scale = _hsic(a, a) * _hsic(b, b)
        if scale > 0:
            found.append(_hsic(a, b) / np.sqrt(scale))
    return float(np.mean(found)) if found else None


def _hsic(a: Array, b: Array) -> float:
    """Song et al.'s unbiased estimator, up to the factor 1 / (n (n - 3)) that cancels."""
    n = len(a)
    a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
    both = a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * float(a.sum(axis=0) @ b.sum(axis=0)) / (n - 2)
    return float((a * b).sum() + both)


@dataclass(frozen=True)
class Responses:
    """What every model's deltas make of the inputs that one model gets: by matrix, means over tokens for each channel,
    float64 [models, out]: `dots` with that model's own answer, and `squares`."""

    own: int
    dots: Mapping[str, Array]
    squares: Mapping[str, Array]

    def moments(self, name: str, pair: tuple[int, int]) -> Array:
        """`E (D_t x)_i (D_u x)_i` of two models, this run's own among them: [2, 2, out]."""
        one, other = pair
        across = self.dots[name][other if one == self.own else one]
        squares = self.squares[name]
        return np.stack([np.stack([squares[one], across]), np.stack([across, squares[other]])])


class ResponseSums:
    """Adds up such responses while a model runs, model number `own` of those whose `deltas` are given."""

    def __init__(self, live: Any, deltas: Mapping[str, Sequence[Delta]], own: int) -> None:
        import torch

        self.own, self.deltas, self._tokens = own, deltas, dict.fromkeys(deltas, 0)
        self._layers = linear_layers(live, deltas, turned=True, what="so the deltas' answers cannot be measured")
        device, count = next(live.parameters()).device, len(next(iter(deltas.values()), ()))
        self._sums = {
            name: torch.zeros((2, count, _outputs(module)), dtype=torch.float64, device=device)
            for name, module in self._layers.items()
        }

    def listeners(self) -> list[Listener]:
        """Who hears the inputs of each layer."""
        return [Listener(module, inputs=self._hear(name)) for name, module in self._layers.items()]

    def responses(self) -> Responses:
        """The means over all tokens."""
        means = {name: (own / max(self._tokens[name], 1)).cpu().numpy() for name, own in self._sums.items()}
        return Responses(self.own, {n: m[0] for n, m in means.items()}, {n: m[1] for n, m in means.items()})

    def _hear(self, name: str) -> Any:
        deltas, sums = self.deltas[name], self._sums[name]

        def hear(inputs: Tensor) -> None:
            mine = deltas[self.own].answer(inputs)
            self._tokens[name] += len(inputs)
            for number, delta in enumerate(deltas):
                answer = mine if number == self.own else delta.answer(inputs)
                if answer is None:
                    continue
                sums[1, number] += (answer * answer).sum(dim=0).double()
                if mine is not None:
                    sums[0, number] += (answer * mine).sum(dim=0).double()

        return hear


def _outputs(module: Any) -> int:
    return int(getattr(module, "out_features", 0) or module.nf)


def interference(responses: Responses, other: int) -> float:
    """How much model `other` moves the answers of the run's own model, in units of its own moves; mean over matrices
    that the own model changes. Infinite where it changes none and the other does."""
    found = [
        (float(squares[other].sum()), float(squares[responses.own].sum())) for squares in responses.squares.values()
    ]
    ratios = [theirs / mine for theirs, mine in found if mine > 0]
    if ratios:
        return float(np.mean(ratios))
    return float("inf") if any(theirs > 0 for theirs, _ in found) else 0.0


def pooled(runs: Sequence[Responses]) -> Responses:
    """The same model's responses on several data sets, each counting alike."""
    return Responses(
        runs[0].own,
        {name: np.mean([run.dots[name] for run in runs], axis=0) for name in runs[0].dots},
        {name: np.mean([run.squares[name] for run in runs], axis=0) for name in runs[0].squares},
    )


def deltas(models: Sequence[str | Path], names: Sequence[str], base: str | Path) -> dict[str, list[Delta]]:
    """What each model adds to the linear weights of the base's layers: factors for adapters, a float32 matrix for the
    weights that a full model changes. Weights that none changes are left out.

    Raises PlanError for models that do not fit the base, and for adapters that are no products.
    """
    stem = open_model(str(base), Path(base).name, "base", False)
    opened = [open_model(str(model), name, "model", False) for model, name in zip(models, names, strict=True)]
    try:
        wanted = [name for name, shape in stem.shapes().items() if len(shape) == 2 and _linear(name)]
        each = [_deltas(model, stem, wanted) for model in opened]
    finally:
        for model in (stem, *opened):
            model.source.close()
    changed = [name for name in wanted if any(name in own for own in each)]
    return {name: [own.get(name, Delta()) for own in each] for name in changed}


def _linear(name: str) -> bool:
    stacked = layout.layer(name) is not None and not layout.ENCODERS.search(name)
    return name.endswith(".weight") and stacked and layout.role(name) in ("attention", "mlp")


def _deltas(model: Opened, stem: Opened, wanted: Sequence[str]) -> dict[str, Delta]:
    tensors: Any = stem.source.tensors
    if isinstance(model.source, Adapter):
        source = model.source
        places = layout.match_adapter(tensors, source, model.label)
        odd = next((name for name, own in source.factors.items() if own.magnitude), None)
        if odd is not None:
            raise PlanError(f"{model.label}: {odd!r} is a DoRA adapter's, no product of factors; merge it first")
        found = {n: places[n] for n in wanted if places.get(n) in source.factors}
        return {name: factors_of(source, place, source.factors[place]) for name, place in found.items()}
    places = layout.match_checkpoint(tensors, model.source, model.label)
    whole = ((name, _whole(model, stem, name, places[name])) for name in wanted if name in places)
    return {name: Delta(right=own) for name, own in whole if own is not None}


def _whole(model: Opened, stem: Opened, name: str, place: str) -> Tensor | None:
    """A full model's delta, [out, in]; None where it is zero."""
    import torch

    shape = stem.shapes()[name]
    rows = np.empty((2, int(np.prod(shape))), np.float32)
    for row, part in zip(rows, (model.part(place), stem.part(name)), strict=True):
        part.fill(0, rows.shape[1], Workspace(), row)
    change = (rows[0] - rows[1]).reshape(shape)
    turned = isinstance(stem.source, Checkpoint) and stem.source.config.get("model_type") in CONV1D
    return torch.from_numpy(change.T if turned else change) if change.any() else None
