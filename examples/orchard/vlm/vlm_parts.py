"""The parts of the test bed's LLaVA and how they go together: SmolLM2, a small CLIP tower, a projector."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from pictures import SIZE, Picture
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from prepare_model import MODEL_DIR

PATCH = 16
TOKENS = (SIZE // PATCH) ** 2
IMAGE_TOKEN = "<reponame>"  # an unused token that the vocabulary has: no embedding is resized
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + IMAGE_TOKEN + "' }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tower() -> CLIPVisionModel:
    """An untrained vision tower of three layers."""
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIZE,
            patch_size=PATCH,
        )
    )


def language_model() -> Any:
    """The base model of all experts, in float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)


def tokenizer() -> Any:
    """The base's tokenizer with a chat template that takes pictures and adds no system message."""
    made = AutoTokenizer.from_pretrained(MODEL_DIR)
    made.chat_template = TEMPLATE
    return made


def processor() -> LlavaProcessor:
    """Pictures of any size and mode to pixels, and texts to tokens."""
    half = [0.5, 0.5, 0.5]
    images = CLIPImageProcessor(
        size={"height": SIZE, "width": SIZE}, do_center_crop=False, resample=2, image_mean=half, image_std=half
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=TEMPLATE,
    )


def pixels(pictures: Sequence[Picture]) -> torch.Tensor:
    """[pictures, 3, SIZE, SIZE], by the processor that the model is saved with."""
    images = [picture.image.convert("RGB") for picture in pictures]
    return processor().image_processor(images, return_tensors="pt")["pixel_values"]


def assembled(lm: Any, vision: CLIPVisionModel) -> LlavaForConditionalGeneration:
    """A LLaVA around `lm` and `vision`, which it holds as they are, and a projector that is not trained."""
    config = LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=lm.config.to_dict(),
        image_token_index=tokenizer().convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.language_model, model.model.vision_tower, model.lm_head = lm.model, vision, lm.lm_head
    model.generation_config.eos_token_id = lm.generation_config.eos_token_id
    return model


def features(vision: CLIPVisionModel, values: torch.Tensor) -> torch.Tensor:
    """What the projector gets: the last hidden states of the patches, [pictures, TOKENS, 128]."""
    return vision(pixel_values=values, output_hidden_states=True).hidden_states[-1][:, 1:]


def save(model: LlavaForConditionalGeneration, out: Path) -> None:
    """An ordinary checkpoint directory, processor and all."""
    model.save_pretrained(out)
    processor().save_pretrained(out)
