"""One task's model out of a unified one: `OUT#task` is the base, changed where the task's mask says, by its scale.

For every tensor with a mask an element is `U + (scale - 1) (U - W_0)` where its bit is set, else `W_0`, with U the
unified model's and W_0 the base's: computed a precision above the unified model's dtype and rounded to it once, so that
reading the view and reading a copy of it on disk are the same. With scale 1 what is masked in is U to the bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.checkpoints.headers import TensorInfo, inside, read_header
from graftkit.checkpoints.sources import Checkpoint, fingerprint, open_checkpoint, read_json
from graftkit.errors import CheckpointError, unknown

if TYPE_CHECKING:
    import numpy as np

FOLDER, INDEX = "masks", "index.json"


@dataclass(frozen=True)
class Masked(Checkpoint):
    """A view of a unified model. `names`: the base's names of tensors where they differ; `scales` are by tensor."""

    kind: str = "view"
    task: str = ""
    base: Checkpoint = field(default_factory=lambda: Checkpoint(Path(), {}, {}))
    masks: Checkpoint = field(default_factory=lambda: Checkpoint(Path(), {}, {}))
    names: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it is made of."""
        return (*super().files, *self.base.files, *self.masks.files, self.directory / FOLDER / INDEX)

    def fingerprint(self) -> str:
        """A short hash of the weights, the base, the mask and its scales; the same for a copy elsewhere."""
        told = fingerprint(self.files[:-1]) + json.dumps([sorted(self.scales.items()), sorted(self.names.items())])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def content(self) -> str:
        """The same: what a mask leaves of the weights is in no file."""
        return self.fingerprint()

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        """Elements `[start, stop)` of a tensor, as raw bytes in the head of `buffer`."""
        if tensor.name not in self.masks.tensors:
            return super().read(tensor, start, stop, buffer)
        import numpy as np

        from graftkit.checkpoints import storage

        wide = np.float32 if tensor.dtype in ("BF16", "F16") else np.float64
        unified = storage.as_float(super().read(tensor, start, stop, buffer), tensor.dtype, wide)
        own = self.base.tensors[self.names.get(tensor.name, tensor.name)]
        raw = self.base.read(own, start, stop, np.empty((stop - start) * 8, np.uint8))
        base = storage.as_float(raw, own.dtype, wide)
        unified += wide(self.scales[tensor.name] - 1) * (unified - base)
        chosen = np.where(self._bits(tensor.name, start, stop), unified, base)
        return storage.narrow(chosen, tensor.dtype, buffer)

    def _bits(self, name: str, start: int, stop: int) -> np.ndarray:
        import numpy as np

        first, last = start // 8, -(-stop // 8)
        packed = self.masks.read(self.masks.tensors[name], first, last, np.empty(last - first, np.uint8))
        bits = np.unpackbits(packed, bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].astype(bool)

    def close(self) -> None:
        """Closes the files, the base's and the mask's too."""
        super().close()
        self.base.close()
        self.masks.close()


def open_masked(unified: Checkpoint, task: str) -> Masked:
    """The view of a task of a unified model.

    Raises CheckpointError where there are no masks, none of that name, where the base is gone or another one than the
    masks were made on, or where masks and weights do not fit.
    """
    folder = unified.directory / FOLDER
    if not (folder / INDEX).is_file():
        raise CheckpointError(
            f"{unified.directory}#{task}: {unified.directory} has no {FOLDER}/{INDEX}; only a unified model with masks "
            "(methods emr, tall) can be asked for a task"
        )
    told = read_json(folder / INDEX)
    held = told.get("tasks", {})
    if task not in held:
        raise CheckpointError(f"{unified.directory}#{task}: " + unknown("task", task, held))
    base = _open_base(folder / INDEX, told["base"])
    file = inside(folder, held[task]["file"])
    tensors, _ = read_header(file)
    names, scales = told["base"].get("names", {}), held[task]["scale"]
    for name, mask in tensors.items():
        whole, under = unified.tensors.get(name), base.tensors.get(names.get(name, name))
        fits = whole and under and whole.shape == under.shape and mask.nbytes == -(-whole.elements // 8)
        if not fits or mask.dtype != "U8" or name not in scales:
            raise CheckpointError(f"{file}: the mask of {name!r} does not fit the weights; make the unified model anew")
    return Masked(
        unified.directory, unified.tensors, unified.config, task=task, base=base,
        masks=Checkpoint(folder, tensors, {}), names=names, scales=scales,
    )  # fmt: skip


def _open_base(index: Path, told: Mapping[str, Any]) -> Checkpoint:
    directory = Path(told["directory"])
    if not directory.is_dir():
        raise CheckpointError(
            f"{index}: the base {told['source']!r} is no longer in {directory}; put it there, or change "
            "`base.directory` in this file"
        )
    base = open_checkpoint(directory)
    if base.fingerprint() != told["fingerprint"]:
        raise CheckpointError(
            f"{directory}: is not the base that the masks of {index.parent.parent} were made on; its weights differ"
        )
    return base
