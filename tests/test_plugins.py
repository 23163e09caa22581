"""Methods from other packages arrive by the entry point, and a broken one says so."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint

import pytest

from graftkit import methods
from graftkit.errors import GraftError


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package `elsewhere` that registers a method when it is imported."""
    source = (
        "from graftkit.methods import method\n"
        "@method(source='elsewhere', grain='element')\n"
        "def from_elsewhere(deltas):\n    return deltas.sum(dim=0)\n"
    )
    module = types.ModuleType("elsewhere")
    monkeypatch.setitem(sys.modules, "elsewhere", module)
    exec(source, module.__dict__)
    entry = EntryPoint("elsewhere", "elsewhere", "graftkit.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: (entry,))
    methods._load_all.cache_clear()
    yield
    methods._REGISTRY.pop("from_elsewhere", None)
    methods._load_all.cache_clear()


def test_a_plug_in_is_a_method_like_any_other(plugged: None) -> None:
    assert "from_elsewhere" in methods.names()
    assert methods.get("from_elsewhere").returns_delta


def test_a_plug_in_that_cannot_be_loaded_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("broken", "no_such_module", "graftkit.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: (entry,))
    methods._load_all.cache_clear()
    with pytest.raises(GraftError, match=r"plug-in 'broken' \(no_such_module\) cannot be loaded"):
        methods.names()
    monkeypatch.undo()
    methods._load_all.cache_clear()
