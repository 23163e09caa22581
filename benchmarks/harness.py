"""What the benchmarks share: places, recipes filled in, and one process measured from start to end.

Imports the standard library only: a child's peak memory is counted from its parent's at the fork.
"""

from __future__ import annotations

import os
import shutil
import signal
import string
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = Path(os.environ.get("GRAFTKIT_BENCH") or ROOT / ".cache" / "bench")
OUTPUTS = BENCH / "outputs"
RESULTS = ROOT / "benchmarks" / "results"
GRAFT = ROOT / ".venv" / "bin" / "graft"
MERGEKIT = ROOT / ".cache" / "mergekit-venv" / "bin" / "mergekit-yaml"
METHODS = ("average", "task_arithmetic", "ties", "dare", "dare_sign")
MODELS = ("base", "math", "code")


@dataclass(frozen=True)
class Measured:
    """One process: seconds of wall and of CPU (user + system), bytes of peak resident memory, exit status."""

    wall: float
    cpu: float
    peak_rss: int
    status: int
    timed_out: bool
    load: float
    log: str

    @property
    def ok(self) -> bool:
        return self.status == 0 and not self.timed_out


def models_folder(size: str) -> Path:
    """The triple's folder; says how to make it where it is missing."""
    folder = BENCH / size
    if not all((folder / model / "model.safetensors.index.json").exists() for model in MODELS):
        raise SystemExit(f"no models at {folder}: run `python benchmarks/make_models.py {size}`")
    return folder


def missing(tool: Path) -> str | None:
    """One sentence saying how to install the tool, where it is not there."""
    if os.access(tool, os.X_OK):
        return None
    how = "`make setup`" if tool == GRAFT else "`benchmarks/setup_mergekit.sh`"
    return f"{tool.name} is not installed at {tool}: run {how}"


def recipe(name: str, size: str) -> Path:
    """Fill the models' folder into `recipes/NAME.yaml`; the filled file lies beside the models."""
    template = string.Template((ROOT / "benchmarks" / "recipes" / f"{name}.yaml").read_text())
    filled = BENCH / "recipes" / f"{size}-{name}.yaml"
    filled.parent.mkdir(parents=True, exist_ok=True)
    filled.write_text(template.substitute(models=models_folder(size)))
    return filled


def graft_command(method: str, size: str, out: Path, workers: int = 2) -> list[str]:
    return [str(GRAFT), "merge", str(recipe(method, size)), str(out), "--workers", str(workers)]


def mergekit_command(method: str, size: str, out: Path) -> list[str]:
    return [str(MERGEKIT), str(recipe(f"mergekit_{method}", size)), str(out)]


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def warm(size: str) -> int:
    """Read all inputs once, so that they are in the page cache; gives the number of bytes."""
    buffer, total = bytearray(8 << 20), 0
    for model in MODELS:
        for path in weight_files(models_folder(size) / model):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    total += count
    return total


def clear_outputs() -> None:
    """Remove what a run wrote, and let what is still dirty reach the disk before the next one."""
    shutil.rmtree(OUTPUTS, ignore_errors=True)
    OUTPUTS.mkdir(parents=True)
    os.sync()


def measure(command: Sequence[str], timeout: float = 1800, memory: TreeMemory | None = None) -> Measured:
    """Run a command to its end, in a process group of its own, which is killed at the timeout."""
    load = os.getloadavg()[0]
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONDONTWRITEBYTECODE"} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment, cwd=ROOT
        )
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(timeout, expire)
        timer.start()
        if memory:
            memory.watch(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read().decode(errors="replace")
    cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
    return Measured(wall, cpu, peak, process.returncode, expired.is_set(), load, text[-4000:])


class TreeMemory:
    """Peak resident memory of a process and its descendants, mapped pages included: the sum of their VmHWM."""

    def __init__(self, interval: float = 0.02) -> None:
        self.interval = interval
        self.peaks: dict[int, int] = {}

    @property
    def peak(self) -> int:
        return sum(self.peaks.values())

    def watch(self, pid: int) -> None:
        threading.Thread(target=self._sample, args=(pid,), daemon=True).start()

    def _sample(self, pid: int) -> None:
        while found := list(_tree(pid)):
            for process in found:
                self.peaks[process] = max(self.peaks.get(process, 0), _high_water(process))
            time.sleep(self.interval)


def _tree(pid: int) -> Iterator[int]:
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return
        children = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:
        return
    yield pid
    for child in " ".join(children).split():
        yield from _tree(int(child))


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def seconds_in_turn(
    works: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True
) -> dict[str, list[float]]:
    """CPU seconds of this process for each work in each round, all in turn; `warm`: after once without counting."""
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(0 if warm else 1, rounds + 1):
        for name, work in works.items():
            started = time.process_time()
            work()
            if turn:
                spent[name].append(time.process_time() - started)
    return spent
