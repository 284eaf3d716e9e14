"""Tiny random models of every family in transformers' mappings for causal LMs and for image-text-to-text.

A configuration is that of the family with every size that `SIZES` names made small, in all its parts. What a family
needs besides is in `CHANGES`, one entry each.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import zlib
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

VOCABULARY = 160
WORDS = 130
"""Prompts are drawn from the tokens below; the placeholders of images and sound are above."""

LARGEST = 40_000_000
"""Parameters; a family that stays larger would slow the zoo down."""

LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, POSITIONS, EXPERTS = 2, 64, 96, 4, 2, 16, 512, 4
ATTENTION_ONLY = {"layer_types": ["full_attention"] * LAYERS}

SIZES: dict[str, Any] = {
    **dict.fromkeys(["vocab_size", "vocab_size_per_layer_input"], VOCABULARY),
    **dict.fromkeys(
        ["hidden_size", "n_embd", "d_model", "hidden_dim", "embed_dim", "emb_dim", "embedding_size"], HIDDEN
    ),
    **dict.fromkeys(
        ["word_embed_proj_dim", "out_hidden_size", "projection_dim", "mm_hidden_size", "lru_width"], HIDDEN
    ),
    **dict.fromkeys(["intermediate_size", "n_inner", "d_ff", "dff", "ffn_dim", "ffn_hidden_size"], INNER),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim"], INNER),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth"], LAYERS),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], LAYERS),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads"], HEADS),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads"], HEADS),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"], KV_HEADS),
    **dict.fromkeys(["head_dim", "global_head_dim", "kv_channels", "d_kv", "query_pre_attn_scalar"], DIM),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_seq_length"], POSITIONS),
    **dict.fromkeys(["sliding_window", "window_size", "attention_window_size"], 8),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], EXPERTS),
    **dict.fromkeys(["num_experts_per_tok", "moe_k", "moe_top_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"], 32),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"], 32),
    **dict.fromkeys(["n_shared_experts", "num_shared_experts", "n_group", "topk_group"], 1),
    **dict.fromkeys(["first_k_dense_replace", "num_dense_layers"], 1),
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"], 16),
    **dict.fromkeys(["qk_rope_head_dim", "rotary_dim"], 8),
    **dict.fromkeys(["image_size"], 32),
    **dict.fromkeys(["patch_size", "spatial_patch_size"], 16),
    **dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads", "index_n_heads"], 2),
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "index_head_dim"], 16),
    **dict.fromkeys(["mamba_d_state", "mamba_d_head", "mamba_head_dim", "state_size", "ssm_state_size"], 16),
    **dict.fromkeys(["mamba_n_heads", "mamba_num_heads", "index_topk"], 8),
    **dict.fromkeys(["n_groups", "mamba_n_groups"], 1),
    **dict.fromkeys(["hidden_size_per_layer_input", "laurel_rank"], 8),
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}

_SPECIAL = re.compile(r"(image|video|audio|vision|speech|media|im|boi|eoi|boa|eoa|timestamp)\w*_(id|index)$")


def mrope(*sections: int) -> dict[str, Any]:
    """Rotary embedding by time, height and width, with sections that fit the small heads."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(sections)}}


TEXT_MROPE = {"text_config": mrope(2, 3, 3)}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
COHERE = {**ROTARY, "mrope_section": [3, 3, 2]}
BOTH_TYPES = {
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"sliding_attention": COHERE, "full_attention": COHERE},
}
ALL_HEADS = {"num_key_value_heads": HEADS}
SHARED = {
    "num_hidden_layers": 5,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 2,
}
CHUNKED = {  # chunks of 8 tokens, and queries that are scaled by position from the tenth token on
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 0],
    "floor_scale": 10,
}
LATENT = {**ALL_HEADS, "head_dim": 8}  # of the keys' rotary part

# What a family needs besides SIZES; a key like "text_config" changes that part.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        [
            "axk1",
            "deepseek_v2",
            "deepseek_v3",
            "glm4_moe_lite",
            "longcat_flash",
            "minicpm3",
            "mistral4",
            "sarvam_mla",
            "youtu",
        ],
        LATENT,
    ),
    "kimi_k25": {"text_config": LATENT},
    "chameleon": {"vocabulary_map": {"<image>": 140}},
    "cohere_compass": {"text_config": BOTH_TYPES},
    "cohere_compass_text": BOTH_TYPES,
    "cosmos3_edge": TEXT_MROPE,
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {"text_config": ALL_HEADS},
    "dots3_note_text": ALL_HEADS,
    "ernie4_5_vl_moe": {"text_config": mrope(3, 3, 2)},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "glm46v": TEXT_MROPE,
    "glm4v": TEXT_MROPE,
    "glm4v_moe": {"text_config": mrope(1, 1, 2)},
    "glm5_next": {"text_config": {**ALL_HEADS, "index_topk": 16, "qk_rope_head_dim": 0}},
    "glm_ocr": TEXT_MROPE,
    "glmga": TEXT_MROPE,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid, attention only": {**ATTENTION_ONLY, "position_embedding_type": "rope"},
    "hunyuan_vl": {"text_config": mrope(2, 3, 3)},
    "hy_v4_vl": {"text_config": mrope(1, 1, 2)},
    "inkling2": {"vision_config": {"text_hidden_size": HIDDEN}},
    "inkling2_loop": {"vision_config": {"text_hidden_size": HIDDEN}},
    "gemma3n_text, K and V shared": SHARED,
    "gemma4_text, K and V shared": {**SHARED, "use_double_wide_mlp": True},
    "kosmos-2.5": {"text_config": {"attention_heads": HEADS}},
    "lfm2, with convolutions": {"layer_types": ["conv", "full_attention"]},
    "llama4": {"text_config": CHUNKED},
    "llama4_text": CHUNKED,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"head_dim": 32},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "molmo2": {"adapter_config": {"vision_feature_layer": [-1, -2]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": TEXT_MROPE,
    "qwen2_5_omni_thinker": {**TEXT_MROPE, "vision_start_token_id": 150},
    "qwen2_5_vl": TEXT_MROPE,
    "qwen2_vl": TEXT_MROPE,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 150},
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
VARIANTS = {
    "gemma3n_text, K and V shared": "gemma3n_text",
    "gemma4_text, K and V shared": "gemma4_text",
    "granitemoehybrid, attention only": "granitemoehybrid",
    "lfm2, with convolutions": "lfm2",
}
"""Families that are tried in a second configuration, and the model type of each."""

UNBUILT = {"blt": "hash embeddings of half a million rows, whatever the configuration"}
"""Families that are not built, and why not."""


def families() -> dict[str, tuple[str, str]]:
    """Name of each family: its model type and model class. Other names of a family, and doubles, are left out."""
    found: dict[str, tuple[str, str]] = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, class_names in mapping.items():
            name = class_names if isinstance(class_names, str) else class_names[0]
            is_alias = CONFIG_MAPPING[model_type].model_type != model_type
            if not is_alias and mapping.get(f"{model_type}_text") != class_names:
                found.setdefault(model_type, (model_type, name))
    found |= {variant: found[model_type] for variant, model_type in VARIANTS.items() if model_type in found}
    return dict(sorted(found.items()))


def small(config_class: type, changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments that make a configuration small, parts included."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    default = config_class()
    values = vars(default)
    lists = {name for name in fields if isinstance(values.get(name), list | tuple)}
    arguments = {name: size for name, size in SIZES.items() if name in fields - lists}
    special = sorted(name for name in fields if _SPECIAL.search(name) and isinstance(values.get(name), int))
    arguments |= {name: WORDS + 1 + i for i, name in enumerate(special)}
    for part in config_class.sub_configs or {}:
        if (value := getattr(default, part, None)) is not None:
            inner = changes.get(part, {})
            arguments[part] = {"model_type": type(value).model_type, **small(type(value), inner), **inner}
    return arguments | {name: value for name, value in changes.items() if name not in (config_class.sub_configs or {})}


def build(name: str) -> transformers.PreTrainedModel:
    """The tiny random model of a family, in fp32, with eager attention. Raises whatever transformers raises."""
    if name in UNBUILT:
        raise RuntimeError(UNBUILT[name])
    model_type, class_name = families()[name]
    config_class, model_class = CONFIG_MAPPING[model_type], getattr(transformers, class_name)
    config = config_class(**small(config_class, copy.deepcopy(CHANGES.get(name, {}))))
    text = config.get_text_config(decoder=True)
    if isinstance(text, model_class.config_class) and not isinstance(config, model_class.config_class):
        config = text
    if hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    torch.manual_seed(0)
    model = model_class(config).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGEST:
        raise RuntimeError(f"{count / 1e6:.0f} million parameters, whatever sizes its configuration is given")
    _spread(model, zlib.crc32(name.encode()))
    model.set_attn_implementation("eager")
    model.generation_config = transformers.GenerationConfig(pad_token_id=0)  # some families' suppress tokens
    return model


def _spread(model: transformers.PreTrainedModel, seed: int) -> None:
    """Weights so large that logits differ: as they are initialized, near ties would hide and fake differences."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
