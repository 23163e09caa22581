"""A base that is not on this machine: what its adapters say of its shapes is enough to merge them among themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint
from graftkit.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Absent(Checkpoint):
    """A checkpoint of which only names and shapes are known."""

    kind: str = "absent"

    @property
    def files(self) -> tuple[Path, ...]:
        """None."""
        return ()

    def fingerprint(self) -> str:
        """No content, no hash."""
        return ""

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Raises CheckpointError: a plan that reads the base asks for it by name before."""
        raise CheckpointError(f"{self.directory}: the base is not here, and {tensor.name!r} was read; this is a bug")


def absent_base(name: str, shapes: Mapping[str, tuple[int, ...]]) -> Absent:
    """The base that some adapters record, with the shapes of what they change."""
    place = Path(name or "unknown")
    return Absent(place, {own: TensorInfo(own, "F32", shape, place, 0, 0) for own, shape in shapes.items()}, {})
