"""What a model does on samples: its modules' activations as few numbers a sample, no activation kept.

Which count: what linear layers of the stack of layers answer (attention's and the feed-forward network's projections,
or one of the two), or what an adapter adds to each answer, `scale B A x`. All tokens of a sample count, its prompt and
its right answer; padding does not. Sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from graftkit.data.tasks import Task
from graftkit.errors import DataError, NonFiniteError, PlanError
from graftkit.measuring.activations import Listener, batches, forward, listening
from graftkit.measuring.encoding import Row, encode, prompts
from graftkit.recipes import layout

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[np.float64]
Part = Literal["all", "attention", "mlp"]

FIRST = 4  # samples that a module's scale is taken from
TINY = 5e-324  # where that scale is 0, only zeros are small

HearSample = Callable[[int, "Tensor"], None]
"""Gets a sample's number and its values, [tokens, features]."""


@dataclass(frozen=True)
class Statistics:
    """What was measured of some modules: `values` [samples, modules, 3] are mean magnitude, share of small entries and
    variance of each sample; `limits` [modules] what small means; `tokens` [samples] the samples' lengths."""

    modules: tuple[str, ...]
    limits: Array
    values: Array
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Hearer:
    """A module that is listened to, at its outputs or, with `change`, at what a change of its weight makes of its
    inputs [tokens, in]."""

    module: Any
    change: Callable[[Tensor], Tensor | None] | None = None


def rows_of(reader: Any, task: Task, context: int | None = None) -> list[Row]:
    """Each item as one row, in order: its prompt and its right answer (the prompt alone where programs are asked for).

    Raises DataError as `encode` does, and for a task without items.
    """
    if not task.items:
        raise DataError(f"{task.name}: no sample in it")
    if task.kind == "pass_at_1":
        return [Row(prompt.ids, (), (k,), prompt.media) for k, prompt in enumerate(prompts(reader, task))]
    made = encode(reader, task, context)
    return [
        Row(row.prompt, (row.answers[item.answer],), (k,), row.media)
        for k, (item, row) in enumerate(zip(task.items, made, strict=True))
    ]


def linear_modules(model: Any, part: Part = "all") -> dict[str, Any]:
    """The linear layers of a live model's stack of layers, by name; encoders that feed a language model are left out.

    Raises PlanError where there is none.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    roles = ("attention", "mlp") if part == "all" else (part,)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and _counts(f"{name}.weight", roles)
    }
    if not found:
        raise PlanError(f"the model has no linear layer of {' or '.join(roles)} in its layers to measure")
    return found


def _counts(name: str, roles: Sequence[str]) -> bool:
    stacked = layout.layer(name) is not None and not layout.ENCODERS.search(name)
    return stacked and layout.role(name) in roles


def statistics(
    model: Any,
    rows: Sequence[Row],
    listening_to: Mapping[str, Hearer],
    *,
    epsilon: float,
    batch_tokens: int,
    extra: Sequence[Listener] = (),
    samples: Mapping[str, HearSample] | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Statistics:
    """Measures modules, by name, on all rows. An entry is small below `epsilon` times the module's scale.

    The scale is the mean magnitude over the first 4 rows (which are run twice), samples counting alike: it depends on
    the data and their order, and on nothing else. `extra` listeners, and `samples`, who hear the same values as the
    statistics, go along in the main pass. Raises NonFiniteError where an activation is not finite.
    """
    import torch

    names, device = tuple(listening_to), next(model.parameters()).device
    scales = torch.zeros((min(FIRST, len(rows)), len(names)), dtype=torch.float64, device=device)
    values = torch.zeros((len(rows), len(names), 3), dtype=torch.float64, device=device)

    def measure_scale(index: int) -> HearSample:
        def hear(sample: int, heard: Tensor) -> None:
            scales[sample, index] = heard.double().abs().mean()

        return hear

    def measure(index: int) -> HearSample:
        beside = (samples or {}).get(names[index])

        def hear(sample: int, heard: Tensor) -> None:
            exact = heard.double()
            sizes = exact.abs()
            small = (sizes < limits[index]).double().mean()
            values[sample, index] = torch.stack([sizes.mean(), small, exact.var(correction=0)])
            if beside:
                beside(sample, heard)

        return hear

    hearers = [listening_to[name] for name in names]
    _run(model, rows[:FIRST], hearers, measure_scale, (), batch_tokens, lambda done: None)
    limits = (epsilon * scales.mean(dim=0)).clamp(min=TINY)
    _run(model, rows, hearers, measure, extra, batch_tokens, advance)
    made = Statistics(names, limits.cpu().numpy(), values.cpu().numpy(), tuple(row.length for row in rows))
    _refuse_not_finite(made)
    return made


def _run(
    model: Any,
    rows: Sequence[Row],
    hearers: Sequence[Hearer],
    hear: Callable[[int], HearSample],
    extra: Sequence[Listener],
    batch_tokens: int,
    advance: Callable[[int], None],
) -> None:
    """One pass over the rows; every module's values reach `hear(module's index)` sample by sample."""
    import torch

    present: list[Row] = []
    listeners = [_listener(one, _by_sample(hear(index), present)) for index, one in enumerate(hearers)]
    with torch.inference_mode(), listening([*listeners, *extra]) as hearing:
        for batch in batches(rows, batch_tokens):
            present[:] = batch
            forward(model, batch, hearing)
            advance(len(batch))


def _by_sample(hear: HearSample, present: Sequence[Row]) -> Callable[[Tensor], None]:
    """Cuts the tokens of a batch into those of its rows."""

    def cut(values: Tensor) -> None:
        for row, own in zip(present, values.split([row.length for row in present]), strict=True):
            hear(row.slots[0], own)

    return cut


def _listener(hearer: Hearer, hear: Callable[[Tensor], None]) -> Listener:
    if hearer.change is None:
        return Listener(hearer.module, outputs=hear)
    change = hearer.change

    def changed(inputs: Tensor) -> None:
        answer = change(inputs)
        if answer is not None:
            hear(answer)

    return Listener(hearer.module, inputs=changed)


def _refuse_not_finite(found: Statistics) -> None:
    finite = np.isfinite(found.values).all(axis=(0, 2))
    if not finite.all():
        raise NonFiniteError(f"{found.modules[int(np.argmin(finite))]}: its activations are not finite on this data")
