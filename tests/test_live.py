"""A merge into a model in memory has the bits that a merge to disk and a load have."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import tiny
from graftkit.errors import GraftError, NonFiniteError, PlanError
from graftkit.execution.live import Live
from graftkit.execution.local import merge

WIDE = {"F32": torch.float32, "BF16": torch.bfloat16}


def loaded(recipe, out, dtype, kind=AutoModelForCausalLM):
    merge(recipe, out)
    return kind.from_pretrained(out, dtype=getattr(torch, dtype))


def same(live, other):
    mine, theirs = live.model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in mine)


def recipe(family, method, models=None, **more):
    base, *tuned = map(str, family)
    models = models or [{"model": tuned[0], "weight": 0.6}, {"model": tuned[1], "weight": 0.7}]
    return {"method": method, "base": base, "models": models, "accept_base": True, **more}


METHODS = [
    ("task_arithmetic", {}), ("average", {}), ("slerp", {"knobs": {"t": 0.3}}), ("ties", {"knobs": {"density": 0.3}}),
    ("ties", {"knobs": {"density": 0.3, "scope": "model"}}), ("dare", {"knobs": {"density": 0.5}, "seed": 3}),
    ("model_stock", {}), ("tsv", {}), ("task_arithmetic", {"prepare": [{"trim": {"density": 0.5}}]}),
    ("task_arithmetic", {"finish": ["rescale"]}),
]  # fmt: skip


@pytest.mark.parametrize(("kept", "dtype"), [("BF16", "float32"), ("F32", "bfloat16")])
def test_values_are_those_of_a_merge_that_is_loaded(tmp_path, kept, dtype):
    family = tiny.family(tmp_path, dtype=WIDE[kept], shards=2)
    with Live.open(recipe(family, "task_arithmetic"), dtype=dtype, workers=2) as live:
        for k, (method, more) in enumerate(METHODS):
            models = [{"model": str(path)} for path in family[1:]] if method in ("slerp", "model_stock") else None
            chosen = recipe(family, method, models, **more)
            live.apply(chosen)
            same(live, loaded(chosen, tmp_path / f"out{k}", dtype))


@pytest.mark.parametrize("kept", ["BF16", "F32"])
@pytest.mark.parametrize(
    ("method", "knobs"),
    [
        ("task_arithmetic", {}), ("average", {}), ("slerp", {}), ("ties", {}), ("ties", {"rescale": True}),
        ("ties", {"combine": "sum", "weighted_election": True}), ("dare", {"density": 0.4}),
        ("dare", {"density": 0.4, "elect": "sign", "scale": 0.7}), ("dare", {"normalize": True, "scale": 0.7}),
        ("dare", {"rescale_by": "l1", "elect": "sign"}),
    ],
)  # fmt: skip
def test_adapters_alone_and_beside_a_checkpoint(tmp_path, kept, method, knobs):
    base, tuned, _ = tiny.family(tmp_path, dtype=WIDE[kept])
    one, two = (tiny.adapter(tmp_path / f"a{rank}", seed, rank=rank) for seed, rank in ((1, 8), (2, 3)))
    weighted = method != "slerp"
    for k, pair in enumerate([(one, two), (one, tuned)]):
        models = [
            {"model": str(path)} | ({"weight": w} if weighted else {}) for path, w in zip(pair, (0.6, 0.4), strict=True)
        ]
        chosen = recipe((base,), method, models, knobs=knobs, seed=k)
        with Live.open(chosen) as live:
            live.apply()
            same(live, loaded(chosen, tmp_path / f"out{k}", "float32"))


def test_ties_of_a_sum_are_rounded_as_a_merge_rounds_them(tmp_path):
    """Factors of few bits, weights of 3/5 and 2/5: sums that lie on ties unless they are added up in another order."""
    base = tiny.save(tmp_path / "base", tiny.weights(0, dtype=torch.float32))
    paths = [tiny.adapter(tmp_path / f"a{seed}", seed) for seed in (1, 2)]
    for path in paths:
        held = load_file(path / "adapter_model.safetensors")
        save_file({n: (t * 64).round() / 64 for n, t in held.items()}, path / "adapter_model.safetensors")
    models = [{"model": str(p), "weight": w} for p, w in zip(paths, (0.6, 0.4), strict=True)]
    for k, dtype in enumerate(("float32", "bfloat16")):
        chosen = recipe((base,), "task_arithmetic", models, output={"dtype": dtype})
        with Live.open(chosen) as live:
            live.apply()
            same(live, loaded(chosen, tmp_path / f"out{k}", "float32"))


def test_nothing_of_what_was_applied_before_is_left(tmp_path):
    family = tiny.family(tmp_path)
    changes = [
        {"models": [{"weight": 0.1}, {"weight": 1.3}]},
        recipe(family, "dare", knobs={"density": 0.3}),
        {"knobs": {"scale": 2.0}, "rules": [{"where": {"role": "mlp"}, "method": "passthrough"}]},
    ]
    with Live.open(recipe(family, "ties", knobs={"density": 0.4})) as live:
        live.apply()
        first = {name: value.clone() for name, value in live.model.state_dict().items()}
        for change in changes:
            live.apply(change)
            assert any(not torch.equal(first[n], v) for n, v in live.model.state_dict().items())
            for parameter in live.model.parameters():
                parameter.data.add_(1.0)
            live.apply()
            assert all(torch.equal(first[n], v) for n, v in live.model.state_dict().items())


def test_rules_coefficients_and_nested_recipes(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    family = tiny.family(tmp_path)
    (tmp_path / "inner.yaml").write_text(json.dumps(recipe(family, "average")))
    models = [{"model": str(tmp_path / "inner.yaml")}, {"model": str(family[1])}]
    rules = [
        {"where": {"role": "mlp", "layers": "0"}, "knobs": {"scale": 0.2}},
        {"where": {"role": "norm"}, "method": "ties"},
    ]
    for k, knobs in enumerate([{"weight": {"from": "metagpt"}}, {"weight": {"gradient": [0.1, 0.9]}}]):
        chosen = recipe(family, "task_arithmetic", models, knobs=knobs, rules=rules)
        with Live.open(chosen) as live:
            live.apply()
            same(live, loaded(chosen, tmp_path / f"out{k}", "float32"))


def test_a_head_that_is_untied_by_an_adapter(tmp_path):
    base, *_ = tiny.family(tmp_path)
    path = tiny.adapter(tmp_path / "a", 1)
    held = load_file(path / "adapter_model.safetensors")
    held["base_model.model.lm_head.weight"] = torch.randn(tiny.VOCABULARY, tiny.HIDDEN)
    save_file(held, path / "adapter_model.safetensors")
    chosen = recipe((base,), "task_arithmetic", [{"model": str(path), "weight": 0.5}])
    with Live.open(chosen) as live:
        live.apply()
        other = loaded(chosen, tmp_path / "out", "float32")
        assert not torch.equal(other.lm_head.weight, other.model.embed_tokens.weight)
        same(live, other)


def llava(directory, text):
    """A small model with images whose language model is `text`'s architecture, as transformers saves it."""
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, 
              "image_size": 8, "patch_size": 4, "projection_dim": 8, "model_type": "clip_vision_model"}  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=transformers.LlamaConfig(**text), image_token_index=3
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(directory)
    return directory


def test_a_model_with_images(tmp_path):
    settings = {k: v for k, v in tiny.CONFIG.items() if k not in ("architectures", "dtype", "model_type")}
    one = llava(tmp_path / "one", {**settings, "tie_word_embeddings": False})
    held = load_file(one / "model.safetensors")
    other = tmp_path / "two"
    other.mkdir()
    (other / "config.json").write_text((one / "config.json").read_text())
    save_file(
        {n: t + 0.01 * torch.randn(t.shape) for n, t in held.items()}, other / "model.safetensors", {"format": "pt"}
    )
    chosen = recipe((one,), "task_arithmetic", [{"model": str(other), "weight": 0.5}])
    with Live.open(chosen) as live:
        live.apply()
        same(live, loaded(chosen, tmp_path / "out", "float32", AutoModelForImageTextToText))


def test_what_is_refused(tmp_path):
    family = tiny.family(tmp_path)
    chosen = recipe(family, "task_arithmetic")
    with pytest.raises(PlanError, match="needs a whole model"):
        Live.open(chosen | {"output": {"as": "adapter", "rank": 2}})
    with pytest.raises(GraftError, match="--dtype: unknown dtype 'float99'"):
        Live.open(chosen, dtype="float99")
    with Live.open(chosen) as live:
        deeper = tmp_path / "deeper"
        held = load_file(family[0] / "model.safetensors")
        tiny.save(deeper, {n: t.float() for n, t in held.items()})
        with pytest.raises(PlanError, match="open it by itself"):
            live.apply({"base": str(deeper)})
        broken = {n: t.clone() for n, t in held.items()}
        broken["model.norm.weight"][0] = np.nan
        tiny.save(tmp_path / "broken", broken)
        with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
            live.apply({"models": [{"model": str(tmp_path / "broken")}, {}]})
        live.apply()


@pytest.mark.parametrize(
    ("method", "knobs"), [("task_arithmetic", {}), ("ties", {"density": 0.4}), ("dare", {"density": 0.4})]
)
def test_inputs_of_several_dtypes(tmp_path, method, knobs):
    base = tiny.save(tmp_path / "base", tiny.weights(0, dtype=torch.float32))
    models = [tiny.save(tmp_path / name, tiny.weights(k, dtype=WIDE[name])) for k, name in enumerate(WIDE, 1)]
    for k, order in enumerate((models, models[::-1], (models[1], tiny.adapter(tmp_path / "a", 1), models[0]))):
        named = [{"model": str(path), "weight": 0.4} for path in order]
        chosen = recipe((base,), method, named, knobs=knobs)
        with Live.open(chosen, workers=1) as live:
            live.apply()
            same(live, loaded(chosen, tmp_path / f"out{k}", "float32"))


def test_what_counts_is_found_anew_for_tensors_that_are_cut_otherwise(tmp_path, monkeypatch):
    """Larger than a block: parameters of another dtype are filled in other blocks."""
    monkeypatch.setattr(tiny, "VOCABULARY", 5000)
    monkeypatch.setitem(tiny.CONFIG, "vocab_size", 5000)
    family = tiny.family(tmp_path, dtype=torch.float32)
    models = [{"model": str(path), "weight": 0.5} for path in family[1:]]
    layers = [{"model": str(path), "layer_range": [0, 2], "weight": 0.5} for path in family[1:]]
    told = recipe(family, "ties", models, knobs={"density": 0.4}, output={"dtype": "bfloat16"})
    sliced = {name: value for name, value in told.items() if name not in ("models", "accept_base")}
    sliced["slices"] = [{"sources": layers}, {"sources": [layer | {"layer_range": [0, 1]} for layer in layers]}]
    with Live.open(sliced, workers=1) as live:
        live.apply()
        same(live, loaded(sliced, tmp_path / "sliced", "float32"))
    with Live.open(told, dtype="bfloat16", workers=1) as live:
        live.apply()
        live.model.float()
        live.apply()
        same(live, loaded(told, tmp_path / "out", "float32"))
