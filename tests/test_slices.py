"""Changed depth: slices of models' layers, in any order, merged by any method."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import graftkit
import tiny
from graftkit.errors import GraftError
from graftkit.recipes.plan import plan

transformers = pytest.importorskip("transformers")


def text(seed, kind, layers=4, **more):
    """A tiny random model of a family."""
    torch.manual_seed(seed)
    common = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
              "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
              "max_position_embeddings": 64}  # fmt: skip
    if kind == "llama":
        config = transformers.LlamaConfig(**common, **more)
    elif kind == "qwen2":
        del common["head_dim"]
        config = transformers.Qwen2Config(
            **common, **{"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, **more}
        )
    elif kind == "gemma2":
        config = transformers.Gemma2Config(**common, sliding_window=4, query_pre_attn_scalar=4, **more)
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            **common, sliding_window=4, query_pre_attn_scalar=4, sliding_window_pattern=3, **more
        )
    else:
        config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=layers, n_head=4, n_positions=64, **more)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, None
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def stack(model):
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(24)[None] % 31).logits


FAMILIES = ("llama", "qwen2", "gemma2", "gemma3", "gpt2")


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_stack_of_slices_computes_what_its_layers_compute(kind, tmp_path):
    """Layers keep what they are (attending in a window or not), though they stand elsewhere."""
    models = [text(k, kind, layers) for k, layers in enumerate((4, 6))]
    for name, model in zip("ab", models, strict=True):
        model.save_pretrained(tmp_path / name)
    ranges = (("a", 0, 3), ("b", 2, 6), ("a", 1, 3), ("a", 1, 2))
    graftkit.merge(
        {
            "method": "passthrough",
            "slices": [{"sources": [{"model": str(tmp_path / m), "layer_range": [i, j]}]} for m, i, j in ranges],
        },
        tmp_path / "out",
    )
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    wanted = text(0, kind, 10)
    by_name = dict(zip("ab", models, strict=True))
    chosen = [stack(by_name[m])[n] for m, i, j in ranges for n in range(i, j)]
    for n, layer in enumerate(chosen):
        stack(wanted)[n].load_state_dict(layer.state_dict())
    outer = {k: v for k, v in models[0].state_dict().items() if ".layers." not in k and ".h." not in k}
    wanted.load_state_dict(outer, strict=False)
    kinds = getattr(wanted.config, "layer_types", None)
    if kinds is not None:
        wanted.config.layer_types = [by_name[m].config.layer_types[n] for m, i, j in ranges for n in range(i, j)]
        assert out.config.layer_types == wanted.config.layer_types
        wanted = type(wanted)(wanted.config).eval()
        state = {k: v for k, v in out.state_dict().items()}
        wanted.load_state_dict(state)
        for n, layer in enumerate(chosen):
            assert all(torch.equal(v, stack(wanted)[n].state_dict()[k]) for k, v in layer.state_dict().items())
    assert len(stack(out)) == 10 == out.config.num_hidden_layers
    torch.testing.assert_close(logits(out), logits(wanted), rtol=0, atol=0)


def family(root):
    """Three tiny Llamas of equal shape: a base and two fine-tunes, their weights, and the paths."""
    base = tiny.weights(0)
    made = {"base": base} | {name: tiny.weights(k, near=base) for k, name in ((1, "math"), (2, "code"))}
    return {name: str(tiny.save(root / name, tensors)) for name, tensors in made.items()}, made


def source(model, start, stop, **knobs):
    return {"model": model, "layer_range": [start, stop], **knobs}


def merged(recipe, out):
    graftkit.merge(recipe, out)
    return load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


def near(out, exact):
    torch.testing.assert_close(out.float(), exact.to(out.dtype).float(), rtol=2**-7, atol=1e-6)


def test_slices_of_all_layers_are_the_plain_merge(tmp_path):
    """Byte for byte, for a method whose statistics span the model, and one that draws random numbers."""
    paths, _ = family(tmp_path)
    for method, knobs in (
        ("ties", {"density": 0.3, "scope": "model"}),
        ("dare", {"density": 0.5}),
        ("slerp", {"t": 0.3}),
    ):
        common = {"method": method, "knobs": knobs, "seed": 3} | ({"base": paths["base"]} if method != "slerp" else {})
        entries = [{"model": paths[name]} for name in ("math", "code")]
        graftkit.merge(common | {"models": entries}, tmp_path / method)
        whole = [{"sources": [source(paths[name], 0, tiny.LAYERS) for name in ("math", "code")]}]
        graftkit.merge(common | {"slices": whole}, tmp_path / f"{method}-slices")
        one, two = (tmp_path / d / "model.safetensors" for d in (method, f"{method}-slices"))
        assert one.read_bytes() == two.read_bytes()
        assert json.loads((tmp_path / method / "config.json").read_text()) == json.loads(
            (tmp_path / f"{method}-slices" / "config.json").read_text()
        )


def test_methods_and_knobs_by_slice(tmp_path):
    """Later wins: default, recipe, slice, beside the source, rules; a gradient runs over what it stands in."""
    paths, weights = family(tmp_path)
    recipe = {
        "method": "task_arithmetic",
        "base": paths["base"],
        "knobs": {"scale": {"gradient": [0.0, 1.0]}, "weight": 0.25},
        "slices": [
            {"sources": [source(paths["math"], 0, 2), source(paths["code"], 0, 2, weight={"gradient": [0.5, 1.0]})]},
            {"sources": [source(paths["math"], 1, 2)], "knobs": {"scale": 0.5}},
            {"sources": [source(paths["code"], 0, 2)], "method": "passthrough", "knobs": {"scale": 1.0}},
        ],
        "rules": [{"where": {"layers": 4, "role": "mlp"}, "knobs": {"scale": 3.0}}],
    }
    out, config = merged(recipe, tmp_path / "out")
    assert config["num_hidden_layers"] == 5
    base, math, code = (weights[name] for name in ("base", "math", "code"))

    def at(tensors, n, part="self_attn.q_proj"):
        return tensors[f"model.layers.{n}.{part}.weight"].double()

    for n, (scale, weight) in enumerate(((0.0, 0.5), (0.25, 1.0))):
        exact = at(base, n) + scale * (0.25 * (at(math, n) - at(base, n)) + weight * (at(code, n) - at(base, n)))
        near(at(out, n), exact)
    near(at(out, 2), at(base, 1) + 0.5 * 0.25 * (at(math, 1) - at(base, 1)))
    assert torch.equal(at(out, 3), at(code, 0)) and torch.equal(at(out, 4), at(code, 1))
    near(at(out, 4, "mlp.up_proj"), 3 * at(code, 1, "mlp.up_proj"))
    assert torch.equal(out["model.norm.weight"], code["model.norm.weight"])
    assert torch.equal(out["model.embed_tokens.weight"], base["model.embed_tokens.weight"])  # scale 0 at the start


def test_neighbouring_layers_of_one_model_are_merged(tmp_path):
    """One model twice in a slice, at other layers; and a base at other layers than the sources'."""
    paths, weights = family(tmp_path)
    halves = [source(paths["math"], 0, 1), source(paths["math"], 1, 2)]
    out, config = merged({"method": "average", "slices": [{"sources": halves}]}, tmp_path / "mean")
    name = "model.layers.{}.mlp.up_proj.weight"
    math, base = weights["math"], weights["base"]
    near(out[name.format(0)], (math[name.format(0)].double() + math[name.format(1)].double()) / 2)
    assert config["num_hidden_layers"] == 1 and name.format(1) not in out
    recipe = {"method": "task_arithmetic", "base": paths["base"], "slices": [{"sources": halves}]}
    with pytest.raises(GraftError, match=r"slices\[0\]: its sources read different layers.*layer_range"):
        plan(recipe)
    recipe["slices"][0]["base"] = {"layer_range": [1, 2]}
    out, _ = merged(recipe, tmp_path / "delta")
    near(
        out[name.format(0)],
        math[name.format(0)].double() + math[name.format(1)].double() - base[name.format(1)].double(),
    )


def test_an_adapter_in_a_slice(tmp_path):
    """It stands on the same layers of the base, and is never written out as a full model."""
    paths, weights = family(tmp_path)
    lora = tiny.adapter(tmp_path / "lora", 7)
    common = {"method": "passthrough", "base": paths["base"], "accept_base": True}
    graftkit.merge(common | {"models": [str(lora)]}, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    cut = [
        {"sources": [source(str(lora), 1, 2)]},
        {"sources": [source(paths["math"], 0, 2)]},
        {"sources": [source(str(lora), 0, 2)]},
    ]
    out, _ = merged(common | {"slices": cut}, tmp_path / "cut")
    for n, (tensors, m) in enumerate(((whole, 1), (weights["math"], 0), (weights["math"], 1), (whole, 0), (whole, 1))):
        for part in ("self_attn.q_proj", "mlp.down_proj", "mlp.up_proj"):
            assert torch.equal(out[f"model.layers.{n}.{part}.weight"], tensors[f"model.layers.{m}.{part}.weight"])
    with pytest.raises(GraftError, match="stands on the same layers"):
        plan(common | {"slices": [{"sources": [source(str(lora), 1, 2)], "base": {"layer_range": [0, 1]}}]})


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        (
            [{"sources": [("math", 0, 3)]}],
            r"slices\[0\].sources\[0\].layer_range: got \[0, 3\], model .* has layers \[0, 2\]",
        ),
        ([{"sources": [("math", 2, 1)]}], r"layer_range: a layer range is \[first, one after the last\]"),
        ([{"sources": [("math", 1, 1)]}], "a layer range is"),
        ([{"sources": [("math", -1, 1)]}], "a layer range is"),
        (
            [{"sources": [("math", 0, 1), ("code", 0, 2)]}],
            r"slices\[0\]: the layer ranges of a slice are of one length",
        ),
        ([{"sources": []}], r"slices\[0\].sources: got \[\], expected a list of at least one"),
        (
            [{"sources": [("math", 0, 2)], "method": "slerp"}],
            r"slices\[0\].sources: slerp takes exactly 2 models, got 1",
        ),
        ([{"sources": [("math", 0, 2)], "knobs": {"scal": 1}}], r"slices\[0\].knobs: unknown knob of average 'scal'"),
        ([{"sources": [("math", 0, 2, "wieght")]}], r"slices\[0\].sources\[0\]: unknown per-model knob .*'weight'"),
        ([{"sources": [("math", 0, 2)], "method": "ties"}], "recipe.base is missing"),
        ([{"sources": [("wide", 0, 2)]}, {"sources": [("math", 0, 2)]}], "not of one architecture"),
        ([{"sources": [("math", 0, 2), ("wide", 0, 2)]}], "not of one architecture"),
        (
            [{"sources": [("math", 0, 2), ("bare", 0, 2)]}],
            r"slices\[0\]: layer 0 of model .*bare' lacks 'mlp.up_proj.weight'",
        ),
        (
            [{"sources": [("bare", 0, 2), ("math", 0, 2)]}],
            r"slices\[0\]: layer 0 of model .*math' has 'mlp.up_proj.weight'",
        ),
        ([{"sources": [("gap", 0, 1)]}], "layer 0 of 'model.layers.' is missing"),
        ([{"sources": [("liar", 0, 1)]}], "its config says 7 layers, its files hold 2"),
    ],
)
def test_slices_that_do_not_fit_are_refused_by_name(slices, message, tmp_path):
    paths, weights = family(tmp_path)
    math = weights["math"]
    wide = {k: torch.cat([v, v], -1) for k, v in math.items()}
    paths["wide"] = str(tiny.save(tmp_path / "wide", wide))
    paths["bare"] = str(tiny.save(tmp_path / "bare", {k: v for k, v in math.items() if "up_proj" not in k}))
    paths["gap"] = str(tiny.save(tmp_path / "gap", {k: v for k, v in math.items() if ".layers.0." not in k}))
    paths["liar"] = str(tiny.save(tmp_path / "liar", math, config={"num_hidden_layers": 7}))
    given = [
        part | {"sources": [source(paths[m], a, b, **dict.fromkeys(knobs, 1)) for m, a, b, *knobs in part["sources"]]}
        for part in slices
    ]
    with pytest.raises(GraftError, match=message):
        plan({"method": "average", "slices": given})


def test_shards_workers_and_resumption_change_nothing(tmp_path):
    paths, _ = family(tmp_path)
    cut = [{"sources": [source(paths[name], 0, 2)]} for name in ("math", "code", "math")]
    recipe = {"method": "passthrough", "slices": cut, "output": {"shard": "10KB", "like": paths["code"]}}
    for workers in (1, 3):
        graftkit.merge(recipe, tmp_path / f"out{workers}", workers=workers)
    files = sorted((tmp_path / "out1").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.read_bytes() == (tmp_path / "out3" / file.name).read_bytes() for file in files)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out1")
    assert loaded.config.num_hidden_layers == 6


def test_a_sliced_recipe_is_a_source_of_another(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    paths, weights = family(tmp_path)
    tiny.recipe(
        tmp_path,
        f"method: passthrough\nslices:\n- sources: [{{model: {paths['math']}, layer_range: [0, 2]}}]\n"
        f"- sources: [{{model: {paths['math']}, layer_range: [1, 2]}}]\n",
    )
    cut = [{"sources": [source(str(tmp_path / "recipe.yaml"), 2, 3)]}]
    out, config = merged({"method": "passthrough", "slices": cut}, tmp_path / "out")
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(out[name.format(0)], weights["math"][name.format(1)]) and config["num_hidden_layers"] == 1


def test_thresholds_over_the_model_are_those_of_a_slices_models(tmp_path):
    """Two slices of other models have thresholds of their own; as if each were merged alone."""
    paths, _ = family(tmp_path)
    common = {"method": "ties", "base": paths["base"], "knobs": {"density": 0.3, "scope": "model"}}
    cut = [{"sources": [source(paths[name], 0, 2)]} for name in ("math", "code")]
    both, _ = merged(common | {"slices": cut}, tmp_path / "both")
    for k, name in enumerate(("math", "code")):
        alone, _ = merged(common | {"slices": [cut[k]], "rules": []}, tmp_path / name / "alone")
        for n in range(2):
            part = "model.layers.{}.mlp.up_proj.weight"
            differ = (both[part.format(2 * k + n)] != alone[part.format(n)]).double().mean()
            assert differ < 0.02  # alone, its embedding and its norm count too


def test_tensors_beside_the_layers_are_not_lost(tmp_path):
    """A tensor under the stack's name that is in no layer, and a second stack, stay what they are."""
    base = tiny.weights(0)
    extra = {"model.layers.shared.weight": torch.ones(3), "model.vision_tower.layers.0.norm.weight": torch.ones(2)}
    more = {f"model.vision_tower.layers.{n}.up.weight": torch.full((2, 2), float(n)) for n in range(3)}
    path = str(tiny.save(tmp_path / "vlm", base | extra | more))
    out, _ = merged({"method": "passthrough", "slices": [{"sources": [source(path, 1, 2)]}]}, tmp_path / "out")
    assert all(torch.equal(out[name], tensor) for name, tensor in (extra | more).items())
    assert "model.layers.1.mlp.up_proj.weight" not in out


def test_configs_say_of_each_layer_what_its_own_said():
    """Lists, numbers, periods and thresholds; what cannot be said is refused."""
    from graftkit.recipes.configuration import deepened

    def cut(config, layers, **other):
        return deepened(config, 4, [(config | other, n) for n in layers], "the model")

    old = {"num_hidden_layers": 4}
    assert cut(old, [0, 1])["num_hidden_layers"] == 2
    assert cut(old | {"layer_types": list("abcd"), "eos_token_id": [1, 2, 3, 4]}, [3, 3, 0]) == {
        "num_hidden_layers": 3, "layer_types": list("dda"), "eos_token_id": [1, 2, 3, 4],
    }  # fmt: skip
    assert cut(old | {"mlp_only_layers": [1]}, [1, 0, 1])["mlp_only_layers"] == [0, 2]
    assert cut(old | {"first_k_dense_replace": 1}, [0, 0, 1])["first_k_dense_replace"] == 2
    with pytest.raises(
        GraftError, match="first_k_dense_replace 1 would make output layer 0 of another kind than layer 1"
    ):
        cut(old | {"first_k_dense_replace": 1}, [1, 0])
    assert cut(old | {"num_kv_shared_layers": 1}, [2, 3, 3])["num_kv_shared_layers"] == 2
    sparse = cut(old | {"decoder_sparse_step": 2}, [0, 0, 1])
    assert sparse["decoder_sparse_step"] == 1 and sparse["mlp_only_layers"] == [0, 1]
    jamba = old | {"attn_layer_period": 2, "attn_layer_offset": 1}
    assert cut(jamba, [2, 3, 0, 1, 2]) == jamba | {"num_hidden_layers": 5}
    with pytest.raises(GraftError, match="attn_layer_period 2 would make output layer 0"):
        cut(jamba, [1, 2])
    window = old | {"use_sliding_window": True, "max_window_layers": 2}
    assert cut(window, [0, 1, 1, 2]) == window | {"max_window_layers": 3}
    assert cut(window, [2, 0])["layer_types"] == ["sliding_attention", "full_attention"]
    assert cut(old | {"max_window_layers": 4}, [0])["max_window_layers"] == 1
    assert cut(old | {"model_type": "gemma2"}, [0, 1, 2, 3]) == old | {"model_type": "gemma2"}
    assert cut(old | {"model_type": "gemma2"}, [1, 2])["layer_types"] == ["full_attention", "sliding_attention"]
    assert cut(old | {"no_rope_layer_interval": 2}, [1, 2])["no_rope_layers"] == [0, 1]
    nested = {"text_config": old | {"layer_types": list("abcd")}, "vision_config": {"num_hidden_layers": 4}}
    assert cut(nested, [0, 1]) == {
        "text_config": {"num_hidden_layers": 2, "layer_types": ["a", "b"]}, "vision_config": {"num_hidden_layers": 4},
    }  # fmt: skip
    both = {"is_encoder_decoder": True, "num_layers": 4, "num_decoder_layers": 4}
    assert cut(both, [0]) == both | {"num_decoder_layers": 1}
    assert cut(old | {"no_depth_here": 1}, [0])["no_depth_here"] == 1
    with pytest.raises(GraftError, match="'layer_types'.*none for layer 0; add it"):
        cut(old | {"layer_types": list("abcd")}, [0], layer_types=None)


def test_the_recipes_of_the_page_are_recipes():
    from graftkit.recipes.recipe import load

    page = (Path(__file__).parents[1] / "docs" / "depth-and-vocabulary.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    first, second = (load(block) for block in blocks)
    assert len(first.slices) == 2 and second.output.tokenizer.tokens["<|pad|>"].zero
