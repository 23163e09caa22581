"""Options that several commands take, and how they are read."""

from __future__ import annotations

from graftkit.errors import GraftError


def memory_bytes(text: str | None) -> int | None:
    """Bytes of `--memory`."""
    from graftkit.recipes.recipe import parse_size

    try:
        return parse_size(text) if text is not None else None
    except ValueError as error:
        raise GraftError(f"--memory: {error}") from error
