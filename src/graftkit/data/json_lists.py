"""The elements of a JSON list, one at a time: the file may be larger than the memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftkit.errors import DataError

_CHUNK = 1 << 18
_SPACES = " \t\r\n"


def json_list(path: Path, stream: Any, largest: int) -> Iterator[tuple[str, Any, str]]:
    """Where it stands, value and text of each element. Raises DataError with record and line for what is not JSON.

    An element of more than `largest` characters counts as not JSON: where a bracket is never closed, the rest of the
    file would have to be read to know.
    """
    window, number = _Window(path, stream, largest), 0
    window.expect("[", "a list of records")
    while window.peek() != "]":
        if number:
            window.expect(",", f"a comma or the list's end after record {number}")
        number += 1
        window.peek()
        where = f"{path}: record {number} (line {window.line})"
        value, raw = window.value(where)
        yield where, value, raw
    window.expect("]", "the list's end")
    if window.peek():
        raise DataError(f"{path}:{window.line}: more text after the list's end")


def _told(characters: int) -> str:
    return f"{characters >> 20} million characters" if characters >> 20 else f"{characters} characters"


class _Window:
    """The part of the text that has been read and not yet been understood, and the line it begins in."""

    def __init__(self, path: Path, stream: Any, largest: int) -> None:
        self.path, self.stream, self.largest = path, stream, largest
        self.text, self.start, self.line = "", 0, 1
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.start < len(self.text):
                if self.text[self.start] not in _SPACES:
                    return self.text[self.start]
                self._skip(self.start + 1)
            if not self._fill():
                return ""

    def expect(self, character: str, what: str) -> None:
        """Steps over a character."""
        got = self.peek()
        if got != character:
            raise DataError(f"{self.path}:{self.line}: not JSON: expected {what}, got {got or 'the end of the file'!r}")
        self._skip(self.start + 1)

    def value(self, where: str) -> tuple[Any, str]:
        """The next value and its text."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self.text, self.start)
            except (ValueError, RecursionError) as error:
                if len(self.text) - self.start > self.largest or not self._fill():
                    raise DataError(f"{where}: not JSON: {getattr(error, 'msg', error)}") from error
                continue
            if end - self.start > self.largest:
                raise DataError(f"{where}: more than {_told(self.largest)}; expected a list of records")
            if end < len(self.text) or not self._fill():  # a number may go on
                raw = self.text[self.start : end]
                self._skip(end)
                return value, raw

    def _skip(self, to: int) -> None:
        self.line += self.text.count("\n", self.start, to)
        self.start = to

    def _fill(self) -> bool:
        more = self.stream.read(max(_CHUNK, len(self.text) - self.start))
        self.text, self.start = self.text[self.start :] + more, 0
        return bool(more)
