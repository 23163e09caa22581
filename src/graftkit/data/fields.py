"""Fields of records and of descriptions, read with a message that says where, got what, expected what."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from graftkit.errors import DataError, unknown

_NAMES = {str: "a text", bool: "true or false", int: "an integer", list: "a list", dict: "a mapping"}


def field(where: str | Path, fields: Mapping[str, Any], key: str, kind: type, default: Any = None) -> Any:
    """A field of the type asked for; with no default it has to be there."""
    value = fields.get(key, default)
    if key not in fields and default is None:
        raise DataError(f"{where}: {key} is missing")
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise DataError(f"{where}: {key}: expected {_NAMES[kind]}, got {value!r:.60}")
    return value


def known(where: str | Path, fields: Mapping[Any, Any], names: Collection[str], what: str = "field") -> None:
    """Refuses keys that have no meaning here."""
    for key in fields:
        if key not in names:
            raise DataError(f"{where}: {unknown(what, str(key), names)}")


def texts(where: str | Path, value: Any, key: str) -> tuple[str, ...]:
    """A list of texts that are not empty."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise DataError(f"{where}: {key}: expected a list of texts that are not empty, got {value!r:.60}")
    return tuple(value)


def content(path: Path) -> str:
    """A text file."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start})") from error
