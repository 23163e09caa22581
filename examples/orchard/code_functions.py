"""Functions of the Python standard library: signature and docstring as the prompt, body as the answer.

The split is by top-level module, by a hash of its name, so no module is in two splits. The functions are those of the
running interpreter: the same Python version gives the same records. Licence of the text: PSF License Agreement.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from records import Record

FENCE = "```python\n"
SKIPPED = set("site-packages test tests idlelib lib2to3 ensurepip turtledemo pydoc_data lib-dynload".split())
CHARACTERS = (150, 1000)  # of the whole function; longer ones would be cut at 256 tokens


def split_of(module: str) -> str:
    """train, dev or test for a top-level module; `_pyio` and `_io` go where `io` goes."""
    family = module.removeprefix("_py").lstrip("_")
    return {0: "test", 1: "dev"}.get(hashlib.sha256(family.encode()).digest()[0] % 10, "train")


def records(split: str) -> list[Record]:
    """The functions of one split, in the order of files and lines; a body seen in several modules is left out."""
    homes: dict[str, set[str]] = {}
    for record in _library():
        homes.setdefault(record.answer, set()).add(record.subtask)
    kept = {r.answer: r for r in _library() if split_of(r.subtask) == split and len(homes[r.answer]) == 1}
    return list(kept.values())


@cache
def _library() -> tuple[Record, ...]:
    """Every function with a docstring and a fitting length; the subtask is its top-level module."""
    return tuple(record for module, path in _sources() for record in _functions(module, path))


def _sources() -> Iterator[tuple[str, Path]]:
    """Every library file with its top-level module, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if not SKIPPED.intersection(parts) and not parts[0].startswith(("config-", "_sysconfigdata")):
            yield parts[0].removesuffix(".py"), path


def _functions(module: str, path: Path) -> Iterator[Record]:
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
            whole = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if CHARACTERS[0] < len(whole) < CHARACTERS[1]:
                yield _record(module, textwrap.dedent(whole), (node.body[0].end_lineno or 0) - node.lineno + 1)


def _record(module: str, text: str, head: int) -> Record:
    """Cut a function after its docstring's last line; the line break goes with the body, as the tokenizer has it."""
    lines = text.split("\n")
    return Record(FENCE + "\n".join(lines[:head]), "\n" + "\n".join(lines[head:]), module)
