"""Items with images: a tiny random LLaVA is asked about pictures, in batches and one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graftkit.data import Generation, Item, Task, load_task
from graftkit.data.normalisation import Rule
from graftkit.errors import DataError
from graftkit.measuring.encoding import encode
from graftkit.measuring.evaluation import evaluate
from graftkit.measuring.generated import score_generated
from graftkit.measuring.generation import generate
from graftkit.measuring.greedy import NOTE, asked, foreseen
from graftkit.measuring.joining import joined
from graftkit.measuring.scoring import Scorer, choose_scorer, log_probs, read
from talker import tiny, tokenizer

IMAGE = "<image_place>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
pytestmark = pytest.mark.filterwarnings("ignore:.*torchvision.*")


@lru_cache
def processor() -> Any:
    """Pictures of 8 x 8 points as four tokens each."""
    from copy import deepcopy

    from transformers import CLIPImageProcessor, LlavaProcessor

    words = deepcopy(tokenizer())
    words.add_special_tokens({"additional_special_tokens": [IMAGE]})
    images = CLIPImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)
    return LlavaProcessor(
        image_processor=images, tokenizer=words, patch_size=4, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token=IMAGE, chat_template=TEMPLATE,
    )  # fmt: skip


@lru_cache
def vlm(seed: int = 0) -> Any:
    """A random LLaVA around a random Llama, far from uniform, whose pictures matter."""
    import torch
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    inner = tiny(seed, vocab_size=328)
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                              image_size=8, patch_size=4)  # fmt: skip
    config = LlavaConfig(
        vision_config=vision.to_dict(), text_config=inner.config.to_dict(), vision_feature_layer=-1,
        image_token_index=processor().tokenizer.convert_tokens_to_ids(IMAGE), image_seq_length=4,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(inner.model.state_dict())
    model.lm_head.load_state_dict(inner.lm_head.state_dict())
    for parameter in model.model.multi_modal_projector.parameters():
        parameter.data.mul_(20 if parameter.dim() > 1 else 1)
    return model


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    source = np.random.default_rng(0)
    for number in range(6):
        size, mode = ((8, 8), "L") if number % 2 else ((11, 7), "RGB")
        points = source.integers(0, 256, (*size[::-1], 3) if mode == "RGB" else size, dtype=np.uint8)
        Image.fromarray(points).save(folder / f"{number}.png")
    return folder


def task(folder: Path, kind: str = "answer_loss", **changes: Any) -> Task:
    """Pictures before, between and after texts, two at once, and none."""
    asked = [
        ("what is <image> this?", ("0.png",)), ("what is this?<image>", ("1.png",)),
        ("what is this?<image>", ("2.png",)), ("<image> and <image>?", ("3.png", "4.png")),
        ("what is the capital of France?", ()), ("what is this?<image>", ("5.png",)), ("what is the cat?", ()),
    ]  # fmt: skip
    items = tuple(Item(prompt, ("a cat", "four and five")[: 1 + (kind == "multiple_choice")], 0, images=images)
                  for prompt, images in asked)  # fmt: skip
    return replace(Task("seen", kind, items, chat=True, directory=str(folder)), **changes)  # type: ignore[arg-type]


def slow_logits(model: Any, item: Item, folder: Path, answer: list[int], chat: bool = True) -> Any:
    """Logits over a prompt and its answer: one item, no padding, images opened by hand."""
    import torch
    from PIL import Image

    text = item.prompt.replace("<image>", IMAGE)
    text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat else text
    pictures = [Image.open(folder / name).convert("RGB") for name in item.images]
    made = processor()(text=text, images=pictures or None, return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([made.pop("input_ids"), torch.tensor([answer], dtype=torch.long)], dim=1)
    made.pop("attention_mask")
    with torch.no_grad():
        return model(input_ids=ids, **made).logits[0], ids.shape[1] - len(answer)


def slow_answer(model: Any, item: Item, folder: Path, choice: str, chat: bool) -> float:
    """The log-probability of a choice."""
    import torch

    words = processor().tokenizer
    answer = words(choice, add_special_tokens=False)["input_ids"] + ([words.eos_token_id] if chat else [])
    logits, start = slow_logits(model, item, folder, answer, chat)
    table = torch.log_softmax(logits.double(), dim=-1)
    return sum(table[start - 1 + i, token].item() for i, token in enumerate(answer))


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("kind", ["answer_loss", "multiple_choice"])
def test_scores_equal_a_slow_computation_in_any_batches(folder: Path, kind: str, chat: bool) -> None:
    wanted_task = task(folder, kind, chat=chat)
    wanted = [[slow_answer(vlm(), item, folder, choice, chat) for choice in item.choices] for item in wanted_task.items]
    for tokens in (1, 60, 10_000):
        made = evaluate([("v", vlm(), processor())], [wanted_task], batch_tokens=tokens, resamples=10)
        for item, values in zip(made.score("v", "seen").items, wanted, strict=True):
            assert item.log_probs == pytest.approx(values, abs=1e-4)
    seen = [values[0] for item, values in zip(wanted_task.items, wanted, strict=True) if "this?<" in item.prompt]
    assert np.ptp(seen) > 0.01  # the same question: pictures do matter


def test_beginnings_are_shared_and_images_are_not(folder: Path) -> None:
    rows = encode(processor(), task(folder))
    assert choose_scorer(vlm(), rows) == Scorer(vlm(), head_only=True, shared=True)
    together = joined(rows)
    assert len(together) < len(rows) and sum(row.length for row in together) < sum(row.length for row in rows)
    token = processor().image_token_id
    assert all(token not in row.prompt for row in together if row.given)
    parts = sorted((one for row in together for one in row.apart()), key=lambda row: row.slots)
    assert parts == rows
    plain, fast = (log_probs(Scorer(vlm(), True, way), joined(rows), len(rows), 10_000) for way in (False, True))
    assert fast == pytest.approx(plain, abs=1e-4)


def test_the_order_of_images_matters(folder: Path) -> None:
    one = task(folder)
    turned = replace(one, items=tuple(replace(item, images=item.images[::-1]) for item in one.items))
    made = evaluate([("v", vlm(), processor())], [one, replace(turned, name="turned")], resamples=10)
    same = [a.log_probs == pytest.approx(b.log_probs, abs=1e-5)
            for a, b in zip(made.score("v", "seen").items, made.score("v", "turned").items, strict=True)]  # fmt: skip
    assert same == [len(item.images) < 2 for item in one.items]


def greedy_texts(model: Any, wanted: Task, folder: Path, most: int) -> list[str]:
    """Every greedy answer, each step from the whole text."""
    words, found = processor().tokenizer, []
    for item in wanted.items:
        made: list[int] = []
        while len(made) < most and words.eos_token_id not in made:
            made.append(int(slow_logits(model, item, folder, made)[0][-1].argmax()))
        found.append(words.decode([token for token in made if token != words.eos_token_id], skip_special_tokens=True))
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_generation_sees_the_images(folder: Path, seed: int) -> None:
    wanted = task(folder, "exact_match", generation=Generation(6))
    texts = greedy_texts(vlm(seed), wanted, folder, 6)
    for tokens in (1, 20, 1000):
        assert [reply.text for reply in generate(vlm(seed), processor(), wanted, tokens)] == texts
    assert len(set(texts)) > 3


@pytest.mark.parametrize("rules", [(Rule("strip"),), (Rule("strip"), Rule("casefold")), (), (Rule("punctuation"),)])
def test_one_pass_gives_what_generation_gives(folder: Path, rules: tuple[Rule, ...]) -> None:
    most, model = 5, vlm()
    wanted = task(folder, "exact_match", generation=Generation(most, (), rules))
    texts = greedy_texts(model, wanted, folder, most)
    answers = [(texts[0],), (texts[1][:2] or "x",), ("no", texts[2]), (texts[3] + " more",), (" " + texts[4].strip(),),
               (texts[5].upper(),), ("zzz",)]  # fmt: skip
    items = tuple(replace(item, choices=tuple(text or "x" for text in choices))
                  for item, choices in zip(wanted.items, answers, strict=True))  # fmt: skip
    wanted = replace(wanted, items=items)
    found = score_generated(model, processor(), wanted, 1000)
    plain = replace(wanted, generation=Generation(most, ("\0never\0",), rules))  # a stop: nothing is foreseen
    slow = score_generated(model, processor(), plain, 1000)
    assert [item.right for item in found] == [item.right for item in slow]
    for one, other in zip(found, slow, strict=True):
        assert (
            (one == other)
            if one.note != NOTE
            else (not other.right and other.text.startswith(one.text.rstrip("\ufffd")))
        )
    assert any(item.right for item in found)


def test_what_is_foreseen_needs_no_generation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = task(folder, "exact_match", generation=Generation(5, (), (Rule("strip"),)))
    questions = asked(vlm(), processor(), wanted)
    assert questions is not None and len(foreseen(vlm(), questions, 1000)) == len(wanted.items)
    other = Scorer(vlm(1), True, True)  # of another model: only its savings are taken over
    assert foreseen(vlm(), questions, 1000, scorer=other) == foreseen(vlm(), questions, 1000)
    assert foreseen(vlm(1), questions, 1000) != foreseen(vlm(), questions, 1000)
    monkeypatch.setattr("graftkit.measuring.generated.generate", lambda *_: pytest.fail("generated"))
    assert not any(item.right for item in score_generated(vlm(), processor(), wanted, 1000))
    assert asked(vlm(), processor(), replace(wanted, generation=Generation(5, ("\n",)))) is None


def test_an_item_that_does_not_fit_is_refused_with_its_place(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    records = [{"prompt": "what?<image>", "answer": "x", "images": [name]} for name in ("a.png", "b.png")]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "a.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(DataError, match=r"asked\.jsonl:2: .*b\.png does not exist"):
        load_task(data)
    (tmp_path / "b.png").write_bytes(b"no image")
    loaded = load_task(data)
    with pytest.raises(DataError, match=r"task asked, item 1: .*b\.png"):
        evaluate([("v", vlm(), processor())], [loaded], resamples=10)
    with pytest.raises(DataError, match="this model reads text only"):
        evaluate([("t", tiny(), tokenizer())], [loaded], resamples=10)
    (tmp_path / "b.png").unlink()
    with pytest.raises(DataError, match=r"item 1: the image .*b\.png does not exist"):
        encode(processor(), loaded)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 under transformers 5.23
def test_a_vlm_and_an_adapter_of_it_load_from_disk(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    vlm().save_pretrained(tmp_path / "vlm")
    processor().save_pretrained(tmp_path / "vlm")
    config = peft.LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    from transformers import AutoModelForImageTextToText

    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    peft.get_peft_model(again, config).save_pretrained(tmp_path / "adapter")
    wanted = task(folder)
    made = evaluate([tmp_path / "vlm", tmp_path / "adapter", ("live", vlm(), processor())], [wanted],
                    adapter_base=tmp_path / "vlm", resamples=10)  # fmt: skip
    values = {name: [item.log_probs[0] for item in made.score(name, "seen").items] for name in made.models}
    assert values["vlm"] == pytest.approx(values["live"], abs=1e-5)
    assert values["adapter"] != pytest.approx(values["live"], abs=1e-3)


def test_readings_name_every_answer_once(folder: Path) -> None:
    rows = encode(processor(), task(folder, "multiple_choice"))
    found = list(read(Scorer(vlm(), True, True), rows, 60))
    assert sorted(one.slot for one in found) == [slot for row in rows for slot in row.slots]


def test_layers_are_heard_with_their_images(folder: Path) -> None:
    import torch

    from graftkit.measuring.activations import Listener, run

    rows = encode(processor(), task(folder))
    layer = vlm().model.language_model.layers[1].mlp.down_proj
    heard: dict[int, Any] = {}
    for tokens in (1, 10_000):
        sums: list[Any] = []
        run(vlm(), rows, [Listener(layer, inputs=lambda x, to=sums: to.append(x.double().sum(0)))], batch_tokens=tokens)
        heard[tokens] = sum(sums)
    assert torch.allclose(heard[1], heard[10_000], atol=1e-4)
    bare = [replace(row, media=None) for row in rows if row.media is None]
    assert 0 < len(bare) < len(rows)


def test_compatibility_takes_items_with_images(folder: Path) -> None:
    from graftkit.measuring.compatibility import compatibility

    seen = compatibility([("v", vlm(), processor())], [task(folder)])
    turned = replace(task(folder), items=tuple(replace(item, images=item.images[::-1]) for item in task(folder).items))
    other = compatibility([("v", vlm(), processor())], [turned])
    assert seen != other


class GridProcessor:
    """As Qwen2-VL's: as many tokens as an image has patches, and kinds of tokens that go along with them."""

    image_token, image_token_id, chat_template = IMAGE, 312, TEMPLATE

    def __init__(self) -> None:
        from transformers import Qwen2VLImageProcessor

        self.tokenizer = processor().tokenizer
        self.image_processor = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)

    def apply_chat_template(self, *given: Any, **how: Any) -> Any:
        return self.tokenizer.apply_chat_template(*given, **how)

    def __call__(self, text: str, images: list[Any], **how: Any) -> dict[str, Any]:
        import torch

        made = self.image_processor(images, return_tensors="pt")
        for grid in made["image_grid_thw"]:
            text = text.replace(IMAGE, "\0" * (int(grid.prod()) // 4), 1)
        ids = torch.tensor([self.tokenizer.encode(text.replace("\0", IMAGE), add_special_tokens=False)])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **made,
                "mm_token_type_ids": (ids == self.image_token_id).long()}  # fmt: skip


def test_a_model_that_places_tokens_by_their_kinds_is_read_item_by_item(tmp_path: Path) -> None:
    import torch
    from PIL import Image
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    inner = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=328,
                 num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=2,
                 rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 100.0})  # fmt: skip
    vision = dict(depth=1, embed_dim=32, num_heads=2, hidden_size=32, mlp_ratio=2, patch_size=14, spatial_merge_size=2)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=inner, vision_config=vision, image_token_id=312, video_token_id=321,
                      vision_start_token_id=322, vision_end_token_id=323)
    ).eval()  # fmt: skip
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    source = np.random.default_rng(0)
    for number, size in enumerate([(28, 28), (56, 56), (28, 56)]):
        Image.fromarray(source.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    asked_of = [("what is this?<image>", ("0.png",)), ("what is this?<image>", ("1.png",)), ("what is the cat?", ()),
                ("<image> or <image>?", ("1.png", "2.png"))]  # fmt: skip
    items = tuple(Item(prompt, ("a cat", "four and five"), 0, images=images) for prompt, images in asked_of)
    grids = Task("grids", "multiple_choice", items, chat=True, directory=str(tmp_path))
    assert GridProcessor.image_token_id == processor().tokenizer.convert_tokens_to_ids(IMAGE)
    rows = encode(GridProcessor(), grids)
    assert len({row.length for row in rows}) == 4
    found = [log_probs(choose_scorer(model, rows), joined(rows), 8, tokens) for tokens in (1, 5000)]
    alone = np.concatenate([log_probs(Scorer(model), [replace(row, slots=(0, 1))], 2, 1) for row in rows])
    assert found[0] == pytest.approx(alone, abs=1e-4) and found[1] == pytest.approx(alone, abs=1e-4)
    shared = log_probs(Scorer(model, True, True), rows, 8, 5000)
    assert shared != pytest.approx(alone, abs=1e-4)  # why such rows are not shared
    free = replace(grids, kind="exact_match", generation=Generation(5))
    texts = [[reply.text for reply in generate(model, GridProcessor(), free, tokens)] for tokens in (1, 5000)]
    assert texts[0] == texts[1]
