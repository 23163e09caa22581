"""What foretells a merge's gain, against definitions written out; and rankings of experts that were made to differ."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import talker
from graftkit.cli import app
from graftkit.data import Item, Task
from graftkit.errors import DataError, OutputError, PlanError
from graftkit.improving import ranking_rule as rule
from graftkit.improving import ranking_words as words
from graftkit.improving.ranking import experts_in, rank
from graftkit.improving.ranking_weights import weigh
from graftkit.measuring.activations import run
from graftkit.measuring.compatibility_observing import rows_of
from graftkit.measuring.predictors import Responses, ResponseSums, deltas, interference, pooled, similarity
from graftkit.measuring.predictors_observing import Observed, observe
from graftkit.measuring.responses import Delta
from test_compatibility import adapter, added, ids_of, save, task

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's


def gram(x: np.ndarray) -> np.ndarray:
    return (x @ x.T)[None]


def unbiased(a: np.ndarray, b: np.ndarray) -> float:
    """Song et al.'s estimator as a sum over four different samples."""
    n, total = len(a), 0.0
    for i in range(n):
        for j in {*range(n)} - {i}:
            for q in {*range(n)} - {i, j}:
                for r in {*range(n)} - {i, j, q}:
                    total += a[i, j] * (b[i, j] + b[q, r] - 2 * b[i, q])
    return total / (n * (n - 1) * (n - 2) * (n - 3))


def test_similarity_is_debiased_linear_cka() -> None:
    source = np.random.default_rng(0)
    x, y = source.normal(size=(7, 5)), source.normal(size=(7, 3))
    y += x[:, :3]
    k, m = x @ x.T, y @ y.T
    wanted = unbiased(k, m) / np.sqrt(unbiased(k, k) * unbiased(m, m))
    assert similarity(gram(x), gram(y)) == pytest.approx(wanted)
    turned, _ = np.linalg.qr(source.normal(size=(5, 5)))
    assert similarity(gram(x), gram(3 * x @ turned)) == pytest.approx(1)
    strangers = [
        similarity(gram(source.normal(size=(12, 400))), gram(source.normal(size=(12, 400)))) for _ in range(40)
    ]
    assert abs(float(np.mean([v for v in strangers if v is not None]))) < 0.1  # plain CKA says above 0.9 here
    assert similarity(gram(x[:3]), gram(x[:3])) is None
    assert similarity(np.zeros((1, 5, 5)), np.zeros((1, 5, 5))) is None


def test_responses_are_what_the_deltas_answer() -> None:
    model, data, tokenizer = talker.tiny().double(), task(6), talker.tokenizer()
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"]
    weights = dict(model.named_parameters())
    torch.manual_seed(0)
    whole = {name: [torch.randn_like(weights[name]) for _ in range(3)] for name in names}
    given = {name: [Delta(right=own) for own in whole[name]] for name in names}
    low = torch.randn(48, 2).double(), torch.randn(2, 32).double()
    given[names[0]][2], whole[names[0]][2] = Delta(*low), low[0] @ low[1]
    given[names[1]][0], whole[names[1]][0] = Delta(), torch.zeros_like(whole[names[1]][0])
    sums = ResponseSums(model, given, 1)
    run(model, rows_of(tokenizer, data), sums.listeners(), batch_tokens=50)
    found = sums.responses()
    heard: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    modules = dict(model.named_modules())
    for name in names:
        modules[name.removesuffix(".weight")].register_forward_pre_hook(
            lambda _, given, name=name: heard[name].append(given[0].detach()[0])
        )
    for item in data.items:
        model(torch.tensor([ids_of(item)]))
    ratios = []
    for name in names:
        answers = [torch.cat(heard[name]) @ own.T for own in whole[name]]
        for u in range(3):
            np.testing.assert_allclose(
                found.dots[name][u], (answers[1] * answers[u]).mean(dim=0), rtol=1e-9, atol=1e-12
            )
            np.testing.assert_allclose(found.squares[name][u], (answers[u] ** 2).mean(dim=0), rtol=1e-9, atol=1e-12)
        moments = found.moments(name, (1, 2))
        np.testing.assert_allclose(moments[0, 1], (answers[1] * answers[2]).mean(dim=0), rtol=1e-9)
        np.testing.assert_allclose(moments, found.moments(name, (2, 1))[::-1, ::-1])
        ratios.append(float((answers[2] ** 2).sum() / (answers[1] ** 2).sum()))
    assert interference(found, 2) == pytest.approx(np.mean(ratios))
    assert pooled([found, found]).squares[names[0]] == pytest.approx(found.squares[names[0]])


def responses(own: int, answers: np.ndarray) -> Responses:
    """Of one matrix, from the answers of all models' deltas [models, tokens, out]."""
    return Responses(own, {"w": (answers * answers[own]).mean(axis=1)}, {"w": (answers**2).mean(axis=1)})


def test_what_the_best_gates_lose() -> None:
    source = np.random.default_rng(0)
    answers = source.normal(size=(2, 50, 6))
    silent = np.zeros_like(answers[0])
    free, _ = rule.residuals(responses(0, np.stack([answers[0], silent])), responses(1, np.stack([silent, answers[1]])))
    assert free == pytest.approx(0, abs=1e-6)  # each is silent on the other's data
    one, other = responses(0, answers), responses(1, answers)
    assert rule.met(one, other) == pytest.approx(((answers[1] ** 2).mean() / (answers[0] ** 2).mean(),
                                                 (answers[0] ** 2).mean() / (answers[1] ** 2).mean()))  # fmt: skip
    same = np.stack([answers[0] + answers[1]] * 2)
    assert rule.residuals(responses(0, same), responses(1, same))[1] == pytest.approx(0, abs=1e-6)
    apart = np.stack([same[0], -same[0]])  # opposed on the same inputs: no coefficient serves both
    free, convex = rule.residuals(responses(0, apart), responses(1, apart))
    assert 0.9 < free < 1.1 and convex == pytest.approx(1.0, abs=1e-6)


def test_proficiency_and_what_follows_from_it() -> None:
    own = rule.proficiency([[1.0, 30.0], [3.0, 50.0], [2.0, 10.0]], [2.0, 20.0], ["lower", "higher"])
    np.testing.assert_allclose(own, [[1, 1 / 3], [-1, 1], [0, -1 / 3]])
    np.testing.assert_array_equal(rule.proficiency([[3.0]], [2.0], ["lower"]), [[0.0]])  # none is better than the base
    assert rule.headroom(own[0], own[1]) == pytest.approx(1 - 2 / 3)
    assert rule.headroom(own[0], own[0]) == 0
    assert rule.headroom(own[0], own[1], 0.9) == pytest.approx(0.1)
    assert rule.strength(own[0], own[1]) == 1 and rule.strength(own[1], own[2]) == 0.5
    assert rule.strength(own[0]) == pytest.approx(2 / 3)
    assert rule.two_factor([1.0, 3.0, 2.0], [0.5, 0.0, 1.0], 0.5) == [0.25, 0.5, 0.75]
    assert rule.two_factor([1.0, 1.0], [0.0, 1.0], 0.25) == [0.125, 0.875]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, an adapter that was trained on the talk, one that is noise, one that ruins, and a full model."""
    root = tmp_path_factory.mktemp("family")
    base = save(root / "base", talker.tiny())
    made = {"base": base, "noise": adapter(root / "noise", talker.tiny(), 1, size=0.02)}
    made["ruin"] = adapter(root / "ruin", talker.tiny(), 2, size=2.0)
    model = talker.tiny()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(12):
        for item in task().items:
            ids = torch.tensor([ids_of(item)])
            model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    made["full"] = save(root / "full", model.eval())
    return made


def test_deltas_are_what_experts_add_to_the_base(family: dict[str, Path]) -> None:
    names = ["noise", "full"]
    found = deltas([family[name] for name in names], names, family["base"])
    base, x = talker.tiny().state_dict(), torch.randn(4, 32)
    tuned = {"noise": added(talker.tiny(), family["noise"]).state_dict()}
    from transformers import AutoModelForCausalLM

    tuned["full"] = AutoModelForCausalLM.from_pretrained(family["full"]).state_dict()
    place = "model.layers.0.self_attn.q_proj.weight"
    for number, name in enumerate(names):
        answer = found[place][number].answer(x)
        assert answer is not None
        torch.testing.assert_close(answer, x @ (tuned[name][place] - base[place]).T, rtol=1e-3, atol=1e-5)
    assert found["model.layers.0.self_attn.k_proj.weight"][0].right is None
    assert not [name for name in found if "norm" in name or "embed" in name or "lm_head" in name]


def test_weights_are_compared_without_data(family: dict[str, Path]) -> None:
    names = ["noise", "ruin", "full"]
    found = weigh([family[name] for name in names], family["base"])
    assert found.sizes[1] and found.sizes[0] and found.sizes[1] > 1000 * found.sizes[0]
    assert all(abs(cosine or 0) < 0.2 for cosine in found.cosines) and all(0.3 < c < 0.7 for c in found.conflicts)
    assert all(overlap is not None and 0 <= overlap <= 1 for overlap in found.overlaps)


def test_a_run_can_be_kept(family: dict[str, Path], tmp_path: Path) -> None:
    given = {"model.layers.0.mlp.up_proj.weight": [Delta(right=torch.randn(48, 32)), Delta()]}
    found = observe(talker.tiny(), talker.tokenizer(), task(5), given, 0)
    found.save(tmp_path / "run.npz")
    again = Observed.load(tmp_path / "run.npz")
    np.testing.assert_array_equal(again.grams, found.grams)
    np.testing.assert_array_equal(again.statistics.values, found.statistics.values)
    assert again.statistics.modules == found.statistics.modules and again.statistics.tokens == found.statistics.tokens
    assert found.responses and again.responses and again.responses.own == 0
    for name, value in found.responses.squares.items():
        np.testing.assert_allclose(again.responses.squares[name], value, rtol=1e-6)
    assert Observed.load(tmp_path / "run.npz").grams.shape == (14, 5, 5)


def test_a_ranking_finds_out_who_is_who(family: dict[str, Path]) -> None:
    names = ["noise", "ruin", "full"]
    found = rank([family[name] for name in names], [task()], base=family["base"], resamples=20)
    assert found.experts[0].name == "full"
    experts = {expert.name: expert for expert in found.experts}
    assert experts["full"].proficiency == {"talk": 1.0} and experts["ruin"].proficiency["talk"] < 0
    assert experts["full"].reason.startswith("the best on the target")
    assert (
        "so large that it may be damaged" in experts["ruin"].reason
        and "no better than the base" in experts["ruin"].reason
    )
    pairs = {frozenset(pair.models): pair for pair in found.pairs}
    assert len(pairs) == 3
    assert found.by == "both" and found.advice.startswith("take full alone: ")
    values = [pair.values["both"] for pair in found.pairs]
    assert values == sorted(values, reverse=True)  # type: ignore[type-var]
    fits = {name: found.compatibility.fit(name, "talk").normalised.value for name in names}
    means = {pair: (fits[pair[0]] + fits[pair[1]]) / 2 for pair in combinations(names, 2)}
    low, high = min(means.values()), max(means.values())
    for pair, mean in means.items():
        best = max(experts[name].proficiency["talk"] for name in pair)
        wanted = (mean - low) / (high - low) / 2 + min(max(best, 0), 1) / 2
        assert pairs[frozenset(pair)].values["two_factor"] == pytest.approx(wanted)
    harmful, harmless = (pairs[frozenset((name, "full"))] for name in ("ruin", "noise"))
    assert (harmful.values["interference"] or 0) > 100 and "which will be lost" in harmful.reason
    assert "full leads on all of the target" in harmless.reason
    assert set(harmful.values) == set(rule.PREDICTORS) and None not in harmful.values.values()
    assert set(found.scores["talk"]) == {"base", *names}
    other = rank([family[n] for n in names], [task()], base=family["base"], resamples=0, by="size")
    sizes = [pair.values["size"] for pair in other.pairs]
    assert sizes == sorted(sizes)  # type: ignore[type-var]


def values(headroom: float, size: float = 0.01) -> dict[str, float | None]:
    return {"headroom": headroom, "both": headroom, "size": size}


ABLE = {"a": {"x": 1.0, "y": 0.1}, "b": {"x": 0.0, "y": 1.0}, "c": {"x": 0.9, "y": -1.0}}


@pytest.mark.parametrize(
    ("own", "pairs", "advice"),
    [
        (
            ABLE,
            {("a", "b"): values(0.5), ("b", "c"): values(0.45)},
            r"merge a \+ b: .* gains 0.50 over a, the best alone",
        ),
        (ABLE, {("a", "b"): values(0.5, 0.2), ("b", "c"): values(0.45)}, r"merge b \+ c"),
        (ABLE, {("a", "b"): values(0.5, 0.2)}, "take a alone: every pair holds an expert whose change"),
        (ABLE, {("a", "c"): values(0.0)}, "take a alone: no pair could gain more than 0.00"),
        ({"a": {"x": -1.0}, "b": {"x": 0.0}}, {("a", "b"): values(0.0)}, "merge none of them"),
        ({"a": {"x": 1.0}, "b": {"x": 0.5}}, {("a", "b"): values(0.7)}, r"take a alone: on a single task .* a \+ b"),
    ],
)
def test_the_advice(own: Any, pairs: Any, advice: str) -> None:
    assert re.match(advice, words.advice(own, pairs))


def test_a_ranking_for_several_tasks_looks_at_headroom(family: dict[str, Path]) -> None:
    """Over the best single expert of all, so that two weak experts do not come before two strong ones."""
    models = [family[name] for name in ("noise", "ruin", "full")]
    found = rank(models, [task(4, "one"), task(4, "two", start=4)], base=family["base"], resamples=0)
    assert found.by == "headroom" and found.to_dict()["advice"] == found.advice
    best = max(np.mean(list(one.proficiency.values())) for one in found.experts)
    for pair in found.pairs:
        own = [one.proficiency for one in found.experts if one.name in pair.models]
        wanted = np.mean([max(p[t] for p in own) for t in ("one", "two")]) - best
        assert pair.values["headroom"] == pytest.approx(wanted)


def test_a_folder_stands_for_its_experts(family: dict[str, Path], tmp_path: Path) -> None:
    root = family["base"].parent
    assert experts_in([root]) == sorted(str(path) for path in family.values())
    assert experts_in([family["noise"], family["ruin"]]) == [str(family["noise"]), str(family["ruin"])]
    with pytest.raises(DataError, match="holds none"):
        experts_in([tmp_path])
    with pytest.raises(DataError, match="at least two experts, got 1"):
        experts_in([family["noise"]])
    with pytest.raises(DataError, match="as --base"):
        rank([family["noise"], family["full"]], [task()])
    with pytest.raises(DataError, match="did you mean 'cosine'"):
        rank(root, [task()], by="cosin")


def written(folder: Path, data: Task) -> Path:
    file = folder / f"{data.name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": i.prompt, "answer": i.choices[0]}) + "\n" for i in data.items))
    return file


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["compatibility", *map(str, arguments), "--threads", "1"])


def test_the_command(family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTKIT_CACHE", str(tmp_path / "cache"))
    file, out = written(tmp_path, task(6)), tmp_path / "out"
    base = ("--base", family["base"])
    done = invoke(family["noise"], family["full"], "-d", file, *base, "--out", out, "--json", "--resamples", 20)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told == json.loads((out / "compatibility.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "compatibility.json", "scores.svg", "samples.svg", "modules-1.svg", "modules-2.svg",
    }  # fmt: skip
    assert all(path.read_text().startswith("<svg") for path in out.glob("*.svg"))
    assert "noise + full" in invoke(family["noise"], family["full"], "-d", file, *base, "--resamples", 0).output
    ranked = invoke("--rank", family["noise"], family["full"], "-d", file, *base, "--out", tmp_path / "ranked")
    assert ranked.exit_code == 0, ranked.output
    assert "pairs, ordered by both" in ranked.output and "the best on the target" in " ".join(ranked.output.split())
    assert (tmp_path / "ranked" / "pairs.svg").is_file()
    kept = json.loads((tmp_path / "ranked" / "ranking.json").read_text())
    factors = [expert["two_factor"] for expert in kept["experts"]]
    assert factors == sorted(factors, reverse=True) and kept["compatibility"]["fits"]


def test_what_exists_is_not_written_into(family: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for rank_ in ([], ["--rank"]):
        done = invoke(*rank_, family["noise"], family["full"], "-d", "no-such.jsonl", "--out", tmp_path / "out")
        assert isinstance(done.exception, OutputError) and "out: exists already" in str(done.exception)
    assert not list((tmp_path / "out").iterdir())


def test_a_report_that_cannot_be_written_leaves_nothing(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    file = tmp_path / "talk.jsonl"
    file.write_bytes(json.dumps({"prompt": "the cat", "answer": " sat"}).encode())
    done = invoke(family["base"], "-d", file, "--out", tmp_path / "out", "--resamples", 0)
    assert isinstance(done.exception, OutputError) and "No space left" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_an_adapter_of_another_base_is_refused_unless_accepted(family: dict[str, Path], tmp_path: Path) -> None:
    other = adapter(tmp_path / "other", talker.tiny(), 3)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/models/elsewhere"}))
    given = ([family["noise"], other], [task(3)])
    with pytest.raises(PlanError, match="other: was trained on '/models/elsewhere', .*say --accept-base"):
        rank(*given, base=family["base"], resamples=0)
    assert len(rank(*given, base=family["base"], resamples=0, accept_base=True).experts) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--part", "mpl"], "did you mean 'mlp'"),
        (["--of", "inputs"], "--of"),
        (["--rank", "--part", "mlp"], "leave out --part"),
        (["--by", "cosine"], "add --rank"),
        (["--accept-base"], "add --rank"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str, tmp_path: Path) -> None:
    from graftkit.errors import GraftError

    done = invoke("somewhere", "-d", written(tmp_path, task(2)), *arguments)
    assert isinstance(done.exception, GraftError) and message in str(done.exception)


def test_items_of_other_kinds_are_samples_too() -> None:
    """The right choice; a program's prompt alone."""
    choice = Task("choice", "multiple_choice", (Item("two and two", (" make five", " make four"), 1),))
    (row,) = rows_of(talker.tokenizer(), choice)
    assert talker.tokenizer().decode(row.layout()[0]) == "two and two make four"
    program = Task("program", "pass_at_1", (Item("def f():", (), code="def f():", test="", entry_point="f"),))
    (row,) = rows_of(talker.tokenizer(), program)
    assert talker.tokenizer().decode(row.layout()[0]) == "def f():"


def test_a_dora_adapter_has_no_factors(family: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = adapter(tmp_path / "dora", talker.tiny())
    held = load_file(folder / "adapter_model.safetensors")
    held |= {n.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(32) for n in held if "lora_A" in n}
    save_file(held, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(PlanError, match="merge it first"):
        deltas([folder, family["noise"]], ["dora", "noise"], family["base"])
