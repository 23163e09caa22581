"""Passes over blocks as machine code on disk: a merge that finds its own needs no numba, whose import takes 0.5 s.

A pass is one loop with all that it calls. numba compiles it once, llvmlite makes an object of it that refers to nothing
outside, and later runs load that through llvmlite alone. Its file is named by what decides it: the loops' bytecode and
constants, the versions of both packages, the processor; and begins with its own hash. It is read and written only in a
directory that belongs to the user and that no one else can write to.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from graftkit.checkpoints.resolve import cache_directory
from graftkit.compiling import LOCK, Loop

ARGUMENTS = (np.uint16, np.float64, np.int64, np.uint16, np.float64, np.float64, np.float32)
"""What every pass takes, contiguous arrays, the first [rows, n] and the others flat: the inputs' bits, two kinds of
settings, the output's bits, sums to add to, and scratch of two kinds."""

DIGEST = 32
NAME = "run"


class Pass:
    """A loop over `ARGUMENTS` that neither allocates nor raises."""

    def __init__(self, loop: Any) -> None:
        self.loop: Loop = loop
        self._run: Callable[..., Any] | None = None
        self._engine: Any = None  # owns the code

    def __call__(self, *arrays: np.ndarray) -> None:
        """Runs it; the first call loads it, or has it compiled."""
        run = self._run or self._ready()
        assert all(a.dtype == d and a.flags.c_contiguous for a, d in zip(arrays, ARGUMENTS, strict=True))
        run(*(value for array in arrays for value in (array.ctypes.data, *array.shape)))

    def _ready(self) -> Callable[..., Any]:
        with LOCK:
            if self._run is None:
                file = _directory() / f"{self.loop.function.__name__}-{key_of(self.loop)}.o"
                code = _read(file)
                if code is None:
                    code = compile_pass(self.loop)
                    _write(file, code)
                self._engine = _engine(code)
                kinds = [
                    k for n in range(len(ARGUMENTS)) for k in (ctypes.c_void_p, *[ctypes.c_int64] * (1 + (n == 0)))
                ]
                self._run = ctypes.CFUNCTYPE(None, *kinds)(self._engine.get_function_address(NAME))
        return self._run


def compile_pass(loop: Loop) -> bytes:
    """The object that holds a pass, under `NAME`."""
    import llvmlite.binding as llvm

    entry = _entry(loop)
    module = llvm.parse_assembly(entry._library.get_llvm_str())
    for function in module.functions:
        if not function.is_declaration:
            function.linkage = "external" if function.name == entry._wrapper_name else "internal"
    machine = _machine()
    builder = llvm.create_pass_builder(machine, llvm.PipelineTuningOptions(speed_level=3))
    builder.getModulePassManager().run(module, builder)
    module.get_function(entry._wrapper_name).name = NAME
    strange = [f.name for f in module.functions if f.is_declaration and not f.name.startswith(("llvm.", "mem"))]
    assert not strange, f"{loop.function.__name__} needs {strange}: a pass neither allocates nor raises"
    return bytes(machine.emit_object(module))


def _entry(loop: Loop) -> Any:
    """The loop as a function of addresses and sizes, for C."""
    from numba import carray, cfunc, from_dtype, types

    size, kinds = types.int64, [types.CPointer(from_dtype(np.dtype(d))) for d in ARGUMENTS]
    signature = types.void(kinds[0], size, size, *(t for kind in kinds[1:] for t in (kind, size)))

    def entry(bits, rows, n, a, a_size, b, b_size, c, c_size, d, d_size, e, e_size, f, f_size):  # type: ignore[no-untyped-def]
        loop(
            carray(bits, (rows, n)), carray(a, a_size), carray(b, b_size), carray(c, c_size), carray(d, d_size),
            carray(e, e_size), carray(f, f_size),
        )  # fmt: skip

    return cfunc(signature, error_model="numpy")(entry)


def _machine() -> Any:
    """This processor, for llvmlite; an engine owns the one that it is given."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = _processor()
    return llvm.Target.from_default_triple().create_target_machine(
        cpu=name, features=features, opt=3, reloc="default", codemodel="jitdefault"
    )


@lru_cache(maxsize=1)
def _processor() -> tuple[str, str]:
    import llvmlite.binding as llvm

    return llvm.get_host_cpu_name(), llvm.get_host_cpu_features().flatten()


def _engine(code: bytes) -> Any:
    import llvmlite.binding as llvm

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    return engine


def key_of(loop: Loop) -> str:
    """A name that no other code would have."""
    versions = [metadata.version(package) for package in ("numba", "llvmlite")]
    text = "\x00".join((*versions, *_processor(), repr(ARGUMENTS), *_content(loop, set())))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGEST]


def _content(loop: Loop, seen: set[Loop]) -> Iterator[str]:
    """What a loop and all that it calls are made from."""
    if loop in seen:
        return
    seen.add(loop)
    code = loop.function.__code__
    yield repr((code.co_code, code.co_consts, code.co_names, code.co_varnames, loop.options))
    spaces = [loop.function.__globals__]
    spaces += [vars(m) for n in code.co_names if isinstance(m := spaces[0].get(n), ModuleType) and m is not np]
    for value in (space[name] for space in spaces for name in code.co_names if name in space):
        if isinstance(value, Loop):
            yield from _content(value, seen)
        elif not isinstance(value, ModuleType):
            yield repr(value)


def _directory() -> Path:
    return cache_directory() / "passes"


def _read(file: Path) -> bytes | None:
    """The object in a file; None where there is none, or it is broken, or someone else may have written it."""
    if not _private(file.parent):
        return None
    try:
        held = file.read_bytes()
    except OSError:
        return None
    return held[DIGEST:] if hashlib.sha256(held[DIGEST:]).digest() == held[:DIGEST] else None


def _write(file: Path, code: bytes) -> None:
    """Keeps an object, where it can be kept safely."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _private(file.parent):
            return
        with tempfile.NamedTemporaryFile(dir=file.parent, delete=False) as fresh:
            fresh.write(hashlib.sha256(code).digest() + code)
        os.replace(fresh.name, file)
    except OSError:
        return  # a full or read-only disk costs the next run half a second, and this one nothing


def _private(directory: Path) -> bool:
    try:
        held = directory.stat()
    except OSError:
        return False
    return held.st_uid == getattr(os, "getuid", lambda: held.st_uid)() and not held.st_mode & (
        stat.S_IWGRP | stat.S_IWOTH
    )
