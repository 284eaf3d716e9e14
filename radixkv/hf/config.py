"""What a model's configuration says about running it on the engine: layers, windows, lengths, placeholder tokens."""

from __future__ import annotations

import functools
import inspect
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import GenerationMixin

from radixkv.errors import InvalidArgument, InvalidTokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CACHE_ARGUMENTS",
    "attention_chunks",
    "cache_argument",
    "check_config",
    "length_limit",
    "placeholder_tokens",
    "refuse_placeholders",
    "sliding_windows",
    "stored_layers",
    "telling_positions",
    "text_config",
]

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""What transformers calls the argument that carries the cache: the first since 5.24, the second before."""

_PLACEHOLDER = re.compile(r"(image|video|audio|speech|media)(_\w+)?_(token|patch)_(id|index)")
_DELIMITER = re.compile(r"(start|end|begin|bos|eos|pad|delay)_")


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the part of `model` that reads and writes tokens: its own, or a composite's text part."""
    if model.config.is_encoder_decoder:
        raise InvalidArgument(
            f"{type(model).__name__} is an encoder-decoder model: only decoder-only models can run on the engine"
        )
    try:
        return model.config.get_text_config(decoder=True)
    except ValueError as error:
        raise InvalidArgument(f"{type(model).__name__} has no one text part: {error}") from error


def check_config(model: PreTrainedModel) -> None:
    """Refuse models whose layers keep state that the pages do not hold.

    What the layers are is said by `layer_types`. Only where that is missing the flag of the class decides, which also
    stands on models that happen to have attention layers only.
    """
    name, config = type(model).__name__, text_config(model)
    layer_types = getattr(config, "layer_types", None)
    foreign = sorted(set(layer_types or ()) - _LAYER_TYPES)
    if foreign:
        raise InvalidArgument(
            f"{name} has layers of type {', '.join(foreign)}: supported are {', '.join(sorted(_LAYER_TYPES))}; use its "
            "own generate(), or a variant with attention layers only"
        )
    if getattr(model, "_is_stateful", False) and not layer_types:
        raise InvalidArgument(
            f"{name} keeps recurrent or convolutional state between tokens: only K and V can be cached; use its own "
            "generate(), or a variant with attention layers only"
        )
    if getattr(config, "attention_chunk_size", None) is not None and not layer_types:
        raise InvalidArgument(
            f"{name} attends in chunks (attention_chunk_size), but does not say in which layers (layer_types)"
        )


@functools.lru_cache
def cache_argument() -> str:
    """The name of the argument with which the installed transformers hands a model its cache."""
    known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return next(name for name in CACHE_ARGUMENTS if name in known)


def attention_chunks(config: Any) -> list[int] | None:
    """For each layer the length of its chunks, 0 where it sees all keys. None: no layer attends in chunks."""
    size = getattr(config, "attention_chunk_size", None)
    layer_types = getattr(config, "layer_types", None) or ()
    if size is None or "chunked_attention" not in layer_types:
        return None
    return [int(size) if layer_type == "chunked_attention" else 0 for layer_type in layer_types]


def stored_layers(config: Any) -> list[int] | None:
    """For each layer the one that has its K and V, counted among those that store any. None: each has its own.

    A layer that shares takes those of the last layer of its type before it that stores its own.
    """
    modes = getattr(config, "kv_sharing_modes", None)
    if modes is None or "reuse" not in modes:
        return None
    found: list[int] = []
    last_of: dict[str, int] = {}
    for mode, layer_type in zip(modes, config.layer_types, strict=True):
        if mode != "reuse":
            last_of[layer_type] = 1 + max(found, default=-1)
        elif layer_type not in last_of:  # of another model, whose assistant this one is
            return None
        found.append(last_of[layer_type])
    return found


def sliding_windows(model: PreTrainedModel) -> list[int | None]:
    """The window of each layer as transformers' own cache keeps it, None for all keys."""
    config = text_config(model)
    window = getattr(config, "sliding_window", None)
    one_type = "full_attention" if window is None else "sliding_attention"
    layer_types = getattr(config, "layer_types", None) or [one_type] * int(config.num_hidden_layers)
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def length_limit(model: PreTrainedModel) -> int | None:
    """The longest sequence, in tokens, for which `model` computes a token's K and V the same in every batch.

    It is the model's number of positions. Rotary embeddings that rescale with the longest sequence of a batch
    (`rope_type` "dynamic", "longrope") would make cached keys depend on other requests: they end where that begins.
    """
    config = text_config(model)
    limits = [getattr(config, "max_position_embeddings", None)]
    if any(rope.get("rope_type") in ("dynamic", "longrope") for rope in _rotary_embeddings(config)):
        limits += original_lengths(config)
    known = [int(limit) for limit in limits if limit is not None]
    return min(known, default=None)


def original_lengths(config: Any) -> list[int]:
    """The lengths up to which rotary embeddings, and what else a layer does by position, were made to be extended."""
    name = "original_max_position_embeddings"
    found = [rope.get(name) for rope in _rotary_embeddings(config)] + [getattr(config, name, None)]
    return [int(length) for length in found if length is not None]


def telling_positions(model: PreTrainedModel) -> list[int]:
    """Positions at which a layer that looks at them would show it.

    Layers that do change at the length of the first training, at multiples of it, or slowly; so: around that length and
    twice that length, around every power of two, and the last.
    """
    config = text_config(model)
    last = getattr(config, "max_position_embeddings", None)
    if last is None:
        raise InvalidArgument(
            f"{type(model).__name__} does not say how many positions it has (max_position_embeddings), so its layers "
            "cannot be compared at all of them"
        )
    edges = {2**power for power in range(int(last).bit_length())} | {int(last)}
    for original in original_lengths(config):
        edges |= {original, 2 * original}
    return sorted({position for edge in edges for position in (edge - 1, edge)} - {int(last)})


def _rotary_embeddings(config: Any) -> list[dict[str, Any]]:
    """The parameters of the rotary embeddings, one set for all layers or one for each type of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope, *(value for value in rope.values() if isinstance(value, dict))]


def placeholder_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that stand in a prompt for an image, a video or sound. Empty for a model that reads text only.

    The engine knows tokens, not pixels: two images have the same placeholders, so one would be answered with the
    cached keys of the other. See `refuse_placeholders`.
    """
    found = set()
    for config in (model.config, model.config.get_text_config(decoder=True)):
        for name, value in vars(config).items():
            if isinstance(value, int) and _PLACEHOLDER.fullmatch(name) and not _DELIMITER.search(name):
                found.add(value)
    return frozenset(found)


def refuse_placeholders(tokens: np.ndarray, placeholders: frozenset[int]) -> None:
    """Raise InvalidTokens if a prompt, integers `[n]`, has any of `placeholders`, from `placeholder_tokens`."""
    if not placeholders:
        return
    where = np.flatnonzero(np.isin(tokens, list(placeholders)))
    if where.size:
        raise InvalidTokens(
            f"token {int(tokens[where[0]])} at position {int(where[0])} stands for an image, a video or sound, "
            f"{where.size} of {len(tokens)} tokens do: give pictures to Generator.submit(content=...), or remove them "
            "from the prompt"
        )
