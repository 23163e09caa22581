from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from graftkit.errors import DataError, OutputError
from graftkit.measuring.results import Evaluation, ItemScore, TaskSummary, summarise
from graftkit.measuring.table import Value
from graftkit.reporting import plots, records
from graftkit.reporting.report import write_report

HOSTILE = '<script>alert(1)</script> $x_1$ & "q"'
VOID = {"meta", "br", "hr", "img", "link", "input"}


def evaluation(models: tuple[str, ...] = ("base", "math", HOSTILE)) -> Evaluation:
    noise = np.random.default_rng(0).normal(0, 0.1, 12)
    task = TaskSummary("sums", "answer_loss", True, "easy <b>ones</b>", "f" * 64, 12)
    scores = []
    for level, model in zip((3.0, 2.0, 2.5), models, strict=True):
        items = tuple(ItemScore("ab"[i % 2], 0, (-level - noise[i],), (1,), (4,)) for i in range(12))
        scores.append(summarise(model, task, items, 0.1, resamples=200, seed=0))
    sources = {model: f"/runs/{model}" for model in models}
    settings = {"seed": 0, "resamples": 200}
    return Evaluation(models, (task,), tuple(scores), sources, "base", {"sums": "math"}, settings, {"python": "3.11"})


def tensor(name: str, norm: float, shape: tuple[int, ...] = (4, 4), **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": list(shape), "delta_norm": norm, "unchanged": 0.25, "cast_error_norm": 0.01} | more


RECORD: dict[str, Any] = {
    "format": 1,
    "recipe_yaml": "method: ties  # <img src=http://x.org/a.png>\n",
    "plan": {"hash": "abc", "steps": 3, "bytes_read": 2**21, "bytes_written": 2**20},
    "inputs": [{"role": "base", "source": "<i>base</i>", "kind": "checkpoint", "fingerprint": "123"}],
    "versions": {"python": "3.11", "torch": None},
    "machine": {"platform": "Linux", "cpus": 2},
    "execution": {"workers": 2, "device": "cpu", "seconds": 1.5, "peak_memory_bytes": 2**28, "stages": []},
    "tensors": [
        tensor("model.embed_tokens.weight", 0.0),
        tensor("model.layers.0.self_attn.q_proj.weight", 3.0),
        tensor("model.layers.1.self_attn.q_proj.weight", 4.0),
        tensor("model.layers.1.mlp.experts.0.up_proj.weight", 3.0),
        tensor("model.layers.1.mlp.experts.7.up_proj.weight", 4.0, unchanged=0.75),
    ],
}


class Page(HTMLParser):
    """Which tags a page has, whether they close, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("report") / "new" / "report.html"
    merges = [("ties", RECORD), (HOSTILE, {"format": 1})]
    write_report(
        out,
        title="A & B",
        evaluation=evaluation(),
        merges=merges,
        story="One.\n\nTwo <u>2</u>.",
        commands=["graft merge"],
    )
    return out.read_text(encoding="utf-8")


def test_the_page_is_whole_and_needs_nothing_else(page: str) -> None:
    parsed = Page()
    parsed.feed(page)
    assert parsed.open == []
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in parsed.links)
    assert not {"script", "iframe", "img", "link", "u", "i"} & set(parsed.tags)
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert style is not None and "url(" not in style[1] and "@import" not in style[1]


def test_the_page_shows_everything_it_was_given(page: str) -> None:
    for text in ("A &amp; B", "<p>One.</p>", "Two &lt;u&gt;2&lt;/u&gt;.", "method: ties  # &lt;img", "easy &lt;b&gt;"):
        assert text in page
    for heading in ("Scores", "How much of each expert was kept", "What was merged", "What it cost", "the same again"):
        assert heading in page
    assert page.count("<svg") == 6  # scores, differences, normalised, three grids of one merge
    assert "currentColor" in page and "#010203" not in page


def test_json_gives_the_same_page(page: str, tmp_path: Path) -> None:
    parts: dict[str, Any] = {"title": "t", "merges": [("ties", RECORD)], "story": ""}
    live = write_report(tmp_path / "a.html", evaluation=evaluation(), **parts).read_bytes()
    assert live == write_report(tmp_path / "b.html", evaluation=evaluation().to_dict(), **parts).read_bytes()


def test_a_report_of_merges_or_of_scores_alone(tmp_path: Path) -> None:
    alone = write_report(tmp_path / "a.html", title="t", evaluation=None, merges=[("m", RECORD)]).read_text()
    assert "What was merged" in alone and "<h2>Scores" not in alone
    scores = write_report(tmp_path / "b.html", title="t", evaluation=evaluation()).read_text()
    assert "<h2>Scores" in scores and "What was merged" not in scores


def test_what_cannot_be_reported_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not an evaluation of format 1"):
        write_report(tmp_path / "a.html", title="t", evaluation={"models": []})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        write_report(tmp_path / "file" / "a.html", title="t", evaluation=evaluation())


def test_grids_follow_layers_and_roles() -> None:
    (grid,) = records.norm_grids(records.read(RECORD))
    assert (grid.stack, grid.layers, grid.roles) == ("model.layers", ("0", "1"), ("q_proj", "experts.up_proj"))
    assert grid.values[0][0] == 3 and math.isnan(grid.values[0][1])
    assert grid.values[1] == (4, 5)
    (swallowed,) = records.swallowed_grids(records.read(RECORD))
    assert swallowed.values[1] == (25, 50)


def test_tables_of_records() -> None:
    assert records.costs_table([("m", records.read(RECORD)), ("n", records.read({"format": 1}))]).rows == (
        ("m", 1.5, 256.0, 2.0, 1.0, 3, 2, "cpu"),
        ("n", None, None, None, None, None, None, None),
    )
    name, tensors, norm, _, unchanged = records.deltas_table([("m", records.read(RECORD))]).rows[0]
    assert (name, tensors) == ("m", 5)
    assert norm == pytest.approx(math.sqrt(50)) and unchanged == pytest.approx(35)


def test_pictures_repeat_and_take_what_is_missing() -> None:
    draw = {"labels": ["a", "b"], "values": [Value(1.0, 0.5, 1.5), Value(math.nan)], "xlabel": "loss"}
    assert plots.interval_plot(**draw) == plots.interval_plot(**draw)
    empty = plots.heat_map([[math.nan]], ["0"], ["q"], label="norm")
    assert empty.startswith("<svg") and 'aria-label="norm"' in empty


NULLS: dict[str, Any] = {key: None for key in RECORD} | {"format": 1}


@pytest.mark.parametrize(
    "record",
    [
        NULLS,
        RECORD | {"plan": {"hash": None, "steps": None}, "execution": {"seconds": None}, "versions": {"torch": None}},
        RECORD | {"inputs": [None, {"role": None, "source": None}], "tensors": [None, {"name": None}]},
        RECORD | {"tensors": [tensor("model.layers.0.mlp.up_proj.weight", 1.0) | {"shape": None, "unchanged": None}]},
        RECORD | {"tensors": [tensor("model.layers.0.mlp.up_proj.weight", 0.0)]},
    ],
)
def test_parts_that_are_null_are_left_out(record: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(tmp_path / "a.html", title="t", evaluation=None, merges=[("m", record)]).read_text()
    assert "What was merged" in page and "None" not in page


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({}, "m: not a merge's record of format 1: it has nothing"),
        ({"format": 7, "a": 1}, "not a merge's record of format 1: it has a, format"),
        (RECORD | {"tensors": "x"}, "tensors: .*tuple, got 'x'"),
        (RECORD | {"tensors": [{"name": 3}]}, r"tensors\.0\.name: .*string, got 3"),
        (RECORD | {"execution": {"seconds": "long"}}, "execution.seconds: .*number"),
        (RECORD | {"plan": []}, "plan: "),
    ],
)
def test_records_of_another_kind_are_refused(record: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        write_report(tmp_path / "a.html", title="t", evaluation=None, merges=[("m", record)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": None}, "scores: "),
        ({"tasks": [{}]}, r"tasks\.0\.name"),
        ({"models": ["base", "math", HOSTILE, "more"]}, "more has no full score on sums"),
        ({"scores": []}, "no full score on sums; evaluate again"),
    ],
)
def test_evaluations_that_are_not_whole_are_refused(change: dict[str, Any], message: str) -> None:
    whole = evaluation().to_dict()
    assert Evaluation.from_dict(whole) == evaluation()
    with pytest.raises(DataError, match=message):
        Evaluation.from_dict(whole | change)
    with pytest.raises(DataError, match="not an evaluation of format"):
        Evaluation.from_dict([whole])


def test_an_older_evaluation_is_read() -> None:
    old = evaluation().to_dict() | {"format": 1}
    for task in old["tasks"]:
        del task["skill"], task["metrics"]
    for score in old["scores"]:
        del score["cached"]
    assert Evaluation.from_dict(old) == evaluation()


def test_differences_are_shown_with_verdicts(page: str) -> None:
    assert "Against base" in page and "minus base on the same items" in page
    assert ">better<" in page.replace("\n", "").replace("      ", "") and "Δ loss" in page


def test_versions_that_are_alike_share_a_column(tmp_path: Path) -> None:
    merges = [("one", RECORD), ("two", RECORD), ("three", RECORD | {"machine": {"cpus": 64}})]
    shown = write_report(tmp_path / "a.html", title="t", evaluation=None, merges=merges).read_text()
    (heads,) = re.findall(r"<tr><th>of</th>(.*?)</tr>", shown, re.DOTALL)
    assert re.findall(r"<th>(.*?)</th>", heads) == ["one, two", "three"]
    rows = re.findall(r"<tr>\s*<td class=\"\">\s*(python|cpus)</td>(.*?)</tr>", shown, re.DOTALL)
    assert [(name, re.findall(r">\s*([\d.]+)</td>", cells)) for name, cells in rows] == [
        ("python", ["3.11", "3.11"]), ("cpus", ["2", "64"])
    ]  # fmt: skip


def test_pictures_name_their_axes_and_units(page: str) -> None:
    assert ">layer</text>" in page and "Δ loss, nats/token (lower is better)" in page


def test_a_picture_of_few_rows_has_room_for_its_label() -> None:
    few, many = (
        plots.heat_map([[1.0]] * count, list("0123456789")[:count], ["input_layernorm"], label="norm of the delta")
        for count in (2, 10)
    )
    heights = [float(re.search(r'viewBox="0 0 [\d.]+ ([\d.]+)"', drawn)[1]) for drawn in (few, many)]
    assert heights[0] >= 0.9 * heights[1]


def test_what_the_cast_swallowed_is_drawn_up_to_the_largest_of_all_merges(monkeypatch, tmp_path: Path) -> None:
    tops: list[float] = []
    monkeypatch.setattr(records, "heat_map", lambda grid, label, **how: tops.append(how.get("top", -1.0)) or "<svg/>")
    less = RECORD | {"tensors": [tensor("model.layers.0.mlp.up_proj.weight", 1.0, unchanged=0.1)]}
    write_report(tmp_path / "a.html", title="t", evaluation=None, merges=[("a", less), ("b", RECORD)])
    assert tops[2::3] == [50.0, 50.0] and tops[0::3] == [5.0, 5.0]


def test_what_an_adapters_rank_left_out_is_shown(tmp_path: Path) -> None:
    line = {"name": "model.layers.0.mlp.up_proj.weight", "shape": [4, 4], "delta_norm": 5.0, "error_norm": 3.0}
    adapter = RECORD | {"tensors": [line]}
    table = records.deltas_table([("a", records.read(adapter))])
    assert [column.name for column in table.columns[3:]] == ["left out by the rank"] and table.rows[0][3] == 60.0
    (grid,) = records.rank_grids(records.read(adapter))
    assert grid.known() == [60.0]
    page = write_report(tmp_path / "a.html", title="t", evaluation=None, merges=[("a", adapter)]).read_text()
    assert "What the adapter&#39;s rank left out" in page and "left out by the rank" in page


def test_rounding_that_is_next_to_nothing_is_drawn_faint(monkeypatch, tmp_path: Path) -> None:
    tops: list[float] = []
    monkeypatch.setattr(records, "heat_map", lambda grid, label, **how: tops.append(how.get("top", -1.0)) or "<svg/>")
    exact = tensor("model.layers.0.mlp.up_proj.weight", 1.0, unchanged=0.0001, cast_error_norm=0.0001)
    write_report(tmp_path / "a.html", title="t", evaluation=None, merges=[("a", RECORD | {"tensors": [exact]})])
    assert tops[1:] == [1.0, 1.0]


def test_layers_are_whole_numbers() -> None:
    drawn = plots.line_plot([0, 1, 2], {"one": [0.5, 1.5, 1.0]}, xlabel="layer", ylabel="norm")
    assert ">0.25<" not in drawn and ">2<" in drawn


def test_lines_are_told_apart() -> None:
    lines = {f"pair {k}": [0.1 * k, None, 0.3] for k in range(7)}
    drawn = plots.line_plot([0, 1, 2], lines, xlabel="layer", ylabel="cosine", line=0.0)
    assert drawn.startswith("<svg") and all(f"pair {k}" in drawn for k in range(7)) and "currentColor" in drawn
    assert drawn == plots.line_plot([0, 1, 2], lines, xlabel="layer", ylabel="cosine", line=0.0)
