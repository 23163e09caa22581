"""The models of a recipe, opened: each distinct one once, in the recipe's order, with its name and fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.checkpoints.absent import absent_base
from graftkit.checkpoints.adapters import CONFIG, Adapter
from graftkit.checkpoints.headers import ITEMSIZE, METADATA, TensorInfo, encode_header
from graftkit.checkpoints.resolve import Source, cache_directory, directory_of, open_source, split_task
from graftkit.checkpoints.sources import Checkpoint, full_hash
from graftkit.errors import CheckpointError, PlanError
from graftkit.methods.random import key_of
from graftkit.recipes import layout
from graftkit.recipes.recipe import ModelEntry, Recipe

if TYPE_CHECKING:
    from graftkit.recipes.plan import Plan


@dataclass(frozen=True)
class Named:
    """An opened source, what the recipe calls it, its part (`base` or `model`), and its content's fingerprint.

    `nested` is the plan that makes it, for a source that is another recipe's result. `content` names the weights
    however they are kept and whatever was asked of the fingerprint: what random numbers are keyed by.
    """

    name: str
    role: str
    source: Source
    fingerprint: str
    nested: Plan | None = None
    placed: bool = False  # an adapter of which the recipe says itself, by `base+adapter`, what it stands on
    content: str = ""

    @property
    def kind(self) -> str:
        """`checkpoint`, `adapter` or `recipe`."""
        return "recipe" if self.nested else self.source.kind

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.role} {self.name!r}"


@dataclass(frozen=True)
class Opening:
    """How sources are opened: pickles or not, fingerprints by every byte or by samples, and how a recipe is planned."""

    allow_pickle: bool
    full_hash: bool
    plan_nested: Callable[[Path | Recipe], Plan]

    def directory(self, name: str, part: str, directory: Path, task: str = "") -> Named:
        """Opens a checkpoint or an adapter, or the view of a task of a unified model."""
        source = open_source(directory, task=task, allow_pickle=self.allow_pickle)
        files = source.store.files if isinstance(source, Adapter) else source.files
        known = full_hash(files) if self.full_hash else source.fingerprint()
        return Named(name, part, source, known, content=source.content())


def open_all(recipe: Recipe, opening: Opening) -> tuple[tuple[Named, ...], int | None, tuple[int, ...]]:
    """The sources, the index of the base among them, and for each of the recipe's models its index.

    A model that stands twice is opened once. Without a `base:`, adapters stand on the base that they record. A model
    `A+B` is the adapter B on the checkpoint A: read as it is where A is the base, else merged first.
    """
    sources: list[Named] = []
    places: dict[tuple[Path, str], int] = {}

    def add(name: str, part: str) -> int:
        below, adapter = _split_adapter(name, recipe.directory)
        if below and not _is_base(below, recipe):
            key = Path(name), "+"
            if key not in places:
                places[key] = len(sources)
                sources.append(_on_checkpoint(name, part, below, adapter, recipe, opening))
            return places[key]
        if below:
            return add_adapter(name, part, adapter)
        file, (model, task) = _recipe_file(name, recipe.directory), split_task(name, recipe.directory)
        path = file or directory_of(model, recipe.directory, allow_pickle=opening.allow_pickle)
        key = path.resolve(), task
        if key not in places:
            places[key] = len(sources)
            made = _nested(name, part, opening.plan_nested(file)) if file else opening.directory(name, part, path, task)
            sources.append(made)
        return places[key]

    def add_adapter(name: str, part: str, adapter: str) -> int:
        key = directory_of(adapter, recipe.directory).resolve(), "+"
        if key not in places:
            places[key] = len(sources)
            sources.append(_placed(name, opening.directory(name, part, key[0])))
        return places[key]

    base = add(recipe.base, "base") if recipe.base is not None else None
    if base is not None and isinstance(sources[base].source, Adapter):
        raise PlanError(f"recipe.base: {recipe.base!r} is an adapter; the base is a whole checkpoint")
    entries = tuple(add(name, "model") for name in recipe.listed)
    entries += tuple(add(name, "base") for name in dict.fromkeys(part.base.model for part in recipe.slices) if name)
    if base is None:
        base = _recorded_base(sources, add, recipe)
    return tuple(sources), base, entries


def _split_adapter(name: str, directory: Path) -> tuple[str, str]:
    """The checkpoint and the adapter of `A+B`; two empty names for any other."""
    below, plus, adapter = name.partition("+")
    if not plus or "+" in adapter or any((root / name).exists() for root in (directory, Path())):
        return "", ""
    return below, adapter


def _is_base(name: str, recipe: Recipe) -> bool:
    if recipe.base is None or name == recipe.base:
        return name == recipe.base
    return directory_of(name, recipe.directory).resolve() == directory_of(recipe.base, recipe.directory).resolve()


def _placed(name: str, adapter: Named) -> Named:
    if not isinstance(adapter.source, Adapter):
        raise PlanError(f"model {name!r}: what stands behind the + is no adapter; name it as a model of its own")
    return replace(adapter, placed=True)


def _on_checkpoint(name: str, part: str, below: str, adapter: str, recipe: Recipe, opening: Opening) -> Named:
    """An adapter on a checkpoint that is not the recipe's base, as a model that is made first."""
    entry = ModelEntry(model=f"{below}+{adapter}")
    made = Recipe(method="task_arithmetic", base=below, models=[entry], directory=recipe.directory)  # type: ignore[call-arg]
    return _nested(name, part, opening.plan_nested(made))


def _recipe_file(name: str, directory: Path) -> Path | None:
    if not name.endswith((".yaml", ".yml")) or any(path.is_dir() for path in (directory / name, Path(name))):
        return None
    found = next((path for path in (directory / name, Path(name)) if path.is_file()), None)
    if found is None:
        raise PlanError(f"model {name!r}: no such recipe in {directory} or here")
    return found


def _nested(name: str, part: str, nested: Plan) -> Named:
    """A recipe as a source: its tensors are known from its plan, at the offsets that they will have in the cache."""
    directory = cache_directory() / "merges" / f"{nested.hash}-{signature(nested.sources)[:8]}"
    tensors: dict[str, TensorInfo] = {}
    for shard in nested.shards:
        file, offsets = directory / shard.file, encode_header(shard.layout, METADATA)[1]
        for tensor, dtype, shape in shard.layout:
            size = math.prod(shape) * ITEMSIZE[dtype]
            tensors[tensor] = TensorInfo(tensor, dtype, shape, file, offsets[tensor], offsets[tensor] + size)
    if nested.recipe.output.as_ == "adapter":
        raise PlanError(f"{part} {name!r}: a recipe that makes an adapter; merge it first, and name what it made")
    config = nested.config or nested.sources[nested.like].source.config
    content = json.dumps([nested.recipe.to_dict(), [named.content for named in nested.sources]], sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return Named(name, part, Checkpoint(directory, tensors, config), nested.hash, nested, content=digest)


def _recorded_base(sources: list[Named], add: Callable[[str, str], int], recipe: Recipe) -> int | None:
    """Opens the base that the recipe's adapters record, when the recipe names none and there are adapters.

    For a merge of adapters into an adapter it need not be here, since its weights are not read.
    """
    opened = [s.source for s in sources if isinstance(s.source, Adapter)]
    recorded, adapter = {source.base_name for source in opened}, recipe.output.as_ == "adapter"
    if not recorded:
        return None
    if adapter and len(opened) == len(sources) and (len(recorded) == 1 or recipe.accept_base):
        return _here_or_absent(sources, opened, add)
    if len(recorded) > 1 or not min(recorded):
        raise PlanError(
            f"recipe.base is missing: the adapters record different bases ({', '.join(sorted(recorded)) or 'none'})"
        )
    try:
        return add(recorded.pop(), "base")
    except CheckpointError as error:
        raise PlanError(
            f"recipe.base is missing, and the base that the adapters record is not here: {error}"
        ) from error


def _here_or_absent(sources: list[Named], adapters: list[Adapter], add: Callable[[str, str], int]) -> int:
    """The base that adapters record, or what they say of it where it is not here."""
    name = adapters[0].base_name
    with suppress(CheckpointError):
        if name:
            return add(name, "base")
    sources.append(Named(name or "unknown", "base", absent_base(name, layout.changed_by(adapters)), ""))
    return len(sources) - 1


def files_of(sources: tuple[Named, ...]) -> tuple[Path, ...]:
    """Every file that a merge reads weights from, or their scale, those of nested recipes included, links resolved."""
    found: list[Path] = []
    for named in sources:
        own = named.source
        files = (*own.store.files, own.directory / CONFIG) if isinstance(own, Adapter) else own.files
        found += files_of(named.nested.sources) if named.nested else [file.resolve() for file in files]
    return tuple(dict.fromkeys(found))


def signature(sources: tuple[Named, ...]) -> str:
    """Names the input files as they lie on disk now: paths, sizes and times of change.

    Unlike a fingerprint it is not the same for a copy, and it changes whenever a file is written.
    """
    states = []
    for file in files_of(sources):
        try:
            state = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read any more ({error.strerror})") from error
        states.append(f"{file} {state.st_size} {state.st_mtime_ns} {state.st_ino}")
    return hashlib.blake2b("\n".join(states).encode(errors="surrogateescape"), digest_size=16).hexdigest()


def check_base(recipe: Recipe, adapter: Named, base: Named) -> None:
    """Refuses an adapter that records a base of another name, unless the recipe says `accept_base: true`."""
    recorded = adapter.source.base_name if isinstance(adapter.source, Adapter) else ""
    if recorded and not recipe.accept_base and not adapter.placed and not stands_on(adapter, base):
        raise PlanError(
            f"{adapter.label} was trained on {recorded!r}, the recipe's base is {base.name!r}; "
            "if they are the same weights, say `accept_base: true`"
        )


def stands_on(adapter: Named, base: Named) -> bool:
    """Whether an adapter records a base of this one's name."""
    recorded = adapter.source.base_name if isinstance(adapter.source, Adapter) else ""
    own = (base.name, str(base.source.directory.resolve()), str(base.source.config.get("_name_or_path", "")))
    return bool(recorded) and _last(recorded) in map(_last, own)


def _last(name: str) -> str:
    return name.rstrip("/").partition("@")[0].rpartition("/")[2].lower()


def keys(recipe: Recipe, sources: tuple[Named, ...], entries: tuple[int, ...], tensor: str) -> tuple[int, ...]:
    """The random streams of one tensor: by seed, each model's content and occurrence, and the tensor's name."""
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        content = sources[entry].content
        result.append(key_of(recipe.seed, content, seen.setdefault(content, 0), tensor))
        seen[content] += 1
    return tuple(result)


def notes(recipe: Recipe, sources: tuple[Named, ...], like: int, full_hash: bool) -> tuple[str, ...]:
    """What a reader of the plan should know although nothing is wrong."""
    found = list(recipe.notes)
    if not sources[like].source.config and recipe.output.as_ == "checkpoint":
        found.append(
            f"{sources[like].label} has no config.json, so the output will have none, and transformers cannot load it: "
            "put one beside the weights, or name a model that has one as output.like"
        )
    if recipe.accept_base:
        places = [s.source.directory.resolve() for s in sources if s.role == "base"]
        others = {s.source.base_name for s in sources if isinstance(s.source, Adapter)}
        found += [
            f"accept_base: adapters trained on {name!r} are applied to {recipe.base!r}"
            for name in sorted(others)
            if name and Path(name).resolve() not in places
        ]
    base = next((s for s in sources if s.role == "base" and isinstance(s.source, Checkpoint)), None)
    same = [s.label for s in sources if base and s is not base and s.fingerprint == base.fingerprint]
    told = "is the same as the base, byte for byte" if full_hash else "looks the same as the base, by samples"
    found += [f"{label} {told} of its weight files" for label in same]
    return tuple(found)
