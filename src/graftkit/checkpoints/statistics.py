"""Files of statistics: what was measured of one model on the examples of its domain, ready for methods that read it.

A safetensors file, its tensors under the names that the model's matrices have in the output of the recipe that it was
made for, its metadata saying what it is of. Kinds:

    gram        second moments of the inputs of each linear layer, the mean of `x x^T` over all tokens, float32; stored
                once where layers share their input (`shared` says by name whose). Forms:
                `full` [in, in]; `block:128` [blocks, 128, 128], the diagonal blocks, the last one filled up with zeros;
                `sketch:256` [in, 257]: factors of rank 256, and in the last column what they lack of the diagonal
    merged_gram the same of inputs that come out of the merged layers before, so of one recipe only (`merge`)
    core_gram   `gram` of `z = F x`, F what the deltas of all models of the merge read, one below the other, and random
                probes (`execution/features.py`); one half of the symmetric matrix, flat, float64; its form says
                how many: `rank 16, probes 32`
    fisher      the diagonal Fisher information of each parameter, float32, of the parameter's shape; not normalised:
                `scale` in the metadata is its root mean square over all parameters

A file is of one model (`model`, on `base` if it is an adapter), of one set of examples (`data`), and for core_gram of
one list of models (`models`), all by fingerprints: it is found by them, and never used for anything else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from graftkit.checkpoints.headers import TensorInfo, encode_header, read_header
from graftkit.checkpoints.sources import Checkpoint, fingerprint
from graftkit.errors import CheckpointError, NonFiniteError, OutputError

if TYPE_CHECKING:
    import numpy as np

FORMAT = "graftkit statistics 1"
KINDS = ("gram", "merged_gram", "core_gram", "fisher")
ENDING = ".safetensors"
DTYPES = {"F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class About:
    """What a file of statistics is of: fingerprints, and what a reader wants to know."""

    kind: str
    model: str
    base: str = ""
    models: tuple[str, ...] = ()
    merge: str = ""  # of merged_gram: what was merged how, and all examples
    data: str = ""
    place: str = ""  # where the examples were, to be looked at again
    form: str = "full"
    samples: int = 0
    tokens: int = 0
    seed: int = 0
    scale: float = 1.0
    seconds: float = 0.0
    shared: Mapping[str, str] = field(default_factory=dict)

    @property
    def number(self) -> int:
        """The number in the form: a block's size, a sketch's rank; 0 for a full one."""
        return int(self.form.partition(":")[2] or 0)


@dataclass(frozen=True)
class Statistics:
    """An opened file of statistics; values are read when they are asked for."""

    file: Path
    about: About
    tensors: Mapping[str, TensorInfo]
    _store: Checkpoint = field(repr=False, compare=False)

    @property
    def names(self) -> tuple[str, ...]:
        """What it has values of."""
        return (*self.tensors, *self.about.shared)

    @property
    def digest(self) -> str:
        """A short hash of its header, size and sampled bytes: files may hold gigabytes."""
        return fingerprint((self.file,))

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in which it keeps the values of one tensor."""
        return self.tensors[self.about.shared.get(name, name)].shape

    def values(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements `[start, stop)` of what is kept of one tensor, flat; all of it in its shape where none are named.

        Raises CheckpointError for values that are not finite.
        """
        import numpy as np

        info = self.tensors[self.about.shared.get(name, name)]
        end = info.elements if stop is None else stop
        found = np.empty(end - start, DTYPES[info.dtype])
        self._store.read(info, start, end, found.view(np.uint8))
        if not np.isfinite(found).all():
            raise CheckpointError(
                f"{self.file}: the values of {name!r} are not finite; remove the file and measure anew"
            )
        return found if stop is not None else found.reshape(info.shape)

    def close(self) -> None:
        """Closes the file; reading opens it again."""
        self._store.close()


def open_statistics(file: Path) -> Statistics:
    """Reads the header of a file of statistics. Raises CheckpointError where it is none."""
    tensors, told = read_header(file)
    if told.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: no file of statistics (its format is {told.get('format')!r}, expected {FORMAT!r})"
        )
    try:
        held = json.loads(told["about"])
        about = About(**{**held, "models": tuple(held["models"]), "seconds": float(told["seconds"])})
        _ = about.number
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{file}: malformed metadata ({error}); remove the file and measure anew") from error
    if about.kind not in KINDS or any(info.dtype not in DTYPES for info in tensors.values()):
        raise CheckpointError(f"{file}: statistics of an unknown kind or dtype ({about.kind}); remove the file")
    return Statistics(file, about, tensors, Checkpoint(file.parent, tensors, {}))


def all_statistics(directory: Path) -> Iterator[Statistics]:
    """Every file of statistics in a directory, by name; other files are passed by.

    Raises CheckpointError for a file that is damaged.
    """
    for file in sorted(directory.glob(f"*{ENDING}")) if directory.is_dir() else ():
        try:
            told = read_header(file)[1]
        except CheckpointError as error:
            fault = str(error).rpartition("; ")[0] or str(error)
            raise CheckpointError(f"{fault}; remove it, and run `graft statistics` to measure anew") from error
        if told.get("format") == FORMAT:
            yield open_statistics(file)


@dataclass(frozen=True)
class Writer:
    """A file in the making: tensors come in any order."""

    file: Path
    handle: BinaryIO
    offsets: Mapping[str, int]

    def put(self, name: str, values: np.ndarray) -> None:
        """Writes one tensor, whose dtype and shape were announced. Raises NonFiniteError for values that are none."""
        import numpy as np

        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"{self.file}: what was measured for {name!r} is not finite, so nothing is written; the model is "
                "broken, or breaks on these examples"
            )
        self.handle.seek(self.offsets[name])
        self.handle.write(values.tobytes())


@contextmanager
def writing(file: Path, about: About, layout: Sequence[tuple[str, str, tuple[int, ...]]]) -> Iterator[Writer]:
    """Writes a file of tensors (name, dtype, shape) one by one; it stands under its name once all are there.

    What passes until then is added to the seconds that it says of itself.
    """
    started = time.perf_counter()
    head, offsets = encode_header(list(layout), _told(about, 0))
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as handle:
            handle.write(head)
            yield Writer(file, handle, offsets)
            handle.seek(0)
            handle.write(encode_header(list(layout), _told(about, time.perf_counter() - started))[0])
        part.replace(file)
    except OSError as error:
        raise OutputError(f"{file}: cannot be written ({error.strerror})") from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing was
            part.unlink()


def _told(about: About, more: float) -> dict[str, str]:
    """The metadata, of a length that does not depend on the time that it took."""
    known = {name: value for name, value in asdict(about).items() if name != "seconds"}
    return {"format": FORMAT, "about": json.dumps(known), "seconds": f"{about.seconds + more:015.3f}"}


def write_statistics(file: Path, about: About, values: Mapping[str, Any]) -> None:
    """Writes a file whose values are all in memory, float32 or float64."""
    import numpy as np

    names = {"float32": "F32", "float64": "F64"}
    arrays = {name: np.asarray(value, order="C") for name, value in values.items()}
    layout = [(name, names[value.dtype.name], value.shape) for name, value in arrays.items()]
    with writing(file, about, layout) as writer:
        for name, value in arrays.items():
            writer.put(name, value)
