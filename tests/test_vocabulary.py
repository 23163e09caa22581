"""Vocabularies aligned by token: which rows are merged, with what, and what the output's tokenizer is."""

import json
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import graftkit
from graftkit.checkpoints.rows import Rows
from graftkit.errors import GraftError
from graftkit.recipes.explain import summary
from graftkit.recipes.plan import plan
from graftkit.recipes.vocabulary import MISSING, row_map
from graftkit.recipes.words import Words, union
from vocabularies import HIDDEN, bpe, model

transformers = pytest.importorskip("transformers")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LETTERS = list("abcdefghij")


def words(*tokens):
    return {token: k for k, token in enumerate(tokens)}


def merged(recipe, out, **options):
    graftkit.merge(recipe, out, **options)
    files = sorted(out.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def ids(directory):
    data = json.loads((directory / "tokenizer.json").read_text())
    return data["model"]["vocab"] | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


def family(root, **more):
    """A base and two fine-tunes: `math` adds a token and lacks a letter, `chat` has another order and its own."""
    tokenizers = {
        "base": bpe(LETTERS[:6], added=["<|end|>"]),
        "math": bpe(LETTERS[:5], added=["<|end|>", "<|sum|>"]),
        "chat": bpe([*reversed(LETTERS[1:7]), "h"], added=["<|im|>", "<|sum|>", "<|end|>"]),
    }
    return {
        name: (str(root / name), model(root / name, k, tokenizer, **more), ids(root / name))
        for k, (name, tokenizer) in enumerate(tokenizers.items())
    }


def row(models, name, tensor, token):
    _, tensors, held = models[name]
    return tensors[tensor][held[token]].double() if token in held else None


def near(out, exact):
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("source", ["base", "union", "chat"])
def test_rows_are_merged_by_token(source, tied, tmp_path):
    models = family(tmp_path, tied=tied)
    recipe = {
        "method": "task_arithmetic",
        "base": models["base"][0],
        "models": [{"model": models["math"][0], "weight": 0.5}, {"model": models["chat"][0], "weight": 0.25}],
        "output": {"tokenizer": models[source][0] if source == "chat" else source},
    }
    out = merged(recipe, tmp_path / "out")
    held = ids(tmp_path / "out")
    kept = {"base": set(models["base"][2]), "chat": set(models["chat"][2])}
    assert set(held) == kept.get(source, set().union(*(m[2] for m in models.values())))
    if source != "union":
        assert held == models[source][2]
    assert sorted(held.values()) == list(range(len(held)))
    for tensor in (EMBEDDING,) if tied else (EMBEDDING, HEAD):
        assert out[tensor].shape == (len(held), HIDDEN)
        for token, number in held.items():
            base, math, chat = (row(models, name, tensor, token) for name in ("base", "math", "chat"))
            tuned = [(w, r) for w, r in ((0.5, math), (0.25, chat)) if r is not None]
            if base is None:
                exact = sum(w * r for w, r in tuned) / sum(w for w, _ in tuned)
            else:
                exact = base + sum(w * (r - base) for w, r in tuned)
            near(out[tensor][number], exact)
    assert (HEAD in out) == (not tied)


@pytest.mark.parametrize("source", ["base", "union"])
def test_an_average_counts_only_those_that_have_the_token(source, tmp_path):
    models = family(tmp_path)
    listed = [{"model": models[name][0], "weight": w} for name, w in (("base", 1.0), ("math", 2.0), ("chat", 3.0))]
    out = merged({"method": "average", "models": listed, "output": {"tokenizer": source}}, tmp_path / "out")
    for token, number in ids(tmp_path / "out").items():
        rows = [(w, row(models, n, HEAD, token)) for n, w in (("base", 1.0), ("math", 2.0), ("chat", 3.0))]
        rows = [(w, r) for w, r in rows if r is not None]
        near(out[HEAD][number], sum(w * r for w, r in rows) / sum(w for w, _ in rows))


def test_filling_is_what_mergekit_does(tmp_path):
    """A model without a token reads the base's row, else the only one there is, else the mean of those there are."""
    models = family(tmp_path)
    recipe = {
        "method": "task_arithmetic",
        "base": models["base"][0],
        "knobs": {"scale": 0.5},
        "models": [{"model": models["math"][0], "weight": 0.5}, {"model": models["chat"][0], "weight": 0.75}],
        "output": {"tokenizer": {"source": "union", "missing": "fill", "pad_to_multiple_of": 8, "padding": "mean"}},
    }
    out = merged(recipe, tmp_path / "out")
    held = ids(tmp_path / "out")
    filled = {name: [] for name in models}
    for token in sorted(held, key=held.get):
        rows = {name: row(models, name, EMBEDDING, token) for name in models}
        having = [r for r in rows.values() if r is not None]
        donor = rows["base"] if rows["base"] is not None else sum(having) / len(having)
        for name, own in rows.items():
            filled[name].append(donor if own is None else own)
    padding = -len(held) % 8
    whole = {n: torch.stack([*rows, *[torch.stack(rows).mean(0)] * padding]) for n, rows in filled.items()}
    base = whole["base"]
    near(out[EMBEDDING], base + 0.5 * (0.5 * (whole["math"] - base) + 0.75 * (whole["chat"] - base)))
    assert len(out[EMBEDDING]) == 16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16


@pytest.mark.parametrize("method", ["ties", "slerp", "average", "model_stock", "breadcrumbs"])
def test_a_permuted_vocabulary_is_the_same_model(method, tmp_path):
    """Aligned, a copy with its tokens in another order merges as the copy in the first order would."""
    model(tmp_path / "base", 1, bpe(LETTERS))
    model(tmp_path / "one", 0, bpe(LETTERS))
    same = model(tmp_path / "same", 2, bpe(LETTERS))
    order = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    model(tmp_path / "moved", 2, bpe([LETTERS[k] for k in order]))
    moved = {n: t[order] if n in (EMBEDDING, HEAD) else t for n, t in same.items()}
    save_file(moved, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    common = {"method": method, "output": {"tokenizer": str(tmp_path / "one")}}
    common |= {} if method in ("slerp", "average") else {"base": str(tmp_path / "base")}
    results = [
        merged(common | {"models": [str(tmp_path / "one"), str(tmp_path / name)]}, tmp_path / f"out-{name}")
        for name in ("same", "moved")
    ]
    for name, tensor in results[0].items():
        torch.testing.assert_close(tensor, results[1][name], rtol=1e-6, atol=1e-7)


def test_equal_vocabularies_need_no_alignment(tmp_path):
    """With the key or without: the same bytes, padding rows included."""
    for k, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, k, bpe(LETTERS), 16)
    recipe = {"method": "ties", "base": str(tmp_path / "base"), "models": [str(tmp_path / n) for n in "ab"]}
    merged(recipe, tmp_path / "plain")
    for source in ("base", "union", str(tmp_path / "a")):
        out = tmp_path / f"aligned-{len(source)}"
        merged(recipe | {"output": {"tokenizer": source}}, out)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "plain" / "model.safetensors").read_bytes()
        assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "plain/config.json").read_text())


def test_padding_rows(tmp_path):
    """The source's own rows without tokens stay; new tokens take them; what nobody has is the mean of the tokens."""
    base = model(tmp_path / "base", 0, bpe(LETTERS[:4]), 8)
    chat = model(tmp_path / "chat", 1, bpe(LETTERS[:4], added=["<|im|>"]), 5)
    recipe = {"method": "average", "models": [str(tmp_path / "base"), str(tmp_path / "chat")]}

    def rows(**tokenizer):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        return merged(recipe | {"output": {"tokenizer": tokenizer}}, out)[HEAD]

    letters = (base[HEAD][:4].double() + chat[HEAD][:4].double()) / 2
    plain = rows(source="base")
    near(plain, torch.cat([letters, base[HEAD][4:].double()]))
    both = rows(source="union")
    near(both, torch.cat([letters, chat[HEAD][4:].double(), base[HEAD][5:].double()]))
    exact = rows(source="union", pad_to_multiple_of=1)
    near(exact, both[:5].double())
    wide = rows(source="union", pad_to_multiple_of=12)
    mean = (base[HEAD][:4].double().mean(0) + chat[HEAD][:5].double().mean(0)) / 2
    near(wide, torch.cat([both.double(), mean.expand(4, HIDDEN)]))
    new = rows(source="union", pad_to_multiple_of=8, padding="mean")
    near(new, torch.cat([both[:5].double(), mean.expand(3, HIDDEN)]))


def test_rows_given_by_hand(tmp_path):
    models = family(tmp_path)
    chat = models["chat"][0]
    tokens = {
        "a": {"model": chat, "token": "g", "force": True},
        "f": chat,
        "<|new|>": {"model": chat, "id": 0},
        "<|zero|>": {"zero": True},
        "b": {"zero": True, "force": True},
    }
    recipe = {
        "method": "task_arithmetic",
        "base": models["base"][0],
        "models": [models["math"][0], chat],
        "output": {"tokenizer": {"source": "base", "tokens": tokens}},
    }
    out = merged(recipe, tmp_path / "out")[EMBEDDING]
    held = ids(tmp_path / "out")
    assert held == models["base"][2] | {"<|new|>": 7, "<|zero|>": 8}
    near(out[held["a"]], row(models, "chat", EMBEDDING, "g"))
    base, own = row(models, "base", EMBEDDING, "f"), row(models, "chat", EMBEDDING, "f")
    near(out[held["f"]], base + 2 * (own - base))  # math, which lacks it, reads chat's too
    near(out[held["<|new|>"]], models["chat"][1][EMBEDDING][0].double())
    near(out[held["<|zero|>"]], torch.zeros(HIDDEN).double())
    near(out[held["b"]], torch.zeros(HIDDEN).double())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("a<|new|>b")["input_ids"] == [held["a"], held["<|new|>"], held["b"]]


def test_the_output_loads_and_encodes(tmp_path):
    """Tokenizer, special ids, and logits equal to what each model's own rows say."""
    models = family(tmp_path)
    listed = [{"model": models[name][0], "weight": w} for name, w in (("base", 1.0), ("chat", 0.0001))]
    recipe = {"method": "average", "models": listed, "output": {"tokenizer": "union"}}
    merged(recipe, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    held = ids(tmp_path / "out")
    assert tokenizer("ab<|im|>c<|sum|><|end|>")["input_ids"] == [
        held[t] for t in ("a", "b", "<|im|>", "c", "<|sum|>", "<|end|>")
    ]
    assert tokenizer.decode([held["g"], held["h"]]) == "gh"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == len(tokenizer) == 11
    first = transformers.AutoModelForCausalLM.from_pretrained(models["base"][0])
    with torch.inference_mode():
        text = torch.tensor([[models["base"][2][t] for t in "abcdef"]])
        wanted = first(text).logits
        given = loaded(text).logits
    torch.testing.assert_close(given[..., :7], wanted, rtol=0.05, atol=0.05)


def test_special_ids_follow_the_vocabulary(tmp_path):
    a = bpe(LETTERS[:4], added=["<|image|>"])
    b = bpe(["d", "c", "b", "a", "e"], added=["<|image|>"])
    model(tmp_path / "a", 0, a, bos_token_id=0, eos_token_id=[1, 2], image_token_id=4)
    model(tmp_path / "b", 1, b, bos_token_id=3, eos_token_id=4)
    recipe = {
        "method": "average",
        "models": [str(tmp_path / "a"), str(tmp_path / "b")],
        "output": {"tokenizer": str(tmp_path / "b")},
    }
    merged(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["image_token_id"]) == (3, 4, 5)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 3, "eos_token_id": 4}
    assert (tmp_path / "out" / "chat_template.jinja").read_text().endswith("by b")
    model(tmp_path / "c", 2, bpe(LETTERS[:4]))
    with pytest.raises(GraftError, match=r"uses token 4 \('<\|image\|>'\) as its image_token_id.*choose `union`"):
        plan(
            recipe | {"output": {"tokenizer": str(tmp_path / "c")}, "models": [*recipe["models"], str(tmp_path / "c")]}
        )


def test_the_plan_tells_of_every_row(tmp_path):
    models = family(tmp_path)
    recipe = {
        "method": "task_arithmetic",
        "base": models["base"][0],
        "models": [models["math"][0], models["chat"][0]],
        "output": {"tokenizer": {"source": "union", "pad_to_multiple_of": 16}},
    }
    told = summary(plan(recipe))["vocabulary"]
    (tensor,) = told["tensors"]
    assert sorted(tensor["names"]) == [HEAD, EMBEDDING] and tensor["rows"] == 16
    rows = sorted(n for kind in tensor["kinds"] for n in kind["rows"])
    assert rows == list(range(16))
    base, math, chat = (models[name][0] for name in ("base", "math", "chat"))
    assert [(k["kind"], k["models"], [t for t in k["tokens"] if t]) for k in tensor["kinds"]] == [
        ("merged", [], ["b", "c", "d", "e", "<|end|>"]),
        ("merged by those that have it", [base, math], ["a"]),
        ("merged by those that have it", [base, chat], ["f"]),
        ("one model's", [chat], ["g", "h", "<|im|>"]),
        ("the mean of those that have it", [math, chat], ["<|sum|>"]),
        ("padding, the mean of all tokens", [], []),
    ]
    left = summary(plan(recipe | {"output": {"tokenizer": "base"}}))["vocabulary"]["left_out"]
    assert left == {models["math"][0]: ["<|sum|>"], models["chat"][0]: ["g", "h", "<|im|>", "<|sum|>"]}


@contextmanager
def no_more(count, monkeypatch):
    """Kills a run after some steps."""
    from graftkit.checkpoints.sink import Sink

    finish, left = Sink.finish, [count]

    def failing(self, *args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        finish(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "finish", failing)
        yield


@pytest.mark.parametrize("method", ["ties", "dare", "average"])
def test_workers_memory_shards_and_interruption_change_no_byte(method, tmp_path, monkeypatch):
    models = family(tmp_path, dtype=torch.bfloat16)
    recipe = {
        "method": method,
        "models": [models["math"][0], models["chat"][0]],
        "output": {"tokenizer": "union", "shard": "300B"},
    } | ({} if method == "average" else {"base": models["base"][0]})
    merged(recipe, tmp_path / "one", workers=1)
    merged(recipe, tmp_path / "many", workers=4, memory=2 << 30)
    for stop in (1, 4):
        with no_more(stop, monkeypatch), pytest.raises(KeyboardInterrupt):
            merged(recipe, tmp_path / f"killed{stop}", workers=1)
        merged(recipe, tmp_path / f"killed{stop}")
    files = sorted(f.name for f in (tmp_path / "one").iterdir() if f.name not in ("graft.json", "README.md"))
    assert len([f for f in files if f.endswith("safetensors")]) > 3
    for other in ("many", "killed1", "killed4"):
        assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / other / f).read_bytes() for f in files)


def test_what_cannot_be_aligned_is_refused_by_name(tmp_path):
    models = family(tmp_path)
    base, math, chat = (models[name][0] for name in ("base", "math", "chat"))
    recipe = {"method": "average", "models": [base, chat]}

    def refused(message, tokenizer, **more):
        with pytest.raises(GraftError, match=message):
            plan(recipe | more | {"output": {"tokenizer": tokenizer}})

    with pytest.raises(
        GraftError, match=r"vocabularies differ; align them by token with `output: \{tokenizer: base\}`"
    ):
        plan(recipe)
    refused(r"output.tokenizer: unknown model 'unoin'; did you mean 'union'\?", "unoin")
    refused(r"tokens\['x'\]: .*chat' has no token 'x'; name another", {"source": "base", "tokens": {"x": chat}})
    refused("has 10 rows, so none of number 10", {"source": "base", "tokens": {"x": {"model": chat, "id": 10}}})
    refused("unknown model", {"source": "base", "tokens": {"x": math}})
    refused("names a row by `model:`", {"source": "base", "tokens": {"x": {}}})
    (tmp_path / "chat" / "tokenizer.json").rename(tmp_path / "kept.json")
    refused("chat': has no tokenizer.json, so its tokens are unknown", "base")
    data = json.loads((tmp_path / "kept.json").read_text())

    def write(content):
        (tmp_path / "chat" / "tokenizer.json").write_text(json.dumps(content))

    write([])
    refused("tokenizer.json: not a tokenizer", "base")
    write(data | {"model": {**data["model"], "vocab": {}}, "added_tokens": []})
    refused("its tokenizer has no token", "base")
    write(data | {"model": {**data["model"], "vocab": {"a": 0, "b": 0}}})
    refused("gives 'a' and 'b' the same id 0", "base")
    write(data | {"model": {"type": "Unigram", "vocab": [["a", 0.0], ["z", -1.0]]}, "added_tokens": []})
    merged(recipe | {"output": {"tokenizer": "base"}}, tmp_path / "fine")
    refused("Unigram model, to which 5 ordinary tokens", "union", models=[chat, base])


def test_a_token_beyond_the_embedding_has_no_row(tmp_path):
    """Some tokenizers know tokens that the model was never given rows for."""
    a = model(tmp_path / "a", 0, bpe(LETTERS[:4], added=["<|x|>"]), 4)
    b = model(tmp_path / "b", 1, bpe(LETTERS[:4], added=["<|x|>", "<|y|>"]), 5)
    recipe = {"method": "average", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    out = merged(recipe | {"output": {"tokenizer": "union"}}, tmp_path / "out")[EMBEDDING]
    assert ids(tmp_path / "out") == words(*"abcd", "<|x|>")
    near(out[4], b[EMBEDDING][4].double())
    alone = merged(recipe | {"models": [str(tmp_path / "a")], "output": {"tokenizer": "base"}}, tmp_path / "alone")
    near(alone[EMBEDDING][4], a[EMBEDDING].double().mean(0))


def test_vocabulary_and_depth_change_together(tmp_path):
    models = family(tmp_path)
    cut = [{"sources": [{"model": models[m][0], "layer_range": [0, 1]}]} for m in ("base", "chat", "base")]
    recipe = {"method": "passthrough", "slices": cut, "output": {"tokenizer": "union"}}
    out = merged(recipe, tmp_path / "out")
    held = ids(tmp_path / "out")
    for token, number in held.items():
        own = row(models, "base", EMBEDDING, token)
        if own is not None:
            near(out[EMBEDDING][number], own)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.num_hidden_layers == 3 and loaded.config.vocab_size == len(held)


def test_a_note_where_tokens_clash_and_nobody_aligns_them(tmp_path):
    model(tmp_path / "a", 0, bpe(LETTERS[:4]))
    model(tmp_path / "b", 1, bpe(["a", "c", "b", "d"]))
    recipe = {"method": "average", "models": [str(tmp_path / "a"), str(tmp_path / "b")]}
    assert any("has 'c' as token 1" in note and "'b'" in note for note in plan(recipe).notes)
    assert not any("token" in note for note in plan(recipe | {"output": {"tokenizer": "base"}}).notes)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from("abcdefghijkl"), unique=True),
    st.lists(st.sampled_from("abcdefghijkl"), unique=True),
    st.integers(0, 14),
    st.integers(0, 14),
    st.booleans(),
)
def test_row_maps(wanted, own, held, height, padding):
    """Every token's row is that of the same token; no row is read twice; padding only where ids agree."""
    one, two = Words(words(*wanted), {}), Words(words(*own), {})
    rows = row_map(one, two, held, height, padding)
    assert len(rows) == height
    used = [n for n in rows if n != MISSING]
    assert len(used) == len(set(used)) and all(0 <= n < held for n in used)
    for token, number in one.ids.items():
        if number < height:
            assert rows[number] == (two.ids[token] if two.ids.get(token, held) < held else MISSING)
    for number in range(len(wanted), height):
        assert rows[number] in (MISSING, number) and (padding or rows[number] == MISSING)
    both = union([(one, 99), (two, held)])
    assert {t: n for t, n in both.ids.items() if t in one.ids} == dict(one.ids)
    assert set(both.ids) == set(wanted) | {t for t, n in two.ids.items() if n < held}
    assert sorted(both.ids.values()) == list(range(len(both.ids)))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), max_size=30), st.integers(1, 5), st.data())
def test_spans_of_rows(numbers, width, data):
    """Any range of the packed rows is covered once, in order, by pieces that lie together."""
    rows = Rows.of(numbers)
    assert list(rows) == numbers and rows.count == len(numbers)
    start = data.draw(st.integers(0, len(numbers) * width))
    stop = data.draw(st.integers(start, len(numbers) * width))
    packed = [n * width + k for n in numbers for k in range(width)]
    found, at = [], start
    for place, first, count in rows.spans(start, stop, width):
        assert first == at and count > 0
        found += range(place, place + count)
        at += count
    assert found == packed[start:stop]


def test_adapters_beside_another_vocabulary(tmp_path):
    """An adapter has its base's tokens; it has no say in rows that its base lacks."""
    models = family(tmp_path)
    lora = tmp_path / "lora"
    lora.mkdir()
    generator = torch.Generator().manual_seed(9)
    a, b = torch.randn(2, 7, generator=generator), torch.randn(HIDDEN, 2, generator=generator)
    q = {"A": torch.randn(2, HIDDEN, generator=generator), "B": torch.randn(HIDDEN, 2, generator=generator)}
    wrapped = "base_model.model.model."
    tensors = {f"{wrapped}embed_tokens.lora_embedding_A": a, f"{wrapped}embed_tokens.lora_embedding_B": b}
    tensors |= {f"{wrapped}layers.0.self_attn.q_proj.lora_{k}.weight": v for k, v in q.items()}
    save_file(tensors, lora / "adapter_model.safetensors")
    said = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "base_model_name_or_path": "base",
        "target_modules": ["q_proj"],
    }
    (lora / "adapter_config.json").write_text(json.dumps(said))
    recipe = {
        "method": "task_arithmetic",
        "base": models["base"][0],
        "models": [str(lora), models["chat"][0]],
        "output": {"tokenizer": models["chat"][0]},
    }
    out = merged(recipe, tmp_path / "out")
    delta = (b @ a).T
    for token, number in models["chat"][2].items():
        base, chat = row(models, "base", EMBEDDING, token), row(models, "chat", EMBEDDING, token)
        exact = chat if base is None else chat + delta[models["base"][2][token]].double()
        near(out[EMBEDDING][number], exact)
    near(out[HEAD][models["chat"][2]["g"]], row(models, "chat", HEAD, "g"))


def test_a_head_with_a_bias_of_tokens(tmp_path):
    models = family(tmp_path)
    for name, (path, tensors, held) in models.items():
        bias = torch.arange(float(len(held))) + 100 * (name == "chat")
        save_file(tensors | {"lm_head.bias": bias}, f"{path}/model.safetensors", metadata={"format": "pt"})
    recipe = {"method": "average", "models": [m[0] for m in models.values()], "output": {"tokenizer": "union"}}
    out = merged(recipe, tmp_path / "out")["lm_head.bias"]
    for token, number in ids(tmp_path / "out").items():
        rows = [m[2][token] + 100.0 * (n == "chat") for n, m in models.items() if token in m[2]]
        assert out[number].item() == pytest.approx(sum(rows) / len(rows))


@pytest.mark.parametrize("method", ["ties", "della", "svc", "pcb", "sce", "nuslerp", "slerp", "emr", "model_stock"])
def test_every_kind_of_method_takes_rows_in_part(method, tmp_path):
    """Knobs, keys and preparations are those of the models that have a row; what needs more models takes their mean."""
    models = family(tmp_path)
    finish = {"finish": ["svc"]} if method == "svc" else {}
    recipe = {
        "method": "task_arithmetic" if method == "svc" else method,
        "base": models["base"][0],
        "models": [{"model": models["math"][0]}, {"model": models["chat"][0]}],
        "output": {"tokenizer": "union"},
    } | finish
    if method in ("ties", "della", "svc"):
        recipe["models"][1]["weight"] = 0.5
    if method == "emr":
        with pytest.raises(GraftError, match="emr writes a bit mask.*keep the base.s layers and tokens"):
            plan(recipe)
        return
    out = merged(recipe, tmp_path / "out")
    held = ids(tmp_path / "out")
    assert torch.isfinite(out[HEAD]).all() and len(out[HEAD]) == len(held)
    near(out[HEAD][held["g"]], row(models, "chat", HEAD, "g"))
