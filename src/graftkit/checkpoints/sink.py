"""Where a merge is written: tensors at planned offsets in a directory beside the output, renamed at the end.

Until everything is written the work lies in `.NAME.graft-partial`, with a journal of finished tensors. A killed run
leaves that directory, and the same plan takes it up again; a reader never sees half a model under the final name.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from graftkit.checkpoints.headers import ITEMSIZE, METADATA, encode_header
from graftkit.checkpoints.rows import PART
from graftkit.checkpoints.sources import INDEX
from graftkit.errors import BusyError, OutputError

Layout = Sequence[tuple[str, Sequence[tuple[str, str, tuple[int, ...]]]]]
"""Files of the output, each with its tensors as (name, dtype, shape)."""

MARGIN = 16 << 20  # bytes beside the tensors: configuration, tokenizer, record
JOURNAL = "graft-journal.jsonl"


class Sink:
    """An output in the making. Thread-safe: any thread may write any part of any tensor."""

    def __init__(self, out: Path, layout: Layout, token: str, *, overwrite: bool = False, beside: Layout = ()) -> None:
        """Prepares the directory, or takes up an interrupted run of the same plan (`token`).

        `beside`: files of tensors that go with the weights' tensors of the same names, and into no index.
        Raises OutputError when the output exists, another process is writing it, or the disk has no room.
        """
        self.out, self.layout, self.overwrite, self.beside = out, layout, overwrite, beside
        self.partial = out.parent / f".{out.name}.graft-partial"
        self.done: dict[str, Any] = {}
        self.notes: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._places: dict[tuple[str, str], tuple[int, int, int]] = {}  # -> descriptor, offset, bytes of an element
        self._journal: Any = None
        self._check_free_name()
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._take_partial(token)
            self._check_room()
            self._open_files()
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise full(out, error) from error
            raise

    def _check_free_name(self) -> None:
        try:
            held = sorted(path.name for path in self.out.iterdir()) if self.out.is_dir() else []
            link, strange = self.out.is_symlink(), self.out.exists() and not self.out.is_dir()
            inside = Path.cwd().is_relative_to(self.out)
        except OSError as error:
            raise full(self.out, error) from error
        if link or strange:
            kind = "is a symbolic link" if link else "exists and is not a directory"
            raise OutputError(f"{self.out}: {kind}; choose another name")
        if inside:
            raise OutputError(f"{self.out}: is where you are, and is replaced whole; name a new directory")
        if held and not self.overwrite:
            raise OutputError(
                f"{self.out}: holds files already; choose another name, or pass --overwrite to replace it whole"
            )
        if held and not any(name == "graft.json" or name.endswith(".safetensors") for name in held):
            raise OutputError(f"{self.out}: holds {held[0]!r} and no model; --overwrite replaces models only")

    def _take_partial(self, token: str) -> None:
        if self.partial.is_symlink():
            raise OutputError(f"{self.partial}: is a symbolic link in the way of the work in progress; remove it")
        self.partial.mkdir(exist_ok=True)
        self._journal = open(self.partial / JOURNAL, "a+", encoding="utf-8")
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BusyError(
                f"{self.out}: another process is writing it; wait for it, or choose another name"
            ) from error
        head = {"plan": token, "boot": boot_id()}
        lines = journal_lines(self.partial / JOURNAL)
        fresh = lines[:1] != [head]
        self._journal.truncate(0)
        for line in [head] if fresh else lines:  # written anew, so that a line cut short by a kill does not stay
            self._log(line)
        if not fresh:
            whole = self._tensors_of_whole_files()
            self.done = {line["tensor"]: line["record"] for line in lines if _tensor(line) in whole}
            self.notes = {line["note"]: line["value"] for line in lines if "note" in line}
        for path in self.partial.iterdir() if fresh else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != JOURNAL:
                path.unlink()

    def _tensors_of_whole_files(self) -> set[str]:
        """The tensors whose files are still there in full length: a journal is no proof of that."""
        found: set[str] = set()
        cut: set[str] = set()
        for file, tensors in (*self.layout, *self.beside):
            path = self.partial / file
            whole = path.is_file() and path.stat().st_size == _file_size(tensors)
            (found if whole else cut).update(name for name, _, _ in tensors)
        return found - cut

    def _check_room(self) -> None:
        needed = MARGIN + sum(_data_size(tensors) for _, tensors in (*self.layout, *self.beside))
        held = sum(path.stat().st_blocks * 512 for path in self.partial.iterdir())
        free = shutil.disk_usage(self.partial).free
        if free + held < needed:
            self.close()
            if not self.done:
                shutil.rmtree(self.partial)
            raise OutputError(
                f"{self.out}: the output needs {needed / 1e9:.2f} GB and the disk has {(free + held) / 1e9:.2f} GB; "
                "free some, or write elsewhere"
            )

    def _open_files(self) -> None:
        for file, tensors in (*self.layout, *self.beside):
            header, offsets = encode_header(list(tensors), METADATA)
            (self.partial / file).parent.mkdir(exist_ok=True)
            descriptor = os.open(self.partial / file, os.O_RDWR | os.O_CREAT, 0o644)
            for name, dtype, _ in tensors:
                place = file if (file, tensors) in self.beside else ""
                self._places[place, name] = (descriptor, offsets[name], ITEMSIZE[dtype])
            if not tensors:
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, _file_size(tensors))
            self._write_all(descriptor, header, 0)

    def write(self, name: str, start: int, data: Any) -> None:
        """Puts bytes (any buffer) at element `start` of a tensor. Raises OutputError when the disk is full."""
        self.write_beside("", name, start, data)

    def write_beside(self, file: str, name: str, start: int, data: Any) -> None:
        """As `write`, for the tensor of that name in a file beside the weights."""
        descriptor, offset, size = self._places[file, name]
        self._write_all(descriptor, memoryview(data).cast("B"), offset + start * size)

    def _write_all(self, descriptor: int, data: Any, position: int) -> None:
        memory = memoryview(data)
        done = 0
        try:
            while done < len(memory):
                done += os.pwrite(descriptor, memory[done : done + (1 << 30)], position + done)
        except OSError as error:
            raise full(self.out, error) from error

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """Marks a tensor as complete, with what is to be remembered of it; a resumed run will not make it again."""
        with self._lock:
            self.done[name] = dict(record)
            self._log({"tensor": name, "record": dict(record)})

    def note(self, key: str, value: Any) -> None:
        """Remembers a plain value (a statistic, say) for a resumed run."""
        with self._lock:
            self.notes[key] = value
            self._log({"note": key, "value": value})

    def _log(self, line: Mapping[str, Any]) -> None:
        try:
            self._journal.write(json.dumps(line) + "\n")
            self._journal.flush()
        except OSError as error:
            raise full(self.out, error) from error

    def add_file(self, name: str, content: bytes) -> None:
        """Adds a small file beside the weights."""
        try:
            (self.partial / name).parent.mkdir(exist_ok=True)
            (self.partial / name).write_bytes(content)
        except OSError as error:
            raise full(self.out, error) from error

    def complete(self) -> None:
        """Writes the index and gives the directory its final name; an old output is replaced whole where asked."""
        made = {key.partition(PART)[0] for key in self.done}
        missing = [name for _, name in self._places if name not in made]
        if missing:
            raise OutputError(
                f"{self.out}: {len(missing)} tensors were never written, {missing[0]!r} first; this is a bug"
            )
        if len(self.layout) > 1:
            self.add_file(INDEX, _index(self.layout))
        self._check_free_name()  # something may have appeared there meanwhile
        old = self.out.parent / f".{self.out.name}.graft-old"
        try:
            if old.exists():
                shutil.rmtree(old)
            if self.out.exists():
                self.out.rename(old)
            self.partial.rename(self.out)  # the journal, still locked, goes along: nobody can take the work up now
            (self.out / JOURNAL).unlink()
            if old.exists():
                shutil.rmtree(old)
        except OSError as error:
            raise full(self.out, error) from error
        self.close()

    def close(self) -> None:
        """Closes the files; what is written stays for a later run."""
        for descriptor in {place[0] for place in self._places.values()}:
            os.close(descriptor)
        self._places = {}
        if self._journal is not None:
            with suppress(OSError):  # a full disk, which the write into the buffer has said already
                self._journal.close()


def _data_size(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Bytes of some tensors, without a header."""
    return sum(ITEMSIZE[dtype] * math.prod(shape) for _, dtype, shape in tensors)


def _file_size(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> int:
    """Bytes of a whole file: header and tensors."""
    header, _ = encode_header(list(tensors), METADATA)
    return len(header) + _data_size(tensors)


def _tensor(line: Mapping[str, Any]) -> str:
    """The tensor that a journal's line says is made, or a part of it."""
    return str(line.get("tensor", "")).partition(PART)[0]


def _index(layout: Layout) -> bytes:
    total = sum(_data_size(tensors) for _, tensors in layout)
    weight_map = {name: file for file, tensors in layout for name, _, _ in tensors}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode()


def journal_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a line that a kill cut short, and all after it, do not count."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            line = json.loads(text) if text.endswith("\n") else None
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def boot_id() -> str:
    """Names this start of the machine: after a power cut, a journal may know of bytes that never reached the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def full(out: Path, error: OSError) -> OutputError:
    """The error for what the system says while an output is written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{out}: the disk is full; free some room and run the same command again, it goes on where it stopped"
        )
    return OutputError(f"{out}: cannot be written ({error.strerror})")
