"""The models of a recipe, opened: each distinct one once, in the recipe's order, with its name and fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import ITEMSIZE, METADATA, TensorInfo, encode_header
from graftkit.checkpoints.resolve import Source, cache_directory, directory_of, open_source
from graftkit.checkpoints.sources import Checkpoint, full_hash
from graftkit.errors import CheckpointError, PlanError
from graftkit.methods.random import key_of
from graftkit.recipes.recipe import Recipe

if TYPE_CHECKING:
    from graftkit.recipes.plan import Plan


@dataclass(frozen=True)
class Named:
    """An opened source, what the recipe calls it, its part (`base` or `model`), and its content's fingerprint.

    `nested` is the plan that makes it, for a source that is another recipe's result.
    """

    name: str
    role: str
    source: Source
    fingerprint: str
    nested: Plan | None = None

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
    plan_nested: Callable[[Path], Plan]

    def directory(self, name: str, part: str, directory: Path) -> Named:
        """Opens a checkpoint or an adapter."""
        source = open_source(directory, allow_pickle=self.allow_pickle)
        files = source.store.files if isinstance(source, Adapter) else source.files
        return Named(name, part, source, full_hash(files) if self.full_hash else source.fingerprint())


def open_all(recipe: Recipe, opening: Opening) -> tuple[tuple[Named, ...], int | None, tuple[int, ...]]:
    """The sources, the index of the base among them, and for each of the recipe's models its index.

    A model that stands twice is opened once. Without a `base:`, adapters stand on the base that they record.
    """
    sources: list[Named] = []
    places: dict[Path, int] = {}

    def add(name: str, part: str) -> int:
        file = _recipe_file(name, recipe.directory)
        path = file or directory_of(name, recipe.directory, allow_pickle=opening.allow_pickle)
        if path.resolve() not in places:
            places[path.resolve()] = len(sources)
            made = _nested(name, part, opening.plan_nested(file)) if file else opening.directory(name, part, path)
            sources.append(made)
        return places[path.resolve()]

    base = add(recipe.base, "base") if recipe.base is not None else None
    if base is not None and isinstance(sources[base].source, Adapter):
        raise PlanError(f"recipe.base: {recipe.base!r} is an adapter; the base is a whole checkpoint")
    entries = tuple(add(entry.model, "model") for entry in recipe.models)
    if base is None:
        base = _recorded_base(sources, add)
    return tuple(sources), base, entries


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
        offsets = encode_header([(s.name, s.dtype, s.shape) for s in shard.steps], METADATA)[1]
        for s in shard.steps:
            size = s.elements * ITEMSIZE[s.dtype]
            tensors[s.name] = TensorInfo(
                s.name, s.dtype, s.shape, directory / shard.file, offsets[s.name], offsets[s.name] + size
            )
    config = nested.sources[nested.like].source.config
    return Named(name, part, Checkpoint(directory, tensors, config), nested.hash, nested)


def _recorded_base(sources: list[Named], add: Callable[[str, str], int]) -> int | None:
    """Opens the base that the recipe's adapters record, when the recipe names none and there are adapters."""
    recorded = {s.source.base_name for s in sources if isinstance(s.source, Adapter)}
    if not recorded:
        return None
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


def files_of(sources: tuple[Named, ...]) -> tuple[Path, ...]:
    """Every file that a merge reads weights from, those of nested recipes included, symbolic links resolved."""
    found: list[Path] = []
    for named in sources:
        store = named.source.store if isinstance(named.source, Adapter) else named.source
        found += files_of(named.nested.sources) if named.nested else [file.resolve() for file in store.files]
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
    own = (base.name, str(base.source.directory.resolve()), str(base.source.config.get("_name_or_path", "")))
    if recorded and not recipe.accept_base and _last(recorded) not in map(_last, own):
        raise PlanError(
            f"{adapter.label} was trained on {recorded!r}, the recipe's base is {base.name!r}; "
            "if they are the same weights, say `accept_base: true`"
        )


def _last(name: str) -> str:
    return name.rstrip("/").partition("@")[0].rpartition("/")[2].lower()


def keys(recipe: Recipe, sources: tuple[Named, ...], entries: tuple[int, ...], tensor: str) -> tuple[int, ...]:
    """The random streams of one tensor: by seed, each model's content and occurrence, and the tensor's name."""
    seen: dict[str, int] = {}
    result = []
    for entry in entries:
        content = sources[entry].fingerprint
        result.append(key_of(recipe.seed, content, seen.setdefault(content, 0), tensor))
        seen[content] += 1
    return tuple(result)


def notes(recipe: Recipe, sources: tuple[Named, ...]) -> tuple[str, ...]:
    """What a reader of the plan should know although nothing is wrong."""
    found = []
    if recipe.accept_base:
        others = {s.source.base_name for s in sources if isinstance(s.source, Adapter)}
        found += [
            f"accept_base: adapters trained on {name!r} are applied to {recipe.base!r}"
            for name in sorted(others)
            if name
        ]
    base = next((s for s in sources if s.role == "base" and isinstance(s.source, Checkpoint)), None)
    if base:
        found += [f"{s.label} looks the same as the base (header, size and samples agree)" for s in sources
                  if s is not base and s.fingerprint == base.fingerprint]  # fmt: skip
    return tuple(found)
