"""The page of the gates' experiment: shares, differences and verdicts from results made up here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "orchard"))
from gates_page import write_page
from gates_rows import BUDGETS, SCENARIOS
from gates_scores import gain, kept, told, verdict

SKILLS = ["math", "code"]


def items(loss: float, seed: int = 0) -> list[list[float]]:
    """Losses of items about a mean per token, the same noise wherever the seed is the same."""
    noise = np.random.default_rng(seed).uniform(-0.1, 0.1, 12)
    return [[float((loss + n) * 5), 5] for n in noise]


def row(math: float, code: float, **more: Any) -> dict[str, Any]:
    test = {"math": items(math), "code": items(code, 1), "text": items(2.0), "mmlu": [[1, 1], [0, 1]]}
    return {"test": test, **more}


@pytest.fixture
def held() -> dict[str, Any]:
    """Base at 2, experts at 1; a sum that keeps half of both, and a regression that keeps nine tenths."""
    rows = {
        "base": row(2, 2),
        "expert math": {"test": {"math": items(1)}},
        "expert code": {"test": {"code": items(1, 1)}},
        "task arithmetic": row(1.5, 1.5, chosen={"scale": 0.5}),
        "RegMean": row(1.1, 1.1, statistics={"bytes": 2e9, "cpu_seconds": 50.0}),
        "core RegMean": row(1.0, 1.2, statistics={"bytes": 1e7, "cpu_seconds": 40.0}, merging=2.0),
    }
    budget = {"dev": 2, "samples": 3, "steps": 4}
    told_of = {"scenario": "four", "skills": SKILLS, "rows": rows, "budget": budget, "seed": 0}
    return {"four page": {**told_of, "versions": {"torch": "0"}}}


def test_the_base_keeps_nothing_and_an_expert_all(held: dict[str, Any]) -> None:
    own = held["four page"]
    assert np.allclose(gain(own, "base", "math"), 0) and np.allclose(gain(own, "expert math", "math"), 1)
    assert kept(own, "core RegMean")[0] == pytest.approx(0.9)
    assert gain(own, "core RegMean", "code")[0] == pytest.approx(0.8)


def test_a_difference_is_paired(held: dict[str, Any]) -> None:
    """Items that are hard for all rows widen each score, and leave what lies between two rows alone."""
    own = held["four page"]
    gap = kept(own, "RegMean") - kept(own, "task arithmetic")
    assert verdict(gap) == "above" and verdict(-gap) == "below"
    assert verdict(kept(own, "RegMean") - kept(own, "core RegMean")) == "not told apart from"
    assert np.ptp(gap) < np.ptp(kept(own, "task arithmetic")) / 3 + 1e-9
    assert told(gap).startswith("0.400 [")


def test_the_page_says_what_was_reached_and_what_was_not(held: dict[str, Any], tmp_path: Path) -> None:
    write_page(held, tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "minus task arithmetic: 0.400" in page and "above it;" in page
    assert "200 times smaller than RegMean's 2000 MB, as was wanted" in page
    held["four page"]["rows"]["core RegMean"]["statistics"]["bytes"] = 4e7
    write_page(held, tmp_path / "page.md")
    assert "50 times smaller than RegMean's 2000 MB, and 100 was wanted" in (tmp_path / "page.md").read_text()
    assert "core RegMean" in (tmp_path / "experiment-graft.svg").read_text()


def test_rows_have_names_of_their_own_and_start_from_rows_before() -> None:
    for scenario in SCENARIOS:
        names = [own.name for own in scenario.rows]
        assert len(set(names)) == len(names)
        assert all(own.start in names[: names.index(own.name)] for own in scenario.rows if own.start)
    assert {"small", "page", "full"} == set(BUDGETS)
