"""Programs that models write: what they may do, and what stops them."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import pytest

from graftkit.measuring.sandbox import Limits, run_program, run_programs

SHORT = Limits(seconds=2)
ISOLATED = run_program("", SHORT).isolated
alone = pytest.mark.skipif(not ISOLATED, reason="this machine gives no namespaces; only the limits hold")


def test_a_program_passes_by_coming_to_its_end() -> None:
    assert run_program("import math\nassert math.sqrt(4) == 2").passed
    failed = run_program("assert 1 == 2, 'no'")
    assert not failed.passed and failed.note == "AssertionError: no"


@pytest.mark.parametrize(
    ("program", "note"),
    [
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "left early"),
        ("print('passed'); raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import os\nfor k in range(64):\n  try: os.write(k, b'passed')\n  except OSError: pass\nos._exit(0)", ""),
        ("def f(:", "SyntaxError"),
        ("x = [0] * (1 << 29)", "MemoryError"),
        ("f = open('a', 'wb')\nfor _ in range(64): f.write(b'x' * (1 << 20))", "OSError"),
        ("def f(): f()\nf()", "RecursionError"),
    ],
)
def test_what_does_not_pass(program: str, note: str) -> None:
    outcome = run_program(program, SHORT)
    assert not outcome.passed and note in outcome.note


@pytest.mark.parametrize("program", ["while True: pass", "import time; time.sleep(60)"])
def test_time_is_limited(program: str) -> None:
    start = time.monotonic()
    outcome = run_program(program, Limits(seconds=1))
    assert not outcome.passed and outcome.note == "no end within 1 s" and time.monotonic() - start < 8


def test_the_callers_environment_and_directory_are_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "x")
    assert run_program("import os; assert 'A_SECRET' not in os.environ").passed
    assert run_program("import os; assert not os.listdir('.')").passed
    assert run_program("open('a', 'w').write('x'); assert open('a').read() == 'x'").passed


@alone
def test_files_of_the_machine_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("here")
    for action in ("open({0!r}, 'w')", "import os; os.remove({0!r})"):
        assert "Read-only" in run_program(action.format(str(tmp_path / "kept")), SHORT).note
    assert (tmp_path / "kept").read_text() == "here"


@alone
def test_there_is_no_network() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = run_program(f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)", SHORT)
    assert not outcome.passed and "unreachable" in outcome.note


@alone
def test_other_processes_cannot_be_reached() -> None:
    assert "ProcessLookupError" in run_program(f"import os; os.kill({os.getpid()}, 9)", SHORT).note


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the system calls of others are not known")
@pytest.mark.parametrize(
    "start",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['true'], {})",
        "subprocess.run(['/bin/true'])",
        "multiprocessing.get_context('fork').Process(target=print).start()",
    ],
)
def test_no_process_starts_so_that_the_memory_limit_is_that_of_all(start: str) -> None:
    """A limit on the number of processes does not hold for root, and each would have the memory of a program."""
    program = f"import multiprocessing, os, subprocess\n{start}"
    assert "PermissionError" in run_program(program).note
    assert run_program("import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()").passed


def test_outcomes_come_in_order() -> None:
    outcomes = run_programs([f"assert {k} % 2" for k in range(4)], SHORT, workers=2)
    assert [outcome.passed for outcome in outcomes] == [False, True, False, True]
