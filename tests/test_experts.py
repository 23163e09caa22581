"""Mixtures of experts: fused or apart, they merge alike, router included."""

import json

import pytest
import torch
from safetensors.torch import load_file

import graftkit
import talker
import tiny
from graftkit.errors import GraftError
from graftkit.measuring.statistics import collect
from graftkit.recipes.plan import plan

transformers = pytest.importorskip("transformers")

COMMON = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "intermediate_size": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def config(kind):
    if kind == "mixtral":
        return transformers.MixtralConfig(**COMMON, num_local_experts=3)
    if kind == "qwen2_moe":
        sizes = {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts_per_tok": 2}
        return transformers.Qwen2MoeConfig(**COMMON, **sizes, num_experts=3, mlp_only_layers=[1])
    if kind == "gpt_oss":
        more = {"num_local_experts": 3, "head_dim": 4, "num_experts_per_tok": 2, "rope_parameters": ROPE}
        return transformers.GptOssConfig(**COMMON, **more)
    if kind == "llama4":
        return transformers.Llama4TextConfig(**COMMON, intermediate_size_mlp=28, num_local_experts=3, head_dim=4)
    return transformers.GraniteMoeConfig(**COMMON, num_local_experts=3, num_experts_per_tok=2)


KINDS = ("mixtral", "qwen2_moe", "gpt_oss", "llama4", "granitemoe")


def family(root, kind, **saving):
    """A base and two fine-tunes, saved; as in-memory models by name."""
    torch.manual_seed(0)
    made = {"base": transformers.AutoModelForCausalLM.from_config(config(kind)).eval()}
    with torch.no_grad():
        for parameter in made["base"].parameters():
            parameter.normal_(std=0.2)
    for name in ("math", "code"):
        made[name] = transformers.AutoModelForCausalLM.from_config(config(kind)).eval()
        made[name].load_state_dict(made["base"].state_dict())
        with torch.no_grad():
            for parameter in made[name].parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    for name, model in made.items():
        model.save_pretrained(root / name, **saving)
    return made


def paths(root):
    return [str(root / name) for name in ("math", "code")]


def merged(recipe, out, **options):
    graftkit.merge(recipe, out, **options)
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_of_experts_merges_and_loads(kind, tmp_path):
    models = family(tmp_path, kind)
    recipe = {
        "method": "task_arithmetic",
        "base": str(tmp_path / "base"),
        "models": paths(tmp_path),
        "knobs": {"scale": 0.5},
    }
    merged(recipe, tmp_path / "out")
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    states = {name: model.state_dict() for name, model in models.items()}
    for name, tensor in out.state_dict().items():
        base, math, code = (states[k][name].double() for k in ("base", "math", "code"))
        torch.testing.assert_close(tensor.double(), base + 0.5 * (math - base + code - base), rtol=1e-5, atol=1e-6)
    assert any("router" in name or ".gate.weight" in name for name in out.state_dict())


@pytest.mark.parametrize("method", ["ties", "slerp", "della", "model_stock_rows", "arcee_fusion", "dare"])
def test_a_fused_expert_is_a_tensor_of_its_own(method, tmp_path):
    """Statistics, rows and whole-tensor methods see one expert's matrix, as if it stood alone."""
    family(tmp_path, "gpt_oss")
    listed = paths(tmp_path)[: 1 if method == "arcee_fusion" else 2]
    recipe = {"method": method, "models": listed} | ({} if method == "slerp" else {"base": str(tmp_path / "base")})
    out = merged(recipe, tmp_path / "out", workers=2)
    from graftkit import methods

    used = methods.get(method)
    held = {name: load_file(tmp_path / name / "model.safetensors") for name in ("base", "math", "code")}
    names = ["model.layers.1.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj_bias"]
    for name in names:
        assert out[name].shape == held["base"][name].shape
        for e in range(3):
            base = held["base"][name][e].double()
            tuned = torch.stack([held[m][name][e].double() for m in ("math", "code")[: len(listed)]])
            if "rng" in used.reads:
                changed = (out[name][e].double() != base).double().mean()
                assert 0.05 < changed < 0.95
                continue
            exact = used.run(base=None if method == "slerp" else base, models=tuned)
            torch.testing.assert_close(out[name][e].double(), exact, rtol=1e-4, atol=1e-5)
    one = merged(recipe, tmp_path / "one", workers=1)
    assert all(torch.equal(one[name], out[name]) for name in one)


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_fused_and_apart_merge_in_one_recipe(kind, tmp_path):
    """A model that keeps its experts in one tensor is read expert by expert, where the output keeps them apart."""
    family(tmp_path, kind)
    family(tmp_path / "fused", kind, save_original_format=False)
    held = load_file(tmp_path / "fused" / "math" / "model.safetensors")
    assert any(name.endswith("experts.gate_up_proj") for name in held)
    recipe = {"method": "ties", "base": str(tmp_path / "base"), "knobs": {"density": 0.3}}
    apart = merged(recipe | {"models": paths(tmp_path)}, tmp_path / "apart")
    mixed = [str(tmp_path / "fused" / "math"), str(tmp_path / "code")]
    both = merged(recipe | {"models": mixed}, tmp_path / "both")
    assert apart.keys() == both.keys() and all(torch.equal(apart[name], both[name]) for name in apart)
    with pytest.raises(GraftError, match="lacks .*experts.*output.like"):
        plan(recipe | {"models": mixed, "output": {"like": mixed[0]}})


def test_other_numbers_of_experts_are_refused(tmp_path):
    family(tmp_path / "one", "mixtral")
    torch.manual_seed(1)
    more = transformers.MixtralConfig(**COMMON, num_local_experts=4)
    transformers.AutoModelForCausalLM.from_config(more).save_pretrained(tmp_path / "four")
    with pytest.raises(GraftError, match="gate.weight.* as .4, 16., the output as .3, 16."):
        plan({"method": "average", "models": [str(tmp_path / "one" / "math"), str(tmp_path / "four")]})


def test_layers_of_experts_and_without(tmp_path):
    """Slices of a model whose layers differ: dense ones stay dense, and the config says which."""
    models = family(tmp_path, "qwen2_moe")
    source = str(tmp_path / "math")
    cut = [{"sources": [{"model": source, "layer_range": list(r)}]} for r in ((1, 2), (0, 2), (1, 2))]
    merged({"method": "passthrough", "slices": cut}, tmp_path / "out")
    out, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert out.config.mlp_only_layers == [0, 2, 3]
    for n, m in enumerate((1, 0, 1, 1)):
        wanted = models["math"].model.layers[m].state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in out.model.layers[n].state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["regmean", "regmean_plus"])
def test_regression_merges_a_mixture_whose_router_and_experts_get_the_mean(kind, method, tmp_path, monkeypatch):
    """Their inputs cannot be listened to one by one; those of attention and of experts that all share can."""
    tokenizer = talker.tokenizer()
    monkeypatch.setitem(COMMON, "vocab_size", len(tokenizer))
    family(tmp_path, kind)
    for name in ("base", "math", "code"):
        tokenizer.save_pretrained(tmp_path / name)
    data = []
    for name, text in (("math", "two and two"), ("code", "the cat sat")):
        data.append(tmp_path / f"{name}.jsonl")
        data[-1].write_text(json.dumps({"prompt": text, "answer": " make four"}) + "\n")
    models = [{"model": m, "data": str(d)} for m, d in zip(paths(tmp_path), data, strict=True)]
    told = tiny.recipe(tmp_path, json.dumps({"method": method, "base": str(tmp_path / "base"), "models": models}))
    collect(told, device="cpu")
    out = merged(told, tmp_path / "out")
    math, code = (load_file(tmp_path / name / "model.safetensors") for name in ("math", "code"))
    apart = {n for n, t in out.items() if not torch.allclose(t, (math[n] + code[n]) / 2, rtol=1e-5, atol=1e-6)}
    assert {name for name in out if "self_attn" in name and name.endswith("proj.weight")} <= apart
    assert not [name for name in apart if "expert" in name.replace("shared_expert", "") or "router" in name]
    assert not [name for name in apart if name.endswith((".gate.weight", "linear.weight"))]
