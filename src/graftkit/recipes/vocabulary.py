"""The output's vocabulary: whose tokens, and from which rows of which models each of its rows is made.

Tokens are compared by their string, in files alone. A token's row is merged among the models that have the token;
without a base's row it is the weighted mean of theirs. Rows without a token (embeddings are longer than their
vocabularies) follow the model whose vocabulary it is, and rows that no model has are the mean of the token rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from graftkit.checkpoints.adapters import Adapter
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import PlanError, unknown
from graftkit.recipes import configuration, inputs, layout
from graftkit.recipes.recipe import Recipe
from graftkit.recipes.sections import Tokenizer, TokenRow
from graftkit.recipes.words import TOKENIZER, Words, check_extensible, extended, read_words, union

MISSING = -1

Made = tuple[str, tuple[int, ...], tuple[int, ...]]
"""Rows that are made alike: how, the sources that have their tokens (none named where all have), and their numbers."""


@dataclass(frozen=True)
class Given:
    """A row that the recipe gives by hand: a source's row, or zeros (`source` None); `force`: also where it has one."""

    source: int | None
    row: int
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The output's words, the source whose files and padding they come with, and every source's own words."""

    words: Words
    source: int
    spec: Tokenizer
    known: Mapping[int, Words]
    given: Mapping[int, Given]  # by id
    _maps: dict[tuple[int, int, int], list[int]] = field(default_factory=dict, repr=False, compare=False)
    grouped: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # see recipes/rowgroups.py

    @property
    def digest(self) -> str:
        """Names the words and how rows are found."""
        told = [sorted(self.words.ids.items()), sorted(self.words.added), self.spec.model_dump()]
        return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()

    def height(self, held: int) -> int:
        """How many rows the output has, where the model whose vocabulary it is has `held`."""
        multiple = self.spec.pad_to_multiple_of
        if multiple is None:
            return max(self.words.stop, held)
        return -(-self.words.stop // multiple) * multiple

    def row_map(self, source: int, held: int, height: int) -> list[int]:
        """Per row of the output the row of a source whose tensor has `held`, or MISSING; [height]."""
        key = (id(self.known[source]), held, height)
        if key not in self._maps:
            self._maps[key] = row_map(self.words, self.known[source], held, height, self.spec.padding == "keep")
        return self._maps[key]

    def token_at(self) -> dict[int, str]:
        """The tokens by their id."""
        return {number: token for token, number in self.words.ids.items()}


def row_map(wanted: Words, own: Words, held: int, height: int, padding: bool) -> list[int]:
    """Per row of a tensor of `height` rows the row that a model has of the same token, MISSING where it has none.

    `held`: how many rows the model has. `padding`: whether a row without a token is that of the same number, which
    needs a model that gives every token the id that it is wanted to have.
    """
    rows, aligned = [MISSING] * height, True
    for token, number in wanted.ids.items():
        mine = own.ids.get(token, MISSING)
        if 0 <= mine < held and number < height:
            rows[number] = mine
        aligned = aligned and mine in (MISSING, number)
    if padding and aligned:
        taken = {*wanted.ids.values(), *own.ids.values()}
        for number in range(min(held, height)):
            if number not in taken:
                rows[number] = number
    return rows


def choose(
    recipe: Recipe, sources: tuple[inputs.Named, ...], base: int | None, entries: tuple[int, ...]
) -> Vocabulary | None:
    """The vocabulary that the recipe asks for; None where it asks for none.

    Raises PlanError for a model without a tokenizer, and for tokens that no model has.
    """
    spec = recipe.output.tokenizer
    if spec is None:
        return None
    first = base if base is not None else next(e for e in entries if isinstance(sources[e].source, Checkpoint))
    known = known_words(sources, first)
    chosen = first if spec.source in ("base", "union") else _index(spec.source, sources, "recipe.output.tokenizer")
    words = known[chosen]
    if spec.source == "union":
        order = [first, *(k for k in known if k != first)]
        words = union([(known[k], rows_of(sources[k])) for k in order])
    words = extended(words, list(spec.tokens), list(known.values()))
    check_extensible(words, known[chosen], sources[chosen].label)
    given = {words.ids[token]: _given(token, row, known, sources, base) for token, row in spec.tokens.items()}
    return Vocabulary(words, chosen, spec, known, given)


def known_words(sources: tuple[inputs.Named, ...], first: int) -> dict[int, Words]:
    """The vocabulary of every source; an adapter's is that of `first`. Raises PlanError for a source without one."""
    found: dict[int, Words] = {}
    files: dict[bytes, Words | None] = {}  # copies of one file are read once
    for k, named in enumerate(sources):
        file = named.source.directory / TOKENIZER
        if isinstance(named.source, Checkpoint) and not named.nested and file.is_file():
            content = file.read_bytes()
            words = files[content] = files[content] if content in files else words_of(named)
        else:
            words = words_of(named)
        if words is None and isinstance(named.source, Adapter):
            words = found.get(first) or words_of(sources[first])
        if words is None:
            raise PlanError(f"{named.label}: has no {TOKENIZER}, so its tokens are unknown; put it beside the weights")
        same = next((other for other in found.values() if other.ids == words.ids), words)
        found[k] = same
    return found


def words_of(named: inputs.Named) -> Words | None:
    """The vocabulary of a source; an adapter has its own only where it replaces embeddings whole."""
    if named.nested:
        vocabulary = named.nested.vocabulary
        return vocabulary.words if vocabulary else words_of(named.nested.sources[named.nested.like])
    if isinstance(named.source, Adapter) and not any(layout.has_rows(name) for name in named.source.tensors):
        return None
    return read_words(named.source.directory, named.label)


def rows_of(named: inputs.Named) -> int:
    """How many rows a source's embedding has; without one, as many as any vocabulary."""
    found = [i.shape[0] for n, i in named.source.tensors.items() if layout.has_rows(n) and i.shape]
    return max(found, default=1 << 62)


def _index(name: str, sources: tuple[inputs.Named, ...], where: str) -> int:
    names = {named.name.rstrip("/"): k for k, named in enumerate(sources)}
    if name.rstrip("/") not in names:
        raise PlanError(f"{where}: " + unknown("model", name, [*names, "base", "union"]))
    return names[name.rstrip("/")]


def _given(
    token: str, row: TokenRow, known: Mapping[int, Words], sources: tuple[inputs.Named, ...], base: int | None
) -> Given:
    where = f"recipe.output.tokenizer.tokens[{token!r}]"
    if row.zero or row.model is None:
        return Given(None, MISSING, row.force)
    index = base if row.model == "base" and base is not None else _index(row.model, sources, where)
    number = row.id if row.id is not None else known[index].ids.get(row.token or token)
    if number is None:
        raise PlanError(
            f"{where}: {sources[index].label} has no token {row.token or token!r}; name another by `token:` or `id:`"
        )
    if not isinstance(sources[index].source, Checkpoint):
        raise PlanError(f"{where}: {sources[index].label} is an adapter; name a checkpoint")
    if number >= rows_of(sources[index]):
        raise PlanError(
            f"{where}: {sources[index].label} has {rows_of(sources[index])} rows, so none of number {number}"
        )
    return Given(index, number, row.force)


def heightened(
    tensors: Mapping[str, TensorInfo], vocabulary: Vocabulary, source: inputs.Named
) -> dict[str, TensorInfo]:
    """The output's tensors, those with a row for each token with as many as its vocabulary asks for."""
    own = {layout.role(n): i.shape[0] for n, i in source.source.tensors.items() if layout.has_rows(n) and i.shape}
    found = {}
    for name, info in tensors.items():
        if layout.has_rows(name) and info.shape:
            held = own.get(layout.role(name), own.get("embedding", 0))
            info = replace(info, shape=(vocabulary.height(held), *info.shape[1:]))
        found[name] = info
    return found


def notes(sources: Sequence[inputs.Named]) -> list[str]:
    """Models whose tokens have other ids than the first's, where the recipe aligns none: rows are merged by number."""
    first, found = None, []
    for named in sources:
        file = named.source.directory / TOKENIZER
        if named.nested or not isinstance(named.source, Checkpoint) or not file.is_file():
            continue
        if first is None:
            first = (named, file.read_bytes())
        elif file.read_bytes() != first[1]:
            found += _conflict(first[0], named)
    return found


def _conflict(first: inputs.Named, named: inputs.Named) -> list[str]:
    one, two = words_of(first), words_of(named)
    assert one and two
    names = {number: token for token, number in one.ids.items()}
    clash = next(((t, n) for t, n in two.ids.items() if names.get(n, t) != t), None)
    if clash is None:
        return []
    return [
        f"{named.label} has {clash[0]!r} as token {clash[1]}, {first.label} {names[clash[1]]!r}: rows of embeddings "
        "are merged by number; `output: {tokenizer: base}` (or union) merges them by token"
    ]


def told(vocabulary: Vocabulary, rows: Mapping[str, Sequence[Made]], sources: Sequence[inputs.Named]) -> dict[str, Any]:
    """What happens to every row: per tensor the kinds with their rows' numbers and tokens; and the tokens left out.

    Tensors whose rows are made alike are told once.
    """
    names = vocabulary.token_at()
    alike: dict[tuple[Made, ...], list[str]] = {}
    for name, kinds in rows.items():
        alike.setdefault(tuple(kinds), []).append(name)

    def kind(made: Made) -> dict[str, Any]:
        what, holders, numbers = made
        models = [sources[k].name for k in holders]
        return {"kind": what, "models": models, "rows": list(numbers), "tokens": [names.get(n) for n in numbers]}

    tensors = [
        {"names": called, "rows": sum(len(numbers) for *_, numbers in kinds), "kinds": [kind(made) for made in kinds]}
        for kinds, called in alike.items()
    ]
    left = {
        sources[k].name: sorted((t for t in words.ids if t not in vocabulary.words.ids), key=words.ids.__getitem__)
        for k, words in vocabulary.known.items()
    }
    return {
        "source": vocabulary.spec.source,
        "tokens": len(vocabulary.words.ids),
        "tensors": tensors,
        "left_out": {name: tokens for name, tokens in left.items() if tokens},
    }


def config(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    vocabulary: Vocabulary,
    like: int,
    sources: Sequence[inputs.Named],
) -> dict[str, Any] | None:
    """The output's config.json: its number of rows, and the ids of special tokens where they are others."""
    if not config:
        return None
    heights = {layout.role(name): info.shape[0] for name, info in tensors.items() if layout.has_rows(name)}
    height = heights.get("head", heights.get("embedding", vocabulary.words.stop))
    other = sources[vocabulary.source].source.config
    return configuration.with_tokens(config, height, translation(vocabulary, like, sources), other)


def translation(vocabulary: Vocabulary, like: int, sources: Sequence[inputs.Named]) -> Callable[[str, int], int] | None:
    """From the ids of the model that the output is like to the output's; None where they are the same."""
    own = vocabulary.known[like]
    names = {number: token for token, number in own.ids.items()}
    if all(vocabulary.words.ids.get(token) == number for token, number in own.ids.items()):
        return None

    def translate(key: str, number: int) -> int:
        token = names.get(number)
        if token is None or token not in vocabulary.words.ids:
            raise PlanError(
                f"recipe.output.tokenizer: {sources[like].label} uses token {number} ({token!r}) as its {key}, and the "
                "output's vocabulary has no such token; choose `union`, or add it under `tokens:`"
            )
        return vocabulary.words.ids[token]

    return translate
