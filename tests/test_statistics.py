"""Statistics of examples: measured as activations have them, kept, found again, refused when stale; merged by."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import graftkit
import talker
import tiny
from graftkit.checkpoints.adapters import open_adapter
from graftkit.checkpoints.statistics import About, all_statistics, open_statistics, write_statistics
from graftkit.cli import app
from graftkit.errors import CheckpointError, DataError, NonFiniteError, OutputError, PlanError
from graftkit.execution.features import packed, probes, roots, span_of, unpacked
from graftkit.measuring.activations import Listener, batches, linear_layers, run
from graftkit.measuring.encoding import Row
from graftkit.measuring.layerwise import Layers
from graftkit.measuring.statistics import collect
from graftkit.measuring.statistics_fisher import diagonal
from graftkit.measuring.statistics_grams import checked_form, moments_of
from graftkit.recipes.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT on transformers 5

ROWS = [Row((1, 2, 3), ((4,),), (0,)), Row((5,), ((6, 7, 8, 9, 10),), (1,)), Row((11, 12), ((13,),), (2,))]


def live(directory: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


# Forms


@pytest.mark.parametrize("width", [1, 5, 256, 300])
def test_full_moments_are_the_mean_of_products_and_symmetric(width: int) -> None:
    inputs = torch.randn(40, width)
    held = moments_of("full", width, "cpu")
    for part in inputs.split(7):
        held.add(part)
    got = held.mean()
    np.testing.assert_allclose(got, (inputs.double().T @ inputs.double() / 40).numpy(), atol=1e-5)
    assert (got == got.T).all()


@pytest.mark.parametrize(("width", "size"), [(8, 4), (10, 4), (3, 8)])
def test_blocks_are_those_of_the_full_moments(width: int, size: int) -> None:
    inputs, held = torch.randn(20, width), moments_of(f"block:{size}", width, "cpu")
    held.add(inputs)
    full, got = (inputs.T @ inputs / 20).numpy(), held.mean()
    for k, block in enumerate(got):
        ends = slice(k * size, min((k + 1) * size, width))
        n = full[ends, ends].shape[0]
        np.testing.assert_allclose(block[:n, :n], full[ends, ends], atol=1e-6)
        assert not block[n:].any() and not block[:, n:].any()


def test_a_sketch_keeps_the_diagonal_and_all_of_a_low_rank() -> None:
    inputs = torch.randn(50, 6) @ torch.randn(6, 40)
    held = moments_of("sketch:10", 40, "cpu")
    held.add(inputs)
    got, full = held.mean(), (inputs.T @ inputs / 50).numpy()
    made = got[:, :-1] @ got[:, :-1].T + np.diag(got[:, -1])
    np.testing.assert_allclose(made, full, atol=2e-3 * np.abs(full).max())
    np.testing.assert_allclose(np.diagonal(made), np.diagonal(full), rtol=1e-4)
    assert (got[:, -1] >= 0).all()


def test_a_form_that_is_none_is_refused() -> None:
    for form in ("", "blocks", "block:0", "sketch", "full:3"):
        with pytest.raises(DataError, match="expected full, block:SIZE"):
            checked_form(form)


# Layer by layer


@pytest.mark.parametrize("batch_tokens", [7, 100])
def test_layer_by_layer_hears_what_one_pass_hears(tmp_path: Path, batch_tokens: int) -> None:
    base, *_ = tiny.family(tmp_path, dtype=torch.float32)
    model = live(base)
    names = [f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in ("self_attn.o_proj", "mlp.down_proj")]
    layers, whole, single = linear_layers(model, names), {}, {}
    heard = {name: whole.setdefault(name, []) for name in names}
    run(model, ROWS, [Listener(layers[n], heard[n].append) for n in names], batch_tokens=batch_tokens)
    (tmp_path / "spool").mkdir()
    passes, told = Layers(model, list(batches(ROWS, batch_tokens)), tmp_path / "spool"), []
    passes.start(told.append)
    for number in (0, 1):
        own = [n for n in names if f"layers.{number}." in n]
        assert {passes.of(layers[n]) for n in own} == {number}
        passes.through(number, [Listener(layers[n], single.setdefault(n, []).append) for n in own], told.append)
    for name in names:
        torch.testing.assert_close(torch.cat(single[name]), torch.cat(whole[name]), rtol=0, atol=1e-6)
    assert sum(told) == 3 * len(ROWS)
    run(model, ROWS, [], batch_tokens=100)  # as it was before


# Fisher


def test_fisher_is_the_mean_of_squared_scores(tmp_path: Path) -> None:
    """Against the exact sum over all tokens of a vocabulary, for one place: many draws come near it."""
    base, *_ = tiny.family(tmp_path, dtype=torch.float32)
    model, name = live(base), "model.layers.1.mlp.down_proj.weight"
    row = Row((3,), ((),), (0,))
    found = diagonal(model, [row] * 200, [name, "model.norm.weight"], seed=1)
    weight = model.get_parameter(name)
    predicted = model(input_ids=torch.tensor([[3]])).logits[0, 0].log_softmax(-1)
    exact = torch.zeros_like(weight)
    for token in range(len(predicted)):
        (slope,) = torch.autograd.grad(predicted[token], weight, retain_graph=True)
        exact += predicted[token].exp().detach() * slope.square()
    got = found.values[name]
    assert float((got - exact).norm() / exact.norm()) < 0.3
    assert found.values["model.norm.weight"].shape == (tiny.HIDDEN,)
    everything = torch.cat([value.reshape(-1) for value in found.values.values()])
    assert found.scale == pytest.approx(float(everything.square().mean().sqrt()), rel=1e-5)


def test_fisher_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    base, *_ = tiny.family(tmp_path, dtype=torch.float32)
    name = "model.embed_tokens.weight"
    one, same, other = (diagonal(live(base), ROWS, [name], seed=seed).values[name] for seed in (0, 0, 1))
    assert bool((one == same).all()) and not bool((one == other).all())


# From a recipe to a merge


def saved(model: object, place: Path) -> str:
    model.save_pretrained(place)  # type: ignore[attr-defined]
    talker.tokenizer().save_pretrained(place)
    return str(place)


def examples(root: Path, name: str, *texts: str) -> str:
    (root / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": t, "answer": f" {t}!"}) + "\n" for t in texts))
    return str(root / f"{name}.jsonl")


@pytest.fixture
def experts(tmp_path: Path) -> dict[str, object]:
    """A base, two adapters on it, the same two as full models, and examples of two domains."""
    base = saved(talker.tiny(), tmp_path / "base")
    adapters, whole = [], []
    for k, name in enumerate(("one", "two")):
        below = talker.tiny()
        torch.manual_seed(k)  # of the adapter
        config = LoraConfig(r=3 + k, lora_alpha=6, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        model = get_peft_model(below, config)
        model.save_pretrained(tmp_path / name)
        adapters.append(str(tmp_path / name))
        whole.append(saved(model.merge_and_unload(), tmp_path / f"{name}-whole"))
    data = [
        examples(tmp_path, "a", "the cat sat on the mat", "two and two make four"),
        examples(tmp_path, "b", "Berlin is a city", "what is the capital of France?", "Paris"),
    ]
    return {"base": base, "adapters": adapters, "whole": whole, "data": data}


def recipe(experts: dict, models: str, method: str, directory: Path, **more: object) -> Path:
    beside = [{"model": m, "data": d} for m, d in zip(experts[models], experts["data"], strict=True)]
    told = {"method": method, "base": experts["base"], "models": beside, "accept_base": models == "adapters", **more}
    directory.mkdir(exist_ok=True)
    return tiny.recipe(directory, json.dumps(told))


def made(experts: dict, models: str, method: str, directory: Path, **more: object) -> tuple[Path, dict[str, object]]:
    path = recipe(experts, models, method, directory, **more)
    return path, {one.file.name: one for one in collect(path, device="cpu")}


def inputs_of(place: str, data: str, name: str) -> torch.Tensor:
    """What a layer of a model on disk gets, one example at a time, float64 [tokens, in]."""
    from graftkit.data.tasks import load_task
    from graftkit.measuring.encoding import encode

    model, heard = live(Path(place)), []
    layer = linear_layers(model, [name])[name]
    handle = layer.register_forward_pre_hook(lambda module, inputs: heard.append(inputs[0][0]))
    with torch.inference_mode():
        for row in encode(talker.tokenizer(), load_task(data), 256):
            model(input_ids=torch.tensor([row.layout()[0]]))
    handle.remove()
    return torch.cat(heard).double()


def weights(place: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(place) / "model.safetensors")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"])
def test_regmean_answers_each_models_inputs_best(experts: dict, tmp_path: Path, name: str) -> None:
    """No small change of a merged matrix comes nearer to what the models answer on their own inputs."""
    knobs = {"alpha": 1.0, "ridge": 1e-6}
    path, files = made(experts, "whole", "regmean", tmp_path / "r", knobs=knobs, output={"dtype": "float32"})
    assert set(files) == {"one-whole.gram.safetensors", "two-whole.gram.safetensors"}
    graftkit.merge(path, tmp_path / "out")
    inputs = [inputs_of(place, data, name) for place, data in zip(experts["whole"], experts["data"], strict=True)]
    tuned = [weights(place)[name].double() for place in experts["whole"]]
    merged = weights(tmp_path / "out")[name].double()

    def error(matrix: torch.Tensor) -> float:
        return sum(float((x @ (matrix - own).T).square().sum() / len(x)) for x, own in zip(inputs, tuned, strict=True))

    best = error(merged)
    for seed in range(20):
        step = torch.randn(merged.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert error(merged + 1e-3 * step) >= best * (1 - 1e-5)
    assert best < error(sum(tuned) / 2)


def test_moments_are_stored_once_where_inputs_are_shared(experts: dict, tmp_path: Path) -> None:
    made(experts, "whole", "regmean", tmp_path / "r")
    held = open_statistics(tmp_path / "r" / "statistics" / "one-whole.gram.safetensors")
    assert len(held.tensors) == 2 * 4 and len(held.about.shared) == 2 * 3
    assert held.about.samples == 2 and held.about.tokens > 10 and held.about.form == "full"
    name = "model.layers.1.self_attn.v_proj.weight"
    inputs = inputs_of(experts["whole"][0], experts["data"][0], name)
    np.testing.assert_allclose(held.values(name), (inputs.T @ inputs / len(inputs)).numpy(), rtol=1e-3, atol=1e-4)
    assert held.about.tokens == len(inputs)


def test_adapters_and_the_same_full_models_merge_alike(experts: dict, tmp_path: Path) -> None:
    out = {}
    for models in ("whole", "adapters"):
        path, _ = made(experts, models, "regmean", tmp_path / models, output={"dtype": "float32"})
        graftkit.merge(path, tmp_path / f"{models}-out")
        out[models] = weights(tmp_path / f"{models}-out")
    for name, own in out["whole"].items():
        torch.testing.assert_close(own, out["adapters"][name], atol=2e-4, rtol=1e-3)


NAME = "model.layers.1.mlp.down_proj.weight"
FEW = {"knobs": {"probes": 5, "rank": 2}}


def within(experts: dict, features: np.ndarray) -> torch.Tensor:
    """What `core_regmean` should make of NAME: by the function, from inputs projected on the span of some features."""
    span, roots = torch.from_numpy(np.linalg.pinv(features) @ features), []
    for place, data in zip(experts["whole"], experts["data"], strict=True):
        inputs = inputs_of(place, data, NAME)
        roots.append(torch.linalg.qr(inputs @ span / len(inputs) ** 0.5, mode="r").R)
    rows = max(map(len, roots))
    stack = torch.stack([torch.nn.functional.pad(own, (0, 0, 0, rows - len(own))) for own in roots])
    tuned = torch.stack([weights(place)[NAME] for place in experts["whole"]]).double()
    method = graftkit.methods.get("core_regmean")
    return method.run(base=weights(experts["base"])[NAME].double(), models=tuned, core_gram=stack)


def test_core_regression_is_the_regression_within_what_adapters_read(experts: dict, tmp_path: Path) -> None:
    """As an adapter, as a checkpoint, and by the function on dense deltas with projected inputs: one result."""
    whole = {"as": "adapter", "rank": "exact"}
    path, _ = made(experts, "adapters", "core_regmean", tmp_path / "r", output=whole, **FEW)
    record = graftkit.merge(path, tmp_path / "adapter")
    assert {line["rank"] for line in record["tensors"] if line["method"]} == {7}
    dense = recipe(experts, "adapters", "core_regmean", tmp_path / "r", output={"dtype": "float32"}, **FEW)
    graftkit.merge(dense, tmp_path / "dense")
    sum_of = {"method": "task_arithmetic", "base": experts["base"], "models": [str(tmp_path / "adapter")]}
    graftkit.merge({**sum_of, "accept_base": True, "output": {"dtype": "float32"}}, tmp_path / "applied")
    factors = [open_adapter(Path(place)).load(NAME, np.float64).right for place in experts["adapters"]]
    wanted = within(experts, np.concatenate([*factors, probes(48, 5)]))
    for out in ("dense", "applied"):
        torch.testing.assert_close(weights(tmp_path / out)[NAME].double(), wanted, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(
        weights(tmp_path / "dense")[NAME], weights(tmp_path / "applied")[NAME], atol=1e-5, rtol=1e-5
    )


def test_core_regression_of_full_models_sees_the_main_directions_of_their_deltas(experts: dict, tmp_path: Path) -> None:
    path, files = made(experts, "whole", "core_regmean", tmp_path / "r", output={"dtype": "float32"}, **FEW)
    graftkit.merge(path, tmp_path / "out")
    base = weights(experts["base"])[NAME]
    deltas = [(weights(place)[NAME] - base).double().numpy() for place in experts["whole"]]
    main = [np.linalg.svd(delta)[2][:2] for delta in deltas]
    spans = [span_of(delta, 2) for delta in deltas]
    for exact, own in zip(main, spans, strict=True):
        left_out = exact - exact @ np.linalg.pinv(own) @ own
        assert np.linalg.norm(left_out[0]) < 0.2, "the first direction is nearly among them"
    wanted = within(experts, np.concatenate([*spans, probes(48, 5)]))
    torch.testing.assert_close(weights(tmp_path / "out")[NAME].double(), wanted, atol=1e-4, rtol=1e-3)
    held = open_statistics(tmp_path / "r" / "statistics" / "one-whole.core_gram.safetensors")
    assert held.values(NAME).shape == (9 * 10 // 2,) and held.about.form == "rank 2, probes 5"
    assert len(files) == 2 and len(held.tensors) == 2 * 7, "every linear layer changes or may change"


def test_an_adapter_and_a_full_model_meet_in_one_core(experts: dict, tmp_path: Path) -> None:
    both = {**experts, "mixed": [experts["adapters"][0], experts["whole"][1]]}
    more = {"accept_base": True, "output": {"dtype": "float32"}, **FEW}
    path, _ = made(both, "mixed", "core_regmean", tmp_path / "r", **more)
    graftkit.merge(path, tmp_path / "out")
    factor = open_adapter(Path(experts["adapters"][0])).load(NAME, np.float64).right
    delta = (weights(experts["whole"][1])[NAME] - weights(experts["base"])[NAME]).double().numpy()
    wanted = within(experts, np.concatenate([factor, span_of(delta, 2), probes(48, 5)]))
    torch.testing.assert_close(weights(tmp_path / "out")[NAME].double(), wanted, atol=1e-3, rtol=1e-2)


def test_features_change_little_where_a_delta_does() -> None:
    """Else moments that another machine measured would be read in other directions."""
    source = np.random.default_rng(0)
    delta = source.standard_normal((30, 4)) @ source.standard_normal((4, 20))
    delta += 1e-2 * source.standard_normal((30, 20))
    near = delta * (1 + 1e-7 * source.standard_normal(delta.shape))
    one, other = span_of(delta, 4), span_of(near, 4)
    assert np.linalg.norm(one - other) < 1e-5 * np.linalg.norm(one)
    assert np.linalg.norm(delta - delta @ np.linalg.pinv(one) @ one) < 1.2 * np.linalg.norm(delta) * 1e-2


def test_packed_moments_come_back_and_have_roots() -> None:
    inputs = np.random.default_rng(1).standard_normal((3, 6))  # of rank 3
    moments = inputs.T @ inputs
    assert packed(moments).shape == (21,)
    np.testing.assert_array_equal(unpacked(packed(moments), 6), np.triu(moments) + np.triu(moments, 1).T)
    np.testing.assert_allclose(roots(moments).T @ roots(moments), moments, atol=1e-8)
    assert np.linalg.matrix_rank(roots(moments), tol=1e-7) == 6, "nothing that was measured is forgotten"


def test_statistics_of_other_directions_are_not_used(experts: dict, tmp_path: Path) -> None:
    path, _ = made(experts, "adapters", "core_regmean", tmp_path / "r", output={"as": "adapter"}, **FEW)
    assert plan(path).statistics is not None
    more = recipe(experts, "adapters", "core_regmean", tmp_path / "r", output={"as": "adapter"}, knobs={"probes": 6})
    with pytest.raises(PlanError, match="has no core_gram of .*one' as its weights are now, of rank 16, probes 6"):
        plan(more)


def test_core_regression_reads_no_weight_of_the_base(experts: dict, tmp_path: Path) -> None:
    path, _ = made(experts, "adapters", "core_regmean", tmp_path / "r", output={"as": "adapter"})
    held = Path(experts["base"]) / "model.safetensors"
    print_of_base = plan(path).sources[-1].fingerprint
    held.rename(tmp_path / "away")
    told = json.loads(path.read_text())
    told.pop("base")
    path.write_text(json.dumps(told))
    graftkit.merge(path, tmp_path / "out")
    assert print_of_base and (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_equal_adapters_stay_as_they_are(experts: dict, tmp_path: Path) -> None:
    twice = {**experts, "adapters": [experts["adapters"][0]] * 2}
    path, files = made(twice, "adapters", "core_regmean", tmp_path / "r", output={"dtype": "float32"})
    assert len(files) == 2, "one of each set of examples"
    graftkit.merge(path, tmp_path / "out")
    for name, own in weights(experts["whole"][0]).items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], own, atol=1e-5, rtol=1e-4)


def test_moments_of_a_merged_model_are_of_what_its_layers_will_get(experts: dict, tmp_path: Path) -> None:
    """Those of layer 1 are heard again with merged layers before it, and each model's own layer in its place."""
    path, files = made(experts, "whole", "regmean_plus", tmp_path / "r", output={"dtype": "float32"})
    assert set(files) == {"one-whole.merged_gram.safetensors", "two-whole.merged_gram.safetensors"}
    graftkit.merge(path, tmp_path / "out")
    name, merged = "model.layers.1.mlp.down_proj.weight", weights(tmp_path / "out")
    for place, data, held in zip(experts["whole"], experts["data"], files.values(), strict=True):
        mixed = {n: own if ".layers.1." in n else merged[n] for n, own in weights(place).items()}
        model = talker.tiny()
        model.load_state_dict(mixed)
        inputs = inputs_of(saved(model, tmp_path / "mixed"), data, name)
        found = open_statistics(held.file)
        np.testing.assert_allclose(found.values(name), (inputs.T @ inputs / len(inputs)).numpy(), rtol=1e-3, atol=1e-4)
        assert found.about.tokens == len(inputs)
    assert all(one.reused for one in collect(path, device="cpu"))
    other = recipe(experts, "whole", "regmean_plus", tmp_path / "r", knobs={"alpha": 0.5})
    with pytest.raises(PlanError, match="has no merged_gram of .*one-whole' as its weights are now, or merged so"):
        plan(other)
    bare = recipe({**experts, "data": [None, None]}, "whole", "regmean_plus", tmp_path / "s")
    with pytest.raises(PlanError, match="statistics are of all examples; say `data:` beside each model"):
        plan(bare)


def test_fisher_merges_between_its_models(experts: dict, tmp_path: Path) -> None:
    path, _ = made(experts, "whole", "fisher", tmp_path / "r", output={"dtype": "float32"})
    graftkit.merge(path, tmp_path / "out")
    held = [open_statistics(own.file) for own in all_statistics(tmp_path / "r" / "statistics")]
    assert {own.about.kind for own in held} == {"fisher"} and all(own.about.scale > 0 for own in held)
    tuned, merged = [weights(place) for place in experts["whole"]], weights(tmp_path / "out")
    for name, own in merged.items():
        low, high = torch.minimum(tuned[0][name], tuned[1][name]), torch.maximum(tuned[0][name], tuned[1][name])
        assert bool(((own >= low - 1e-6) & (own <= high + 1e-6)).all())
    name = "model.layers.0.self_attn.q_proj.weight"
    counts = torch.stack([torch.from_numpy(one.values(name)) / one.about.scale + 1e-6 for one in held]).double()
    stack = torch.stack([one[name] for one in tuned]).double()
    torch.testing.assert_close(merged[name].double(), (counts * stack).sum(0) / counts.sum(0), atol=1e-6, rtol=1e-4)


def test_little_memory_means_layer_by_layer_and_the_same_moments(
    experts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(experts, "whole", "regmean", tmp_path / "r")
    (one, _) = collect(path, device="cpu")
    whole = {name: open_statistics(one.file).values(name) for name in open_statistics(one.file).tensors}
    monkeypatch.setattr("graftkit.measuring.statistics_runs.RESIDENT", 0)
    for file in (tmp_path / "r" / "statistics").iterdir():
        file.unlink()
    with pytest.raises(PlanError, match="is too little: the model and the moments of one layer need"):
        collect(path, device="cpu", memory=1000)
    told: list[tuple[str, int, int]] = []
    model = sum(p.numel() * 4 for p in live(Path(experts["whole"][0])).parameters())
    (again, _) = collect(path, device="cpu", memory=model + 25_000, advance=lambda *args: told.append(args))
    assert told[-1][1] == told[-1][2] > 3, "it went through the layers one by one"
    for name, moments in whole.items():
        np.testing.assert_allclose(open_statistics(again.file).values(name), moments, atol=1e-5)


@pytest.mark.parametrize("form", ["block:16", "sketch:48"])
def test_cheap_forms_merge_by_what_they_keep(experts: dict, tmp_path: Path, form: str) -> None:
    path, name = recipe(experts, "whole", "regmean", tmp_path / "r", output={"dtype": "float32"}), "model.layers.0"
    full = [open_statistics(one.file).values(f"{name}.mlp.down_proj.weight") for one in collect(path, device="cpu")]
    cheap = collect(path, device="cpu", form=form)
    assert all(one.about.form == form and not one.reused for one in cheap)
    graftkit.merge(path, tmp_path / "out")
    blocks = np.kron(np.eye(3), np.ones((16, 16))) if form == "block:16" else np.ones((48, 48))
    tuned = torch.stack([weights(place)[f"{name}.mlp.down_proj.weight"] for place in experts["whole"]])
    base = weights(experts["base"])[f"{name}.mlp.down_proj.weight"]
    gram = torch.from_numpy(np.stack(full) * blocks)
    wanted = graftkit.methods.get("regmean").run(base=base, models=tuned, gram=gram)
    got = weights(tmp_path / "out")[f"{name}.mlp.down_proj.weight"]
    assert float((got - wanted).norm() / (wanted - base).norm()) < 0.01, "a sketch of as many directions as inputs"


def test_files_are_used_again_and_refused_when_stale(experts: dict, tmp_path: Path) -> None:
    path, _ = made(experts, "whole", "regmean", tmp_path / "r")
    assert all(one.reused for one in collect(path, device="cpu"))
    assert [one.reused for one in collect(path, device="cpu", samples=1)] == [False, False]
    graftkit.merge(path, tmp_path / "out")
    first = plan(path).hash
    with open(experts["data"][0], "a") as file:
        file.write(json.dumps({"prompt": "more", "answer": " words"}) + "\n")
    with pytest.raises(PlanError, match=r"models\[0\]: the gram of .* is of other examples.*run `graft statistics"):
        plan(path)
    again = collect(path, device="cpu", samples=1)
    assert [one.reused for one in again] == [False, True] and len(list((tmp_path / "r/statistics").iterdir())) == 2
    assert plan(path).hash != first, "what was measured is part of what will be done"
    file = Path(experts["whole"][1]) / "model.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    with pytest.raises(PlanError, match=r"models\[1\]: .* has no gram of .* as its weights are now; run"):
        plan(path)


def test_a_stopped_command_leaves_whole_files_and_goes_on(
    experts: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, done = recipe(experts, "whole", "regmean", tmp_path / "r"), []

    def stop(name: str, count: int, total: int) -> None:
        done.append(name)
        if name == "two-whole":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(path, device="cpu", advance=stop)
    assert [file.name for file in (tmp_path / "r" / "statistics").iterdir()] == ["one-whole.gram.safetensors"]
    made_now = collect(path, device="cpu")
    assert [one.reused for one in made_now] == [True, False] and all(one.about.seconds > 0 for one in made_now)


def test_matrices_kept_as_in_out_are_merged_by_their_rows(experts: dict, tmp_path: Path) -> None:
    """GPT-2, whose linear layers are Conv1D."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 320, "n_positions": 256}
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    places = [saved(base, tmp_path / "gpt")]
    for name in ("gpt-one", "gpt-two"):
        for parameter in base.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        places.append(saved(base, tmp_path / name))
    told = {**experts, "base": places[0], "whole": places[1:]}
    path, files = made(told, "whole", "regmean", tmp_path / "r", output={"dtype": "float32"})
    graftkit.merge(path, tmp_path / "out")
    name = next(n for n in weights(tmp_path / "out") if n.endswith("h.0.mlp.c_fc.weight"))
    gram = torch.stack([torch.from_numpy(open_statistics(one.file).values(name)) for one in files.values()])
    assert gram.shape == (2, 16, 16)
    tuned = torch.stack([weights(place)[name] for place in places[1:]])
    wanted = graftkit.methods.get("regmean").run(base=weights(places[0])[name], models=tuned, gram=gram, inputs="rows")
    torch.testing.assert_close(weights(tmp_path / "out")[name], wanted, atol=1e-5, rtol=1e-4)


def test_statistics_may_stand_elsewhere_and_be_shared(experts: dict, tmp_path: Path) -> None:
    recipe(experts, "whole", "regmean", tmp_path / "r", statistics="../shared")
    collect(tmp_path / "r" / "recipe.yaml", device="cpu")
    other = recipe(experts, "whole", "regmean", tmp_path / "s", statistics="../shared", knobs={"alpha": 0.5})
    assert [own.about.kind for own in all_statistics(tmp_path / "shared")] == ["gram", "gram"]
    assert plan(other).statistics is not None


def test_examples_may_be_given_by_the_command_alone(experts: dict, tmp_path: Path) -> None:
    told = {"method": "regmean", "models": experts["whole"]}
    path = tiny.recipe(tmp_path, json.dumps(told))
    with pytest.raises(PlanError, match="gram is measured with examples, and .* has none; run .*--data once a model"):
        plan(path)
    command = ["statistics", str(path), "--device", "cpu", *(part for d in experts["data"] for part in ("--data", d))]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0 and "gram (full) of 2 examples" in done.output
    again = CliRunner().invoke(app, [*command, "--json"])
    assert [one["reused"] for one in json.loads(again.stdout)] == [True, True]
    explained = CliRunner().invoke(app, ["explain", str(path)])
    assert "gram full, 2 examples" in explained.output
    record = graftkit.merge(path, tmp_path / "out")
    assert [one["kind"] for one in record["statistics"]] == ["gram", "gram"]
    with open(experts["data"][1], "a") as file:
        file.write(json.dumps({"prompt": "more", "answer": " words"}) + "\n")
    with pytest.raises(PlanError, match=r"models\[1\]: the gram of .* is of other examples"):
        plan(path)


def test_what_cannot_be_meant_is_refused(experts: dict, tmp_path: Path) -> None:
    path = recipe(experts, "whole", "task_arithmetic", tmp_path / "r", statistics="here")
    with pytest.raises(PlanError, match=r"recipe.statistics: no tensor is merged by statistics"):
        plan(path)
    with pytest.raises(PlanError, match="task_arithmetic reads no statistics of examples; choose regmean"):
        collect(recipe(experts, "whole", "task_arithmetic", tmp_path / "r"))
    prepared = recipe(experts, "whole", "core_regmean", tmp_path / "r", prepare=[{"trim": {"density": 0.5}}])
    with pytest.raises(PlanError, match="core_regmean reads what was measured of the models' deltas as they are"):
        collect(prepared)
    with pytest.raises(DataError, match="2 models need examples of 2 domains, got 1"):
        collect(recipe(experts, "whole", "regmean", tmp_path / "r"), data=[experts["data"][0]])
    with pytest.raises(
        DataError, match="the recipe names examples by `data:` beside its models; drop those, or --data"
    ):
        collect(recipe(experts, "whole", "regmean", tmp_path / "r"), data=experts["data"])
    with pytest.raises(DataError, match="--gram: got 'blocks'"):
        collect(recipe(experts, "whole", "regmean", tmp_path / "r"), form="blocks")
    with pytest.raises(PlanError, match="scales deltas; name the models' `base`"):
        plan({"method": "regmean", "models": experts["whole"], "knobs": {"scale": 0.5}})


def test_a_file_where_the_directory_should_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "statistics").write_text("")
    with pytest.raises(OutputError, match=r"a\.safetensors: cannot be written"):
        write_statistics(tmp_path / "statistics" / "a.safetensors", About("gram", "m"), {"w": np.zeros((2, 2), "f4")})


@pytest.mark.parametrize("form", ["block:99999", "block:49", "sketch:999"])
def test_a_form_that_is_larger_than_the_widest_layer_is_refused(experts: dict, tmp_path: Path, form: str) -> None:
    with pytest.raises(DataError, match=f"--gram: {form} is larger than the widest layer, of 48 inputs; take full"):
        collect(recipe(experts, "whole", "regmean", tmp_path / "r"), form=form)
    assert not (tmp_path / "r" / "statistics").exists()


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "fisher"])
@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_a_model_with_nan_in_its_weights_is_not_measured(
    experts: dict, tmp_path: Path, method: str, tensor: str
) -> None:
    file = Path(experts["whole"][1]) / "model.safetensors"
    broken = weights(file.parent)
    broken[tensor].view(-1)[3] = float("nan")
    save_file(broken, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=f"two-whole.*{tensor}.* (NaN or infinite|NaN or infinity)"):
        collect(recipe(experts, "whole", method, tmp_path / "r"), device="cpu")
    assert "two-whole" not in "".join(path.name for path in (tmp_path / "r").rglob("*"))


def test_values_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    """Activations may overflow where all weights are finite."""
    values = {"w": np.array([[1.0, np.inf]], "f4")}
    with pytest.raises(NonFiniteError, match=r"a\.gram\.safetensors: what was measured for 'w' is not finite"):
        write_statistics(tmp_path / "a.gram.safetensors", About("gram", "m"), values)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [lambda whole: whole[:700], lambda whole: whole[:-5], lambda whole: b"hello"])
def test_a_damaged_file_is_said_to_be_removed(experts: dict, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path, files = made(experts, "whole", "regmean", tmp_path / "r")
    first = next(iter(files.values())).file
    first.write_bytes(damage(first.read_bytes()))
    for again in (collect, plan):
        with pytest.raises(CheckpointError, match=r"one-whole.gram.safetensors: .*; remove it, and run `graft stat"):
            again(path)
    first.unlink()
    assert [one.reused for one in collect(path, device="cpu")] == [False, True]
