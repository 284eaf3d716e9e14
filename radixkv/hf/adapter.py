"""Runs a Hugging Face causal LM on the engine: one attention function, and one forward pass over a ragged batch.

The model is not changed. Transformers (5.23 or later) looks its attention up by name in `AttentionInterface`; this
module registers the name "radixkv". A batch of requests is packed as one row of tokens, `[1, rows]`, and the open
step travels through `forward` as a keyword argument that reaches the attention function as it is. No mask is built,
because no mask function is registered under that name: the page table says which keys a row sees.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AttentionInterface

from radixkv.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from radixkv.engine import Engine
    from radixkv.step import Step

__all__ = [
    "ATTENTION",
    "STEP",
    "AttentionShape",
    "attach",
    "engine_attention",
    "engine_for",
    "forward",
    "length_limit",
    "probe",
]

ATTENTION = "radixkv"
"""The name in transformers' `AttentionInterface`. A name with flash, sdpa or flex in it would take other paths."""

STEP = "radixkv_step"
"""The keyword argument of the model's forward that carries the open step to every attention layer."""

_UNSUPPORTED = ("s_aux", "sinks", "position_bias", "indices", "block_indices")
"""Arguments with which some models change the attention itself: attention sinks, biases, sparse selections."""

_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True)
class AttentionShape:
    """What a model's attention layers were seen to do, and so what an engine for it must hold."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype


class _Probe:
    """Stands in for a step: notes what each layer passes to `attend` and answers zeros."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: set[tuple[int, int, int, int, torch.dtype]] = set()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        self.layers.append(layer)
        self.shapes.add((q.shape[1], k.shape[1], k.shape[2], v.shape[2], q.dtype))
        return q.new_zeros(q.shape[0], q.shape[1], v.shape[2])


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "radixkv".

    `query` is `[1, num_qo_heads, rows, head_dim]`, `key` and `value` are `[1, num_kv_heads, rows, head_dim]`: the new
    rows only. Returns `[1, rows, num_qo_heads, head_dim]`. Nothing is copied on the way in.
    """
    step = kwargs.get(STEP)
    if step is None:
        raise InvalidArgument(
            f"{type(module).__name__} was called without an open step: run the model through radixkv.hf.forward(model, "
            'step), or call model.set_attn_implementation("eager") to use it without the engine'
        )
    _check_call(module, query, attention_mask, is_causal, kwargs)
    # Transformers counts the query itself in its window, FlashInfer and this engine do not.
    window_left = sliding_window - 1 if sliding_window is not None else -1
    out = step.attend(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        sm_scale=scaling,
        window_left=window_left,
        logits_soft_cap=softcap or 0.0,
    )
    return out.unsqueeze(0), None


def _check_call(
    module: torch.nn.Module,
    query: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    kwargs: dict[str, Any],
) -> None:
    """Refuse what the engine's attention would silently compute differently."""
    name = type(module).__name__
    if attention_mask is not None:
        raise InvalidArgument(f"{name} passes an attention mask: only causal and sliding-window attention can be paged")
    if is_causal is False or (is_causal is None and getattr(module, "is_causal", True) is False):
        raise InvalidArgument(f"{name} is not causal: a cached prefix would depend on the tokens after it")
    if query.shape[0] != 1:
        raise InvalidArgument(f"batch of {query.shape[0]}: pack the requests as one row of tokens, [1, rows]")
    for argument in _UNSUPPORTED:
        if kwargs.get(argument) is not None:
            raise InvalidArgument(f"{name} passes {argument!r}: attention with sinks, biases or sparsity is not paged")


AttentionInterface.register(ATTENTION, _attend)


def attach(model: PreTrainedModel) -> None:
    """Let `model` use the engine's attention from now on; `model.set_attn_implementation("eager")` undoes it.

    Raises InvalidArgument where the model's attention does not go through `AttentionInterface`.
    """
    if model.config._attn_implementation == ATTENTION:
        return
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise InvalidArgument(f"{name} is an encoder-decoder model: only decoder-only models can run on the engine")
    if not model._can_set_attn_implementation():
        raise InvalidArgument(f"{name} does not look its attention up in transformers' AttentionInterface")
    model.set_attn_implementation(ATTENTION)


def engine_for(
    model: PreTrainedModel,
    *,
    num_pages: int | None = None,
    capacity: str | float | None = None,
    page_size: int = 16,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Engine:
    """An engine with the layers, heads, head dimension, dtype and device of `model`.

    `num_pages` or `capacity` ("4GiB", a number of bytes, or a share of the free memory) sizes the pool, as for
    `Engine`. The geometry is observed, not guessed from the configuration: see `probe`, whose errors this raises.
    `dtype` is a check, not a conversion: the model computes K and V in it, and another dtype raises InvalidArgument.
    `kv_dtype` and its scales say what they are stored as, as for `Engine`.
    The model's own attention stays in place; `forward` and `Generator` switch it.
    """
    from radixkv.engine import Engine

    shape = probe(model)
    if dtype is not None and dtype != shape.dtype:
        raise InvalidArgument(
            f"the model computes K and V in {shape.dtype}, not {dtype}: convert it, model.to({dtype})"
        )
    return Engine(
        num_layers=shape.num_layers,
        num_qo_heads=shape.num_qo_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        page_size=page_size,
        num_pages=num_pages,
        capacity=capacity,
        dtype=shape.dtype,
        device=model.device,
        kv_dtype=kv_dtype,
        k_scale=k_scale,
        v_scale=v_scale,
    )


def probe(model: PreTrainedModel) -> AttentionShape:
    """Run one token through `model` and report the shapes its attention layers use.

    Costs one forward pass of one token. The attention implementation is restored afterwards. Raises InvalidArgument
    for what cannot run on the engine: encoder-decoders, models with recurrent or convolutional state, layers with
    linear, chunked or sparse attention, attention sinks, K and V of different head dimensions (latent attention),
    layers of different shapes, and models whose attention is not reached through `AttentionInterface`.
    """
    _check_config(model)
    seen = _Probe()
    with engine_attention(model), torch.inference_mode():
        zero = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
        model(input_ids=zero, position_ids=zero, use_cache=False, **{STEP: seen})
    name = type(model).__name__
    expected = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    if seen.layers != list(range(expected)):
        raise InvalidArgument(
            f"{name} has {expected} layers, but the engine's attention was called for layers {seen.layers}: every "
            "layer must attend exactly once, in order"
        )
    if len(seen.shapes) != 1:
        raise InvalidArgument(
            f"{name} has layers of different shapes {sorted(map(str, seen.shapes))}: one pool holds one shape"
        )
    num_qo_heads, num_kv_heads, k_dim, v_dim, dtype = seen.shapes.pop()
    if k_dim != v_dim:
        raise InvalidArgument(
            f"{name} has keys of {k_dim} and values of {v_dim} dimensions: the pool needs equal head_dim"
        )
    return AttentionShape(expected, num_qo_heads, num_kv_heads, k_dim, dtype)


def _check_config(model: PreTrainedModel) -> None:
    """Refuse models whose layers keep state that the pages do not hold."""
    name = type(model).__name__
    if getattr(model, "_is_stateful", False):
        raise InvalidArgument(
            f"{name} keeps recurrent or convolutional state between tokens: only K and V can be cached"
        )
    config = model.config.get_text_config(decoder=True)
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if foreign:
        raise InvalidArgument(
            f"{name} has layers of type {', '.join(foreign)}: supported are {', '.join(sorted(_LAYER_TYPES))}"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise InvalidArgument(
            f"{name} attends in chunks (attention_chunk_size): supported are full and sliding-window attention"
        )


@contextmanager
def engine_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use the engine's attention inside the block, the model's own after it."""
    before = model.config._attn_implementation
    attach(model)
    try:
        yield
    finally:
        if before != ATTENTION:
            model.set_attn_implementation(before)


def forward(model: PreTrainedModel, step: Step) -> torch.Tensor:
    """One forward pass over all rows of an open `step`: the logits of each lease's last row, `[leases, vocabulary]`.

    Writes K and V of every row into the leases' pages, layer by layer. Switches the model to the engine's attention
    (see `attach`). Call it under `torch.inference_mode()` or `torch.no_grad()`.
    """
    attach(model)
    arguments: dict[str, Any] = {STEP: step}
    if _keeps_logits(model.__class__.forward):
        arguments["logits_to_keep"] = step.last_rows
    logits = model(
        input_ids=step.input_ids.unsqueeze(0),
        position_ids=step.positions.unsqueeze(0),
        use_cache=False,
        **arguments,
    ).logits[0]
    return cast("torch.Tensor", logits if "logits_to_keep" in arguments else logits[step.last_rows])


@functools.lru_cache
def _keeps_logits(forward_of_class: Callable[..., Any]) -> bool:
    """Whether a model class can compute the logits of chosen rows only."""
    return "logits_to_keep" in inspect.signature(forward_of_class).parameters


def length_limit(model: PreTrainedModel) -> int | None:
    """The longest sequence, in tokens, for which `model` computes a token's K and V the same in every batch.

    It is the model's number of positions. Rotary embeddings that rescale with the longest sequence of a batch
    (`rope_type` "dynamic", "longrope") would make cached keys depend on other requests: they end where that begins.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if parameters.get("rope_type") in ("dynamic", "longrope"):
            limits.append(parameters.get("original_max_position_embeddings"))
            limits.append(getattr(config, "original_max_position_embeddings", None))
    known = [int(limit) for limit in limits if limit is not None]
    return min(known, default=None)
