"""`graft gates train`: gates learnt by the loss of answers, while the models stay as they are; and the recipe by them.

The models run fused (`measuring/fused.py`), with the coefficients that the recipe's method makes of the gates
(`Gating`): what is trained is what `graft merge` will make of the file.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from graftkit.data.tasks import Task
from graftkit.errors import DataError, OutputError
from graftkit.execution.live import Live
from graftkit.execution.record import versions
from graftkit.improving.gated import RECIPE, Gated, Place, examples, gated, write
from graftkit.improving.learnable import Form, Learnable, granularity_of, learnable
from graftkit.improving.learning import STATE, Course, Settings, Told, Training, cut
from graftkit.improving.phi import Gating
from graftkit.improving.tuned import tuned
from graftkit.measuring.encoding import Row, encode
from graftkit.measuring.fused import FusedLinear, fused
from graftkit.measuring.loading import default_device, default_dtype
from graftkit.measuring.responses import Delta
from graftkit.measuring.scoring import choose_scorer
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import Output, Recipe, load
from graftkit.recipes.steps import Step

RECORD, PHI, PARTIAL = "training.json", "phi.safetensors", ".partial"
PLAIN = Form()
CURVE = 200  # points of the curve that the file of gates carries, at most


@dataclass(frozen=True)
class Change:
    """By how much the coefficients moved, and where they lie, over all channels of all matrices; of the first model."""

    mean: float
    most: float
    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Trained:
    """What was learnt: where the recipe stands, the course, numbers learnt, what became of the weights w_b, and how
    many examples of --data were held out.
    """

    recipe: Path
    kind: str
    phi: str
    learnt: int
    sharpness: float | None
    change: Change
    course: Course
    held_out: int = 0


def train(
    recipe: Recipe | str | Path,
    out: Path,
    *,
    data: Sequence[Place],
    settings: Settings,
    form: Form = PLAIN,
    dev: Sequence[Place] = (),
    held_out: int = 16,
    samples: int | None = None,
    recompute: bool = False,
    device: str | None = None,
    told: Told = lambda course, steps: None,
) -> Trained:
    """Learns gates on examples of any domains, and writes them, the recipe, phi and the record under `out`.

    Dev examples are those of `dev`, else `held_out` of each domain's, which are then not trained on; the best of the
    looks at them is kept. `recompute`: keep no activations of layers. A training that was interrupted goes on.
    Raises PlanError, DataError or OutputError.
    """
    asked, device = load(recipe), device or default_device()
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name")
    tasks, looked = examples(data, samples), examples(dev)
    made = learnable(gated(asked), form, device, settings.seed)
    keep = out.with_name(out.name + PARTIAL)
    digest = _digest(made.asked, [*tasks, *looked], settings, form, held_out)
    with running(made, device, recompute=recompute) as (live, tokenizer, layers):
        domains, seen = _split(live, tokenizer, tasks, looked, held_out, settings)
        learnt = torch.nn.ModuleDict({"gating": made.gating})
        if form.weights:
            learnt["layers"] = torch.nn.ModuleList(layer.learning() for layer in layers.values())
        before = _coefficients(made.gating)
        scorer = choose_scorer(live, domains[0])
        course = Training(scorer, learnt, domains, seen, settings, keep, digest, told).run()
        factors = {name: layer.parted() for name, layer in layers.items()} if form.weights else {}
    change = _change(before, _coefficients(made.gating))
    gating = made.gating
    kinds = gating.kind, gating.phi.kind, gating.phi.size
    held = 0 if looked else sum(map(len, seen))
    found = Trained(out / RECIPE, *kinds, gating.sharpness, change, course, held)
    _write(made, found, keep, out, factors, _record(found, settings, form, tasks, looked))
    return found


@contextmanager
def running(
    made: Learnable, device: str, *, recompute: bool = False
) -> Iterator[tuple[Any, Any, dict[str, FusedLinear]]]:
    """The models as one that fuses while it runs: all other tensors are those of the merge. And its tokenizer."""
    with Live.open(_reference(made.asked), dtype=default_dtype(device), device=device) as live:
        live.apply(live.plan)
        model = live.model.requires_grad_(False)
        dtype = next(model.parameters()).dtype
        deltas = {name: [_to(delta, dtype) for delta in own] for name, own in made.deltas.items()}
        if recompute:
            _recompute(model)
        with fused(model, deltas, made.gating, made.size) as layers:
            yield model, live.tokenizer, layers


def _reference(asked: Gated) -> Plan:
    """The merge as a whole model, but for the gated matrices: they are those that the deltas are differences from."""
    recipe = asked.plan.recipe
    places = {"like", "align", "embeddings"} if recipe.output.align else set()  # a VLM stays one
    output = recipe.output.model_dump(include=places) | {"dtype": "float32"}
    made = plan(recipe.model_copy(update={"output": Output.model_validate(output)}), without_gates=True)
    wanted = {step.key for step in asked.steps}

    def step(own: Step) -> Step:
        origin = own.base or own.models[0]
        return replace(own, method="", knobs={}, base=origin, models=(), keys=()) if own.key in wanted else own

    shards = tuple(replace(shard, steps=tuple(map(step, shard.steps))) for shard in made.shards)
    return replace(made, shards=shards)


def _to(delta: Delta, dtype: torch.dtype) -> Delta:
    return Delta(*(None if of is None else of.to(dtype) for of in (delta.left, delta.right)))


def _recompute(live: Any) -> None:
    """Layers make their activations again on the way back; only they think that they are trained, so nothing drops."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    live.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in live.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.training = True


def _split(
    live: Any, tokenizer: Any, tasks: Sequence[Task], looked: Sequence[Task], held_out: int, settings: Settings
) -> tuple[list[list[Row]], list[list[Row]]]:
    """The rows to train on and those to look at, by domain. Raises DataError where a domain has none."""

    def rows(task: Task) -> list[Row]:
        found = [cut(row, settings.length) for row in encode(tokenizer, task)]
        kept = [row for row in found if row is not None]
        if not kept:
            raise DataError(f"task {task.name}: no example has room for an answer in {settings.length} tokens")
        return kept

    domains, seen = [rows(task) for task in tasks], [rows(task) for task in looked]
    if not looked and held_out:
        for k, own in enumerate(domains):
            order = random.Random(settings.seed).sample(range(len(own)), min(held_out, len(own) // 4))
            seen += [[own[place] for place in order]] if order else []
            domains[k] = [row for place, row in enumerate(own) if place not in set(order)]
    return domains, seen


def _digest(asked: Gated, tasks: Sequence[Task], settings: Settings, form: Form, held_out: int) -> str:
    told = [asked.plan.hash, [task.content for task in tasks], asdict(settings), asdict(form), held_out]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _coefficients(gating: Gating) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: gating(name).double().cpu() for name in gating.matrices}


def _change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Change:
    moved = torch.cat([(after[name] - before[name]).abs().reshape(-1) for name in before])
    first = torch.cat([own[0].reshape(-1) for own in after.values()])
    low, middle, high = float(first.min()), float(first.median()), float(first.max())
    return Change(float(moved.mean()), float(moved.max()), low, middle, high)


def _record(
    found: Trained, settings: Settings, form: Form, tasks: Sequence[Task], dev: Sequence[Task]
) -> dict[str, Any]:
    """All that a reader wants to know of a training."""
    named = {key: value for key, value in asdict(found).items() if key not in ("recipe", "course")}
    places = [{"name": task.name, "items": len(task.items), "content": task.content} for task in (*tasks, *dev)]
    return {
        **named,
        "settings": asdict(settings),
        "form": {**asdict(form), "start": None if form.start is None else str(form.start)},
        "data": places[: len(tasks)],
        "dev": places[len(tasks) :],
        "course": found.course.record(),
        "versions": versions(),
    }


def _write(
    made: Learnable,
    found: Trained,
    keep: Path,
    out: Path,
    factors: Mapping[str, list[Delta]],
    record: Mapping[str, Any],
) -> None:
    """Gates, recipe, phi and record into the directory of the state, which then gets its name."""
    gating, step = made.gating, max(1, -(-len(found.course.curve) // CURVE))
    curve = [list(point) for k, point in enumerate(found.course.curve) if k % step == 0 or point.dev is not None]
    about = {"training": json.dumps({**record, "course": {**found.course.record(), "curve": curve}})}
    granularity, size = granularity_of(made.size)
    given: dict[str, Any] = {"granularity": granularity, "size": size, "about": about}
    values = {name: gating.gates(name).detach().cpu().numpy() for name in gating.matrices}
    if found.sharpness is not None:
        given["knobs"] = {"sharpness": found.sharpness}
    try:
        keep.mkdir(parents=True, exist_ok=True)
        if factors:
            free = gating.kind == "coefficient"
            values = values if free else {name: own.numpy() for name, own in _coefficients(gating).items()}
            moved = tuned(made.asked, factors, keep / "experts")
            write(moved, keep, values, gating.kind if free else "weight", moved=(keep, out), about=about)
        else:
            write(made.asked, keep, values, gating.kind, **given)
        (keep / PHI).write_bytes(save({n: v.contiguous() for n, v in gating.state_dict().items() if v.numel()}))
        (keep / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (keep / STATE).unlink(missing_ok=True)
        keep.rename(out)
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
