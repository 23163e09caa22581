"""What a hostile tester found, once each: inputs that vanish, lie, change or hide, and outputs in the wrong place."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import graftkit
import tiny
from graftkit.checkpoints import storage
from graftkit.checkpoints.sink import JOURNAL, Sink
from graftkit.cli import app, main
from graftkit.errors import CheckpointError, GraftError, OutputError, PlanError
from graftkit.recipes.recipe import load


def average(*models: Path) -> dict:
    return {"method": "average", "models": list(map(str, models))}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nested(tmp_path: Path) -> Path:
    """A recipe in its own directory whose model is another recipe over `data/`."""
    tiny.family(tmp_path / "data")
    other = tiny.save(tmp_path / "other", tiny.weights(7))
    (tmp_path / "recipes").mkdir()
    inner = f"method: average\nmodels: [{tmp_path}/data/math, {tmp_path}/data/code]\n"
    (tmp_path / "recipes" / "inner.yaml").write_text(inner)
    return tiny.recipe(tmp_path / "recipes", f"method: average\nmodels: [inner.yaml, {other}]\n")


def test_inputs_of_nested_recipes_and_the_recipe_itself_are_not_overwritten(tmp_path: Path, cache: Path) -> None:
    recipe = nested(tmp_path)
    for place in ("data", "data/math", "recipes", "."):
        with pytest.raises(OutputError, match="an input of this merge"):
            graftkit.merge(recipe, tmp_path / place, overwrite=True)
    assert (tmp_path / "data" / "math" / "model.safetensors").is_file() and recipe.is_file()


def test_weights_behind_a_symbolic_link_are_not_overwritten(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    (tmp_path / "store").mkdir()
    (family[1] / "model.safetensors").rename(tmp_path / "store" / "blob.safetensors")
    (family[1] / "model.safetensors").symlink_to(tmp_path / "store" / "blob.safetensors")
    with pytest.raises(OutputError, match="an input of this merge"):
        graftkit.merge(average(family[1], family[2]), tmp_path / "store", overwrite=True)


def test_overwrite_replaces_models_only(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years")
    with pytest.raises(OutputError, match="replaces models only"):
        graftkit.merge(average(family[1], family[2]), tmp_path / "thesis", overwrite=True)


def test_what_appears_under_the_final_name_meanwhile_is_kept(tmp_path: Path) -> None:
    layout = [("a.safetensors", [("one", "F32", (2,))])]
    sink = Sink(tmp_path / "out", layout, "plan")
    sink.write("one", 0, bytes(8))
    sink.finish("one", {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="holds files already"):
        sink.complete()
    sink.close()
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years"


def test_a_journal_is_no_proof_of_a_file(tmp_path: Path) -> None:
    layout = [("a.safetensors", [("one", "F32", (2,))]), ("b.safetensors", [("two", "F32", (2,))])]
    sink = Sink(tmp_path / "out", layout, "plan")
    sink.finish("one", {})
    sink.finish("two", {})
    sink.close()
    (tmp_path / ".out.graft-partial" / "a.safetensors").unlink()
    again = Sink(tmp_path / "out", layout, "plan")
    assert set(again.done) == {"two"}
    again.close()


def test_a_change_that_samples_do_not_see_starts_a_killed_run_anew(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    recipe = average(family[1], family[2])
    planned = graftkit.plan(recipe)
    graftkit.execute(planned, tmp_path / "out")
    partial = tmp_path / ".out.graft-partial"
    (tmp_path / "out").rename(partial)
    state = graftkit.plan(recipe)
    from graftkit.recipes.inputs import signature

    lines = [
        {
            "plan": f"{state.hash} {signature(state.sources)}",
            "boot": __import__("graftkit.checkpoints.sink", fromlist=["x"]).boot_id(),
        }
    ]
    lines += [{"tensor": s.name, "record": {"method": s.method}} for s in state.steps]
    (partial / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    file = family[1] / "model.safetensors"
    os.utime(file, ns=(1, 1))  # as any write would
    assert graftkit.merge(recipe, tmp_path / "out")["execution"]["resumed_steps"] == 0


def test_a_broken_cache_of_a_nested_recipe_is_made_again(tmp_path: Path, cache: Path) -> None:
    recipe = nested(tmp_path)
    graftkit.merge(recipe, tmp_path / "one")
    held = next((cache / "merges").glob("*/model.safetensors"))
    held.unlink()
    graftkit.merge(recipe, tmp_path / "two")
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_a_quantised_model_is_refused_in_the_plan_on_either_side(tmp_path: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    quantised = tiny.weights(1) | {name: torch.ones(16, 16).to(dtype)}
    a, b = tiny.save(tmp_path / "a", tiny.weights(0)), tiny.save(tmp_path / "b", quantised)
    for pair in ((a, b), (b, a)):
        with pytest.raises(PlanError, match=r"q_proj.*(quantised|dequantise)"):
            graftkit.plan(average(*pair))


def test_a_model_that_is_the_base_itself_contributes_nothing(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    recipe = {"method": "task_arithmetic", "base": str(family[0]), "models": [str(family[0]), str(family[1])]}
    with pytest.raises(PlanError, match="contributes nothing"):
        graftkit.plan(recipe)


@pytest.mark.parametrize(
    "setting", [{"layer_replication": [[0, 2]]}, {"use_qalora": True}, {"lora_alpha": "x"}, {"alpha_pattern": {"[": 3}}]
)
def test_settings_that_change_an_adapters_meaning_are_refused(tmp_path: Path, setting: dict) -> None:
    base = tiny.save(tmp_path / "base", tiny.weights(0))
    lora = tiny.adapter(tmp_path / "lora", 0, **setting)
    with pytest.raises(CheckpointError, match=r"lora"):
        graftkit.plan({"method": "task_arithmetic", "base": str(base), "models": [str(lora)]})


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # PEFT on transformers 5
def test_an_adapter_of_the_embedding_as_peft_saves_it(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    untied = tiny.weights(0, dtype=torch.float32) | {"lm_head.weight": torch.randn(40, 16)}
    base = tiny.save(tmp_path / "base", untied, config={"dtype": "float32", "tie_word_embeddings": False})
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["embed_tokens", "lm_head", "q_proj"], init_lora_weights=False
    )
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=True)
    graftkit.merge(
        {"method": "task_arithmetic", "base": str(base), "models": [str(tmp_path / "lora")]}, tmp_path / "out"
    )
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), model.merge_and_unload().state_dict()
    assert set(ours) == set(theirs) and all(torch.allclose(ours[n], theirs[n], atol=1e-5) for n in ours)


def test_numbers_as_people_write_them_and_merge_keys(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    text = "x: &x {model: MATH, weight: 1e-3}\n".replace("x: ", "")
    recipe = load(
        f"method: ties\nbase: {family[0]}\nmodels:\n  - {text}  - {{<<: *x, model: {family[2]}}}\n".replace(
            "MATH", str(family[1])
        )
    )
    assert [entry.knobs for entry in recipe.models] == [{"weight": 0.001}, {"weight": 0.001}]


def test_a_common_list_of_the_wrong_length_is_refused(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    models = [{"model": str(family[1]), "weight": 0.3}, str(family[2])]
    for values in ([], [1.0], [1.0, 2.0, 3.0]):
        recipe = {"method": "ties", "base": str(family[0]), "models": models, "knobs": {"weight": values}}
        with pytest.raises(GraftError, match="values for 2 models"):
            graftkit.plan(recipe)


def test_places_where_nothing_can_be_written_are_said(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / ".out.graft-partial").symlink_to(family[1])
    for place in ("file/x", "x" * 300, "out"):
        with pytest.raises(OutputError):
            graftkit.merge(average(family[1], family[2]), tmp_path / place)
    assert (family[1] / "model.safetensors").is_file()


def test_an_output_that_is_a_link_or_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.family(tmp_path / "family")
    recipe = tiny.recipe(tmp_path / "family", "method: average\nmodels: [math, code]\n")
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("link", "dangling"):
        with pytest.raises(OutputError, match=f"{name}: is a symbolic link"):
            graftkit.merge(recipe, tmp_path / name)
    monkeypatch.chdir(tmp_path / "empty" / "deeper")
    for place in (".", "", ".."):
        with pytest.raises(OutputError, match="is where you are"):
            graftkit.merge(recipe, place, overwrite=True)


@pytest.mark.parametrize("name", ["über 模型", "new\nline", "--out", "a'b\"c", "x" * 240])
def test_outputs_of_any_name(tmp_path: Path, name: str) -> None:
    family = tiny.family(tmp_path / "family")
    made = graftkit.merge(average(family[1], family[2]), tmp_path / name)
    assert json.loads((tmp_path / name / "graft.json").read_text()) == made


def test_a_model_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = tiny.family(tmp_path)

    def forbidden(directory: Path) -> list[str]:
        raise PermissionError(13, "Permission denied", str(directory))

    monkeypatch.setattr(os, "listdir", forbidden)  # tests may run as root, whom no mode stops
    with pytest.raises(CheckpointError, match=r"math: cannot be read \(Permission denied\)"):
        graftkit.plan(average(family[1], family[2]))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_fills_up_is_said_once(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "out", [("a.safetensors", [("one", "F32", (2,))])], "plan")
    sink._journal.close()
    sink._journal = open("/dev/full", "w")
    with pytest.raises(OutputError, match="the disk is full"):
        sink.finish("one", {})
    sink.close()  # with the line still in its buffer


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_behind_the_printed_text_is_one_sentence() -> None:
    program = [sys.executable, "-c", "from graftkit.cli import main; main()", "methods"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.splitlines() == ["graft: the output: the disk is full; free some room"]


def test_a_name_that_no_disk_takes_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(
        sys, "argv", ["graft", "subsample", str(tmp_path / "d.jsonl"), str(tmp_path / ("x" * 300)), "-n", "1"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2


@pytest.mark.parametrize("command", ["evaluate m -t d", "compatibility m -d d", "adamerging r o", "subsample d o -n 1"])
def test_seeds_are_not_negative(command: str) -> None:
    done = CliRunner().invoke(app, [*command.split(), "--seed", "-1"])
    assert done.exit_code == 2 and "--seed" in done.output and "Traceback" not in done.output


def test_a_bare_backbone_with_a_head_is_matched(tmp_path: Path) -> None:
    whole = tiny.weights(0) | {"lm_head.weight": torch.ones(40, 16, dtype=torch.bfloat16)}
    bare = {n.removeprefix("model."): t for n, t in whole.items()}
    settings = {"tie_word_embeddings": False}
    a, b = tiny.save(tmp_path / "a", whole, config=settings), tiny.save(tmp_path / "b", bare, config=settings)
    graftkit.merge(average(a, b), tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(whole)


def test_a_header_that_is_no_header(tmp_path: Path) -> None:
    for text in (
        b'{"a":{"dtype":["F32"],"shape":[1],"data_offsets":[0,4]}}',
        b"[" * 100_000,
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}",
    ):
        (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0\0\0\0")
        with pytest.raises(CheckpointError):
            graftkit.plan(average(tmp_path))


@pytest.mark.parametrize("shape", [[2**62, 2**62, 0], [0, 2**62, 2**62], [2**63, 0], [1] * 65])
def test_a_shape_that_no_tensor_has(tmp_path: Path, shape: list[int]) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}}).encode()
    data = b"\0" * 4 * math.prod(shape)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(CheckpointError, match=r"tensor 'a' of shape .* copy it anew"):
        graftkit.plan(average(tmp_path))


def test_an_output_that_will_lack_its_config_is_announced(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    recipe = average(family[1], family[2])
    assert graftkit.plan(recipe).notes == ()
    (family[1] / "config.json").unlink()
    (note,) = graftkit.plan(recipe).notes
    assert "math' has no config.json" in note and "transformers cannot load it" in note
    assert graftkit.plan(recipe | {"output": {"like": str(family[2])}}).notes == ()
    assert graftkit.merge(recipe, tmp_path / "out")["notes"] == [note]


def test_models_of_integers_are_not_merged(tmp_path: Path) -> None:
    one, other = (tiny.save(tmp_path / name, {"a": torch.arange(4)}) for name in ("one", "other"))
    with pytest.raises(PlanError, match="no tensor would be merged; the models hold no tensor of floating point"):
        graftkit.plan(average(one, other))


def test_a_copy_of_the_base_is_told_and_by_what_it_was_recognised(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    twin = tiny.save(tmp_path / "twin", load_file(family[0] / "model.safetensors"))
    recipe = {"method": "task_arithmetic", "base": str(family[0]), "models": [str(family[1]), str(twin)]}
    (sampled,), (whole,) = (graftkit.plan(recipe, full_hash=full).notes for full in (False, True))
    assert "twin' looks the same as the base, by samples" in sampled
    assert "twin' is the same as the base, byte for byte" in whole


def test_a_method_that_cannot_do_what_its_knobs_ask_says_so(tmp_path: Path) -> None:
    family = tiny.family(tmp_path)
    models = [{"model": str(family[1]), "weight": 1}, {"model": str(family[2]), "weight": -1}]
    with pytest.raises(GraftError, match="nuslerp"):
        graftkit.merge({"method": "nuslerp", "models": models}, tmp_path / "out")


SIXTEEN = {"bfloat16": (torch.bfloat16, 2.0**-7), "float16": (torch.float16, 2.0**-10)}


@pytest.mark.parametrize("where", ["base", "model"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_float64_inputs_are_rounded_once(tmp_path: Path, dtype: str, where: str) -> None:
    """Just beside the middle of two neighbours: rounded to float32 on the way, it would become the middle."""
    narrow, step = SIXTEEN[dtype]
    base = {n: torch.ones(s, dtype=torch.float64) for n, s in tiny.shapes().items()}
    for side in (1, -1):
        wanted = 1 + 1.5 * step + side * 2.0**-40
        tuned = {n: torch.full_like(t, wanted) for n, t in base.items()}
        whole, cut = (base, tuned) if where == "model" else (tuned, base)
        a = tiny.save(tmp_path / f"a{side}", {n: t.to(narrow) for n, t in whole.items()} if where == "model" else whole)
        b = tiny.save(tmp_path / f"b{side}", cut if where == "model" else {n: t.to(narrow) for n, t in cut.items()})
        models = [{"model": str(b), "weight": 1.0 if where == "model" else 1e-30}]
        recipe = {"method": "task_arithmetic", "base": str(a), "models": models, "output": {"dtype": dtype}}
        graftkit.merge(recipe, tmp_path / f"out{side}")
        for tensor in load_file(tmp_path / f"out{side}" / "model.safetensors").values():
            assert (tensor.double() == 1 + (2 if side > 0 else 1) * step).all()


def test_a_copied_float64_tensor_is_rounded_once(tmp_path: Path) -> None:
    base = tiny.weights(0, dtype=torch.float64)
    base["model.norm.weight"] = torch.full((16,), 1 + 2.0**-8 + 2.0**-40, dtype=torch.float64)
    directory, lora = tiny.save(tmp_path / "base", base), tiny.adapter(tmp_path / "lora", 0)
    recipe = {"method": "task_arithmetic", "base": str(directory), "models": [str(lora)], "accept_base": True}
    graftkit.merge(recipe | {"output": {"dtype": "bfloat16"}}, tmp_path / "out")
    assert (load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"].double() == 1 + 2.0**-7).all()


def test_float64_to_bfloat16_is_the_nearest() -> None:
    every = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double().numpy()
    low, high = every[:-1], every[1:]
    middle = (low + high) / 2
    for wide, nearest in (
        (middle, np.where(np.arange(len(low)) % 2, high, low)),  # ties to even
        (np.nextafter(middle, 0), low),
        (np.nextafter(middle, np.inf), high),
        (low, low),
    ):
        for sign in (1, -1):
            raw = storage.narrow(sign * wide, "BF16", np.empty(8 * wide.size, np.uint8))
            assert np.array_equal(storage.as_float(raw, "BF16", np.float64), sign * nearest)


def test_weights_beside_the_largest_number(tmp_path: Path) -> None:
    """A mean of them is finite, and so is a step from one end to the other; beyond the end is refused."""
    high = {n: torch.full(s, 3e38, dtype=torch.bfloat16) for n, s in tiny.shapes().items()}
    a, b = tiny.save(tmp_path / "a", high), tiny.save(tmp_path / "b", high)
    low = tiny.save(tmp_path / "low", {n: -t for n, t in high.items()})
    recipe = {"method": "ties", "base": str(low), "models": [str(a)], "knobs": {"density": 1}}
    for name, whole in (("mean", average(a, b)), ("step", recipe)):
        graftkit.merge(whole, tmp_path / name)
        assert all(torch.equal(t, high[n]) for n, t in load_file(tmp_path / name / "model.safetensors").items())
    with pytest.raises(CheckpointError, match="the result is not finite in BF16"):
        graftkit.merge({**recipe, "knobs": {"density": 1, "scale": 1.5}}, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_saving_again_gives_the_same_file(tmp_path: Path) -> None:
    """The tests' own writer and ours agree, so that byte comparisons here mean something."""
    made = tiny.weights(3)
    save_file(made, tmp_path / "a.safetensors", metadata={"format": "pt"})
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
