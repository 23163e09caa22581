"""EMR and TALL: one unified model and bit masks; `OUT#task` as a model like any other."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit.checkpoints.masked import open_masked
from graftkit.checkpoints.resolve import split_task
from graftkit.checkpoints.sources import open_checkpoint
from graftkit.errors import CheckpointError, PlanError
from graftkit.execution import blocks
from graftkit.measuring.inspection import inspect
from graftkit.measuring.loading import on_disk
from graftkit.methods import get
from graftkit.testing import MethodConformance
from reference import cases as inputs
from reference import unified as reference


class TestEmr(MethodConformance):
    method = "emr"


class TestTall(MethodConformance):
    method = "tall"


PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@PROPERTY
@given(inputs.cases())
def test_emr_is_its_reference(case):
    deltas = torch.tensor(case.models - case.base)
    unified, masks = reference.emr(list(deltas.numpy()))
    merged = get("emr").function(deltas)
    np.testing.assert_array_equal(merged.numpy(), unified)
    np.testing.assert_array_equal(get("emr").masked(deltas, merged, {}).numpy(), np.stack(masks))


@PROPERTY
@given(st.data())
def test_tall_is_its_reference(data):
    case = data.draw(inputs.cases())
    shares = data.draw(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=case.count, max_size=case.count))
    deltas = torch.tensor(case.models - case.base)
    unified, masks = reference.tall(list(deltas.numpy()), shares)
    merged = get("tall").function(deltas)
    np.testing.assert_allclose(merged.numpy(), unified, rtol=1e-12, atol=1e-12 * case.largest)
    np.testing.assert_array_equal(get("tall").masked(deltas, merged, {"selectivity": shares}).numpy(), np.stack(masks))


def test_nobody_agrees_where_a_sum_is_zero_and_all_are_negative_of_each_other():
    """A zero sum elects minus, as the paper's code does."""
    deltas = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert get("emr").function(deltas).tolist() == [-1.0, 0.0]


def weights(path):
    return load_file(path / "model.safetensors")


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def family(tmp_path, request):
    return tiny.family(tmp_path, dtype=request.param)


def unify(family, out, method="emr", **more):
    options = {key: more.pop(key) for key in ("workers", "overwrite") if key in more}
    made = {"method": method, "base": str(family[0]), "models": [str(family[1]), str(family[2])], **more}
    graftkit.merge(made, out, **options)
    return out


def taken(name, out):
    """A plain checkpoint of a view."""
    graftkit.merge({"method": "passthrough", "models": [str(name)]}, out)
    return weights(out)


@pytest.mark.parametrize("rescale", ["model", "means", "tensor", "none"])
def test_a_task_is_what_the_reference_says(tmp_path, monkeypatch, family, rescale):
    monkeypatch.setattr(blocks, "BLOCK", 72)
    out = unify(family, tmp_path / "out", knobs={"rescale": rescale}, workers=2)
    base, *models = (weights(path) for path in family)
    merged = weights(out)
    deltas = {n: [(m[n].double() - base[n].double()).numpy() for m in models] for n in base}
    scales = reference.emr_scales(list(deltas.values()), rescale)
    for k, task in enumerate(("math", "code")):
        found = taken(f"{out}#{task}", tmp_path / f"plain-{task}")
        told = json.loads((out / "masks" / "index.json").read_text())["tasks"][task]["scale"]
        for n, name in enumerate(base):
            assert told[name] == pytest.approx(scales[k][n], rel=1e-12)
            mask = torch.from_numpy(reference.emr(deltas[name])[1][k])
            wide = merged[name].double() + (scales[k][n] - 1) * (merged[name].double() - base[name].double())
            exact = torch.where(mask, wide, base[name].double())
            assert found[name].dtype == merged[name].dtype
            close = 2.0**-8 if merged[name].dtype == torch.bfloat16 else 2.0**-23
            torch.testing.assert_close(found[name].double(), exact, rtol=close, atol=0)
            untouched = ~mask
            assert torch.equal(found[name][untouched], base[name][untouched])


def test_tall_takes_the_sum_where_a_model_needs_it(tmp_path, family):
    out = unify(family, tmp_path / "out", "tall", knobs={"selectivity": [0.4, 0.0]})
    base, *models = (weights(path) for path in family)
    merged = weights(out)
    for k, task in enumerate(("math", "code")):
        found = taken(f"{out}#{task}", tmp_path / f"plain-{task}")
        for name in base:
            deltas = [(m[name].double() - base[name].double()).numpy() for m in models]
            mask = torch.from_numpy(reference.tall(deltas, [0.4, 0.0])[1][k])
            assert torch.equal(found[name], torch.where(mask, merged[name], base[name]))


def test_one_model_comes_back_to_the_bit(tmp_path, family):
    made = {"method": "emr", "base": str(family[0]), "models": [str(family[1])]}
    graftkit.merge(made, tmp_path / "out")
    found = taken(tmp_path / "out#math", tmp_path / "back")
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(family[1]).items())


def test_a_model_that_agrees_nowhere_is_the_base(tmp_path):
    base = {"w": torch.zeros(5)}
    tuned = {"w": torch.ones(5)}, {"w": -0.5 * torch.ones(5)}
    paths = [tiny.save(tmp_path / name, t) for name, t in zip(("base", "a", "b"), (base, *tuned), strict=True)]
    unify(paths, tmp_path / "out")
    assert taken(tmp_path / "out#b", tmp_path / "plain-b")["w"].tolist() == [0.0] * 5
    assert taken(tmp_path / "out#a", tmp_path / "plain-a")["w"].tolist() == [1.0] * 5


@pytest.mark.parametrize("prepare", [[], ["magprune"], [{"trim": {"density": 0.4}}]], ids=str)
def test_workers_and_blocks_change_no_byte(tmp_path, monkeypatch, family, prepare):
    """Rows of preparations end within a byte of a mask."""
    one = unify(family, tmp_path / "one", workers=1, prepare=prepare)
    monkeypatch.setattr(blocks, "BLOCK", 24)
    many = unify(family, tmp_path / "many", workers=4, prepare=prepare)
    for file in ("model.safetensors", "masks/math.safetensors", "masks/code.safetensors"):
        assert (one / file).read_bytes() == (many / file).read_bytes()
    first, second = (json.loads((p / "masks" / "index.json").read_text())["tasks"] for p in (one, many))
    assert first["math"]["scale"] == pytest.approx(second["math"]["scale"], rel=1e-12)


def test_a_view_is_read_from_anywhere(tmp_path, family):
    view = open_masked(open_checkpoint(unify(family, tmp_path / "out")), "code")
    info = view.tensors["model.layers.0.mlp.up_proj.weight"]
    whole = view.read(info, 0, info.elements, np.empty(8 * info.elements, np.uint8)).copy()
    size = info.nbytes // info.elements
    for start, stop in ((0, 1), (7, 9), (8, 16), (3, 3), (101, 230), (383, 384)):
        part = view.read(info, start, stop, np.empty(8 * 384, np.uint8))
        assert part.tobytes() == whole[start * size : stop * size].tobytes()
    view.close()


def test_views_are_models_like_any_other(tmp_path, family):
    out = unify(family, tmp_path / "out")
    plain = {task: taken(f"{out}#{task}", tmp_path / f"plain-{task}") for task in ("math", "code")}
    made = {"method": "ties", "base": str(family[0])}
    graftkit.merge({**made, "models": [f"{out}#math", f"{out}#code"]}, tmp_path / "views")
    graftkit.merge(
        {**made, "models": [str(tmp_path / "plain-math"), str(tmp_path / "plain-code")]}, tmp_path / "copies"
    )
    views, copies = weights(tmp_path / "views"), weights(tmp_path / "copies")
    assert all(torch.equal(views[name], copies[name]) for name in views)
    found = inspect([f"{out}#math", f"{out}#code"], base=family[0])
    assert [facts.kind for facts in found.models] == ["view", "view"]
    assert found.changes[0].total.norm > 0
    assert not (tmp_path / "views" / "masks").exists()
    made = on_disk(f"{out}#math")
    held = load_file(f"{made}/model.safetensors")
    assert all(torch.equal(held[name], tensor) for name, tensor in plain["math"].items())
    assert on_disk(f"{out}#math") == made and on_disk(str(out)) == str(out)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))


def test_adapters_have_masks_too(tmp_path):
    base = tiny.family(tmp_path)[0]
    loras = [tiny.adapter(tmp_path / name, seed) for seed, name in enumerate(("one", "two"))]
    made = {"method": "emr", "base": str(base), "models": [str(path) for path in loras], "accept_base": True}
    graftkit.merge(made, tmp_path / "out")
    held = load_file(tmp_path / "out" / "masks" / "two.safetensors")
    assert {name.split(".")[-2] for name in held} == {"q_proj", "down_proj"}
    found = taken(tmp_path / "out#two", tmp_path / "back")
    assert torch.equal(found["model.norm.weight"], weights(base)["model.norm.weight"])


def test_models_that_are_called_alike_are_numbered(tmp_path, family):
    twin = shutil.copytree(family[1], tmp_path / "else" / "math")
    graftkit.merge(
        {"method": "emr", "base": str(family[0]), "models": [str(family[1]), str(twin), str(family[1])]},
        tmp_path / "out",
    )
    assert sorted(p.name for p in (tmp_path / "out" / "masks").iterdir()) == [
        "index.json", "math-2.safetensors", "math-3.safetensors", "math.safetensors",
    ]  # fmt: skip


def test_an_interrupted_run_goes_on_with_its_masks(tmp_path, family, monkeypatch):
    from graftkit.execution import local

    whole = unify(family, tmp_path / "whole", workers=1)
    count, cast = [0], local.cast

    def failing(*given):
        count[0] += 1
        if count[0] > 9:
            raise KeyboardInterrupt
        return cast(*given)

    monkeypatch.setattr(local, "cast", failing)
    with pytest.raises(KeyboardInterrupt):
        unify(family, tmp_path / "again", workers=1)
    assert not (tmp_path / "again").exists()
    monkeypatch.setattr(local, "cast", cast)
    again = unify(family, tmp_path / "again", workers=1)
    assert json.loads((again / "graft.json").read_text())["execution"]["resumed_steps"] == 9
    for file in ("model.safetensors", "masks/math.safetensors", "masks/code.safetensors", "masks/index.json"):
        assert (whole / file).read_bytes() == (again / file).read_bytes()


def test_what_changed_since_is_refused(tmp_path, family):
    out = unify(family, tmp_path / "out")
    with pytest.raises(CheckpointError, match="unknown task 'maths'; did you mean 'math'"):
        taken(f"{out}#maths", tmp_path / "x")
    with pytest.raises(CheckpointError, match="only a unified model with masks"):
        taken(f"{family[1]}#math", tmp_path / "x")
    base = weights(family[0])
    shutil.move(family[0], tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"the base .* is no longer in"):
        taken(f"{out}#math", tmp_path / "x")
    tiny.save(family[0], {name: tensor + 1 for name, tensor in base.items()})
    with pytest.raises(CheckpointError, match="is not the base that the masks of"):
        taken(f"{out}#math", tmp_path / "x")


def test_a_mask_that_does_not_fit_is_refused(tmp_path, family):
    out = unify(family, tmp_path / "out")
    index = out / "masks" / "index.json"
    told = json.loads(index.read_text())
    told["tasks"]["math"]["file"] = "../model.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="leaves the directory"):
        taken(f"{out}#math", tmp_path / "x")
    shutil.copy(out / "model.safetensors", out / "masks" / "weights.safetensors")
    told["tasks"]["math"]["file"] = "weights.safetensors"
    index.write_text(json.dumps(told))
    with pytest.raises(CheckpointError, match="does not fit the weights"):
        taken(f"{out}#math", tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish": ["rescale"]}, "`finish` would change the unified delta"),
        ({"output": {"as": "adapter", "rank": 4}}, "an adapter has no place for them"),
    ],
)
def test_what_masks_cannot_go_with_is_refused(family, change, message):
    made = {"method": "emr", "base": str(family[0]), "models": [str(family[1]), str(family[2])]}
    with pytest.raises(PlanError, match=message):
        graftkit.plan(made | change)


def test_a_directory_may_have_a_hash_in_its_name(tmp_path):
    (tmp_path / "a#b").mkdir()
    assert split_task("a#b", tmp_path) == ("a#b", "")
    assert split_task("a#c", tmp_path) == ("a", "c")
    assert split_task("owner/name", tmp_path) == ("owner/name", "")
