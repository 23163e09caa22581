"""What docs/compatibility.md tells was computed from examples/orchard/compatibility.json, and that adds up."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORCHARD = ROOT / "examples" / "orchard"


@pytest.fixture(autouse=True)
def orchard_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ORCHARD))
    for name in ("compatibility_page",):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def found() -> dict[str, Any]:
    return dict(json.loads((ORCHARD / "compatibility.json").read_text()))


def test_the_page_says_what_was_measured(found: dict[str, Any]) -> None:
    import compatibility_page as page

    text = page.PAGE.read_text(encoding="utf-8")
    assert page.section(found) in text, "run examples/orchard/compatibility_study.py --page"
    named = set(re.findall(r"\]\(compatibility/(.*?)\)", text))
    assert named == {path.name for path in page.PICTURES.iterdir()} == set(page.pictures(found))


def test_every_predictor_is_explained() -> None:
    from graftkit.improving.ranking_rule import PREDICTORS

    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").partition("<!-- measured -->")[0]
    assert [name for name in PREDICTORS if f"| `{name}`" not in text and f", `{name}` |" not in text] == []


def test_the_correlations_follow_from_the_pairs(found: dict[str, Any]) -> None:
    from scipy.stats import spearmanr

    gains = found["gains"]["task_arithmetic"]
    assert len(gains) == len(found["experts"]) * (len(found["experts"]) - 1) // 2 >= 28
    for pair, one in gains.items():
        assert one["gain"] == pytest.approx(one["merged"] - one["single"])
        assert set(found["predictors"][pair]) == set(found["better"])
    for name, told in found["spearman"]["task_arithmetic"]["all"].items():
        values = [found["predictors"][pair][name] for pair in gains]
        if None in values:
            continue
        sign = 1 if found["better"][name] == "higher" else -1
        made = spearmanr(values, [one["gain"] for one in gains.values()]).statistic
        assert told["value"] == pytest.approx(sign * made) and told["low"] <= told["value"] <= told["high"]


def test_bad_experts_are_in_it(found: dict[str, Any]) -> None:
    assert {"shuffled", "overheated", "mislabelled"} <= {name for name, one in found["experts"].items() if one["note"]}
    assert len(found["experts"]) >= 8


def test_a_target_of_one_task_is_a_pair_on_one_of_its_skills(found: dict[str, Any]) -> None:
    alone = found["one_task"]
    gains = alone["gains"]["task_arithmetic"]
    assert set(gains) == set(alone["predictors"])
    for pair, one in found["gains"]["task_arithmetic"].items():
        own = [value for key, value in gains.items() if key.rpartition(" on ")[0] == pair]
        assert len(own) == len({found["experts"][name]["skill"] for name in pair.split("+")})
        assert one["merged"] == pytest.approx(sum(value["merged"] for value in own) / len(own))
        assert one["gain"] >= sum(value["gain"] for value in own) / len(own) - 1e-9  # one expert is not best on both
