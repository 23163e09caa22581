"""Programs that models write, run where they can do little harm: each in a process of its own, shut in and limited.

The process is `python -I` in an empty directory, without the caller's environment, under limits of time, memory and
files; it may start threads but no processes. On Linux kernels that let it, it also gets namespaces of its own: no
network, every file of the machine read-only, one small directory to write in, no sight of other processes, and nothing
that outlives it. Where that is refused (other systems, some containers) only the limits hold, and `Outcome.isolated`
says so. Files that the user can read can be read in either case. This holds off accidents and mischief of models; it is
no prison for an attacker.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

INSIDE = Path(__file__).with_name("sandboxed.py")


@dataclass(frozen=True)
class Limits:
    """Of one program: seconds (of the clock, and of the processor), bytes of memory, bytes written to files."""

    seconds: int = 10
    memory: int = 1 << 30
    file_bytes: int = 16 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program went: `passed` where it ran to its end, else `note` says what stopped it.

    `isolated`: in namespaces of its own; without, only the limits held.
    """

    passed: bool
    note: str
    isolated: bool


def run_program(program: str, limits: Limits = Limits()) -> Outcome:
    """Runs a program in the sandbox and waits for it.

    That it passed is said by a word which the program does not know, so leaving early does not count as passing.
    """
    nonce = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="graft-run-") as scratch:
        report, inside = os.pipe()
        arguments = [sys.executable, "-I", "-B", str(INSIDE), str(inside)]
        numbers = map(str, (limits.seconds, limits.memory, limits.file_bytes))
        environment = {"PATH": os.defpath, "HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8"}
        process = subprocess.Popen(
            [*arguments, *numbers], cwd=scratch, env=environment, pass_fds=[inside], start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(inside)
        late = _finish(process, f"{nonce}\n{program}".encode(errors="replace"), limits.seconds)
        said = _said(report)
    isolated = f"{nonce} isolated" in said
    if f"{nonce} passed" in said:
        return Outcome(True, "", isolated)
    reason = said.partition("failed ")[2].strip()
    ended = f"no end within {limits.seconds} s" if late else "it left early, or a limit killed it"
    return Outcome(False, reason or ended, isolated)


def run_programs(
    programs: Sequence[str],
    limits: Limits = Limits(),
    workers: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[Outcome]:
    """Runs programs side by side, as many at once as there are processors; the outcomes in their order."""
    outcomes = []
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        for outcome in pool.map(lambda program: run_program(program, limits), programs):
            outcomes.append(outcome)
            advance(1)
    return outcomes


def _finish(process: subprocess.Popen[bytes], program: bytes, seconds: int) -> bool:
    """Waits for the process, kills what is left of its group; whether it was late."""
    late = False
    try:
        process.communicate(program, timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()
    return late


def _said(report: int) -> str:
    """What is left in the pipe; not waited for, since a process that got away may hold its other end."""
    os.set_blocking(report, False)
    try:
        return os.read(report, 4096).decode(errors="replace")
    except BlockingIOError:
        return ""
    finally:
        os.close(report)
