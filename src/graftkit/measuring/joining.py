"""Rows that begin alike, side by side in one row: what their prompts share is computed once.

A system prompt, a template, worked examples or a question in front of an image are the same for many items. A joined
row holds the common beginning, then each item's rest; an attention mask keeps the items from seeing each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from graftkit.measuring.encoding import Row

LENGTH = 128  # tokens of a joined row (more where much is shared): attention between its items is thrown away
_LEAST = 4  # tokens that are worth sharing


def joined(rows: Sequence[Row]) -> list[Row]:
    """Rows of one answer joined where their prompts begin alike, the others as they are.

    An image is never shared, only what stands before it; where something goes along with a prompt's tokens, as kinds of
    tokens do, the row stays alone.
    """
    single = [row for row in rows if len(row.answers) == 1 and not row.given and _movable(row)]
    others = [row for row in rows if not (len(row.answers) == 1 and not row.given and _movable(row))]
    ordered = sorted(single, key=lambda row: (row.pictured, _sharable(row)))
    return [*others, *(_join(group) for group in _groups(ordered))]


def _movable(row: Row) -> bool:
    return row.media is None or row.media.movable


def _sharable(row: Row) -> tuple[int, ...]:
    """What of a prompt may be shared: up to its first image, and not its last token."""
    return row.prompt[: min(len(row.prompt) - 1, row.media.first if row.media else len(row.prompt))]


def _groups(ordered: Sequence[Row]) -> Iterator[list[Row]]:
    """Neighbours that share enough, as many as fit a row."""
    group: list[Row] = []
    shared: tuple[int, ...] = ()
    for row in ordered:
        common = _common(shared, _sharable(row)) if group else _sharable(row)
        length = sum(one.length for one in [*group, row]) - len(group) * len(common)
        fits = not group or (group[0].pictured == row.pictured and length <= max(LENGTH, 2 * len(common)))
        if group and not (fits and _LEAST <= len(common) >= len(shared) // 2):
            yield group
            group, common = [], _sharable(row)
        group.append(row)
        shared = common
    if group:
        yield group


def _join(group: Sequence[Row]) -> Row:
    if len(group) == 1:
        return group[0]
    common = len(_common(_sharable(group[0]), _sharable(group[-1])))  # in their order, what both ends share all share
    return Row(
        group[0].prompt[:common],
        tuple(row.prompt[common:] + row.answers[0] for row in group),
        tuple(row.slots[0] for row in group),
        None,
        tuple((len(row.prompt) - common, row.media) for row in group),
    )


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """What two begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return one[: next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))]
