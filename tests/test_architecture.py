"""The rules of design.md that a reader relies on: who may import whom, what is heavy, how long things are."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import graftkit

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "graftkit"
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = (
    "errors",
    "compiling",
    "checkpoints",
    "methods",
    "recipes",
    "execution",
    "data",
    "measuring",
    "improving",
    "reporting",
    "cli",
)
FACES = {"cli": (), "reporting": ("cli",), "testing": ()}  # packages, and who may import them
HEAVY = {"torch", "transformers", "numba", "peft", "sklearn", "matplotlib", "jinja2"}
LIGHT = ("recipes/", "methods/", *(f"checkpoints/{name}.py" for name in ("headers", "sources", "adapters", "resolve")))


def relative(path):
    return path.relative_to(SOURCE).as_posix()


def module_of(path):
    return ".".join(["graftkit", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")


@cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


MODULES = {module_of(path): path for path in FILES}


def package(module):
    """The name that stands in ORDER: `graftkit.methods.parts` -> `methods`; the root itself is ``."""
    return [*module.split("."), ""][1]


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def nodes(body, everywhere):
    """The statements of a module; with `everywhere` also those that run later or only for a type checker."""
    for node in body:
        yield node
        if is_type_checking(node) and not everywhere:
            continue
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and not everywhere:
            continue
        for field in ("body", "orelse", "finalbody", "handlers"):
            inner = getattr(node, field, [])
            yield from nodes([n for n in inner if isinstance(n, (ast.stmt, ast.ExceptHandler))], everywhere)


def imports(path, everywhere=True):
    """The modules that a file imports, in full; `from graftkit.methods import parts` is `graftkit.methods.parts`."""
    for node in nodes(tree(path).body, everywhere):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import; write it in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module or ""


def ours(path, everywhere=True):
    return [name for name in imports(path, everywhere) if name.split(".")[0] == "graftkit"]


def test_the_order_is_complete():
    found = {package(module) for module in MODULES} - {"", "testing"}
    assert found <= set(ORDER), f"say in design.md, and here, where {found - set(ORDER)} stands"


def test_imports_run_upwards():
    """A file imports its own package and what stands above it; the package's root may be imported for its version."""
    wrong = []
    for module, path in MODULES.items():
        own = package(module)
        if own in ("", "testing"):
            continue
        allowed = set(ORDER[: ORDER.index(own) + 1]) | {""}
        wrong += [f"{relative(path)} imports {name}" for name in ours(path) if package(name) not in allowed]
    assert not wrong


def test_methods_and_checkpoints_do_not_know_each_other():
    pairs = [("methods", "checkpoints"), ("checkpoints", "methods")]
    wrong = [
        f"{relative(path)} imports {name}"
        for one, other in pairs
        for path in FILES
        if relative(path).startswith(f"{one}/")
        for name in ours(path)
        if package(name) == other
    ]
    assert not wrong


def test_nothing_below_imports_the_faces():
    wrong = [
        f"{relative(path)} imports {name}"
        for module, path in MODULES.items()
        for name in ours(path)
        if package(name) in FACES and package(module) not in (package(name), *FACES[package(name)], "")
    ]
    assert not wrong


def ancestors(module):
    parts = module.split(".")
    return {".".join(parts[:k]) for k in range(1, len(parts))}


def test_no_import_cycles():
    """At import time: what functions import later, and what only a type checker sees, may close a circle.

    Importing a module runs its packages first, unless they are running already because they hold the importer.
    """
    graph = {}
    for module, path in MODULES.items():
        named = {name for name in ours(path, False) if name in MODULES} - {module}
        packages = set().union(*map(ancestors, named)) - ancestors(module) - {module}
        graph[module] = named | packages
    state = {}

    def visit(module, path):
        if state.get(module) == "open":
            pytest.fail(" -> ".join([*path[path.index(module) :], module]))
        if module not in state:
            state[module] = "open"
            for name in sorted(graph[module]):
                visit(name, [*path, module])
            state[module] = "done"

    for module in graph:
        visit(module, [])


@pytest.mark.parametrize("path", [p for p in FILES if relative(p).startswith(LIGHT)], ids=relative)
def test_planning_modules_import_nothing_heavy(path):
    heavy = {name.split(".")[0] for name in imports(path, False)} & HEAVY
    assert not heavy, f"{relative(path)} imports {heavy} at its top; import it inside functions"


def loaded(program):
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & HEAVY


@pytest.mark.parametrize("module", ["graftkit", "graftkit.recipes.plan"])
def test_importing_leaves_heavy_packages_alone(module):
    """Loading the plug-ins too: planning asks for every method's signature."""
    more = "; from graftkit import methods; [methods.get(n) for n in methods.names()]" if module != "graftkit" else ""
    assert not loaded(f"import sys, {module}{more}; print(*sys.modules)")


def definitions():
    """Every function and class with the names that lead to it."""

    def walk(body, path, names):
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                yield path, (*names, node.name), node
                yield from walk(node.body, path, (*names, node.name))

    for path in FILES:
        yield from walk(tree(path).body, path, ())


def length(node):
    """Lines of a function without its decorators and its docstring."""
    lines = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        lines -= first.end_lineno - first.lineno + 1
    return lines


def test_files_are_short():
    long = {relative(path): lines for path in FILES if (lines := len(path.read_text("utf-8").splitlines())) > 500}
    assert not long


def test_functions_are_short():
    """Half have at most 10 lines, nine in ten at most 30, none more than 60, docstrings not counted."""
    found = [
        (length(node), f"{relative(path)}:{node.lineno} {'.'.join(names)}")
        for path, names, node in definitions()
        if not isinstance(node, ast.ClassDef)
    ]
    lengths = [lines for lines, _ in found]
    assert not [where for lines, where in found if lines > 60]
    assert statistics.median(lengths) <= 10
    long = sorted((item for item in found if item[0] > 30), reverse=True)
    assert len(long) <= len(found) / 10, f"{len(long)} of {len(found)} are longer than 30 lines: {long}"


def test_public_names_are_documented():
    """Modules, and functions, classes and methods that no underscore hides, neither theirs nor their class's."""
    missing = [relative(path) for path in FILES if not ast.get_docstring(tree(path))]
    functions = [node for _, _, node in definitions() if not isinstance(node, ast.ClassDef)]
    inside = {id(child) for node in functions for child in ast.walk(node) if child is not node}
    for path, names, node in definitions():
        hidden = any(name.startswith("_") for name in names) or id(node) in inside
        if not hidden and not ast.get_docstring(node):
            missing.append(f"{relative(path)}:{node.lineno} {'.'.join(names)}")
    assert not missing


def test_public_functions_are_typed():
    untyped = []
    for path, names, node in definitions():
        if isinstance(node, ast.ClassDef) or any(name.startswith("_") for name in names):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or node.returns is None:
            untyped.append(f"{relative(path)}:{node.lineno} {'.'.join(names)}")
    assert not untyped


def test_no_drawers_for_everything():
    """Files are named after what they hold."""
    drawers = {"utils", "util", "helpers", "helper", "common", "manager", "misc"}
    assert not [relative(path) for path in FILES if path.stem in drawers or set(path.parts) & drawers]


def test_every_method_file_is_loaded():
    """A file of methods that nobody imports registers nothing."""
    from graftkit import methods

    modules = {methods.get(name).function.__module__ for name in methods.names()}
    written = {m for m, path in MODULES.items() if package(m) == "methods" and "\n@method(" in path.read_text("utf-8")}
    assert written == {module for module in modules if module.startswith("graftkit.")}


def test_the_version_is_the_changelogs_newest():
    project = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^##\s+\[?v?(\d+\.\d+\.\d+[^\]\s]*)", changes, re.MULTILINE)
    assert newest, "CHANGELOG.md has no heading such as `## 0.1.0`"
    assert project and newest[1] == graftkit.__version__ == project[1]
