from __future__ import annotations

import io
import json
import math

import pytest

from graftkit.measuring.table import Column, Table, Value

TABLE = Table(
    (
        Column("model"),
        Column("loss", "nats/token", "lower"),
        Column("accuracy", better="higher", digits=2),
        Column("n"),
    ),
    (
        ("base", Value(1.5, 1.4, 1.6), Value(0.25), 10),
        ("a|b", Value(1.25, 1.1, 1.4), 0.75, 1234),
        ("[red]x", math.nan, None, None),
    ),
    title="scores",
)


def test_best_follows_the_direction_and_skips_what_is_missing() -> None:
    assert [TABLE.best(column) for column in range(4)] == [frozenset(), {1}, {1}, frozenset()]


def test_best_marks_ties_but_not_a_lone_or_common_value() -> None:
    columns = (Column("x", better="higher"),)
    assert Table(columns, ((1.0,), (2.0,), (2.0,))).best(0) == {1, 2}
    assert Table(columns, ((2.0,), (2.0,))).best(0) == frozenset()
    assert Table(columns, ((2.0,),)).best(0) == frozenset()


def test_markdown_escapes_and_marks() -> None:
    lines = TABLE.to_markdown().splitlines()
    assert lines[0] == "scores"
    assert lines[2] == "| model | loss (nats/token) ↓ | accuracy ↑ | n |"
    assert lines[3] == "| --- | ---: | ---: | ---: |"
    assert lines[5] == "| a\\|b | **1.250 [1.100, 1.400]** | **0.75** | 1,234 |"
    assert lines[6] == "| [red]x | – | – | – |"


def test_json_has_no_nan_and_keeps_intervals() -> None:
    data = json.loads(json.dumps(TABLE.to_dict(), allow_nan=False))
    assert data["rows"][0][1] == {"value": 1.5, "low": 1.4, "high": 1.6}
    assert data["rows"][2][1] is None
    assert data["columns"][1] == {"name": "loss", "unit": "nats/token", "better": "lower", "best": [1]}
    assert Value.from_dict(data["rows"][0][1]) == Value(1.5, 1.4, 1.6)


def test_rich_takes_names_literally() -> None:
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(TABLE.to_rich())
    text = console.export_text()
    assert "[red]x" in text and "1.250 [1.100, 1.400]" in text


def test_rows_and_intervals_must_be_whole() -> None:
    with pytest.raises(ValueError, match="row 0 has 1 cells, expected 2"):
        Table((Column("a"), Column("b")), (("x",),))
    with pytest.raises(ValueError, match="two ends"):
        Value(1.0, low=0.5)
