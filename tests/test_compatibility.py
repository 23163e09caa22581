"""Compatibility (Graft, equations 9 to 14) against the equations written out with plain hooks, one sample at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import graftkit
import talker
from graftkit.data import Item, Task
from graftkit.errors import DataError, PlanError
from graftkit.measuring.compatibility import compatibility
from graftkit.measuring.compatibility_scores import by_samples, normalised_parts, resampled, scores

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's

TEXTS = [(sentence[: 4 + 3 * k], " " + sentence[3 : 6 + 2 * k]) for k, sentence in enumerate(talker.SENTENCES * 3)]


def task(count: int = 12, name: str = "talk", chat: bool = False, start: int = 0) -> Task:
    items = tuple(Item(prompt=prompt, choices=(answer,)) for prompt, answer in TEXTS[start : start + count])
    return Task(name, "answer_loss", items, chat)


def live(seed: int = 0, name: str = "tiny", **changes: Any) -> tuple[str, Any, Any]:
    return name, talker.tiny(seed, **changes).double(), talker.tokenizer()


def ids_of(item: Item) -> list[int]:
    def encode(text: str) -> list[int]:
        return list(talker.tokenizer()(text, add_special_tokens=False)["input_ids"])

    return encode(item.prompt) + encode(item.choices[0])


def plain(model: Any, data: Task, kinds: tuple[str, ...] = ("proj",), epsilon: float = 0.1) -> dict[str, Any]:
    """The equations as printed, in Python, with the module's scale from the first 4 samples."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and any(k in n for k in kinds)]
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    handles = [
        modules[n].register_forward_hook(lambda _, __, out, n=n: heard[n].append(out.detach().double())) for n in names
    ]
    for item in data.items:
        with torch.no_grad():
            model(torch.tensor([ids_of(item)]))
    for handle in handles:
        handle.remove()
    mu, s, v, eps = [], [], [], []
    for name in names:
        samples = heard[name]
        first = samples[:4]
        eps.append(epsilon * sum(float(a.abs().mean()) for a in first) / len(first))
        mu.append(sum(float(a.abs().sum()) / a.numel() for a in samples) / len(samples))
        s.append(sum(float((a.abs() < eps[-1]).sum()) / a.numel() for a in samples) / len(samples))
        v.append(sum(float(((a - a.mean()) ** 2).sum()) / a.numel() for a in samples) / len(samples))
    rho = [m * (1 - share) * math.sqrt(var) for m, share, var in zip(mu, s, v, strict=True)]

    def scaled(values: list[float]) -> list[float]:
        return [(value - min(values)) / (max(values) - min(values)) for value in values]

    primed = zip(scaled(mu), scaled(s), scaled(v), strict=True)
    rho_ = [m * (1 - share) * math.sqrt(var) for m, share, var in primed]
    return {"names": names, "mu": mu, "s": s, "v": v, "eps": eps, "rho": rho, "rho_": rho_}


@pytest.mark.parametrize("part", ["all", "attention", "mlp"])
def test_the_equations(part: str) -> None:
    model, data = live(), task()
    found = compatibility([model], data, part=part, resamples=0).fits[0]  # type: ignore[arg-type]
    kinds = {"all": ("proj",), "attention": ("self_attn",), "mlp": ("mlp",)}[part]
    wanted = plain(model[1], data, kinds)
    assert [module.name for module in found.modules] == wanted["names"]
    told = {
        "mu": "magnitude",
        "s": "sparsity",
        "v": "variance",
        "eps": "limit",
        "rho": "sensitivity",
        "rho_": "normalised",
    }
    for key, attribute in told.items():
        np.testing.assert_allclose([getattr(m, attribute) for m in found.modules], wanted[key], rtol=1e-9, atol=1e-12)
    assert found.raw.value == pytest.approx(sum(wanted["rho"]) / len(wanted["rho"]))
    assert found.normalised.value == pytest.approx(sum(wanted["rho_"]) / len(wanted["rho_"]))
    assert 0 < wanted["s"][0] < 1 and (found.samples, found.tokens) == (12, sum(map(len, map(ids_of, data.items))))


def test_chats_are_measured_as_they_are_scored() -> None:
    plain_text, chat = (compatibility([live()], task(4, chat=chat), resamples=0).fits[0] for chat in (False, True))
    assert chat.tokens > plain_text.tokens and chat.raw.value != plain_text.raw.value


def test_padding_and_company_change_nothing() -> None:
    """Alone, two at a time, all at once; and beside longer samples (the first 4 decide what is small)."""
    model, data = live(), task()
    alone, some, whole = (
        compatibility([model], data, batch_tokens=size, resamples=0).fits[0].modules for size in (1, 60, 10_000)
    )
    for other in (some, whole):
        for one, same in zip(alone, other, strict=True):
            assert (one.name, one.sparsity) == (same.name, pytest.approx(same.sparsity, abs=1e-12))
            assert one.normalised == pytest.approx(same.normalised, rel=1e-9, abs=1e-12)
            assert (one.magnitude, one.variance) == pytest.approx((same.magnitude, same.variance), rel=1e-10)


def save(folder: Path, model: Any) -> Path:
    model.save_pretrained(folder)
    talker.tokenizer().save_pretrained(folder)
    return folder


def adapter(
    folder: Path, model: Any, seed: int = 0, rank: int = 3, size: float = 0.3, targets: str = "q_proj down_proj"
) -> Path:
    """A LoRA adapter as PEFT writes it, on some projections of a model."""
    folder.mkdir()
    torch.manual_seed(seed)
    tensors = {}
    for name, weight in model.state_dict().items():
        if name.split(".")[-2] in targets.split() and weight.dim() == 2:
            module = "base_model.model." + name.removesuffix(".weight")
            tensors[f"{module}.lora_A.weight"] = size * torch.randn(rank, weight.shape[1])
            tensors[f"{module}.lora_B.weight"] = size * torch.randn(weight.shape[0], rank)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": "tiny/base",
              "target_modules": targets.split()}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def added(base: Any, folder: Path) -> Any:
    """The base with an adapter of scale 2 added in."""
    tensors, state = load_file(folder / "adapter_model.safetensors"), base.state_dict()
    for name in [n for n in tensors if "lora_A" in n]:
        key = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        state[key] = state[key] + 2 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    base.load_state_dict(state)
    return base


def test_an_adapter_is_measured_as_the_full_model_that_it_makes(tmp_path: Path) -> None:
    base = save(tmp_path / "base", talker.tiny())
    tuned = adapter(tmp_path / "tuned", talker.tiny())
    full = save(tmp_path / "full", added(talker.tiny(), tuned))
    one, other = (compatibility([m], task(), base=base, resamples=0).fits[0] for m in (tuned, full))
    assert one.normalised.value == pytest.approx(other.normalised.value, rel=1e-5)
    assert one.raw.value == pytest.approx(other.raw.value, rel=1e-5)
    assert one.raw.value != pytest.approx(compatibility([base], task(), resamples=0).fits[0].raw.value, rel=1e-3)


def test_an_adapters_own_contribution(tmp_path: Path) -> None:
    base = save(tmp_path / "base", talker.tiny())
    tuned = adapter(tmp_path / "tuned", talker.tiny())
    found = compatibility([tuned], task(5), of="contribution", base=base, resamples=0).fits[0]
    model, factors = added(talker.tiny(), tuned), load_file(tuned / "adapter_model.safetensors")
    assert {module.name.split(".")[-1] for module in found.modules} == {"q_proj", "down_proj"}
    place = "model.layers.1.mlp.down_proj"
    heard: list[torch.Tensor] = []
    layer = dict(model.named_modules())[place]
    handle = layer.register_forward_pre_hook(lambda _, given: heard.append(given[0].detach()))
    for item in task(5).items:
        model(torch.tensor([ids_of(item)]))
    handle.remove()
    a, b = (factors[f"base_model.model.{place}.lora_{x}.weight"].double() for x in "AB")
    answers = [2 * x.double() @ a.T @ b.T for x in heard]
    module = next(module for module in found.modules if module.name == place)
    assert module.magnitude == pytest.approx(float(torch.stack([y.abs().mean() for y in answers]).mean()), rel=1e-4)
    assert module.variance == pytest.approx(float(torch.stack([y.var(correction=0) for y in answers]).mean()), rel=1e-4)
    with pytest.raises(PlanError, match="no plain LoRA adapter"):
        compatibility([base], task(5), of="contribution")
    with pytest.raises(PlanError, match="no linear layer of part 'attention'"):
        only = adapter(tmp_path / "mlp", talker.tiny(), targets="up_proj")
        compatibility([only], task(5), of="contribution", part="attention", base=base)


def test_modules_that_do_nothing_stay_finite() -> None:
    name, model, tokenizer = live()
    model.model.layers[0].mlp.down_proj.weight.data.zero_()
    found = compatibility([(name, model, tokenizer)], task(3), resamples=20)
    silent = next(module for module in found.fits[0].modules if module.name == "model.layers.0.mlp.down_proj")
    assert (silent.magnitude, silent.sparsity, silent.variance, silent.sensitivity) == (0, 1, 0, 0)
    assert all(math.isfinite(v) for m in found.fits[0].modules for v in (m.normalised, m.sensitivity))
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data.zero_()
    dead = compatibility([(name, model, tokenizer)], task(3), resamples=20).fits[0]
    assert (dead.raw.value, dead.normalised.value) == (0, pytest.approx(0.5**2.5))


def test_one_sample_and_one_module() -> None:
    found = compatibility([live()], task(1), resamples=50).fits[0]
    assert found.normalised.low is found.normalised.high is None, "one sample says nothing of others"
    assert [spread.samples for spread in found.by_samples] == [1]
    raw, normalised = scores(np.array([[2.0, 0.25, 4.0]]))
    assert (raw, normalised) == (2.0 * 0.75 * 2.0, 0.5**2.5)  # nothing to scale by: 1/2 each


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000), st.booleans())
def test_scores_are_finite_and_bounded(samples: int, modules: int, seed: int, constant: bool) -> None:
    source = np.random.default_rng(seed)
    values = source.random((samples, modules, 3)) * [10.0, 1.0, 1e6]
    if constant:
        values[:] = values[:1, :1]
    raw, normalised = scores(values)
    assert np.isfinite(raw).all() and ((normalised >= 0) & (normalised <= 1)).all()
    parts = normalised_parts(values)
    assert ((parts >= 0) & (parts <= 1)).all()
    if modules > 1 and not constant:
        assert parts.min(axis=-2).max() == 0 and parts.max(axis=-2).min() == 1


def test_the_bootstrap_draws_samples_alike_for_all_models() -> None:
    source = np.random.default_rng(0)
    values = source.random((9, 4, 3))
    one, two = resampled(values, 600, 3, "talk"), resampled(values, 600, 3, "talk")
    np.testing.assert_array_equal(one, two)
    assert not np.array_equal(one[1], resampled(values, 600, 4, "talk")[1])
    raws = np.array([scores(values[list(draw)].mean(axis=0))[0] for draw in source.integers(9, size=(4000, 9))])
    assert float(one[0].std()) == pytest.approx(float(raws.std()), rel=0.12)
    assert float(one[0].mean()) == pytest.approx(float(raws.mean()), rel=0.02)
    found = compatibility([live(0, "a"), live(1, "b")], task(), resamples=200)
    a, b, pair = found.fit("a", "talk"), found.fit("b", "talk"), found.pair("b", "a", "talk")
    assert pair.normalised.value == pytest.approx((a.normalised.value + b.normalised.value) / 2)
    width = (pair.raw.high or 0) - (pair.raw.low or 0)
    assert 0 < width < max((one.raw.high or 0) - (one.raw.low or 0) for one in (a, b))


@pytest.mark.parametrize("count", [1, 4, 9, 10])
def test_few_samples_give_no_interval(count: int) -> None:
    found = compatibility([live(0, "a"), live(1, "b")], task(count), resamples=30)
    values = [v for one in (*found.fits, *found.pairs) for v in (one.raw, one.normalised)]
    values += [spread.normalised for fit in found.fits for spread in fit.by_samples]
    assert {value.low is None for value in values} == {value.high is None for value in values} == {count < 10}
    assert ("none below 10" in found.table().note) == (count < 10)


def test_more_samples_spread_less() -> None:
    values = np.linspace(0.1, 0.8, 18).reshape(6, 3) * (1 + 0.1 * np.random.default_rng(1).random((64, 6, 3)))
    found = by_samples(values, 300, 0)
    assert [spread.samples for spread in found] == [1, 2, 4, 8, 16, 32, 64]
    widths = [(spread.normalised.high or 0) - (spread.normalised.low or 0) for spread in found]
    assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    assert [spread.samples for spread in by_samples(values[:5], 10, 0)] == [1, 2, 4, 5] and by_samples(
        values, 0, 0
    ) == ()


def test_two_data_sets_give_a_pair_two_numbers(tmp_path: Path) -> None:
    data = [task(4), task(4, "other", start=6)]
    found = graftkit.compatibility([live(0, "a"), live(1, "b")], data, resamples=10)
    assert len(found.fits) == 4 and [(pair.models, pair.data) for pair in found.pairs] == [
        (("a", "b"), "talk"), (("a", "b"), "other"),
    ]  # fmt: skip
    told = json.loads(json.dumps(found.to_dict()))
    assert told["settings"]["scale_from_first"] == 4 and told["versions"]["torch"] == torch.__version__
    assert "a + b" in [row[0] for row in found.table().rows]
    with pytest.raises(DataError, match="two data sets are called 'talk'"):
        compatibility([live()], [task(), task()])
    with pytest.raises(DataError, match="no sample"):
        compatibility([live()], Task("none", "answer_loss", ()))
    with pytest.raises(DataError, match="no model"):
        compatibility([], task())
