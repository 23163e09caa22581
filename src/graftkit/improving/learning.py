"""The loop that learns gates: batches of all domains, the loss of answers, a cosine, dev looks, and a state to resume.

Domains count alike: the loss of a step is the mean over domains of the mean loss per answer token. The models do not
drop out: they run as in evaluation.
"""

from __future__ import annotations

import io
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from graftkit.errors import DataError, NonFiniteError, OutputError
from graftkit.measuring.activations import padded
from graftkit.measuring.encoding import Row
from graftkit.measuring.scoring import Scorer, batches

DEV_TOKENS = 2048  # of a batch that dev examples run in, padding included
STATE = "state.pt"


@dataclass(frozen=True)
class Settings:
    """How gates are learnt: one of `steps` and `epochs` is set; `warmup` is a share of the steps.

    `every`: steps from one look at the dev examples, and one saved state, to the next; `patience`: such looks without
    a better loss after which it ends, 0 for never.
    """

    rate: float
    steps: int | None = None
    epochs: float | None = None
    batch: int = 4
    accumulation: int = 1
    warmup: float = 0.1
    clip: float = 1.0
    length: int = 2048
    every: int = 20
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs is not None and not self.epochs > 0:
            raise DataError(f"--epochs: got {self.epochs:g}, expected a number above 0")

    def steps_for(self, examples: int) -> int:
        """The number of optimiser steps for so many examples."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil((self.epochs or 1) * examples / (self.batch * self.accumulation)))


PRESETS: dict[str, Settings] = {
    "small": Settings(rate=0.1, steps=60),
    # arXiv 2506.23940, Tables 14 and 15: settings of a training of weights. A small phi hardly moves by them.
    "graft-model": Settings(rate=1e-5, epochs=1, batch=1, accumulation=2),
    "graft-lora": Settings(rate=1e-4, epochs=3, batch=4, accumulation=8),
}
"""Settings by name: our own for small phi, and those of the paper's Tables 14 (GraftModel) and 15 (GraftLoRA)."""


class Point(NamedTuple):
    """One step of a training: mean loss per answer token, learning rate, and the dev loss where there was a look."""

    step: int
    loss: float
    rate: float
    dev: float | None


@dataclass
class Course:
    """What became of a training: its curve, answer and all tokens that were trained on, seconds, the best dev loss."""

    curve: list[Point] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    first: float | None = None
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    stopped: bool = False

    def record(self) -> dict[str, Any]:
        """As plain data."""
        return {**asdict(self), "curve": [point._asdict() for point in self.curve]}


Told = Callable[[Course, int], None]
"""Hears of each step: the course so far, and how many steps there are."""


class Example(NamedTuple):
    """One encoded example and the number of its domain."""

    row: Row
    domain: int


def stream(domains: Sequence[Sequence[Row]], batch: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches with an example of each domain in turn, each domain in an order of its own, again and again."""
    turns = [_shuffled(rows, random.Random(f"{seed} {k}")) for k, rows in enumerate(domains)]
    place = 0
    while True:
        chosen = [(place + k) % len(domains) for k in range(batch)]
        place += batch
        yield [Example(next(turns[domain]), domain) for domain in chosen]


def _shuffled(rows: Sequence[Row], source: random.Random) -> Iterator[Row]:
    order = list(rows)
    while True:
        source.shuffle(order)
        yield from order


def rate_at(step: int, rise: int, steps: int) -> float:
    """The share of the rate in a step, counted from 0: a line up over `rise` steps from above 0, then a cosine."""
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))


def cut(row: Row, length: int) -> Row | None:
    """A row of at most `length` tokens, cut at its end; None where no token of the answer is left."""
    room = length - len(row.prompt)
    return None if room < 1 else row if row.length <= length else replace(row, answers=(row.answers[0][:room],))


def token_losses(scorer: Scorer, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """The loss of every answer token of a batch, and the row that it belongs to; differentiable."""
    model = scorer.model
    device = next(model.parameters()).device
    ids, mask = padded(rows)
    places = [(k, source, token) for k, row in enumerate(rows) for source, token, _ in row.predictions()]
    row, source, target = torch.tensor(places, device=device).T
    given = {"input_ids": ids.to(device), "attention_mask": mask.long().to(device), "use_cache": False}
    if scorer.head_only:
        states = model.base_model(**given).last_hidden_state
        logits = model.get_output_embeddings()(states[row, source])
    else:
        logits = model(**given).logits[row, source]
    return functional.cross_entropy(logits.float(), target, reduction="none"), row


def step_loss(scorer: Scorer, parts: Sequence[Sequence[Example]]) -> tuple[float, int]:
    """Adds up gradients over the parts of one step; its loss, and how many tokens it saw."""
    counts: dict[int, int] = {}
    for example in (one for part in parts for one in part):
        counts[example.domain] = counts.get(example.domain, 0) + len(example.row.answers[0])
    total, tokens = 0.0, 0
    for part in parts:
        losses, row = token_losses(scorer, [example.row for example in part])
        share = torch.tensor([1 / (len(counts) * counts[example.domain]) for example in part], device=losses.device)
        loss = (losses * share[row]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        total, tokens = total + float(loss.detach()), tokens + sum(example.row.length for example in part)
    return total, tokens


def mean_loss(scorer: Scorer, domains: Sequence[Sequence[Row]]) -> float:
    """The mean over domains of the mean loss per answer token."""
    found = []
    with torch.inference_mode():
        for rows in domains:
            total = sum(float(token_losses(scorer, part)[0].double().sum()) for part in batches(rows, DEV_TOKENS))
            found.append(total / sum(len(row.answers[0]) for row in rows))
    return sum(found) / len(found)


@dataclass
class Training:
    """A training under way. `digest` names all that it depends on: a saved state of another one is refused."""

    scorer: Scorer
    learnt: nn.Module
    domains: Sequence[Sequence[Row]]
    dev: Sequence[Sequence[Row]]
    settings: Settings
    keep: Path
    digest: str
    told: Told = lambda course, steps: None

    def __post_init__(self) -> None:
        self.steps = self.settings.steps_for(sum(map(len, self.domains)))
        self.wanted = [parameter for parameter in self.learnt.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.Adam(self.wanted, lr=self.settings.rate)
        rise = math.ceil(self.settings.warmup * self.steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda step: rate_at(step, rise, self.steps))
        self.course, self.best = Course(), self._values()

    def run(self) -> Course:
        """Trains to the end or until the dev loss no longer falls, and leaves the best values in `learnt`."""
        self._resume()
        source = stream(self.domains, self.settings.batch, self.settings.seed)
        for _ in range(len(self.course.curve) * self.settings.accumulation):
            next(source)
        if self.dev and self.course.first is None:
            self.course.first = self.course.best = mean_loss(self.scorer, self.dev)
        while len(self.course.curve) < self.steps and not self.course.stopped:
            self._step([next(source) for _ in range(self.settings.accumulation)])
        if self.dev:
            self.learnt.load_state_dict(self.best)
        return self.course

    def _step(self, parts: Sequence[Sequence[Example]]) -> None:
        started, course, rate = time.perf_counter(), self.course, float(self.schedule.get_last_lr()[0])
        self.optimiser.zero_grad()
        loss, tokens = step_loss(self.scorer, parts)
        if not math.isfinite(loss):
            raise NonFiniteError(f"step {len(course.curve) + 1}: the loss is {loss}; choose a smaller --rate")
        nn.utils.clip_grad_norm_(self.wanted, self.settings.clip)
        self.optimiser.step()
        self.schedule.step()
        step = len(course.curve) + 1
        look = step % self.settings.every == 0 or step == self.steps
        dev = mean_loss(self.scorer, self.dev) if self.dev and look else None
        course.curve.append(Point(step, loss, rate, dev))
        course.tokens, course.seconds = course.tokens + tokens, course.seconds + time.perf_counter() - started
        if dev is not None:
            self._judge(dev, step)
        if look:
            self._save()
        self.told(course, self.steps)

    def _judge(self, dev: float, step: int) -> None:
        course = self.course
        if course.best is None or dev < course.best:
            course.best, course.best_step, course.waited, self.best = dev, step, 0, self._values()
        else:
            course.waited += 1
            course.stopped = 0 < self.settings.patience <= course.waited

    def _values(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.learnt.state_dict().items()}

    def _save(self) -> None:
        told = {**self.course.record(), "curve": [list(point) for point in self.course.curve]}
        state = {"digest": self.digest, "course": told, "now": self._values(), "best": self.best}
        state |= {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}
        held = io.BytesIO()  # torch tells of a full disk by an error of its own
        torch.save(state, held)
        try:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{STATE}.new").write_bytes(held.getbuffer())
            os.replace(self.keep / f"{STATE}.new", self.keep / STATE)
        except OSError as error:
            raise OutputError(f"{self.keep}: cannot be written ({error.strerror})") from error

    def _resume(self) -> None:
        if not (self.keep / STATE).is_file():
            return
        state: Mapping[str, Any] = torch.load(self.keep / STATE, weights_only=True)
        if state["digest"] != self.digest:
            raise OutputError(
                f"{self.keep}: holds a training of other models, data or settings; remove it, or choose another name"
            )
        told = dict(state["course"])
        self.course = Course(**{**told, "curve": [Point(*point) for point in told["curve"]]})
        self.learnt.load_state_dict(state["now"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self.best = dict(state["best"])
