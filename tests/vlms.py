"""Tiny VLMs of many families, each with the text model that its language backbone comes from, made in a moment."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

ROWS, TEXT_ROWS = 88, 80  # a VLM has eight rows more than its text model
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "num_channels": 3}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14, "in_channels": 3,
    "spatial_merge_size": 2,
}  # fmt: skip
QWEN_NARROW = QWEN_VISION | {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
AUDIO = {"num_mel_bins": 8, "max_source_positions": 16}


@dataclass(frozen=True)
class Family:
    """A kind of VLM: its text model's kind, which part of its config is that of images or sound, and other settings."""

    text: str
    senses: dict[str, Any]
    inner: str = ""  # the kind of the text config in the VLM, where it has one of its own
    tied: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    text_settings: dict[str, Any] = field(default_factory=dict)  # of both
    inner_settings: dict[str, Any] = field(default_factory=dict)
    between: tuple[int, ...] = ()  # layers of the VLM that its text model has not
    flat: bool = False  # the text model's settings stand in the VLM's config itself


def _vision(kind: str, **other: Any) -> dict[str, Any]:
    return {"vision_config": {"model_type": kind, **VISION, **other}}


_GRID = {"image_grid_pinpoints": [[28, 56]]}
_CLIP, _SIGLIP = _vision("clip_vision_model"), _vision("siglip_vision_model")
_DEEP = {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
_PERCEIVER = {
    "perceiver_config": {
        "model_type": "idefics2_perceiver", "hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1,
        "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 2,
    }
}  # fmt: skip
_TILES = {
    "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 32, "max_num_tiles": 2,
    "supported_aspect_ratios": [[1, 1], [1, 2]], "intermediate_layers_indices": [0],
}  # fmt: skip
_GLM_VISION = {"depth": 2, "hidden_size": 16, "num_heads": 2, "image_size": 28, "patch_size": 14,
               "out_hidden_size": 32, "intermediate_size": 24, "in_channels": 3}  # fmt: skip
QFORMER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
           "encoder_hidden_size": 16}  # fmt: skip
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_num_key_heads": 2,
    "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip

FAMILIES = {
    "llava": Family("llama", _CLIP),
    "llava_next": Family("mistral", _CLIP, settings=_GRID),
    "llava_onevision": Family("qwen2", _SIGLIP, settings=_GRID),
    "vipllava": Family("llama", _CLIP, settings={"vision_feature_layers": [-1, -2]}),
    "qwen2_vl": Family("qwen2", {"vision_config": {**QWEN_VISION, "mlp_ratio": 2}}, "qwen2_vl_text", True,
                       inner_settings=MROPE),
    "qwen2_5_vl": Family("qwen2", {"vision_config": {**QWEN_NARROW, "fullatt_block_indexes": [1]}},
                         "qwen2_5_vl_text", inner_settings=MROPE),
    "qwen3_vl": Family("qwen3", {"vision_config": QWEN_NARROW | _DEEP}, "qwen3_vl_text", True, inner_settings=MROPE),
    "idefics2": Family("mistral", _vision("idefics2_vision") | _PERCEIVER),
    "idefics3": Family("llama", _vision("idefics3_vision"), settings={"scale_factor": 2}),
    "smolvlm": Family("llama", _vision("smolvlm_vision"), tied=True, settings={"scale_factor": 2}),
    "paligemma": Family("gemma", _SIGLIP, tied=True, settings={"projection_dim": 32}),
    "gemma3": Family("gemma3_text", _SIGLIP, tied=True, settings={"mm_tokens_per_image": 4}),
    "mllama": Family("llama", {"vision_config": {**VISION, **_TILES}}, "mllama_text_model",
                     inner_settings={"num_hidden_layers": 5, "cross_attention_layers": [1, 3]}, between=(1, 3)),
    "internvl": Family("qwen2", _vision("internvl_vision", image_size=[28, 28], patch_size=[14, 14])),
    "mistral3": Family("mistral", _vision("pixtral")),
    "aya_vision": Family("cohere2", _SIGLIP, tied=True, settings={"downsample_factor": 2}),
    "glm4v": Family("glm4", {"vision_config": _GLM_VISION}, "glm4v_text", inner_settings=MROPE),
    "lfm2_vl": Family("lfm2", _vision("siglip2_vision_model", num_patches=4), tied=True,
                      settings={"projector_hidden_size": 16},
                      text_settings={"layer_types": ["conv", "full_attention", "conv"]}),
    "aria": Family("aria_text", _vision("idefics3_vision"), settings={"projector_patch_to_query_dict": {"4": 2}},
                   text_settings={"moe_num_experts": 2, "moe_topk": 1, "moe_num_shared_experts": 1}),
    "qwen2_audio": Family("qwen2", {"audio_config": {
        "model_type": "qwen2_audio_encoder", "d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24, **AUDIO}}),
    "granite_speech": Family("granite", {"encoder_config": {
        "hidden_dim": 16, "num_layers": 2, "num_heads": 2, "dim_head": 8, "input_dim": 8, "output_dim": 10,
        "context_size": 4, "feedforward_mult": 2, "conv_kernel_size": 3},
        "projector_config": {**QFORMER, "model_type": "blip_2_qformer", "num_hidden_layers": 1}},
        settings={"has_lora_adapter": False}),
    "blip-2": Family("opt", {"vision_config": VISION, "qformer_config": QFORMER}, tied=True,
                     text_settings={"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "fuyu": Family("persimmon", {}),
    "exaone4_5": Family("exaone4", {"vision_config": {**QWEN_NARROW, "fullatt_block_indexes": [1]}}),
    "qwen3_5": Family("qwen3_5_text", {"vision_config": {**QWEN_NARROW, "num_position_embeddings": 16}},
                      text_settings=_LINEAR),
    "phi4_multimodal": Family("phi3", {
        "vision_config": {**VISION, "crop_size": 28}, "audio_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_blocks": 2, "num_attention_heads": 2, "input_size": 16,
            "ext_pw_out_channel": 16, "nemo_conv_channels": 8, "depthwise_separable_out_channel": 16}}, flat=True),
    "voxtral": Family("llama", {"audio_config": {
        "model_type": "voxtral_encoder", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, **AUDIO}}),
}  # fmt: skip


INSIDE = ("model.text_model.", "model.language_model.", "language_model.model.", "model.")
"""Where the text model is in a VLM in memory."""


def shaken(model: PreTrainedModel, seed: int, scale: float) -> PreTrainedModel:
    """The model with noise on every parameter, so that none is a plain zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def vlm(kind: str, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random VLM of a family, with rows for more tokens than its text model has."""
    family = FAMILIES[kind]
    inner = {"model_type": family.inner or family.text, **TEXT, "vocab_size": ROWS, "tie_word_embeddings": family.tied}
    image = "audio_token" if "audio_config" in family.senses else "image_token"
    tokens = {f"{image}_index": 87, f"{image}_id": 87, "video_token_id": 86, "vision_start_token_id": 85}
    text = inner | family.text_settings | family.inner_settings
    whole = (
        {k: v for k, v in text.items() if k not in ("model_type", "head_dim")} if family.flat else {"text_config": text}
    )
    others = family.senses | family.settings | tokens | settings | {"tie_word_embeddings": family.tied}
    config = CONFIG_MAPPING[kind](**whole | others)
    torch.manual_seed(seed)
    return shaken(AutoModelForMultimodalLM.from_config(config), seed, 0.1)


def text_model(kind: str) -> PreTrainedModel:
    """An untrained text model of the family that a VLM's backbone is of."""
    family = FAMILIES[kind]
    config = CONFIG_MAPPING[family.text](
        **TEXT, vocab_size=TEXT_ROWS, tie_word_embeddings=family.tied, **family.text_settings
    )
    return AutoModelForCausalLM.from_config(config).eval()


def live_names(kind: str, text: PreTrainedModel, model: PreTrainedModel) -> dict[str, str]:
    """For each parameter of the text model the VLM's, by their names in memory; nothing of ours is asked."""
    family, held = FAMILIES[kind], dict(model.named_parameters())
    inside = next(p for p in INSIDE if any(name.startswith((p + "layers", p + "decoder")) for name in held))
    layers = [n for n in range(16) if n not in family.between]
    found = {}
    for name, _ in text.named_parameters():
        rest = name.removeprefix("model.")
        parts = rest.split(".")
        if parts[0] == "layers":
            parts[1] = str(layers[int(parts[1])])
        found[name] = name if name.startswith("lm_head") else inside + ".".join(parts)
    assert set(found.values()) <= held.keys(), sorted(set(found.values()) - held.keys())
    return found


def in_memory(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """The parameters that transformers loads from names on disk; on a meta device as well, since names are enough."""
    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in entries if isinstance(entry, WeightConverter)]
    with torch.device("meta"):
        held = type(model)(model.config).state_dict()
    return {n: rename_source_key(n, renamings, converters, model.base_model_prefix, held)[0] for n in names}


def base_of(kind: str, model: PreTrainedModel, seed: int = 7) -> PreTrainedModel:
    """A text model from which the VLM's backbone is a small step away."""
    text = text_model(kind)
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, place in live_names(kind, text, model).items():
            own = text.get_parameter(name)
            own.copy_(held[place][: own.shape[0]] if "embed_tokens" in name or "lm_head" in name else held[place])
    return shaken(text, seed, 0.01)


def saved(model: PreTrainedModel, directory: Path, **how: Any) -> Path:
    """The model on disk, as transformers writes it."""
    model.save_pretrained(directory, **how)
    return directory
