"""Which models fit which data, and each other: Graft's activation-based compatibility (arXiv 2506.23940, 3.4).

Every model is measured on every data set; `compatibility_scores` has the equations, `compatibility_observing` says
which activations count. The score of a pair of models on a data set is the mean of the two models' scores there: on
two data sets a pair has two numbers, as in the paper's tables.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graftkit.checkpoints.adapters import Adapter, Factors
from graftkit.checkpoints.resolve import directory_of, open_source, split_task
from graftkit.data.tasks import Task, load_task, sample
from graftkit.errors import DataError, PlanError
from graftkit.measuring.activations import linear_layers
from graftkit.measuring.compatibility_observing import (
    FIRST,
    Hearer,
    Part,
    Statistics,
    linear_modules,
    rows_of,
    statistics,
)
from graftkit.measuring.compatibility_scores import (
    LEAST,
    Spread,
    by_samples,
    normalised_parts,
    resampled,
    scores,
    sensitivities,
    with_interval,
)
from graftkit.measuring.loading import ModelLike, default_device, default_dtype, model_names, opened, source_of
from graftkit.measuring.responses import Delta
from graftkit.measuring.table import Cell, Column, Table, Value
from graftkit.recipes import layout

FORMAT = 1
EPSILON = 0.1  # of a module's scale: smaller entries count as zero

Of = Literal["outputs", "contribution"]
Progress = Callable[[str, int, int], None]
"""Told of a model and data set, and how many of its samples are done."""


@dataclass(frozen=True)
class Module:
    """One module: its statistics over the samples (equations 9 to 11), what counted as small, and its sensitivity, raw
    and normalised (12, 13)."""

    name: str
    role: str
    layer: int | None
    limit: float
    magnitude: float
    sparsity: float
    variance: float
    sensitivity: float
    normalised: float


@dataclass(frozen=True)
class Fit:
    """One model on one data set: its score (14), raw and normalised, with 95% intervals over resampled samples; how the
    normalised one depends on the number of samples; and every module. Fewer than 10 samples give no intervals."""

    model: str
    data: str
    samples: int
    tokens: int
    raw: Value
    normalised: Value
    by_samples: tuple[Spread, ...]
    modules: tuple[Module, ...]


@dataclass(frozen=True)
class PairFit:
    """Two models on one data set: the mean of their scores, the interval over the same resamples of both."""

    models: tuple[str, str]
    data: str
    raw: Value
    normalised: Value


@dataclass(frozen=True)
class Compatibility:
    """Every model on every data set, and every two models; where they came from, and what else the numbers rest on."""

    models: tuple[str, ...]
    data: tuple[str, ...]
    fits: tuple[Fit, ...]
    pairs: tuple[PairFit, ...]
    sources: Mapping[str, str]
    fingerprints: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def fit(self, model: str, data: str) -> Fit:
        """A model on a data set."""
        return next(one for one in self.fits if (one.model, one.data) == (model, data))

    def pair(self, one: str, other: str, data: str) -> PairFit:
        """Two models on a data set, in either order."""
        return next(pair for pair in self.pairs if set(pair.models) == {one, other} and pair.data == data)

    def table(self) -> Table:
        """Models, then pairs, by data sets: normalised scores."""
        columns = (Column("model"), *(Column(name, digits=4) for name in self.data))
        rows: list[tuple[Cell, ...]] = [(m, *(self.fit(m, d).normalised for d in self.data)) for m in self.models]
        for one, other in combinations(self.models, 2):
            rows.append((f"{one} + {other}", *(self.pair(one, other, d).normalised for d in self.data)))
        counts = ", ".join(f"{name}: {self.fit(self.models[0], name).samples}" for name in self.data)
        few = any(self.fit(self.models[0], name).samples < LEAST for name in self.data)
        none = f", none below {LEAST}" * few
        note = (
            f"equation 14, normalised; 95% intervals over resampled samples ({counts}){none}; a pair has its models' "
            "mean"
        )
        return Table(columns, tuple(rows), title="compatibility", note=note)

    def tables(self) -> tuple[Table, ...]:
        """The same, where several are asked for."""
        return (self.table(),)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"format": FORMAT} | asdict(self)


def compatibility(
    models: ModelLike | Sequence[ModelLike],
    data: Task | str | Path | Sequence[Task | str | Path],
    *,
    samples: int = 64,
    part: Part = "all",
    of: Of = "outputs",
    epsilon: float = EPSILON,
    resamples: int = 1000,
    seed: int = 0,
    base: str | Path | None = None,
    batch_tokens: int = 2048,
    device: str | None = None,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> Compatibility:
    """Measures every model on at most `samples` samples of every data set.

    `models`: checkpoints, hub ids, adapters (on `base`, else on the base that they name), or live models as `(name,
    model, tokenizer)`. `data`: loaded tasks, or what `load_task` takes; the samples of a larger one are drawn once for
    all models. `part`: which projections count. `of`: their outputs, or an adapter's own `contribution` to them. An
    entry is small below `epsilon` times the module's scale, its mean magnitude on the first 4 samples. `batch_tokens`
    changes no number beyond rounding; `resamples` and `seed` are the bootstrap's.

    Raises DataError, CheckpointError or PlanError for what cannot be measured.
    """
    given = _listed(models)
    tasks = loaded(data, samples)
    if epsilon < 0 or samples < 1:
        raise DataError(f"compatibility: samples must be 1 or more and epsilon 0 or more, got {samples} and {epsilon}")
    names, device = model_names(given), device or default_device()
    how = {"device": device, "dtype": dtype or default_dtype(device), "adapter_base": base}
    held: dict[tuple[str, str], Statistics] = {}
    for name, model in zip(names, given, strict=True):
        factors = contribution(model) if of == "contribution" else None
        with opened(model, **how) as (live, tokenizer):  # type: ignore[arg-type]
            hearers = hearers_of(live, part, factors)
            for task in tasks:
                held[name, task.name] = measure(
                    live, tokenizer, task, hearers, epsilon=epsilon, batch_tokens=batch_tokens,
                    advance=_counter(progress, f"{name} on {task.name}", len(task.items)),
                )  # fmt: skip
    settings = {
        "samples": samples, "part": part, "of": of, "epsilon": epsilon, "scale_from_first": FIRST, "seed": seed,
        "resamples": resamples, "batch_tokens": batch_tokens, "base": None if base is None else str(base), **how,
        "data": {task.name: task.fingerprint for task in tasks},
    }  # fmt: skip
    settings["adapter_base"] = settings.pop("base")
    return assembled(names, tasks, held, {n: source_of(m) for n, m in zip(names, given, strict=True)}, settings)


def loaded(data: Task | str | Path | Sequence[Task | str | Path], samples: int) -> tuple[Task, ...]:
    """Data sets, cut to so many samples each. Raises DataError where two have one name."""
    places = [data] if isinstance(data, Task | str | Path) else list(data)
    tasks = tuple(sample(one, samples) if isinstance(one, Task) else load_task(one, samples) for one in places)
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not tasks:
        raise DataError(f"two data sets are called {twice!r}; give each its own name" if tasks else "no data given")
    return tasks


def measure(
    live: Any, tokenizer: Any, task: Task, hearers: Mapping[str, Hearer], *, epsilon: float, batch_tokens: int,
    **options: Any,
) -> Statistics:  # fmt: skip
    """The statistics of a live model on a data set; `options` are those of `statistics`."""
    rows = rows_of(tokenizer, task, getattr(live.config.get_text_config(), "max_position_embeddings", None))
    return statistics(live, rows, hearers, epsilon=epsilon, batch_tokens=batch_tokens, **options)


def contribution(model: ModelLike) -> dict[str, Delta]:
    """What an adapter adds to each module's answer, by weight. Raises PlanError for what is no plain LoRA adapter."""
    place = "" if isinstance(model, tuple) else split_task(str(model), Path())[0]
    source = open_source(directory_of(place, Path())) if place else None
    if not isinstance(source, Adapter) or any(own.magnitude for own in source.factors.values()):
        raise PlanError(f"{source_of(model)}: is no plain LoRA adapter, so it has no contribution of its own; use --of "
                        "outputs")  # fmt: skip
    found = {n: factors_of(source, n, own) for n, own in source.factors.items() if not own.embedding}
    source.close()
    return found


def factors_of(source: Adapter, name: str, factors: Factors) -> Delta:
    """An adapter's change of one weight, as it acts on inputs."""
    import torch

    pair = source.load(name, np.float32)
    left, right = torch.from_numpy(np.ascontiguousarray(pair.left)), torch.from_numpy(np.ascontiguousarray(pair.right))
    return Delta(right.T, left.T) if factors.transposed else Delta(left, right)


def hearers_of(live: Any, part: Part, factors: Mapping[str, Delta] | None = None) -> dict[str, Hearer]:
    """The modules to listen to, by name; with `factors`, those that these change, at what they add.

    Raises PlanError where there is none.
    """
    counted = linear_modules(live, part)
    if factors is None:
        return {name: Hearer(module) for name, module in counted.items()}
    device, names = next(live.parameters()).device, {id(module): name for name, module in counted.items()}
    changed = linear_layers(live, factors, turned=True, what="so its contribution cannot be measured")
    found = {
        names[id(module)]: Hearer(module, _moved(factors[weight], device).answer)
        for weight, module in changed.items()
        if id(module) in names
    }
    if not found:
        raise PlanError(f"the adapter changes no linear layer of part {part!r}; use --part all")
    return found


def _moved(delta: Delta, device: Any) -> Delta:
    return Delta(*(None if factor is None else factor.to(device) for factor in (delta.left, delta.right)))


def assembled(
    names: Sequence[str],
    tasks: Sequence[Task],
    held: Mapping[tuple[str, str], Statistics],
    sources: Mapping[str, str],
    settings: Mapping[str, Any],
) -> Compatibility:
    """What follows from the statistics of each model on each data set."""
    resamples, seed = settings["resamples"], settings["seed"]
    drawn = {key: resampled(own.values, resamples, seed, key[1]) for key, own in held.items()}
    keys = [(name, task.name) for name in names for task in tasks]
    return Compatibility(
        models=tuple(names),
        data=tuple(task.name for task in tasks),
        fits=tuple(_fit(*key, held[key], drawn[key], resamples, seed) for key in keys),
        pairs=tuple(_pairs(names, tasks, held, drawn)),
        sources=dict(sources),
        fingerprints={name: _fingerprint(source) for name, source in sources.items()},
        settings=dict(settings),
        versions=_versions(),
    )


def _fit(model: str, data: str, own: Statistics, drawn: Any, resamples: int, seed: int) -> Fit:
    means = own.values.mean(axis=0)
    raw, normalised = scores(means)
    each = zip(
        own.modules, own.limits, means, sensitivities(means), sensitivities(normalised_parts(means)), strict=True
    )
    modules = tuple(
        Module(
            name=name,
            role=layout.role(f"{name}.weight"),
            layer=layout.layer(f"{name}.weight"),
            limit=float(limit),
            magnitude=float(parts[0]),
            sparsity=float(parts[1]),
            variance=float(parts[2]),
            sensitivity=float(rho),
            normalised=float(scaled),
        )
        for name, limit, parts, rho, scaled in each
    )
    count = len(own.values)
    return Fit(
        model, data, count, sum(own.tokens), with_interval(float(raw), drawn[0], count),
        with_interval(float(normalised), drawn[1], count), by_samples(own.values, min(resamples, 500), seed), modules,
    )  # fmt: skip


def _pairs(
    names: Sequence[str], tasks: Sequence[Task], held: Mapping[Any, Statistics], drawn: Any
) -> Iterator[PairFit]:
    for one, other in combinations(names, 2):
        for task in tasks:
            both = [(name, task.name) for name in (one, other)]
            found = [scores(held[key].values.mean(axis=0)) for key in both]
            values = [
                with_interval(
                    float(found[0][k] + found[1][k]) / 2,
                    (drawn[both[0]][k] + drawn[both[1]][k]) / 2,
                    len(held[both[0]].values),
                )
                for k in (0, 1)
            ]
            yield PairFit((one, other), task.name, *values)


def _fingerprint(source: str) -> str:
    if source == "in memory":
        return ""
    place, task = split_task(source, Path())
    found = open_source(directory_of(place, Path()), task=task)
    found.close()
    return found.fingerprint()


def _versions() -> dict[str, str]:
    packages = ("graftkit", "torch", "transformers", "tokenizers", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def _listed(models: Any) -> list[ModelLike]:
    live = isinstance(models, tuple) and len(models) == 3 and not isinstance(models[1], str | Path | tuple)
    given = [models] if isinstance(models, str | Path) or live else list(models)
    if not given:
        raise DataError("no model given; name at least one checkpoint, adapter or hub id")
    return given


def _counter(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done += more
        if progress:
            progress(stage, done, total)

    return advance
