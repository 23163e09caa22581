"""Listening to live models: padding does not count, weights' names on disk lead to their layers, refusals by name."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from graftkit.errors import PlanError
from graftkit.measuring.activations import Listener, batches, forward, linear_layers, listening, run, shared
from graftkit.measuring.encoding import Row
from graftkit.recipes.layout import live_names

ROWS = [Row((1, 2, 3), ((4,),), (0,)), Row((5,), ((6, 7, 8, 9, 10),), (1,)), Row((11, 12), ((13,),), (2,))]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, vocab_size=40, bos_token_id=0, eos_token_id=0))


@pytest.mark.parametrize("batch_tokens", [1, 7, 14, 100])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight"])
def test_inputs_and_outputs_are_those_of_each_row_by_itself(name: str, batch_tokens: int) -> None:
    model = llama().eval()
    layer = linear_layers(model, [name])[name]
    heard: dict[str, list[torch.Tensor]] = {"in": [], "out": []}
    done: list[int] = []
    listener = Listener(layer, inputs=heard["in"].append, outputs=heard["out"].append)
    run(model, ROWS, [listener], batch_tokens=batch_tokens, advance=done.append)
    assert sum(done) == len(ROWS)
    wanted = []
    handle = layer.register_forward_pre_hook(lambda module, inputs: wanted.append(inputs[0][0]))
    with torch.inference_mode():
        for batch in batches(ROWS, batch_tokens):
            for row in batch:
                model(input_ids=torch.tensor([row.layout()[0]]))
    handle.remove()
    torch.testing.assert_close(torch.cat(heard["in"]), torch.cat(wanted), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat(heard["out"]), layer(torch.cat(wanted)), rtol=1e-4, atol=1e-5)


def test_listeners_are_gone_afterwards_even_when_one_fails() -> None:
    model = llama().eval()

    def fail(inputs: torch.Tensor) -> None:
        raise ArithmeticError

    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(ArithmeticError):
        run(model, ROWS, [Listener(layer, inputs=fail)], batch_tokens=100)
    run(model, ROWS, [], batch_tokens=100)


def test_gradients_flow_through_what_is_heard() -> None:
    model, heard = llama(), []
    layer = model.model.layers[1].self_attn.o_proj
    with listening([Listener(layer, outputs=heard.append)]) as hearing:
        forward(model, ROWS, hearing, head=True)
    heard[0].sum().backward()
    assert heard[0].shape == (13, 16) and float(layer.weight.grad.abs().sum()) > 0


def test_layers_that_get_the_same_input_are_found() -> None:
    model = llama().eval()
    names = [f"model.layers.{n}.{part}.weight" for n in (0, 1) for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]  # fmt: skip
    found = shared(model, linear_layers(model, names), ROWS[0])
    for n in (0, 1):
        first = f"model.layers.{n}."
        assert {found[f"{first}self_attn.{k}_proj.weight"] for k in "qkv"} == {f"{first}self_attn.q_proj.weight"}
        assert found[f"{first}mlp.up_proj.weight"] == f"{first}mlp.gate_proj.weight"
        for own in ("self_attn.o_proj", "mlp.down_proj"):
            assert found[f"{first}{own}.weight"] == f"{first}{own}.weight"


def test_conv1d_is_refused_by_name_unless_wanted() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, bos_token_id=0, eos_token_id=0))
    name = "h.0.attn.c_attn.weight"  # as old checkpoints call it
    with pytest.raises(PlanError, match=r"'h.0.attn.c_attn.weight' is kept as \[in, out\]"):
        linear_layers(model, [name])
    heard: list[torch.Tensor] = []
    run(model.eval(), ROWS, [Listener(linear_layers(model, [name], turned=True)[name], heard.append)], batch_tokens=100)
    assert heard[0].shape == (13, 16)


def test_experts_of_a_mixture_are_refused_by_name() -> None:
    config = MixtralConfig(**SIZES, num_hidden_layers=1, vocab_size=40, num_local_experts=2, num_experts_per_tok=1)
    name = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    with pytest.raises(PlanError, match="experts.0.w1.weight' is of an expert of a mixture"):
        linear_layers(MixtralForCausalLM(config), [name])


def test_an_embedding_is_no_linear_layer() -> None:
    with pytest.raises(PlanError, match="is not the weight of a linear layer"):
        linear_layers(llama(), ["model.embed_tokens.weight"])


def test_names_on_disk_lead_to_live_ones() -> None:
    held = [
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.weight",
        "model.vision_tower.encoder.layers.0.mlp.fc1.weight",
        "lm_head.weight",
    ]
    names = {
        "language_model.model.layers.0.self_attn.q_proj.weight": held[0],  # LLaVA's files
        "model.language_model.layers.0.self_attn.q_proj.weight": held[0],
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight": held[1],
        "encoder.layers.0.mlp.fc1.weight": held[2],
        "language_model.lm_head.weight": held[3],
    }
    assert live_names(names, held) == names
    assert live_names(["layers.0.self_attn.q_proj.weight"], held) == {}, "it could be either"
    assert live_names(["layers.10.self_attn.q_proj.weight"], ["model.layers.0.self_attn.q_proj.weight"]) == {}
