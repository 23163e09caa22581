"""`graft gates solve | train | fold RECIPE OUT`: gates from examples, and the recipe that merges by them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from graftkit.improving.learning import Course
    from graftkit.improving.training import Trained

app = typer.Typer(no_args_is_help=True, help="Make the gates that a recipe merges by.")

RecipeFile = Annotated[
    Path, typer.Argument(help="A recipe by graft, graft_convex or graft_free.", show_default=False, metavar="RECIPE")
]
Out = Annotated[Path, typer.Argument(help="The directory to write.", metavar="OUT", show_default=False)]
Device = Annotated[str | None, typer.Option(help="Where models run; cuda where there is one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")]

Domains = Annotated[
    list[Path],
    typer.Option("--data", "-d", help="A task of prompts and answers; once a domain.", show_default=False),
]
Dev = Annotated[
    list[Path] | None,
    typer.Option(help="Examples that decide when to stop; else some of --data are held out.", show_default=False),
]
Preset = Annotated[
    str, typer.Option(help="Settings that the options change: small, or the paper's graft-model, graft-lora.")
]
PhiKind = Annotated[
    str | None, typer.Option(help="affine (for graft), channelwise, mlp, dense, direct (for the others).")
]


class Grain(str, Enum):
    """What has a gate of its own."""

    channel = "channel"
    block = "block"
    element = "element"


class Learning(str, Enum):
    """What learns."""

    gates = "gates"
    both = "gates+weights"


class Making(str, Enum):
    """How the gates of a pair are made."""

    solve = "solve"
    train = "train"


@app.callback()
def _gates() -> None:
    """Make the gates that a recipe merges by."""


@app.command("solve")
def solve(
    recipe: RecipeFile,
    out: Out,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", help="A task of prompts and answers; once a model, in order.", show_default=False),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Examples of each domain, at most.")] = 200,
    ridge: Annotated[float, typer.Option(min=0, help="graft_free: pull towards the prior.")] = 0.1,
    prior: Annotated[float, typer.Option(help="graft_free: the coefficient where nothing is known.")] = 1.0,
    device: Device = None,
    threads: Threads = None,
    json: AsJson = False,
) -> None:
    """Solve gates in closed form: each model runs once, over examples of its own domain. Writes gates and a recipe."""
    from dataclasses import asdict

    from graftkit.cli import console
    from graftkit.improving import gates

    console.quiet_libraries(threads)
    found = gates.solve(
        recipe, out, data=data or (), samples=samples, ridge=ridge, prior=prior, device=device,
        advance=(lambda *_: None) if json else _tell,
    )  # fmt: skip
    if json:
        console.print_json({**asdict(found), "recipe": str(found.recipe)})
    else:
        typer.echo(
            f"{found.recipe}: {found.kind}s of {found.channels} channels of {found.matrices} matrices, from "
            f"{found.examples} examples ({found.tokens} tokens) in {found.seconds:.1f} s"
        )


def _tell(name: str, done: int, total: int) -> None:
    typer.echo(f"\r{name}: {done} of {total} examples", err=True, nl=done == total)


@app.command("train")
def train(
    recipe: RecipeFile,
    out: Out,
    data: Domains,
    dev: Dev = None,
    held_out: Annotated[int, typer.Option(min=0, help="Examples of each domain to hold out without --dev.")] = 16,
    samples: Annotated[int | None, typer.Option(min=1, help="Examples of each domain, at most.")] = None,
    preset: Preset = "small",
    phi: PhiKind = None,
    granularity: Annotated[Grain, typer.Option(help="What has a gate of its own.")] = Grain.channel,
    size: Annotated[int, typer.Option(min=2, help="Rows and columns of a block.")] = 8,
    start: Annotated[Path | None, typer.Option(help="A file of gates to start from, solved say.")] = None,
    prior: Annotated[float, typer.Option(help="graft_free: the coefficients to start from without --start.")] = 1.0,
    learn: Annotated[Learning, typer.Option("--train", help="gates+weights: adapters learn along.")] = Learning.gates,
    sharpness: Annotated[bool, typer.Option("--learn-sharpness", help="Learn graft's knob sharpness too.")] = False,
    raw: Annotated[bool, typer.Option("--raw-distances", help="Give d to phi as it is, not standardised.")] = False,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, in place of --epochs.")] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Passes over the examples, in place of --steps.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Adam's learning rate.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Examples that run at once.")] = None,
    accumulation: Annotated[int | None, typer.Option(min=1, help="Batches of a step.")] = None,
    warmup: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the steps that the rate rises.")] = None,
    clip: Annotated[float | None, typer.Option(min=0, help="Largest norm of a step's gradient.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of an example, at most.")] = None,
    every: Annotated[int | None, typer.Option(min=1, help="Steps between looks at the dev examples.")] = None,
    patience: Annotated[int | None, typer.Option(min=0, help="Looks without a better loss; 0: never stop.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the order of examples.")] = None,
    recompute: Annotated[bool, typer.Option("--recompute", help="Save memory: make activations again.")] = False,
    device: Device = None,
    threads: Threads = None,
    json: AsJson = False,
) -> None:
    """Learn gates by the loss of answers; the models stay as they are. Writes gates, recipe, phi and the course."""
    from graftkit.cli import console

    console.quiet_libraries(threads)
    from graftkit.improving import training
    from graftkit.improving.learnable import Form

    chosen = {"rate": rate, "steps": steps, "epochs": epochs, "batch": batch, "accumulation": accumulation}
    chosen |= {"warmup": warmup, "clip": clip, "length": length, "every": every, "patience": patience, "seed": seed}
    blocks = {Grain.channel: 0, Grain.block: size, Grain.element: 1}[granularity]
    form = Form(_phi(phi), blocks, raw, start, sharpness, learn is Learning.both, prior)
    found = training.train(
        recipe, out, data=data, settings=_settings(preset, chosen), form=form, dev=dev or (), held_out=held_out,
        samples=samples, recompute=recompute, device=device, told=_silent if json else _teller(),
    )  # fmt: skip
    if json:
        typer.echo((out / training.RECORD).read_text(encoding="utf-8"), nl=False)
        return
    for line in _lines(found):
        typer.echo(line)


@app.command("fold")
def fold(
    recipe: RecipeFile,
    out: Out,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", "-d", help="A task of prompts and answers; once a model, in order.", show_default=False),
    ] = None,
    by: Annotated[Making, typer.Option(help="How the gates of each pair are made.")] = Making.solve,
    samples: Annotated[int, typer.Option(min=1, help="Examples of each model, at most.")] = 200,
    preset: Annotated[str, typer.Option(help="Of a training: small, graft-model, graft-lora.")] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps of each training.")] = None,
    rate: Annotated[float | None, typer.Option(min=0, help="Adam's learning rate.")] = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Fuse three models or more by pairs: the first two, then their merge and the next; order matters."""
    from dataclasses import asdict

    from graftkit.cli import console

    console.quiet_libraries(threads)
    from graftkit.improving import folding, gates, training

    settings = _settings(preset, {"steps": steps, "rate": rate})

    def make(pair: Any, place: Path, tasks: Any) -> None:
        if by is Making.solve:
            gates.solve(pair, place, data=tasks, samples=samples, device=device, advance=_tell)
            return
        mixed = [task for own in tasks for task in own]
        training.train(pair, place, data=mixed, samples=samples, settings=settings, device=device, told=_teller())

    how = {"by": by.value, "samples": samples} | (asdict(settings) if by is Making.train else {})
    found = folding.fold(recipe, out, make, data=data or (), settings=how, told=lambda line: typer.echo(line, err=True))
    typer.echo(f"{found}: the last of the pairs; `graft merge {found} MERGED` makes the result")


def _silent(course: Course, steps: int) -> None:
    """Tells nothing."""


def _settings(preset: str, chosen: dict[str, Any]) -> Any:
    """A preset's settings with some of them changed; of steps and epochs the one that was asked for."""
    from dataclasses import replace

    from graftkit.errors import DataError, unknown
    from graftkit.improving.learning import PRESETS

    if preset not in PRESETS:
        raise DataError("--preset: " + unknown("preset", preset, PRESETS))
    wanted = {name: value for name, value in chosen.items() if value is not None}
    if "steps" in wanted and "epochs" in wanted:
        raise DataError("--steps and --epochs: each says how long to train; give one")
    if "epochs" in wanted:
        wanted["steps"] = None
    return replace(PRESETS[preset], **wanted)


def _phi(name: str | None) -> Any:
    from graftkit.errors import DataError, unknown
    from graftkit.improving.phi import KINDS

    if name is not None and name not in KINDS:
        raise DataError("--phi: " + unknown("phi", name, KINDS))
    return name


def _teller() -> Callable[[Course, int], None]:
    """Tells of each step on standard error: in place on a terminal, else only of looks at the dev examples."""
    import sys

    live = sys.stderr.isatty()

    def tell(course: Course, steps: int) -> None:
        point = course.curve[-1]
        if not live and point.dev is None and point.step < steps:
            return
        left = course.seconds / point.step * (steps - point.step)
        dev = next((f", dev {p.dev:.4f}" for p in reversed(course.curve) if p.dev is not None), "")
        pace = course.tokens / max(course.seconds, 1e-9)
        line = f"step {point.step} of {steps}: loss {point.loss:.4f}{dev}, {pace:.0f} tokens/s, {left:.0f} s left"
        typer.echo(f"\r{line:<78}" if live else line, err=True, nl=not live or point.step == steps or course.stopped)

    return tell


def _lines(found: Trained) -> list[str]:
    """What came out, for people."""
    course, change = found.course, found.change
    what = "coefficients" if found.kind == "coefficient" else "w_b"
    lines = [
        f"{found.recipe}: {found.learnt} numbers of phi {found.phi} learnt in {len(course.curve)} steps, "
        f"{course.seconds:.1f} s, {course.tokens} tokens",
        f"{what} moved by {change.mean:.2g} on average, {change.most:.2g} at most; it lies in {change.low:.3f} to "
        f"{change.high:.3f}, half of it below {change.middle:.3f}",
    ]
    if found.sharpness is not None:
        lines.append(f"sharpness {found.sharpness:.4g}, in the recipe")
    if found.held_out:
        lines.append(f"{found.held_out} examples were held out for the dev loss; at most a quarter of a domain's are")
    if course.first is not None and course.best is not None:
        ended = "ended as it no longer fell" if course.stopped else "ran to the end"
        lines.append(f"dev loss {course.first:.4f} -> {course.best:.4f} at step {course.best_step}; {ended}")
    return lines
