"""Statistics of examples: which a recipe needs, where they are, and whether they are of these models and examples.

They stand in the directory that `statistics:` names, by default `statistics/` beside the recipe, one file for each
model and kind. Files are found by what they are of, not by their names: recipes in one directory share them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from graftkit import methods
from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.statistics import About, Statistics, all_statistics
from graftkit.errors import PlanError
from graftkit.recipes import layout
from graftkit.recipes.gates import content
from graftkit.recipes.inputs import Named
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.steps import Step

if TYPE_CHECKING:
    from graftkit.recipes.plan import Plan

DIRECTORY = "statistics"
COMMAND = "graft statistics RECIPE"
WHOLE = 64 << 20  # bytes of a file of examples up to which every byte counts; of a larger one, samples
SAMPLES, SAMPLE = 64, 1 << 16
PICTURE = re.compile(rb'"([^"\\]{1,512}\.(?:png|jpe?g|webp|gif|bmp|tiff?))"', re.IGNORECASE)
"""A picture that a record names, beside the records; a directory of pictures stands in their description."""


@dataclass(frozen=True)
class Measured:
    """The statistics that a plan's steps read: by kind, one file for each of the recipe's models, in their order."""

    files: Mapping[str, tuple[Statistics, ...]]
    names: Mapping[tuple[str, str, int], str]  # by kind, step and model: under which name the file has it

    @property
    def distinct(self) -> tuple[Statistics, ...]:
        """Every file once."""
        return tuple({own.file: own for files in self.files.values() for own in files}.values())

    @property
    def digest(self) -> str:
        """A hash of all that is read."""
        return " ".join(own.digest for own in self.distinct)

    def of(self, kind: str, step: Step) -> Iterator[tuple[Statistics, str]]:
        """For each model the file, and the name of what is of this step in it."""
        for k, own in enumerate(self.files[kind]):
            yield own, self.names[kind, step.key, k]

    def close(self) -> None:
        """Closes the files."""
        for own in self.distinct:
            own.close()


def needed(step: Step) -> tuple[str, ...]:
    """The kinds of statistics that a step reads; none where no model changes its tensor."""
    changed = bool(step.method) and any(part.kind != "base" for part in step.models)
    return methods.get(step.method).measured_with_examples if changed else ()


def directory_of(recipe: Recipe) -> Path:
    """Where a recipe's statistics stand."""
    return recipe.directory / (recipe.statistics or DIRECTORY)


def statistics_of(
    recipe: Recipe, sources: tuple[Named, ...], base: int | None, entries: tuple[int, ...], steps: Sequence[Step]
) -> Measured | None:
    """The opened files that the steps read, None where they read none.

    Raises PlanError where some are missing, stale, of other tensors or superfluous.
    """
    kinds = tuple(dict.fromkeys(kind for step in steps for kind in needed(step)))
    if not kinds:
        if recipe.statistics is not None:
            raise PlanError(
                "recipe.statistics: no tensor is merged by statistics of examples, so they would change nothing; leave "
                "it out, or choose a method that reads some (regmean, core_regmean, fisher)"
            )
        return None
    check_steps(recipe, [step for step in steps if needed(step)])
    held = list(all_statistics(directory_of(recipe)))
    wanted = [wanted_of(recipe, sources, base, entries, kind, steps) for kind in kinds]
    files = {
        kind: tuple(_found(recipe, held, one, k) for k, one in enumerate(of))
        for kind, of in zip(kinds, wanted, strict=True)
    }
    return Measured(files, dict(_names(files, [step for step in steps if needed(step)])))


def wanted_of(
    recipe: Recipe,
    sources: tuple[Named, ...],
    base: int | None,
    entries: tuple[int, ...],
    kind: str,
    steps: Sequence[Step],
) -> list[About]:
    """What a file of a kind must be of, for each model; where the recipe names no examples, `data` is empty."""
    prints = tuple(content(sources[entry]) for entry in entries)
    merge = _merge(recipe, steps) if kind == "merged_gram" else ""
    form = _form(steps) if kind == "core_gram" else "full"
    found = []
    for k, entry in enumerate(entries):
        adapted = isinstance(sources[entry].source, Adapter)
        below = content(sources[base]) if (adapted or merge) and base is not None else ""
        place = recipe.models[k].data if k < len(recipe.models) else None
        data = fingerprint(recipe.directory / place) if place else ""
        together = prints if kind in ("core_gram", "merged_gram") else ()
        found.append(About(kind, prints[k], below, together, merge, data, place or "", form))
    return found


def _merge(recipe: Recipe, steps: Sequence[Step]) -> str:
    """A hash of how all tensors are merged, and of all examples. Raises PlanError where the recipe names none."""
    if not all(entry.data for entry in recipe.models):
        raise PlanError("recipe.models: a merged model's statistics are of all examples; say `data:` beside each model")
    told = [(step.key, step.method, dict(step.knobs)) for step in steps]
    data = [fingerprint(recipe.directory / str(entry.data)) for entry in recipe.models]
    return hashlib.blake2b(json.dumps([told, data], default=str).encode(), digest_size=16).hexdigest()


def _form(steps: Sequence[Step]) -> str:
    """How many directions the features of core_gram have."""
    own = (step.knobs for step in steps if "core_gram" in needed(step))
    return "; ".join(sorted({f"rank {knobs['rank']}, probes {knobs['probes']}" for knobs in own}))


def sources_of(planned: Plan) -> tuple[int | None, tuple[int, ...]]:
    """The base's place among a plan's sources, and that of each of the recipe's models."""
    step = next(step for step in planned.steps if step.method and len(step.models) == len(planned.recipe.models))
    return planned.base, tuple(part.source for part in step.models)


def wanted(planned: Plan) -> dict[str, list[About]]:
    """What the files that a plan reads must be of, by kind, for each model."""
    base, entries = sources_of(planned)
    kinds = tuple(dict.fromkeys(kind for step in planned.steps for kind in needed(step)))
    made = (wanted_of(planned.recipe, planned.sources, base, entries, kind, planned.steps) for kind in kinds)
    return dict(zip(kinds, made, strict=True))


def matches(own: About, wanted: About) -> bool:
    """Whether statistics are of these models, whatever the examples. A base that is not here cannot be compared."""
    bases = own.base == wanted.base or not own.base or not wanted.base
    same = [(one.kind, one.model, one.models, one.merge) for one in (own, wanted)]
    return same[0] == same[1] and bases and (own.form == wanted.form or own.kind != "core_gram")


def _found(recipe: Recipe, held: Sequence[Statistics], wanted: About, k: int) -> Statistics:
    """The file of one model. Raises PlanError where there is none, or not one."""
    name, where = recipe.models[k].model, directory_of(recipe)
    of_model = [one for one in held if matches(one.about, wanted)]
    fresh = [one for one in of_model if one.about.data == (wanted.data or _now(one.about, recipe))]
    if len(fresh) == 1:
        return fresh[0]
    if fresh:
        raise PlanError(
            f"recipe.models[{k}]: {where} has {wanted.kind} of {name!r} on {len(fresh)} sets of examples "
            f"({', '.join(one.about.place for one in fresh)}); say which by `data:` beside the model"
        )
    if of_model:
        why = f"the {wanted.kind} of {name!r} in {where} is of other examples than {wanted.place or 'those'} now"
    elif any(one.about.kind == wanted.kind for one in held):
        why = f"{where} has no {wanted.kind} of {name!r} as its weights are now" + ", or merged so" * bool(wanted.merge)
        why += f", of {wanted.form}" * (wanted.kind == "core_gram")
    else:
        why = f"{wanted.kind} is measured with examples, and {where} has none"
    told = "" if wanted.data else ", with `data:` beside each model or --data once a model"
    raise PlanError(f"recipe.models[{k}]: {why}; run `{COMMAND}` for it{told}")


def _now(about: About, recipe: Recipe) -> str:
    """The fingerprint of the examples where they were; that in the file if they are there no more."""
    place = recipe.directory / about.place
    return fingerprint(place) if about.place and path_of(place) else about.data


def check_steps(recipe: Recipe, steps: Sequence[Step]) -> None:
    """Refuses recipes whose matrices are not those of the models as they run."""
    if recipe.slices:
        raise PlanError(
            "recipe.slices: statistics are of the tensors of whole models, and slices move layers; drop one"
        )
    for step in steps:
        if step.rows is not None or (step.part and "fisher" in needed(step)):
            raise PlanError(
                f"recipe: {step.name!r} is merged in parts (aligned vocabularies or experts), and {step.method} reads "
                "statistics of whole tensors; give it another method by a rule"
            )
        if "core_gram" in needed(step) and step.prepare:
            raise PlanError(
                f"recipe.prepare: {step.method} reads what was measured of the models' deltas as they are, and "
                f"{step.name!r} has others; drop `prepare`, or take regmean"
            )


def _names(
    files: Mapping[str, tuple[Statistics, ...]], steps: Sequence[Step]
) -> Iterator[tuple[tuple[str, str, int], str]]:
    """Where each file has what is of each step."""
    for kind, of in files.items():
        asked = [step for step in steps if kind in needed(step)]
        for k, own in enumerate(of):
            places = layout.live_names([step.name for step in asked], own.names)
            for step in asked:
                place = places.get(step.name)
                if place is None or own.shape(place) != shape_of(own.about, step, own.shape(place)):
                    fault = "lacks" if place is None else f"has {list(own.shape(place))} for"
                    shown = f"{own.file} {fault} {step.name!r} {list(step.shape)}"
                    raise PlanError(f"recipe.statistics: {shown}; run `{COMMAND}` for it")
                yield (kind, step.key, k), place


def shape_of(about: About, step: Step, got: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the values of a step in a file of a kind and form; of core_gram it is one half of any square."""
    if about.kind == "fisher":
        return step.shape
    if about.kind == "core_gram":
        return got
    width = _width(step)
    if about.form.startswith("block"):
        return (-(-width // about.number), about.number, about.number)
    return (width, about.number + 1 if about.form.startswith("sketch") else width)


def _width(step: Step) -> int:
    """How many inputs a matrix has."""
    return step.shape[0] if step.knobs.get("inputs") == "rows" else step.shape[1]


def widest(steps: Sequence[Step]) -> int:
    """The most inputs of a matrix that is merged by grams."""
    return max((_width(step) for step in steps if "gram" in needed(step)), default=0)


def path_of(place: Path) -> Path | None:
    """The file or directory of a place of examples, without its split; None for what lies elsewhere."""
    bare = Path(str(place).rpartition("#")[0]) if "#" in place.name else place
    return next((path for path in (place, bare) if path.exists()), None)


def fingerprint(place: Path) -> str:
    """A hash of a place of examples: of its files' bytes and of those that they name; of its name elsewhere."""
    path, digest = path_of(place), hashlib.blake2b(digest_size=16)
    if path is None:
        digest.update(place.name.encode())
        return digest.hexdigest()
    if path != place:
        digest.update(place.name.rpartition("#")[2].encode())
    for file in _files(path):
        _update(digest, file)
    return digest.hexdigest()


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from sorted(file for file in path.rglob("*") if file.is_file())
        return
    yield path
    if path.suffix in (".json", ".jsonl") and path.stat().st_size <= WHOLE:
        pictures = dict.fromkeys(match[1].decode(errors="replace") for match in PICTURE.finditer(path.read_bytes()))
        yield from (picture for name in pictures if (picture := path.parent / name).is_file())
    if path.suffix in (".yaml", ".yml"):
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise PlanError(f"{path}: no description of examples ({str(error).splitlines()[0]})") from error
        named = [value for value in told.values() if isinstance(value, str)] if isinstance(told, dict) else []
        for own in (path_of(path.parent / value) for value in named if value and len(value) < 1024):
            if own is not None and own != path.parent and own != path:
                yield from _files(own)


def _update(digest: Any, file: Path) -> None:
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with open(file, "rb") as handle:
        if size <= WHOLE:
            digest.update(handle.read())
            return
        for k in range(SAMPLES):
            handle.seek((size - SAMPLE) * k // (SAMPLES - 1))
            digest.update(handle.read(SAMPLE))


def told(measured: Measured) -> list[dict[str, str | int]]:
    """Statistics in words, for plans and records."""
    return [
        {
            "file": str(own.file),
            "kind": own.about.kind,
            "form": own.about.form,
            "examples": own.about.place,
            "samples": own.about.samples,
            "tokens": own.about.tokens,
            "content": own.digest,
        }
        for own in measured.distinct
    ]
