"""The sections `prepare:` and `finish:` of a recipe: lists of steps such as `- {trim: {density: 0.2}}` or `- svc`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator


def _listed(value: Any) -> Any:
    """Every step as a mapping from its name to the values of its knobs."""
    if not isinstance(value, list):
        raise ValueError(f"got {value!r}, expected a list of steps such as [{{trim: {{density: 0.2}}}}]")
    return [_step(item) for item in value]


def _step(item: Any) -> dict[str, dict[str, Any]]:
    if isinstance(item, str):
        return {item: {}}
    name, knobs = next(iter(item.items()), (None, None)) if isinstance(item, dict) else (None, None)
    if not isinstance(name, str) or len(item) != 1 or not isinstance(knobs, dict | None):
        raise ValueError(
            f"got the step {item!r}, expected a name, or one with its knobs such as {{dare: {{density: 0.5}}}}"
        )
    return {name: knobs or {}}


Steps = Annotated[list[dict[str, dict[str, Any]]], BeforeValidator(_listed)]
"""Steps in the order in which they are applied."""
