"""What commands share in speaking to people and to machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graftkit.errors import OutputError

if TYPE_CHECKING:
    from graftkit.measuring.table import Table

PATIENCE = 1.0  # seconds before a progress bar shows


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_json(path: Path, value: Any) -> None:
    """One JSON document in a file. Raises OutputError when it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from error


def print_table(table: Table) -> None:
    """A table for people, as wide as it needs to be."""
    from rich.console import Console

    Console(width=max(Console().width, 100)).print(table.to_rich())


def quiet_libraries(threads: int | None) -> None:
    """Silences what libraries say for themselves, and gives torch its threads (all cores without a number)."""
    import os
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\..*")
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads or os.cpu_count() or 1)


def size_of(count: float) -> str:
    """Bytes for people: `3.09 GB`."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def count_of(count: float) -> str:
    """Parameters for people: `1.54 B`."""
    for unit in ("", " k", " M"):
        if abs(count) < 1000:
            return f"{count:.0f}" if not unit else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.2f} B"


class Bar:
    """A progress bar on standard error that shows once the work has taken a second."""

    def __init__(self, unit: str) -> None:
        self.unit, self._started, self._stage = unit, time.monotonic(), ""
        self._progress: Any = None
        self._task: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Progress of a stage; may be called from any thread."""
        if time.monotonic() - self._started < PATIENCE or not sys.stderr.isatty():
            return
        if self._progress is None:
            self._progress = self._open()
        if stage != self._stage:
            self._stage, self._task = stage, self._progress.add_task(stage, total=total)
        self._progress.update(self._task, completed=done, total=total)

    def _open(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        amounts: list[Any] = [MofNCompleteColumn()] if self.unit != "work" else [TaskProgressColumn()]
        if self.unit == "bytes":
            amounts = [DownloadColumn(), TransferSpeedColumn()]
        columns = [TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn()]
        progress = Progress(*columns, console=Console(stderr=True), transient=True)
        progress.start()
        return progress

    def close(self) -> None:
        """Takes the bar away."""
        if self._progress is not None:
            self._progress.stop()


@contextmanager
def progress(unit: str) -> Iterator[Bar]:
    """A bar for `with`; `unit` is `bytes`, a thing that is counted, or `work` for what has no unit but a share."""
    bar = Bar(unit)
    try:
        yield bar
    finally:
        bar.close()
