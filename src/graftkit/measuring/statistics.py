"""`graft statistics`: what a recipe's methods read that must be measured with examples, for each model on its own.

Every model runs by itself on the examples of its domain, in float32; each file is done with before the next one begins,
and a command that was stopped goes on at the first file that is not there yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graftkit.checkpoints.statistics import ENDING, About, all_statistics, open_statistics
from graftkit.data.tasks import load_task
from graftkit.errors import DataError, PlanError
from graftkit.measuring.loading import default_device, model_names
from graftkit.measuring.statistics_grams import check_width, checked_form
from graftkit.measuring.statistics_runs import Options, Subject, Tell, run_merged, run_one
from graftkit.recipes import statistics
from graftkit.recipes.plan import Plan, plan
from graftkit.recipes.recipe import Recipe, load
from graftkit.recipes.steps import Step


@dataclass(frozen=True)
class Made:
    """One file: what it is of, where it stands, its bytes, and whether it was there already."""

    about: About
    file: Path
    nbytes: int
    reused: bool


def collect(
    recipe: Recipe | str | Path,
    *,
    data: Sequence[str | Path] = (),
    samples: int = 500,
    form: str = "full",
    memory: int | None = None,
    device: str | None = None,
    seed: int = 0,
    advance: Tell = lambda name, done, total: None,
) -> list[Made]:
    """Measures what the recipe's methods read of each model, at most `samples` examples a model, all their tokens.

    `data`: the examples of each model, where none stand beside it in the recipe. `form`: of `gram`, full, block:SIZE
    or sketch:RANK. `memory`: bytes that the process may use; grams that do not fit are made layer by layer. Files that
    are there already and say the same of themselves stay. Raises PlanError, DataError or OutputError.
    """
    asked = load(recipe)
    options = Options(checked_form(form), memory, device or default_device(), seed, advance)
    planned = plan(asked, without_gates=True, without_statistics=True)
    steps = tuple(step for step in planned.steps if statistics.needed(step))
    _check(planned, steps)
    check_width(options.form, statistics.widest(steps))
    places = _places(asked, data)
    wanted = _wanted(planned, places)
    subjects = _subjects(planned, steps, places, samples)
    made = []
    for kind, of in wanted.items():
        counts = [len(subject.task.items) for subject in subjects]
        abouts = [replace(own, samples=n, seed=seed) for own, n in zip(of, counts, strict=True)]
        abouts = [replace(own, form=options.form) if kind == "gram" else own for own in abouts]
        held = [_held(asked, about) for about in abouts]
        if kind == "merged_gram" and not all(held):
            files = [_file(asked, subject.name, about) for subject, about in zip(subjects, abouts, strict=True)]
            run_merged(subjects, abouts, files, options)
            made += [_made(file) for file in files]
            continue
        for subject, about, own in zip(subjects, abouts, held, strict=True):
            made.append(own or _measured(subject, about, options))
    return made


def _check(planned: Plan, steps: Sequence[Step]) -> None:
    if not steps:
        raise PlanError(
            f"recipe.method: {planned.recipe.method} reads no statistics of examples; choose regmean, core_regmean or "
            "fisher"
        )
    statistics.check_steps(planned.recipe, steps)
    nested = next((named for named in planned.sources if named.nested), None)
    if nested:
        raise PlanError(f"{nested.label} is a recipe; merge it first, and name what it made")


def _places(recipe: Recipe, data: Sequence[str | Path]) -> list[Path]:
    """Where the examples of each model are: from `data`, in order, else beside the models in the recipe."""
    beside = [entry.data and recipe.directory / entry.data for entry in recipe.models]
    if len(data) not in (0, len(recipe.models)) or (not data and not all(beside)):
        raise DataError(
            f"{len(recipe.models)} models need examples of {len(recipe.models)} domains, got {len(data)}: give --data "
            "once for each model, in the recipe's order, or `data:` beside each model"
        )
    if data and any(beside):
        raise DataError("the recipe names examples by `data:` beside its models; drop those, or --data")
    return [Path(place) for place in data or [own for own in beside if own]]


def _wanted(planned: Plan, places: Sequence[Path]) -> dict[str, list[About]]:
    """What the file of each model must be of, by kind, examples included."""
    prints = [statistics.fingerprint(place) for place in places]
    return {
        kind: [
            replace(about, data=data, place=about.place or str(place.resolve()))
            for about, data, place in zip(of, prints, places, strict=True)
        ]
        for kind, of in statistics.wanted(planned).items()
    }


def _subjects(planned: Plan, steps: tuple[Step, ...], places: Sequence[Path], samples: int) -> list[Subject]:
    entries = statistics.sources_of(planned)[1]
    sources = list(dict.fromkeys(entries))
    names = dict(zip(sources, model_names([planned.sources[e].source.directory for e in sources]), strict=True))
    found = []
    for k, (entry, place) in enumerate(zip(entries, places, strict=True)):
        task = load_task(place, samples)
        if task.kind == "pass_at_1":
            raise DataError(f"task {task.name}: statistics are measured on prompts and answers, and it has no answers")
        found.append(Subject(planned, steps, k, planned.sources[entry], names[entry], task))
    return found


def _held(recipe: Recipe, about: About) -> Made | None:
    """The file that is there already, if it was made in the same way."""
    for own in all_statistics(statistics.directory_of(recipe)):
        same = (own.about.data, own.about.form, own.about.samples, own.about.seed)
        if statistics.matches(own.about, about) and same == (about.data, about.form, about.samples, about.seed):
            return Made(own.about, own.file, own.file.stat().st_size, True)
    return None


def _file(recipe: Recipe, name: str, about: About) -> Path:
    """The first free name; one of the same kind, of the same examples or older ones, gives way."""
    directory = statistics.directory_of(recipe)
    held = {own.file: own.about for own in all_statistics(directory)}
    for number in range(1, len(held) + 2):
        stem = name.replace("/", "-") + (f"-{number}" if number > 1 else "")
        file = directory / f"{stem}.{about.kind}{ENDING}"
        own = held.get(file)
        if own is None and file.exists():
            continue
        if own is None or own.place == about.place or (not recipe.models[0].data and statistics.matches(own, about)):
            return file
    raise AssertionError("more files than names; this is a bug")


def _measured(subject: Subject, about: About, options: Options) -> Made:
    file = _file(subject.planned.recipe, subject.name, about)
    run_one(subject, about, file, options)
    return _made(file)


def _made(file: Path) -> Made:
    return Made(open_statistics(file).about, file, file.stat().st_size, False)
