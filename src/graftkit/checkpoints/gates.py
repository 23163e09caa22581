"""Files of gates: what was learnt or solved for each output channel of each matrix, as values, ready to be merged by.

A safetensors file with one float32 tensor for each matrix, under its name in the merge's output:

    [models, out]                   granularity `channel`: one value for each output channel
    [models, out/size, in/size]     granularity `block`: one for each block of size x size; the last ones may be ragged
    [models, out, in]               granularity `element`

Its metadata say `kind`, the block's `size`, and the fingerprints of the models, in their order, and of their base: a
file made for other weights is refused. Kinds: `local` are gates that sum to one over the models and go through the
paper's squashing, `weight` are weights that sum to one, `coefficient` are free ones, on deltas.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.headers import TensorInfo, read_header
from graftkit.checkpoints.sources import Checkpoint, full_hash
from graftkit.errors import CheckpointError, unknown

if TYPE_CHECKING:
    import numpy as np

FORMAT = "graftkit gates 1"
KINDS = ("local", "weight", "coefficient")
GRANULARITIES = ("channel", "block", "element")
OWN = ("format", "kind", "granularity", "size", "base", "models")
SUM = 1e-3  # by how much gates that sum to one may miss it: files may have been through a narrower dtype


@dataclass(frozen=True)
class Gates:
    """An opened file of gates; values are read when they are asked for."""

    file: Path
    kind: str
    granularity: str
    size: int
    models: tuple[str, ...]
    base: str
    tensors: Mapping[str, TensorInfo]
    digest: str
    about: Mapping[str, str]
    _store: Checkpoint = field(repr=False, compare=False)

    def shape_for(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that the gates of a matrix of this shape have; dimensions after the first count as one."""
        out, across = shape[0], 1
        for n in shape[1:]:
            across *= n
        if self.granularity == "channel":
            return len(self.models), out
        return len(self.models), -(-out // self.size), -(-across // self.size)

    def rows(self, name: str, columns: int, first: int, last: int) -> np.ndarray:
        """The gates of output channels `[first, last)`, float64 [models, rows, 1 or columns]."""
        import numpy as np

        info = self.tensors[name]
        high, wide = info.shape[1], info.shape[2] if len(info.shape) > 2 else 1
        start, stop = first // self.size, -(-last // self.size)
        found = np.empty((len(self.models), stop - start, wide), np.float32)
        for k, one in enumerate(found):
            begin = (k * high + start) * wide
            self._store.read(info, begin, begin + one.size, one.reshape(-1).view(np.uint8))
        if not np.isfinite(found).all():
            raise CheckpointError(f"{self.file}: the gates of {name!r} hold NaN or infinity; make the file anew")
        places = np.arange(first, last) // self.size - start
        across = np.arange(columns) // self.size if wide > 1 else np.zeros(1, np.int64)
        return found[:, places][:, :, across].astype(np.float64)

    def values(self, name: str) -> np.ndarray:
        """All gates of a matrix as the file has them, float64 [models, out] or [models, out/size, in/size]."""
        info = self.tensors[name]
        across = info.shape[2] if len(info.shape) > 2 else 1  # blocks of size 1: one value for each
        blocks = replace(self, size=1).rows(name, across, 0, info.shape[1])
        return blocks.reshape(info.shape)

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        self._store.close()


def is_gates(place: str | Path) -> bool:
    """Whether a path is a file of gates."""
    path = Path(place)
    return path.suffix == ".safetensors" and path.is_file() and read_header(path)[1].get("format") == FORMAT


def open_gates(file: Path) -> Gates:
    """Reads the header of a file of gates. Raises CheckpointError where it is none."""
    tensors, told = read_header(file)
    if told.get("format") != FORMAT:
        raise CheckpointError(f"{file}: no file of gates (its format is {told.get('format')!r}, expected {FORMAT!r})")
    for key, known in (("kind", KINDS), ("granularity", GRANULARITIES)):
        if told.get(key) not in known:
            raise CheckpointError(f"{file}: " + unknown(key, str(told.get(key)), known))
    try:
        models, size = json.loads(told["models"]), int(told["size"])
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: its metadata are malformed ({error}); make the file anew") from error
    wanted = 2 if told["granularity"] == "channel" else 3
    for name, info in tensors.items():
        if info.dtype != "F32" or len(info.shape) != wanted or info.shape[0] != len(models):
            raise CheckpointError(
                f"{file}: the gates of {name!r} are {info.dtype} {list(info.shape)}, expected F32 with {wanted} "
                f"dimensions for {len(models)} models; make the file anew"
            )
    return Gates(
        file, told["kind"], told["granularity"], max(size, 1), tuple(models), told.get("base", ""), tensors,
        full_hash((file,)), {key: text for key, text in told.items() if key not in OWN},
        Checkpoint(file.parent, tensors, {}),
    )  # fmt: skip


def write_gates(
    file: Path,
    values: Mapping[str, Any],
    *,
    kind: str,
    models: Sequence[str],
    base: str = "",
    granularity: str = "channel",
    size: int = 1,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes gates, arrays by the matrices' names in the shapes above. `models`, `base`: fingerprints; `about`: notes.

    Raises CheckpointError for values that are not finite, or do not sum to one where their kind does.
    """
    import numpy as np
    from safetensors.numpy import save_file

    held = {name: np.ascontiguousarray(value, np.float32) for name, value in values.items()}
    for name, value in held.items():
        if not np.isfinite(value).all() or len(value) != len(models):
            raise CheckpointError(f"{file}: the gates of {name!r} are not finite, or not of {len(models)} models")
        if kind != "coefficient" and value.size and np.abs(value.sum(axis=0) - 1).max() > SUM:
            raise CheckpointError(f"{file}: gates of kind {kind} sum to one over the models; those of {name!r} do not")
    metadata = {"format": FORMAT, "kind": kind, "granularity": granularity, "size": str(size), "base": base}
    metadata |= {"models": json.dumps(list(models)), **(about or {})}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(held, file, metadata=metadata)
