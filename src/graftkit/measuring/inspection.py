"""What models hold, and how they lie to each other: norms, entropies, deltas, cosines and sign conflicts.

Read in blocks, each once for all that is compared on it, so memory depends on the block and not on the model; an
adapter's delta is formed block by block from its factors. NaN and infinity are named, and left out of every sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import FLOATING
from graftkit.errors import PlanError
from graftkit.execution.local import Progress
from graftkit.measuring.findings import (
    AdapterFacts,
    Breakdown,
    Change,
    Facts,
    Inspection,
    NonFinite,
    Pair,
    Weights,
)
from graftkit.measuring.loading import model_names
from graftkit.measuring.passes import Opened, Run, compare, open_model, weigh

__all__ = [
    "AdapterFacts",
    "Breakdown",
    "Change",
    "Facts",
    "Inspection",
    "NonFinite",
    "Pair",
    "Weights",
    "inspect",
]


def inspect(
    models: str | Path | Sequence[str | Path],
    base: str | Path | None = None,
    workers: int = 1,
    progress: Progress | None = None,
    *,
    allow_pickle: bool = False,
) -> Inspection:
    """Measures models (directories or hub ids): alone, against a base, and against each other.

    Without a base: norms, entropies and zeros of each model, and for any two cosine, distance and sign conflicts of
    their weights (of their deltas, where all are adapters). With a base: the delta of each model, and the same
    comparison of deltas. Entries and deltas are float32 (float64 where an input is), sums float64 over fixed blocks:
    `workers` threads change no number. `progress` is told of entries.

    NaN and infinity are reported, not refused. Raises PlanError where models do not fit each other, CheckpointError for
    what cannot be read.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    if not given:
        raise PlanError("inspect: no model given")
    named = zip(given, model_names(given), strict=True)
    opened = tuple(open_model(str(one), name, "model", allow_pickle) for one, name in named)
    stem = None if base is None else open_model(str(base), Path(base).name, "base", allow_pickle)
    try:
        return _inspect(Run(opened, stem, workers, progress))
    finally:
        for model in (*opened, *([stem] if stem else [])):
            model.source.close()


def _inspect(run: Run) -> Inspection:
    weights = () if run.base else tuple(weigh(run, model) for model in run.models)
    changes, pairs = compare(run) if run.base or len(run.models) > 1 else ((), ())
    low_rank = all(isinstance(model.source, Adapter) for model in run.models)
    return Inspection(
        models=tuple(_facts(model) for model in run.models),
        base=_facts(run.base) if run.base else None,
        compared="deltas" if run.base or low_rank else "weights",
        weights=weights,
        changes=changes,
        pairs=pairs,
        non_finite=run.non_finite(),
        notes=_notes(run),
    )


def _facts(model: Opened) -> Facts:
    source = model.source
    infos = list((source.store if isinstance(source, Adapter) else source).tensors.values())
    dtypes = {kind: sum(i.elements for i in infos if i.dtype == kind) for kind in sorted({i.dtype for i in infos})}
    parameters, size = sum(dtypes.values()), sum(info.nbytes for info in infos)
    adapter = _adapter_facts(source) if isinstance(source, Adapter) else None
    where = str(source.directory.resolve())
    return Facts(model.name, model.given, where, source.kind, len(infos), parameters, size, dtypes, adapter)


def _adapter_facts(source: Adapter) -> AdapterFacts:
    factors = source.factors.values()
    return AdapterFacts(
        base=source.base_name,
        ranks=tuple(sorted({f.rank for f in factors})),
        alpha=source.config.get("lora_alpha"),
        scales=tuple(sorted({f.scale for f in factors})),
        targets=tuple(sorted({name.split(".")[-2] for name in source.factors})),
        modules=len(factors),
        whole_tensors=tuple(sorted(source.tensors)),
    )


def _notes(run: Run) -> tuple[str, ...]:
    """What a reader of the numbers should know although nothing is wrong."""
    found = []
    for model in (*run.models, *([run.base] if run.base else [])):
        source = model.source
        left = sum(info.dtype not in FLOATING for info in source.tensors.values())
        if left:
            found.append(f"{model.label}: {left} tensors that are not floating point are not measured")
        recorded = Path(source.base_name).name.lower() if isinstance(source, Adapter) else ""
        if run.base and recorded and recorded != Path(run.base.given).name.lower():
            found.append(f"{model.label} records another base, {recorded!r}; it is measured on {run.base.given!r}")
    return tuple(found)
