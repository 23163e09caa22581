"""Answers by generation: the texts, what is read from them, and programs that are run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from graftkit.data import Generation, Item, Task
from graftkit.data.normalisation import Rule
from graftkit.errors import DataError, NonFiniteError
from graftkit.measuring.evaluation import evaluate
from graftkit.measuring.generated import program_of, score_generated
from graftkit.measuring.generation import generate
from talker import slow_reply, tiny, tokenizer

PROMPTS = ("what is the capital of France?", "two and", "the cat sat on the mat and " * 3, "Berlin", "is a city four")
TASK = Task(
    "t",
    "exact_match",
    tuple(Item(prompt, ("x",)) for prompt in PROMPTS),
    generation=Generation(12, (), (Rule("strip"),)),
)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_replies_equal_a_slow_computation(chat: bool, seed: int) -> None:
    model, task, words = tiny(seed), replace(TASK, chat=chat), tokenizer()
    wanted = [slow_reply(model, words, task, item, ends=(words.eos_token_id,)) for item in task.items]
    for batch_tokens in (1, 10, 1000):  # a row each, some together, all together with padding on the left
        found = generate(model, words, task, batch_tokens)
        assert [reply.text for reply in found] == [text for text, _ in wanted]
    assert len({text for text, _ in wanted}) > 3


def test_stops_cut_the_text_and_end_the_row() -> None:
    model, words = tiny(), tokenizer()
    whole = generate(model, words, TASK, 1000)
    middle = whole[0].text[len(whole[0].text) // 2 :][:3]
    task = replace(TASK, generation=Generation(12, (middle,), ()))
    for reply, full, item in zip(generate(model, words, task, 1000), whole, task.items, strict=True):
        assert reply.text == full.text.split(middle)[0] == slow_reply(model, words, task, item, (2,))[0]
        assert reply.finished == (middle in full.text) and (reply.finished or reply.tokens == 12)


def test_an_end_of_text_ends_the_answer() -> None:
    model, words = tiny(), tokenizer()
    first = generate(model, words, TASK, 1000)[0]
    token = words(first.text, add_special_tokens=False)["input_ids"][3]
    model.generation_config.eos_token_id = [token]
    ends = (token, words.eos_token_id)
    found = generate(model, words, TASK, 1000)
    wanted = [slow_reply(model, words, TASK, item, ends) for item in TASK.items]
    assert [(reply.text, reply.tokens) for reply in found] == wanted
    assert found[0].finished and found[0].tokens < 12


def test_a_checkpoints_own_settings_are_set_aside() -> None:
    model, words = tiny(), tokenizer()
    before = generate(model, words, TASK, 1000)
    model.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0, max_new_tokens=2)
    assert generate(model, words, TASK, 1000) == before
    assert model.generation_config.repetition_penalty == 5.0


def test_answers_are_matched_after_the_rules() -> None:
    model, words = tiny(), tokenizer()
    texts = [reply.text for reply in generate(model, words, TASK, 1000)]
    assert texts[0].strip() != texts[1].strip()
    items = (
        Item(PROMPTS[0], (texts[0],)), Item(PROMPTS[1], ("wrong", texts[1].upper())), Item(PROMPTS[3], ("wrong",)),
    )  # fmt: skip
    task = Task("t", "exact_match", items, generation=Generation(12, (), (Rule("strip"), Rule("casefold"))))
    found = evaluate([("tiny", model, words)], [task], resamples=100).score("tiny", "t")
    assert [item.right for item in found.items] == [True, True, False]
    assert found.metrics["exact_match"].value == pytest.approx(2 / 3)
    assert found.items[0].found == texts[0].strip().casefold()
    nothing = replace(task, generation=Generation(12, (), (Rule("regex", "never (there)"),)))
    assert [item.found for item in score_generated(model, words, nothing, 1000)] == [None, None, None]
    assert not any(item.right for item in score_generated(model, words, nothing, 1000))


def test_a_program_is_given_code_continuation_and_test() -> None:
    item = Item("p", (), 0, "", "import math\n\ndef f(x):\n", "def check(g):\n    assert g(4) == 2\n", "f")
    for code in ("    return math.sqrt(x)", "def f(x):\n    return math.sqrt(x)"):
        scope: dict[str, Any] = {}
        exec(program_of(item, code), scope)
        assert scope["f"](9) == 3
    with pytest.raises(AssertionError):
        exec(program_of(item, "    return x"), {})
    assert program_of(replace(item, entry_point=""), "    pass").endswith("== 2\n\n\n")


def test_programs_run_only_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import graftkit.measuring.generated as generated
    from graftkit.measuring.generation import Reply

    test = "def check(f):\n    assert f(2) == 4\n"
    items = tuple(Item(f"def f(x):  # {n}\n", (), 0, "", "def f(x):\n", test, "f") for n in range(3))
    task = Task("code", "pass_at_1", items, generation=Generation(8, (), (Rule("code_block"),)))
    with pytest.raises(DataError, match="task code: it runs programs .* --run-code"):
        evaluate([("tiny", tiny(), tokenizer())], [task])
    texts = ["    return x * x\n", "    return x\n", "So:\n```python\ndef f(x):\n    return 2 ** x\n```\nDone."]
    monkeypatch.setattr(generated, "generate", lambda *_: [Reply(text, 4, True) for text in texts])
    whole = evaluate([("tiny", tiny(), tokenizer())], [task], run_code=True, resamples=50)
    found = whole.score("tiny", "code")
    assert whole.settings["sandbox"] in ("namespaces and limits", "limits only")
    assert [item.right for item in found.items] == [True, False, True]
    assert "AssertionError" in found.items[1].note
    assert found.metrics["pass_at_1"].value == pytest.approx(2 / 3)


def test_what_cannot_be_generated_is_refused() -> None:
    words = tokenizer()
    with pytest.raises(DataError, match=r"t, item 2: a prompt of .* and max_new_tokens of 12 .* the model takes 30"):
        generate(tiny(max_position_embeddings=30), words, TASK, 1000)
    broken = tiny()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="task t"):
        generate(broken, words, TASK, 1000)
