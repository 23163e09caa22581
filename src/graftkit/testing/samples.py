"""Inputs that bring mistakes to light: ties, zeros, tiny and huge numbers, odd shapes, knobs at their ends."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from graftkit.methods import Method
from graftkit.methods.knobs import Knob
from graftkit.methods.random import Keyed

if TYPE_CHECKING:
    from torch import Tensor

SHAPES: tuple[tuple[int, ...], ...] = ((), (1,), (7,), (5, 1), (1, 5), (4, 6), (2, 3, 4), (0,), (0, 3))
KINDS = ("random", "tied", "zeros", "tiny", "huge")
MOST = 256  # combinations of knobs that a test goes through


@dataclass(frozen=True)
class Sample:
    """What a merge starts from: `base` [*shape], `models` [models, *shape], and a random stream per model."""

    base: Tensor
    models: Tensor
    rng: Keyed

    @property
    def count(self) -> int:
        """How many models."""
        return self.models.shape[0]

    def permuted(self, order: list[int]) -> Sample:
        """The same models in another order, each with its own stream."""
        keys = tuple(self.rng.keys[k] for k in order)
        return replace(self, models=self.models[order].clone(), rng=Keyed(keys, self.rng.start))


def gates(sample: Sample) -> Tensor:
    """Gates of each channel that sum to one over the models, [models, out, 1]; a vector has equal ones."""
    import torch

    if sample.base.ndim < 2:
        return sample.base.new_full((sample.count, 1, 1), 1 / sample.count)
    source = torch.Generator().manual_seed(sample.base.shape[0])
    drawn = torch.rand((sample.count, sample.base.shape[0], 1), generator=source) + 0.1
    return (drawn / drawn.sum(dim=0)).to(sample.base.dtype)


def of_examples(name: str, sample: Sample, turned: bool = False) -> Tensor:
    """A statistic of examples, float64 of float32 numbers, the same for a model wherever it stands: by its weights.

    `turned`: of matrices kept as [in, out].
    """
    import torch

    shape = tuple(sample.base.shape)
    width = (shape[0] if turned else shape[1]) if len(shape) == 2 else 1
    drawn = []
    for model in sample.models.detach().float():
        content = hashlib.blake2b(model.numpy().tobytes(), digest_size=6).digest()
        source = torch.Generator().manual_seed(int.from_bytes(content, "little"))
        if name == "fisher":
            drawn.append(torch.randn(model.numel(), generator=source).double().square().reshape(shape))
        else:
            inputs = torch.randn((3 * width, width), generator=source).double()
            drawn.append(inputs.T @ inputs / max(len(inputs), 1))
    return torch.stack(drawn).float().double()


def counts(method: Method, most: int = 5) -> list[int]:
    """The numbers of models that the method takes, from 1 to `most`."""
    low, high = method.model_count
    return list(range(low, min(high or most, max(low, most)) + 1))


def sample(
    method: Method,
    shape: tuple[int, ...],
    kind: str = "random",
    *,
    count: int | None = None,
    dtype: str = "float64",
    seed: int = 0,
) -> Sample:
    """Models of a kind (see `KINDS`), three of them where the method takes three; every number fits float32."""
    import torch

    wanted = torch.float64 if dtype == "float64" else torch.float32
    several = count or min(3, counts(method)[-1])
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=source)
    models = base + 0.1 * torch.randn((several, *shape), generator=source)
    if kind == "tied":
        base = torch.randint(-2, 3, shape, generator=source) / 4
        models = base + torch.randint(-2, 3, (several, *shape), generator=source) / 8
    elif kind == "zeros":
        models = torch.where(torch.rand((several, *shape), generator=source) < 0.5, models, base.expand_as(models))
        base, models = (torch.where(base > 0, part, torch.zeros_like(part)) for part in (base, models))
    elif kind in ("tiny", "huge"):
        scale = 2.0**-130 if kind == "tiny" else 2.0**100
        base, models = base * scale, models * scale
    return Sample(base.to(wanted), models.to(wanted), Keyed.of(seed=seed, models=several))


def distinct(method: Method, count: int) -> dict[str, Any]:
    """Every per-model knob with another value for each model, inside what a search would look at."""

    def spread(knob: Knob) -> tuple[float, ...]:
        low, high = _ends(knob) or (0.5, 1.5)
        return tuple(low + (high - low) * (k + 1) / (count + 1) for k in range(count))

    return {name: spread(knob) for name, knob in method.knobs.items() if knob.per_model}


def negative(method: Method, count: int) -> dict[str, Any]:
    """Per-model knobs of either sign where they may be negative; no selection of the values sums to zero."""
    values = (0.3, -0.7, 1.1, 0.45, -0.2)
    free = [name for name, knob in method.knobs.items() if knob.per_model and knob.range.low == -math.inf]
    return {name: tuple(values[k % 5] for k in range(count)) for name in free}


def _ends(knob: Knob) -> tuple[float, float] | None:
    """Both ends of a knob's range, else of the part of it that a search looks at."""
    if math.isfinite(knob.range.low) and math.isfinite(knob.range.high):
        return knob.range.low, knob.range.high
    return knob.range.search


def ends(knob: Knob) -> list[Any]:
    """The values at a knob's ends: choices, switches, and the finite ends of its range."""
    if knob.kind == "choice":
        return list(knob.choices)
    if knob.kind == "switch":
        return [False, True]
    whole = int if knob.kind == "integer" else float
    return [whole(end) for end in (knob.range.low, knob.range.high) if math.isfinite(end)]


def extremes(method: Method, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every knob at every end, one at a time, by label; a per-model knob also with both ends in one merge."""
    for name, knob in method.knobs.items():
        for value in ends(knob):
            yield f"{name}={value}", {name: value}
        both = _ends(knob)
        if knob.per_model and both and count > 1:
            yield f"{name}=mixed", {name: tuple(both[min(k, 1)] for k in range(count))}


def combinations(method: Method) -> Iterator[dict[str, Any]]:
    """All knobs at their ends together, in every combination, up to `MOST` of them."""
    yield from _product(method, {name: ends(knob) for name, knob in method.knobs.items()})


def variants(method: Method) -> Iterator[dict[str, Any]]:
    """Choices and switches in every combination of any three of them; numbers stay at their defaults."""
    discrete = {name: ends(knob) for name, knob in method.knobs.items() if knob.kind in ("choice", "switch")}
    left = {k: _threes(chosen) for k, chosen in enumerate(_product(method, discrete))}
    every, wanted = list(_product(method, discrete)), set().union(*left.values())
    while wanted:
        best = max(left, key=lambda k: len(left[k] & wanted))
        wanted -= left.pop(best)
        yield every[best]


def _threes(chosen: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(chosen.items(), min(3, len(chosen))))


def _product(method: Method, values: Mapping[str, list[Any]]) -> Iterator[dict[str, Any]]:
    axes = {name: options or [method.knobs[name].default] for name, options in values.items()}
    for chosen in itertools.islice(itertools.product(*axes.values()), MOST):
        yield dict(zip(axes, chosen, strict=True))
