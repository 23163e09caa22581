"""AdaMerging: coefficients of task arithmetic under which the merged model is sure of what it says, without labels.

Yang et al. 2024 (arXiv 2310.02575): `W = W_0 + sum_t c_t D_t`, one c for each model (task-wise) or for each model and
tensor (layer-wise), by Adam on the entropy of the model's predictions. No graph runs through the merge: the gradient of
a coefficient is the dot product of the weight's gradient with the delta, a small product for adapters.

Of a language model the entropy is that of the next token, averaged over all real tokens of a batch, and added up over
domains. It falls as well where a model gets sure of nonsense: read the scores of what comes out, not the entropy.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from graftkit.data.tasks import Task
from graftkit.errors import DataError, OutputError, PlanError, RecipeError
from graftkit.execution.live import Live
from graftkit.improving.gated import Gated, Place, deltas_of, domains
from graftkit.measuring.encoding import Row, encode
from graftkit.measuring.responses import Delta
from graftkit.recipes.moving import moved
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import ModelEntry, Recipe, load
from graftkit.recipes.steps import Step

if TYPE_CHECKING:
    from torch import Tensor

COEFFICIENTS, RECIPE, RECORD = "coefficients.yaml", "recipe.yaml", "adamerging.json"

Scope = Literal["model", "tensor"]

Slope = Callable[["Tensor"], tuple[float, "Tensor"]]
"""The loss at coefficients [models, tensors], and its gradient by them."""

Tell = Callable[[int, int, float], None]
"""Told of each step: how many are done, of how many, and the entropy before it."""


@dataclass(frozen=True)
class Settings:
    """How coefficients are found. `scope`: one for each model (`model`), or for each model and tensor (`tensor`).

    `rate`: Adam's. `start`: every coefficient's first value. `batch`: examples of each domain in a step. `clip`: keep
    coefficients within 0 and 1. `samples`: examples of each domain, at most.
    """

    scope: Scope = "tensor"
    steps: int = 100
    rate: float = 1e-2
    start: float = 0.3
    batch: int = 4
    clip: bool = True
    samples: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Adapted:
    """Where the recipe stands, the coefficients by tensor, the entropy before each step, and the seconds it took."""

    recipe: Path
    coefficients: dict[str, list[float]]
    entropies: list[float]
    seconds: float


def adamerging(
    recipe: Recipe | str | Path,
    out: Path,
    *,
    data: Sequence[Place | Sequence[Task]] = (),
    settings: Settings | None = None,
    device: str = "cpu",
    advance: Tell = lambda done, total, entropy: None,
) -> Adapted:
    """Finds the weights of a recipe of task_arithmetic; writes them, the recipe that uses them and a record to `out`.

    `data`: examples for each model, where none stand beside it in the recipe; their answers are read as text, not as
    labels. The paper's rate is 1e-3 over 500 steps; the default is ten times that over 100.
    Raises PlanError for another method or composed deltas, DataError for examples, OutputError.
    """
    chosen, asked, started = settings or Settings(), load(recipe), time.perf_counter()
    if out.exists():
        raise OutputError(f"{out}: exists already; choose another name")
    if not math.isfinite(chosen.start) or (chosen.clip and not 0 <= chosen.start <= 1):
        expected = "a number from 0 to 1, or any with --no-clip" if chosen.clip else "a number"
        raise DataError(f"--start: expected {expected}, got {chosen.start}")
    tasks = domains(asked, data, chosen.samples)
    planned = plan(asked)
    steps = _mergeable(planned)
    with Live.open(planned, device=device) as live:
        deltas = {step.key: deltas_of(Gated(planned, steps), step, device) for step in steps}
        rows = [_rows(live, own) for own in tasks]
        entropy = Entropy(live, steps, deltas, [_turns(own, chosen.batch, chosen.seed) for own in rows])
        values, trail = descend(entropy, len(asked.models), len(steps), chosen, advance)
    if not bool(values.isfinite().all()):
        raise DataError(f"--rate: the coefficients are no numbers any more after {chosen.steps} steps; take less than "
                        f"{chosen.rate}")  # fmt: skip
    found = {step.name: [round(float(v), 6) for v in values[:, k]] for k, step in enumerate(steps)}
    place = _write(asked, out, found, {"entropies": trail, "tasks": tasks}, chosen)
    return Adapted(place, found, trail, time.perf_counter() - started)


def descend(slope: Slope, models: int, tensors: int, settings: Settings, advance: Tell) -> tuple[Tensor, list[float]]:
    """Adam on coefficients [models, tensors] from `start`; returns them and the loss before each step."""
    import torch

    width = tensors if settings.scope == "tensor" else 1
    free = torch.full((models, width), settings.start, dtype=torch.float64, requires_grad=True)
    optimiser, trail = torch.optim.Adam([free], lr=settings.rate), []

    def held() -> Tensor:
        kept = free.clamp(0, 1) if settings.clip else free
        return kept.expand(models, tensors)

    for done in range(settings.steps):
        now = held()
        loss, gradient = slope(now.detach())
        optimiser.zero_grad()
        (now * gradient).sum().backward()
        optimiser.step()
        trail.append(loss)
        advance(done + 1, settings.steps, loss)
    return held().detach(), trail


def slopes(gradients: Sequence[Tensor], deltas: Sequence[Sequence[Delta]]) -> Tensor:
    """`<gradient of the loss by a weight, delta of a model>`: float64 [models, tensors], by factors where there are."""
    import torch

    found = torch.zeros(len(deltas[0]), len(gradients), dtype=torch.float64)
    for k, (gradient, own) in enumerate(zip(gradients, deltas, strict=True)):
        for t, delta in enumerate(own):
            if delta.right is not None:
                inner = gradient if delta.left is None else delta.left.T @ gradient
                found[t, k] = (inner * delta.right).sum().double()
    return found


class Entropy:
    """The entropy of a live merge's predictions on the next batch of each domain, and its slopes."""

    def __init__(
        self,
        live: Live,
        steps: Sequence[Step],
        deltas: Mapping[str, Sequence[Delta]],
        turns: Sequence[Iterator[list[Row]]],
    ) -> None:
        self.live, self.steps, self.turns = live, steps, turns
        self.deltas = [deltas[step.key] for step in steps]
        self.scales = [float(step.knobs["scale"]) for step in steps]
        self.weights = [live.parameter(step) for step in steps]

    def __call__(self, coefficients: Tensor) -> tuple[float, Tensor]:
        """The sum over domains of their mean entropy, and its gradient by the coefficients."""
        import torch

        weights = {step.key: tuple(coefficients[:, k].tolist()) for k, step in enumerate(self.steps)}
        self.live.apply(_weighted(self.live.plan, weights))
        total = 0.0
        for weight in self.weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for turn in self.turns:
                entropy = _entropy(self.live.model, next(turn))
                entropy.backward()
                total += float(entropy.detach())
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]
        found = slopes([g * scale for g, scale in zip(gradients, self.scales, strict=True)], self.deltas)
        for weight in self.weights:
            weight.grad = None
            weight.requires_grad_(False)
        return total, found


def _entropy(model: Any, batch: Sequence[Row]) -> Tensor:
    """The mean over real tokens of the entropy of what the model says comes next."""
    from graftkit.measuring.activations import Hearing, forward

    hearing = Hearing()
    logits = hearing.real(forward(model, batch, hearing, head=True).logits).float()
    sure = logits.log_softmax(-1)
    return -(sure.exp() * sure).sum(-1).mean()


def _mergeable(planned: Plan) -> tuple[Step, ...]:
    """The steps whose weights are sought. Raises PlanError where a merge is more than a weighted sum of deltas."""
    steps = tuple(step for step in planned.steps if step.method)
    odd = next((s for s in steps if s.method != "task_arithmetic" or s.prepare or s.finish or s.rows), None)
    if odd is not None:
        what = "prepared or finished deltas" if odd.prepare or odd.finish else "rows" if odd.rows else odd.method
        raise PlanError(
            f"recipe: AdaMerging finds the weights of task_arithmetic, and {odd.name!r} is merged by {what}; leave "
            "that out"
        )
    if any(step.knobs.get("normalize") for step in steps) or planned.recipe.slices:
        raise RecipeError("recipe: AdaMerging finds the weights of plain sums; leave out `normalize` and `slices`")
    if not steps:
        raise PlanError("recipe: nothing is merged, so there are no weights to find")
    return steps


def _weighted(planned: Plan, weights: Mapping[str, tuple[float, ...]]) -> Plan:
    """The plan with other weights."""

    def changed(step: Step) -> Step:
        return replace(step, knobs={**step.knobs, "weight": weights[step.key]}) if step.key in weights else step

    shards = tuple(replace(shard, steps=tuple(map(changed, shard.steps))) for shard in planned.shards)
    return replace(planned, shards=shards)


def _rows(live: Live, tasks: Sequence[Task]) -> list[Row]:
    """A domain's examples as token ids."""
    context = getattr(live.model.config, "max_position_embeddings", None)
    return [row for task in tasks for row in encode(live.tokenizer, task, context)]


def _turns(rows: list[Row], size: int, seed: int) -> Iterator[list[Row]]:
    """Batches without end, each time around in another order."""
    order = random.Random(seed)
    while True:
        mixed = order.sample(rows, len(rows))
        yield from (mixed[start : start + size] for start in range(0, len(mixed), size))


def _write(recipe: Recipe, out: Path, found: Mapping[str, list[float]], seen: Any, settings: Settings) -> Path:
    """Coefficients, recipe and record, with paths that lead to the models from there."""
    told = {
        "settings": asdict(settings),
        "entropies": seen["entropies"],
        "examples": [[{"task": task.name, "content": task.content} for task in own] for own in seen["tasks"]],
        "versions": {name: version(name) for name in ("graftkit", "torch", "transformers")},
    }
    entries = [ModelEntry(model=entry.model, **_without_weight(entry.knobs)) for entry in recipe.models]
    rules = [rule.model_copy(update={"knobs": _without_weight(rule.knobs)}) for rule in recipe.rules]
    kept = [rule for rule in rules if rule.method or rule.knobs or rule.prepare is not None or rule.finish is not None]
    knobs = {**recipe.knobs, "weight": {"from": COEFFICIENTS}}
    weighted = recipe.model_copy(update={"models": entries, "rules": kept, "knobs": knobs})
    untouched = {"values": [settings.start] * len(entries)}  # of tensors that no model changes: any number will do
    coefficients = yaml.safe_dump(untouched | {"tensors": dict(found)}, sort_keys=False)
    try:
        out.mkdir(parents=True)
        (out / COEFFICIENTS).write_text(coefficients, encoding="utf-8")
        (out / RECORD).write_text(dumps(told, indent=1), encoding="utf-8")
        (out / RECIPE).write_text(moved(weighted, out).to_yaml(), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror})") from error
    return out / RECIPE


def _without_weight(knobs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in knobs.items() if name != "weight"}
