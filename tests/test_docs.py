"""Every Python block in README and docs runs, and the methods' pages say what the methods do."""

from __future__ import annotations

import doctest
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.checkpoints.headers import TensorInfo
from graftkit.checkpoints.sources import Checkpoint, open_checkpoint
from graftkit.cli import app, pages
from graftkit.methods import Method
from graftkit.methods.composition import Part
from graftkit.recipes.steps import BLOCK

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
LISTED = {name: method for name, method in pages.entries().items() if pages.built_in(method)}

each_method = pytest.mark.parametrize(("name", "method"), LISTED.items(), ids=LISTED)


def test_a_page_tells_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    row = pages.measured.Measured("math, code", "TIES, density 0.2", 0.912, 0.85, 0.961, "statistics.md")
    monkeypatch.setattr(pages.measured, "rows", lambda: {"ties": (row,)})
    assert "| math, code | TIES, density 0.2 | 0.91 [0.85, 0.96] |" in pages.page(LISTED["ties"])
    assert "[how](../statistics.md)" in pages.page(LISTED["ties"])
    assert "## Measured" not in pages.page(LISTED["dare"]) + pages.page(LISTED["prepare.trim"])


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": f"docs_{page.stem.replace('-', '_')}"}
    for k, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)):
        exec(compile(block, f"{page.name}[{k}]", "exec", dont_inherit=True), space)


def test_the_readme_names_every_method_and_every_file() -> None:
    text = (ROOT / "README.md").read_text()
    assert [m.name for m in LISTED.values() if f"`{m.name}`" not in text] == []
    listed = re.search(r"```\nsrc/graftkit/\n(.*?)```", text, re.DOTALL)
    assert listed
    folders = ("checkpoints", "methods", "recipes", "execution")
    files = [p.name for f in folders for p in (ROOT / "src/graftkit" / f).glob("*.py") if p.name != "__init__.py"]
    assert [f for f in files if f not in listed[1]] == []


def test_the_pages_of_the_methods_are_up_to_date(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["methods", "--pages", str(tmp_path)])
    assert done.exit_code == 0, done.output
    made, kept = ({p.name: p.read_text() for p in d.iterdir()} for d in (tmp_path, ROOT / "docs" / "methods"))
    assert [name for name in made.keys() | kept.keys() if made.get(name) != kept.get(name)] == [], "run `make pages`"


def test_a_plug_in_has_a_page_however_little_it_says() -> None:
    bare = Method("bare", lambda deltas: deltas[0], ("deltas",), {}, "elsewhere", "row")
    assert re.findall(r"^## (.*)", pages.page(bare), re.MULTILINE) == ["Knobs", "Cost", "Recipe", "Shapes", "Source"]
    assert not pages.built_in(bare)


@each_method
def test_a_page_has_every_part_and_the_terminal_shows_the_same(name: str, method: Method) -> None:
    assert [part for part in ("", *pages.SECTIONS) if not pages.sections(method).get(part)] == []
    assert CliRunner().invoke(app, ["methods", name]).output == pages.page(method)
    words = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", pages.page(method), re.MULTILINE)
    assert [knob for knob, _ in words] == list(method.knobs) and all(text for _, text in words)


@each_method
def test_a_pages_example_prints_what_it_says(name: str, method: Method) -> None:
    (block,) = re.findall(r"```pycon\n(.*?)```", pages.page(method), re.DOTALL)
    example = doctest.DocTestParser().get_doctest(block, {}, method.name, None, 0)
    report: list[str] = []
    assert doctest.DocTestRunner().run(example, out=report.append).failed == 0, "".join(report)


def of_factors(method: Method) -> bool:
    """Whether it merges factors of adapters unless told otherwise."""
    return "of" in method.knobs and method.knobs["of"].default == "factors"


@each_method
def test_a_pages_recipe_merges(name: str, method: Method, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every default written out, it does what the bare name does."""
    tiny.family(tmp_path)
    if of_factors(method) or "core_gram" in method.reads:
        for seed, adapter in enumerate(("math", "code")):
            shutil.rmtree(tmp_path / adapter)
            tiny.adapter(tmp_path / adapter, seed)
    if method.gates:
        tiny.gates(tmp_path / "gates.safetensors", method.gates[0], tmp_path / "math", tmp_path / "code")
    monkeypatch.chdir(tmp_path)
    told = yaml.safe_load(pages.recipe(method))
    for kind in method.measured_with_examples:
        tiny.statistics(told, kind)
    graftkit.merge(told, "out")
    bare = {key: value for key, value in told.items() if key != "knobs"}
    for kind in {"prepare", "finish"} & set(bare):
        bare[kind] = [method.name]
    graftkit.merge(bare, "bare")
    (one,), (other,) = (list((tmp_path / made).glob("*.safetensors")) for made in ("out", "bare"))
    assert one.read_bytes() == other.read_bytes()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Two families of a base and two fine-tunes with one matrix; in the large one thresholds take one pass."""
    roots, generator = {size: tmp_path_factory.mktemp("sizes") for size in (False, True)}, torch.Generator()
    for large, shape in ((False, (24, 16)), (True, (9 * BLOCK >> 10, 1 << 10))):
        base = 0.02 * torch.randn(shape, generator=generator.manual_seed(0))
        for name, change in (("base", 0.0), ("math", 0.001), ("code", 0.001)):
            tuned = (base + change * torch.randn(shape, generator=generator)).bfloat16()
            tiny.save(roots[large] / name, {"model.layers.0.mlp.up_proj.weight": tuned})
    return roots


@each_method
def test_a_page_counts_the_passes_over_the_inputs(
    name: str, method: Method, sizes: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one of the models; samples of a few blocks come on top, and are less than a pass."""
    root = sizes[bool({"threshold", "band", "signals"} & set(method.reads))]
    told, read, counts = yaml.safe_load(pages.recipe(method)), Checkpoint.read, []

    def counted(source: Checkpoint, tensor: TensorInfo, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
        counts.append((stop - start) * (source.directory.name == "math"))
        return read(source, tensor, start, stop, buffer)

    if of_factors(method):
        told |= {"knobs": {"of": "product"}, "output": {}}
    if method.gates:
        tiny.gates(root / "gates.safetensors", method.gates[0], root / "math", root / "code")
    if "core_gram" in method.reads:
        pytest.skip("of adapters, which hold no tensor of the base")
    monkeypatch.chdir(root)
    for kind in method.measured_with_examples:
        tiny.statistics(told, kind)
    monkeypatch.setattr(Checkpoint, "read", counted)
    graftkit.merge(told, tmp_path / "out", workers=1)
    elements = sum(tensor.elements for tensor in open_checkpoint(root / "math").tensors.values())
    assert sum(counts) // elements == pages.passes(method) + isinstance(method, Part)  # beside the merge's own
