"""mergekit's recipes as ours, without models: what stands where, which of several values wins, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from graftkit.errors import RecipeError
from graftkit.recipes import chat_templates
from graftkit.recipes.knobs import Depth, at, settings
from graftkit.recipes.recipe import load

SLERP = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
TWO = "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n"


def recipe(text):
    return load("\n" + text)


def ours(text):
    return recipe(text).to_dict()


def values(text, name, last=3):
    """The knobs of one tensor."""
    return settings(recipe(text), name, last).knobs


def refused(text):
    with pytest.raises(RecipeError) as refusal:
        recipe(text)
    return str(refusal.value).removeprefix("recipe: ")


def test_what_is_mergekits_and_what_is_ours():
    assert recipe("method: ties\nbase: b\nmodels: [a]").notes == []
    assert ours("merge_method: ties\nbase_model: b\n" + TWO)["method"] == "ties"
    assert refused("base_model: b\n" + TWO) == "merge_method: got None, expected the name of one of mergekit's methods"


def test_our_recipe_has_the_base_only_beside_the_models():
    told = ours("merge_method: ties\nbase_model: b\n" + TWO)
    assert told["base"] == "b" and told["models"] == [{"model": "a", "weight": 1}]
    told = ours("merge_method: linear\nbase_model: b\n" + TWO)
    assert told["base"] == "b" and [entry["model"] for entry in told["models"]] == ["b", "a"]
    told = ours("merge_method: karcher\nbase_model: b\nmodels: [{model: a}]")
    assert "base" not in told and told["output"] == {"like": "b"}


@pytest.mark.parametrize(
    ("theirs", "ours_are"),
    [
        ("ties", {"density": (1.0,), "combine": "mean", "weighted_election": True, "rescale": False}),
        ("dare_ties", {"density": (1.0,), "elect": "sign", "combine": "sum", "rescale": True, "rescale_by": "l1",
                       "weighted_election": True}),
        ("dare_linear", {"elect": "none", "normalize": False, "rescale": True, "rescale_by": "l1"}),
        ("breadcrumbs", {"density": (1.0,), "outliers": (0.01,), "elect": "none", "normalize": False}),
        ("breadcrumbs_ties", {"elect": "sign", "combine": "sum", "weighted_election": True}),
        ("della", {"epsilon": (0.15,), "elect": "sign", "combine": "mean", "rescale_by": "l1"}),
        ("della_linear", {"elect": "none", "normalize": False, "rescale_by": "l1"}),
        ("task_arithmetic", {"scale": 1.0, "normalize": False}),
        ("sce", {"select_topk": 1.0, "floor": 1e-6}),
        ("ram", {"r": 0.0, "epsilon": 1e-5}),
        ("ramplus_tl", {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}),
    ],
)  # fmt: skip
def test_defaults_are_mergekits(theirs, ours_are):
    text = f"merge_method: {theirs}\nbase_model: b\nmodels: [{{model: a, parameters: {{weight: 1}}}}]"
    found = values(text, "model.layers.0.mlp.up_proj.weight")
    assert {name: found[name] for name in ours_are} == ours_are


FILTERED = """
merge_method: linear
models:
- model: a
  parameters:
    weight:
    - {filter: q_proj, value: 1}
    - {filter: attn, value: [2, 5]}
    - {value: 3}
    - {filter: mlp, value: 99}
- model: b
parameters: {weight: [{filter: mlp, value: 4}, {filter: "*", value: 6}]}
"""


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("layers.0.attn.q_proj.weight", (1, 6)),  # the first filter that matches
        ("layers.0.attn.k_proj.weight", (2, 6)),
        ("layers.2.attn.k_proj.weight", (4, 6)),  # a gradient over the layers
        ("layers.3.attn.k_proj.weight", (5, 6)),
        ("attn_norm.weight", (2, 6)),  # outside the layers its first value
        ("layers.1.mlp.up_proj.weight", (3, 4)),  # a filter behind the unconditional value is never reached
        ("lm_head.weight", (3, 6)),
    ],
)
def test_the_first_filter_wins_and_the_nearest_level(name, weight):
    assert values(FILTERED, name)["weight"] == weight


def test_a_level_without_a_match_leaves_it_to_the_next():
    text = """
merge_method: slerp
base_model: a
modules:
  default:
    models: [{model: a}, {model: b}]
    parameters: {t: [{filter: attn, value: 0.25}]}
parameters: {t: [{filter: k_proj, value: 0.75}, {value: 0.5}]}
"""
    names = {"layers.1.attn.k_proj.weight": 0.25, "layers.1.mlp.k_proj.weight": 0.75, "norm.weight": 0.5}
    assert {name: values(text, name)["t"] for name in names} == names


def test_a_tensor_without_a_value_is_refused_by_the_plan():
    text = SLERP + "parameters: {t: [{filter: x, value: 0.5}]}"
    assert values(text, "layers.0.x.weight")["t"] == 0.5
    with pytest.raises(RecipeError, match=r"recipe.knobs.t: got None, expected number"):
        values(text, "layers.0.y.weight")


def test_filters_are_plain_text():
    text = SLERP + "parameters: {t: [{filter: '[x]', value: 0}, {value: 1}]}"
    assert values(text, "layers.0.x.weight")["t"] == 1 and values(text, "a.[x].weight")["t"] == 0


def test_filters_with_numbers_follow_the_layers():
    """In a slice they are parts of the source's names; ours are parts of the output's."""
    told = ours("""
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 4]}]
- sources: [{model: a, layer_range: [2, 4], parameters: {scale: [{filter: layers.3.mlp, value: 0}]}}]
""")
    assert [rule["where"] for rule in told["rules"]] == [{"name": "*layers.3.mlp*", "slice": 1}]
    told = ours("""
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 4]}]
- sources: [{model: a, layer_range: [1, 4]}]
parameters: {scale: [{filter: layers.3.mlp, value: 0}]}
""")
    assert [rule["where"] for rule in told["rules"]] == [{"name": "*layers.3.mlp*", "slice": k} for k in (0, 1)]


def test_models_of_no_weight_are_left_out():
    text = "merge_method: linear\nmodels:\n" + "".join(
        f"- {{model: {name}, parameters: {{weight: {weight}}}}}\n"
        for name, weight in [("a", 1), ("b", 0), ("c", "[{filter: mlp, value: 2}, {value: 0}]")]
    )
    told = ours(text)
    assert [entry["model"] for entry in told["models"]] == ["a", "c"] and told["notes"] == [
        "b: left out, for the weight is 0"
    ]
    assert told["rules"][0]["knobs"] == {"weight": [None, 2]}
    assert values(text, "layers.0.mlp.weight")["weight"] == (1, 2) and values(text, "x.weight")["weight"] == (1, 0)


def test_numbers_and_switches_are_read_as_mergekit_reads_them():
    given = "{normalize: 0, weight: '5e-1', density: 1e-1, lambda: true}"
    text = f"merge_method: ties\nbase_model: base\nparameters: {given}\nmodels: [{{model: a}}]"
    found = values(text, "x.weight")
    assert (found["combine"], found["weight"], found["density"], found["scale"]) == ("sum", (0.5,), (0.1,), 1.0)


def test_variants_are_methods():
    def chosen(method, parameters):
        return ours(f"merge_method: {method}\nbase_model: base\nparameters: {parameters}\n{TWO}")["method"]

    assert chosen("nuslerp", "{}") == chosen("nuslerp", "{nuslerp_row_wise: true}") == "nuslerp"
    assert chosen("nuslerp", "{nuslerp_flatten: false}") == "nuslerp_rows"
    assert chosen("nuslerp", "{nuslerp_flatten: false, nuslerp_row_wise: true}") == "nuslerp_columns"
    assert chosen("model_stock", "{filter_wise: true}") == "model_stock_rows"


def test_notes_say_what_is_kept_for_mergekits_sake():
    told = ours("merge_method: dare_ties\nbase_model: x\ndtype: bfloat16\nparameters: {int8_mask: true}\n" + TWO)[
        "notes"
    ]
    assert [note.split(";")[0] for note in told] == [
        "mergekit's weights count in the election of signs",
        "mergekit rescales a tensor by one ratio of L1 norms",
        "density is not given: in mergekit's dare_ties it is 1, which leaves every delta whole",
        "mergekit computes in bfloat16",
        "int8_mask changes nothing in dare_ties, in mergekit neither",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("merge_method: tiess\n" + TWO, "merge_method: unknown method of mergekit 'tiess'; did you mean 'ties'?"),
        ("merge_method: ties\n" + TWO, "base_model is missing; ties needs it"),
        ("merge_method: ties\nbase_model: x\nout_dtyp: x\n" + TWO,
         "mergekit has no key 'out_dtyp' here, and would ignore it; did you mean 'out_dtype'?"),
        ("merge_method: ties\nbase_model: x\nparameters: {densty: 0.1}\n" + TWO,
         "mergekit has no parameter 'densty' in ties, and would ignore it; did you mean 'density'?"),
        ("merge_method: linear\nmodels: [{model: a, weight: 1}]",
         "models[0]: mergekit has no key 'weight' here, and would ignore it; known: model, parameters"),
        ("merge_method: linear\nmodels: [{model: a}, {model: b, parameters: {weight: 1}}]",
         "a: weight is missing, and mergekit has no default for it; give a value"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: abc}}]",
         "a: weight: got 'abc', expected a number"),
        ("merge_method: linear\nmodels: [{model: a, parameters: {weight: {vale: 1}}}]",
         "a: weight: got {'vale': 1}, expected a filter and a value, such as {filter: mlp, value: 0.5}"),
        ("merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n" + TWO + "- {model: c}",
         "merge_method: the method takes exactly 2 models, got 3"),
        ("merge_method: arcee_fusion\nbase_model: x\n" + TWO,
         "merge_method: the method takes exactly 1 model beside the base, got 2"),
        ("merge_method: ties\nbase_model: x\nparameters: {weight: 1}\nmodels: [{model: a}, {model: a}]",
         "a model stands twice among those that are merged; give it once"),
        ("merge_method: linear\ndtype: float64\n" + TWO,
         "dtype: got 'float64'; outputs are float32, float16, bfloat16"),
        ("merge_method: linear", "got none, expected exactly one of models, slices and modules"),
        ("merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3]}]}]",
         "slices[0].sources[0].layer_range: got [3], expected [first, one after the last], such as [0, 12]"),
        ("merge_method: sce\nbase_model: x\nslices: [{sources: [{model: a, layer_range: [0, 3]}]}]",
         "slices: the base, 'x', is not among the sources of each; give its layers too"),
        ("merge_method: linear\nmodels: [{model: a+b+c, parameters: {weight: 1}}]",
         "models[0].model: got 'a+b+c', expected a path or hub id, with at most one @revision and one +lora"),
        ("merge_method: nuslerp\nparameters: {nuslerp_flatten: [{filter: x, value: false}, {value: true}]}\n" + TWO,
         "nuslerp_flatten has several values; it chooses the method here, so give one for all tensors"),
        ("merge_method: ties\nbase_model: x\nparameters: {normalize: [true, false]}\n" + TWO,
         "normalize: [True, False] changes over the layers, and here only numbers do; use filters"),
        ("merge_method: linear\nmodules: {text_decoder: {models: [{model: a}]}, vision_tower: {models: [{model: b}]}}",
         "modules.vision_tower differs from modules.text_decoder: which tensors are of which module is mergekit's own "
         "knowledge of the architecture; write a recipe of ours with rules by tensor names"),
        ("merge_method: linear\ntokenizer_source: base\ntokenizer: {source: union}\n" + TWO,
         "got both tokenizer_source and tokenizer; give one of them"),
        ("merge_method: linear\ntokenizer: {tokens: {x: {force: true}}}\n" + TWO,
         "tokenizer.tokens['x']: force needs a source: which model's row is to be taken by all?"),
        ("merge_method: linear\nchat_template: chatlm\n" + TWO,
         "output.chat_template: got 'chatlm', expected Jinja text or the name of a template; did you mean 'chatml'?"),
    ],
)  # fmt: skip
def test_what_is_refused(text, message):
    assert refused(text) == message


def test_what_mergekit_passes_over_is_noted():
    told = ours("merge_method: linear\nparameters: {density: 0.5, embed_slerp: true, normalize: true}\n" + TWO)["notes"]
    assert told == [f"{name} changes nothing in linear, in mergekit neither" for name in ("density", "embed_slerp")]
    told = ours(SLERP.replace("{model: a}", "{model: a, parameters: {t: 0.9}}") + "parameters: {t: 0.5}")
    assert told["notes"] == ["t beside a model changes nothing; mergekit reads it under the recipe's parameters"]


def test_gradients_may_say_what_is_outside():
    value = {"gradient": [0.2, 0.8], "outside": 0.5}
    assert at(value, Depth(0.5), "") == pytest.approx(0.5) and at(value, Depth(1.0), "") == pytest.approx(0.8)
    assert at(value, Depth(1.0, inside=False), "") == 0.5
    assert at({"gradient": [0.2, 0.8]}, Depth(1.0, inside=False), "") == pytest.approx(0.8)
    with pytest.raises(RecipeError, match="expected a number"):
        at({"gradient": [0.2], "inside": 1}, Depth(0.5), "here")


def test_rules_leave_a_models_value_as_it_was():
    text = """
method: task_arithmetic
base: x
models: [{model: a, weight: 0.1}, b, {model: c, weight: 0.3}]
knobs: {weight: 0.7}
rules:
- {where: {name: "*mlp*"}, knobs: {weight: [null, 0.5, null]}}
- {where: {name: "*up*"}, knobs: {weight: [9, null, null]}}
"""
    names = {"mlp.up": (9, 0.5, 0.3), "mlp.down": (0.1, 0.5, 0.3), "up": (9, 0.7, 0.3), "x": (0.1, 0.7, 0.3)}
    assert {name: values(text, name)["weight"] for name in names} == names


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
]
RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\nTwo and two?\n\n### Response:\nFour.\n\n### Instruction:\nAnd three?\n\n"
    "### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nTwo and two?<|im_end|>\n"
    "<|im_start|>assistant\nFour.<|im_end|>\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Two and two?\n[|assistant|]Four.[|endofturn|]\n"
    "[|user|]And three?\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo and two?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nAnd three?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief.\n\nTwo and two? [/INST] Four.</s> [INST] And three? [/INST]",
}


@pytest.mark.parametrize("name", chat_templates.KNOWN)
def test_the_chat_templates_make_the_prompts_of_their_models(name):
    from transformers.utils.chat_template_utils import render_jinja_template

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    rendered, _ = render_jinja_template(
        [CHAT], chat_template=chat_templates.KNOWN[name], add_generation_prompt=True, **special
    )
    assert rendered == [RENDERED[name]]
    alone, _ = render_jinja_template([CHAT[1:2]], chat_template=chat_templates.KNOWN[name], **special)
    assert "Two and two?" in alone[0] and "Be brief" not in alone[0] and "assistant" not in alone[0]


def test_auto_is_the_template_that_most_models_have(tmp_path):
    for name, text in [("a", "{{ one }}"), ("b", "{{ two }}\n"), ("c", None), ("d", None)]:
        (tmp_path / name).mkdir()
        if text:
            (tmp_path / name / "chat_template.jinja").write_text(text)
    (tmp_path / "c" / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tools", "template": "{{ x }}"}, {"name": "default", "template": "{{ two }}"}]}'
    )
    directories = [tmp_path / name for name in "abcd"]
    assert chat_templates.text_of("auto", directories) == "{{ two }}"
    assert chat_templates.text_of("auto", directories[:1]) == "{{ one }}"
    assert chat_templates.text_of("auto", directories[3:]) == ""
    assert chat_templates.text_of("{{ own }}", directories) == "{{ own }}"


def test_a_printed_recipe_is_yaml_of_ours():
    printed = yaml.safe_load(recipe("merge_method: ties\nbase_model: x\n" + TWO).to_yaml())
    assert "merge_method" not in printed and load(printed) == recipe("merge_method: ties\nbase_model: x\n" + TWO)
