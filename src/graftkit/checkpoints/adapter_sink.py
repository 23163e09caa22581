"""Where a merge leaves an adapter: factors whose ranks are known only as they are made, in PEFT's format.

Workers put what they finish into a spool, where it would stand in `adapter_model.safetensors` if all ranks were the
largest possible. Where they are, the spool becomes that file; else its pieces are copied into one, in the order of
names. Either way the file does not depend on who was first. An interrupted run goes on, as with `Sink`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from graftkit.checkpoints.adapters import CONFIG, WEIGHTS
from graftkit.checkpoints.headers import ITEMSIZE, METADATA, encode_header
from graftkit.checkpoints.sink import JOURNAL, Sink, full, journal_lines

SPOOL = "graft-spool.bin"
CHUNK = 1 << 24  # bytes that go from the spool to the file together


@dataclass(frozen=True)
class Piece:
    """A tensor in the spool: its name in the adapter, its shape, and the byte at which it begins."""

    name: str
    shape: tuple[int, ...]
    begin: int


class AdapterSink(Sink):
    """An adapter in the making, all of one `dtype`. Thread-safe."""

    def __init__(
        self,
        out: Path,
        dtype: str,
        token: str,
        *,
        overwrite: bool = False,
        largest: Sequence[tuple[str, tuple[int, ...]]] = (),
    ) -> None:
        """As `Sink`; `largest` are the names of tensors to come, and the largest shape that each may have."""
        self.dtype, self.pieces, self._spool = dtype, dict[str, list[Piece]](), -1
        offsets = encode_header([(name, dtype, shape) for name, shape in largest], METADATA)[1]
        self._room = {name: Piece(name, shape, offsets[name]) for name, shape in largest}
        super().__init__(out, [], token, overwrite=overwrite)
        self._spool = os.open(self.partial / SPOOL, os.O_RDWR | os.O_CREAT, 0o644)
        held = [piece for pieces in (*self.pieces.values(), self._room.values()) for piece in pieces]
        self._end = max(map(self._stop, held), default=0)

    def _tensors_of_whole_files(self) -> set[str]:
        """The steps whose bytes are all in the spool."""
        spool = self.partial / SPOOL
        size = spool.stat().st_size if spool.is_file() else -1
        for line in journal_lines(self.partial / JOURNAL):
            pieces = [Piece(p["name"], tuple(p["shape"]), p["begin"]) for p in line.get("pieces", ())]
            if "tensor" in line and all(self._stop(piece) <= size for piece in pieces):
                self.pieces[line["tensor"]] = pieces
        return set(self.pieces)

    def _stop(self, piece: Piece) -> int:
        return piece.begin + math.prod(piece.shape) * ITEMSIZE[self.dtype]

    def reserve(self, step: str, name: str, shape: tuple[int, ...]) -> Piece:
        """Room in the spool for a tensor `name` of the adapter, which a step makes."""
        with self._lock:
            room, piece = self._room.get(name), Piece(name, shape, self._end)
            if room and math.prod(shape) <= math.prod(room.shape):
                piece = replace(piece, begin=room.begin)
            self._end = max(self._end, self._stop(piece))
            self.pieces.setdefault(step, []).append(piece)
            return piece

    def write(self, name: str, start: int, data: Any) -> None:
        """As `Sink.write`, of the one tensor that a step has reserved."""
        self.put(self.pieces[name][0], start, data)

    def put(self, piece: Piece, start: int, data: Any) -> None:
        """Bytes (any buffer) at element `start` of a piece."""
        self._write_all(self._spool, memoryview(data).cast("B"), piece.begin + start * ITEMSIZE[self.dtype])

    def finish(self, name: str, record: Mapping[str, Any]) -> None:
        """As `Sink.finish`, with the places of what the step made."""
        with self._lock:
            self.done[name] = dict(record)
            pieces = [asdict(piece) for piece in self.pieces.setdefault(name, [])]
            self._log({"tensor": name, "record": dict(record), "pieces": pieces})

    def assemble(self, pieces: Sequence[Piece], config: Mapping[str, Any]) -> None:
        """Makes the adapter's two files of the spool, which is gone then. Raises OutputError for a full disk."""
        header, offsets = encode_header([(p.name, self.dtype, p.shape) for p in pieces], METADATA)
        if all(piece.begin == offsets[piece.name] for piece in pieces):
            self._write_all(self._spool, header, 0)
            os.ftruncate(self._spool, max(map(self._stop, pieces), default=len(header)))
            os.replace(self.partial / SPOOL, self.partial / WEIGHTS)
        else:
            self._gather(header, [(piece, offsets[piece.name]) for piece in pieces])
        self.add_file(CONFIG, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())

    def _gather(self, header: bytes, places: Sequence[tuple[Piece, int]]) -> None:
        """The weights as a file of their own, from pieces that stand elsewhere in the spool."""
        target = os.open(self.partial / WEIGHTS, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._write_all(target, header, 0)
            for piece, offset in places:
                self._copy(piece, target, offset)
        finally:
            os.close(target)
        os.unlink(self.partial / SPOOL)

    def _copy(self, piece: Piece, target: int, offset: int) -> None:
        position, stop = piece.begin, self._stop(piece)
        while position < stop:
            try:
                chunk = os.pread(self._spool, min(CHUNK, stop - position), position)
            except OSError as error:
                raise full(self.out, error) from error
            self._write_all(target, chunk, offset + position - piece.begin)
            position += len(chunk)

    def close(self) -> None:
        """As `Sink.close`."""
        super().close()
        if self._spool >= 0:
            os.close(self._spool)
            self._spool = -1
