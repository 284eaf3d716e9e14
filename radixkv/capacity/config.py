"""Reads what a model keeps of a token from its config.json, without the library that runs it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from radixkv.capacity.sizes import Layer, Model, checked_layers
from radixkv.errors import InvalidArgument

__all__ = ["model_from_config"]

Config = Mapping[str, Any]

_FULL, _WINDOW, _STATE = "full", "window", "state"
_KINDS = {
    "full_attention": _FULL, "attention": _FULL, "hybrid": _FULL, "*": _FULL,
    "sliding_attention": _WINDOW, "chunked_attention": _WINDOW,
    "linear_attention": _STATE, "mamba": _STATE, "mamba2": _STATE, "recurrent": _STATE, "conv": _STATE, "M": _STATE,
    "mlp": _STATE, "moe": _STATE, "-": _STATE, "E": _STATE,
}  # fmt: skip
"""What transformers call a layer, in `layer_types` or older fields, and what it keeps of each token."""

_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "exaone4": 4, "olmo3": 4, "gpt_oss": 2, "gemma4_text": 6}
"""Families that say nothing of their windows but that they have one: every n-th layer sees all."""


def model_from_config(config: Config, name: str, weight_bytes: int | None = None) -> Model:
    """The model that a config.json describes. Raises InvalidArgument for what it does not say."""
    if config.get("is_encoder_decoder"):
        raise InvalidArgument(f"{name} is an encoder-decoder model: only decoders cache what they have read")
    text = _text(config)
    count = checked_layers(_number(text, name, "num_hidden_layers", "n_layer", "n_layers", "num_layers"), name)
    kinds = _layer_kinds(text, count, name)
    stored = count - int(text.get("num_kv_shared_layers") or 0)
    layers = [_layer(text, i, kind, name) for i, kind in enumerate(kinds) if kind != _STATE and i < stored]
    longest = _first(text, "max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    return Model(
        name=name,
        layers=tuple(layers),
        weight_bytes=weight_bytes,
        max_length=None if longest is None else int(longest),
        num_state_layers=kinds.count(_STATE),
        num_sharing_layers=count - stored,
    )


def _text(config: Config) -> Config:
    """The part that reads and writes text, of a model that also sees or hears."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        if isinstance(config.get(name), Mapping):
            return _text(config[name])
    return config


def _layer_kinds(config: Config, count: int, name: str) -> list[str]:
    """What each layer keeps: all keys, those in a window, or a state."""
    named = _first(config, "layer_types", "layers_block_type", "hybrid_override_pattern")
    if named is None and config.get("block_types"):
        named = (list(config["block_types"]) * count)[:count]
    if named is not None:
        foreign = sorted({str(kind) for kind in named} - set(_KINDS))
        if foreign or len(named) != count:
            what = f"layers of type {', '.join(foreign)}" if foreign else f"{len(named)} layer types"
            raise InvalidArgument(f"{name} has {what} for {count} layers: known are {', '.join(_KINDS)}")
        return [_KINDS[kind] for kind in named]
    return [_kind(config, i) for i in range(count)]


def _kind(config: Config, i: int) -> str:
    """The kind of a layer where the configuration has no list of them."""
    if config.get("full_attention_interval"):
        return _STATE if (i + 1) % int(config["full_attention_interval"]) else _FULL
    if config.get("attn_layer_period"):
        return _FULL if i % int(config["attn_layer_period"]) == int(config.get("attn_layer_offset", 0)) else _STATE
    if config.get("full_attn_idxs") is not None:
        return _FULL if i in config["full_attn_idxs"] else _STATE
    if config.get("attention_chunk_size"):
        return _WINDOW if (i + 1) % int(config.get("no_rope_layer_interval") or 4) else _FULL
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        return _FULL
    if config.get("use_sliding_window"):
        return _WINDOW if i >= int(config.get("max_window_layers") or 0) else _FULL
    model_type = str(config.get("model_type"))
    pattern = _first(config, "sliding_window_pattern", "_sliding_window_pattern") or _PATTERNS.get(model_type)
    if isinstance(pattern, str):
        return _WINDOW if pattern[i % len(pattern)] == "L" else _FULL
    return _WINDOW if pattern is None or (i + 1) % int(pattern) else _FULL


def _layer(config: Config, i: int, kind: str, name: str) -> Layer:
    own = {**config, **_own(config, i)}
    window = None
    if kind == _WINDOW:
        window = _number(own, name, "sliding_window", "attention_window_size", "attention_chunk_size")
    heads = _number(own, name, "num_attention_heads", "n_head", "n_heads")
    if own.get("kv_lora_rank"):
        nope, value = own.get("qk_nope_head_dim"), own.get("v_head_dim")
        rope = _number(own, name, "qk_rope_head_dim")
        heads_of = (int(nope) + rope, int(value)) if nope and value else None
        return Layer(heads, 1, int(own["kv_lora_rank"]) + rope, 0, window, heads_of)
    wide = kind == _FULL and "per_layer_config" not in config and config.get("global_head_dim")
    dim = int(wide) if wide else _head_dim(own, name)
    kv_heads = _kv_heads(own, heads, i)
    if kind == _FULL and config.get("attention_k_eq_v", True) and config.get("num_global_key_value_heads"):
        kv_heads = int(config["num_global_key_value_heads"])
    if heads % kv_heads:
        raise InvalidArgument(f"{name}: {heads} query heads are no multiple of {kv_heads} KV heads")
    return Layer(heads, kv_heads, dim, int(own.get("v_head_dim") or dim), window)


def _own(config: Config, i: int) -> Config:
    """What transformers saved for this layer alone."""
    each = config.get("per_layer_config") or {}
    return next((values for key, values in each.items() if int(key) == i), {})


def _kv_heads(config: Config, heads: int, i: int) -> int:
    nested = config.get("attn_config")
    found = _first(config, "num_key_value_heads", "num_kv_heads", "multi_query_group_num", "n_head_kv")
    if found is None and isinstance(nested, Mapping):
        found = nested.get("kv_n_heads")
    if config.get("model_type") == "falcon":
        found = found if config.get("new_decoder_architecture") else 1 if config.get("multi_query", True) else heads
    elif found is None and config.get("multi_query"):
        found = 1
    if isinstance(found, Sequence):
        found = found[i]
    return heads if found is None else int(found)


def _head_dim(config: Config, name: str) -> int:
    found = _first(config, "head_dim", "kv_channels", "attention_head_dim")
    if found is not None:
        return int(found)
    hidden = _number(config, name, "hidden_size", "n_embd", "d_model")
    return hidden // _number(config, name, "num_attention_heads", "n_head", "n_heads")


def _number(config: Config, name: str, *names: str) -> int:
    found = _first(config, *names)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        what = "is missing" if found is None else f"is {found!r:.40}"
        raise InvalidArgument(f"{name}: {' or '.join(names)} {what} in the configuration: it must be a whole number")
    return found


def _first(config: Config, *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)
