"""Inputs that stay: files mapped once, so that the next merge of the same models reads memory.

Everything else of a source is as it was opened: names, shapes, fingerprints. Several processes that map one file share
its pages.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from graftkit.checkpoints.adapters import Adapter, LowRank
from graftkit.checkpoints.headers import ITEMSIZE, TensorInfo
from graftkit.checkpoints.resolve import Source
from graftkit.checkpoints.sources import Checkpoint
from graftkit.checkpoints.storage import STORAGE
from graftkit.errors import CheckpointError


@dataclass(frozen=True)
class ResidentCheckpoint(Checkpoint):
    """A checkpoint whose files are mapped."""

    _mapped: dict[Path, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def array(self, tensor: TensorInfo) -> np.ndarray:
        """All of a tensor as it lies in its file, flat; bfloat16 and float16 as bits."""
        return self._mapping(tensor.file)[tensor.begin : tensor.end].view(STORAGE[tensor.dtype])

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` of a tensor, as raw bytes in the head of `buffer`."""
        size = ITEMSIZE[tensor.dtype]
        view = buffer[: (stop - start) * size]
        first = tensor.begin + start * size
        np.copyto(view, self._mapping(tensor.file)[first : first + view.size])
        return view

    def _mapping(self, file: Path) -> np.ndarray:
        with self._lock:
            if file not in self._mapped:
                try:
                    with open(file, "rb") as handle:
                        whole = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
                except OSError as error:
                    raise CheckpointError(f"{file}: cannot be read any more ({error.strerror})") from error
                self._mapped[file] = np.frombuffer(whole, np.uint8)
            return self._mapped[file]

    def close(self) -> None:
        """Lets the files go; reading maps them again."""
        with self._lock:
            self._mapped.clear()


@dataclass(frozen=True)
class ResidentAdapter(Adapter):
    """An adapter whose factors are read once, in each precision that is asked for."""

    _loaded: dict[tuple[str, type, bool, bool], LowRank] = field(default_factory=dict, repr=False, compare=False)

    def load(self, name: str, dtype: type, *, direction: bool = False, scaled: bool = True) -> LowRank:
        """The factors of one tensor in memory, which callers leave as they are."""
        key = name, dtype, direction, scaled
        if key not in self._loaded:
            self._loaded[key] = super().load(name, dtype, direction=direction, scaled=scaled)
        return self._loaded[key]

    def close(self) -> None:
        """Forgets the factors and lets the files go."""
        self._loaded.clear()
        super().close()


def resident(source: Source) -> Source:
    """The source with inputs that stay; a view of another keeps reading its files, from the system's cache."""
    if isinstance(source, Adapter):
        store = _checkpoint(source.store)
        return ResidentAdapter(source.directory, source.factors, source.tensors, source.config, store)
    return _checkpoint(source) if type(source) is Checkpoint else source


def _checkpoint(source: Checkpoint) -> ResidentCheckpoint:
    source.close()
    return ResidentCheckpoint(source.directory, source.tensors, source.config, source.kind)


def renamed(held: Source, opened: Source) -> Source:
    """What is held, with the names and the configuration under which a plan has opened it again."""
    if isinstance(held, ResidentCheckpoint) and isinstance(opened, Checkpoint):
        return replace(held, tensors=opened.tensors, config=opened.config)
    return held
