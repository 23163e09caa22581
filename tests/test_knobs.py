"""Kinds and ranges of hyperparameters, read from signatures, and what is said about a value that does not fit."""

import math
from typing import Annotated, Literal

import pytest

from graftkit import methods
from graftkit.errors import RecipeError
from graftkit.methods import PerModel, Range
from graftkit.methods.knobs import Knob, knobs_of


def example(
    models,
    *,
    share: Annotated[PerModel, Range(0, 1)] = 0.2,
    factor: float = 1.0,
    count: Annotated[int, Range(1, 9)] = 3,
    way: Literal["mean", "sum"] = "mean",
    on: bool = False,
): ...


KNOBS = knobs_of(example)


def test_kinds_are_read_in_order():
    assert [(knob.name, knob.kind, knob.per_model) for knob in KNOBS.values()] == [
        ("share", "number", True),
        ("factor", "number", False),
        ("count", "integer", False),
        ("way", "choice", False),
        ("on", "switch", False),
    ]
    assert KNOBS["way"].choices == ("mean", "sum")
    assert KNOBS["share"].default == 0.2
    assert KNOBS["factor"].range == Range(-math.inf, math.inf)


def test_what_they_accept_in_words():
    assert [knob.describe for knob in KNOBS.values()] == [
        "number in [0, 1], one or one per model",
        "number in (-inf, inf)",
        "integer in [1, 9]",
        "mean | sum",
        "true | false",
    ]
    assert str(Range(0)) == "[0, inf)"


@pytest.mark.parametrize(
    ("name", "value", "checked"),
    [
        ("share", 1, 1.0), ("share", [0, 0.5], (0.0, 0.5)), ("share", (1,), (1.0,)), ("share", 0.0, 0.0),
        ("factor", -3, -3.0), ("count", 9, 9), ("count", 2.0, 2), ("way", "sum", "sum"), ("on", True, True),
    ],
)  # fmt: skip
def test_good_values(name, value, checked):
    result = KNOBS[name].check(value, name)
    assert result == checked
    assert type(result) is type(checked)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("share", 1.5, "here: got 1.5, expected number in [0, 1], one or one per model"),
        ("share", -0.1, "here: got -0.1, expected number in [0, 1]"),
        ("share", [0.5, 2], "here[1]: got 2, expected number in [0, 1]"),
        ("share", [], None),
        ("share", "0.5", "here: got '0.5', expected number"),
        ("share", True, "here: got True, expected number"),
        ("share", None, "here: got None, expected number"),
        ("share", [[0.5]], "here[0]: got [0.5], expected number"),
        ("factor", [1.0, 2.0], "here: got [1.0, 2.0], expected number in (-inf, inf)"),
        ("factor", math.nan, "here: got nan, expected number"),
        ("factor", math.inf, "here: got inf, expected number"),
        ("count", 2.5, "here: got 2.5, expected integer in [1, 9]"),
        ("count", 0, "here: got 0, expected integer in [1, 9]"),
        ("count", 10, "here: got 10, expected integer in [1, 9]"),
        ("way", "meen", "here: got 'meen', expected mean | sum; did you mean 'mean'?"),
        ("way", "xyz", "here: got 'xyz', expected mean | sum"),
        ("way", 1, "here: got 1, expected mean | sum"),
        ("on", 1, "here: got 1, expected true | false"),
        ("on", "yes", "here: got 'yes', expected true | false"),
    ],
)
def test_bad_values_say_where_what_and_what_instead(name, value, message):
    if message is None:
        assert KNOBS[name].check(value, "here") == (), "how many values there are is the recipe's business"
        return
    with pytest.raises(RecipeError) as refusal:
        KNOBS[name].check(value, "here")
    assert str(refusal.value).startswith(message)
    assert ("did you mean" in str(refusal.value)) == ("did you mean" in message)


def test_signatures_that_cannot_be_read_are_refused():
    def strange(models, *, names: dict = None): ...  # noqa: RUF013

    def no_default(models, *, share: float): ...

    def text(models, *, share: "float" = 1.0): ...

    for function, message in [(strange, "none of float, int"), (no_default, "no default"), (text, "must be objects")]:
        with pytest.raises(TypeError, match=message):
            knobs_of(function)


@pytest.mark.parametrize("name", methods.names())
def test_the_knobs_of_every_method_are_readable(name):
    """From the signature alone: kinds, words, defaults inside the range, search ranges inside the range."""
    for knob in methods.get(name).knobs.values():
        assert isinstance(knob, Knob) and knob.describe
        checked = knob.check(knob.default, knob.name)
        assert checked == knob.default
        if knob.range.search:
            low, high = knob.range.search
            assert knob.range.low <= low < high <= knob.range.high


def test_registering_refuses_what_the_engine_could_not_run(monkeypatch):
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))

    def reads_the_unknown(deltas, thresold, *, weight: float = 1.0): ...

    def plain(deltas, *, weight: float = 1.0): ...

    with pytest.raises(TypeError, match="unknown input 'thresold'; did you mean 'threshold'"):
        methods.method(source="-", grain="element")(reads_the_unknown)
    with pytest.raises(TypeError, match="unknown grain 'elements'; did you mean 'element'"):
        methods.method(source="-", grain="elements")(plain)

    def ties(deltas): ...

    with pytest.raises(TypeError, match="'ties' is already registered by graftkit"):
        methods.method(source="-", grain="element")(ties)


def test_what_follows_from_a_signature():
    assert methods.get("ties").statistics == ("threshold", "retained")
    assert methods.get("ties").scope({"scope": "model"}) == "model" and methods.get("ties").scope({}) == "tensor"
    assert methods.get("ties").needs_base and methods.get("ties").returns_delta
    assert not methods.get("average").needs_base and not methods.get("average").returns_delta
    assert methods.get("slerp").reads == ("models", "norms", "dots") and methods.get("slerp").ordered
