"""Every Python block in README and docs runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        exec(compile(block, f"{page.name}[{k}]", "exec", dont_inherit=True), space)


def test_the_readme_names_every_method_and_every_file() -> None:
    from graftkit.methods import get, names

    text = (ROOT / "README.md").read_text()
    builtin = {n for n in names() if get(n).function.__module__.startswith("graftkit.")}
    assert all(f"`{name}`" in text for name in builtin)
    listed = re.search(r"```\nsrc/graftkit/\n(.*?)```", text, re.DOTALL)
    assert listed
    folders = ("checkpoints", "methods", "recipes", "execution")
    files = [p.name for f in folders for p in (ROOT / "src/graftkit" / f).glob("*.py") if p.name != "__init__.py"]
    assert [f for f in files if f not in listed[1]] == []
