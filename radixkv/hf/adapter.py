"""Runs a Hugging Face causal LM on the engine: one attention function, and one forward pass over a ragged batch.

The model is not changed. Transformers looks its attention up by name in `AttentionInterface`; this module registers the
name "radixkv". A batch of requests is packed as one row of tokens, `[1, rows]`. The open step reaches the attention
function in a context variable: a keyword argument of the model's forward would be lost in models that hand none down.
No mask is built, because no mask function is registered under that name: the page table says which keys a row sees.
Of a model that also reads images or sound, only the text part is switched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AttentionInterface, GenerationMixin, PreTrainedModel

from radixkv.attention import Options
from radixkv.errors import InvalidArgument
from radixkv.hf.absorbed import head_values, is_absorbed, latent_queries
from radixkv.hf.config import (
    check_config,
    length_limit,
    placeholder_tokens,
    sliding_windows,
    stored_layers,
    text_config,
)
from radixkv.hf.digest import weights_digest
from radixkv.hf.layers import position_arguments, step_for
from radixkv.hf.linear import warn_of_slow_products
from radixkv.shape import LayerShape
from radixkv.tiers import TierOptions

if TYPE_CHECKING:
    from radixkv.engine import Engine
    from radixkv.formats import LayerFormat
    from radixkv.kv_plan import KvPlan
    from radixkv.step import Step

__all__ = [
    "ATTENTION",
    "AttentionShape",
    "attach",
    "attention_name",
    "current_step",
    "engine_attention",
    "engine_for",
    "forward",
    "length_limit",
    "probe",
    "running",
]

ATTENTION = "radixkv"
"""The name in transformers' `AttentionInterface`. A name with flash, sdpa or flex in it would take other paths."""

_UNSUPPORTED = ("sinks", "position_bias", "indices", "block_indices")
"""Arguments with which some models change the attention itself: sinks that differ by row, biases, sparse selections."""

_STEP: ContextVar[Any] = ContextVar("radixkv_step", default=None)


@contextmanager
def running(step: Any) -> Iterator[None]:
    """Hand `step`, or a stand-in with its `attend`, to every attention layer that is called inside the block."""
    token = _STEP.set(step)
    try:
        yield
    finally:
        _STEP.reset(token)


def current_step(module: torch.nn.Module) -> Any:
    """The step that `module` attends in; raises InvalidArgument where the model was called without one."""
    step = _STEP.get()
    if step is None:
        raise InvalidArgument(
            f"{type(module).__name__} was called without an open step: run the model through radixkv.hf.forward(model, "
            'step), or call model.set_attn_implementation("eager") to use it without the engine'
        )
    return step


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
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function "radixkv".

    `query` is `[1, num_qo_heads, rows, head_dim]`, `key` and `value` are `[1, num_kv_heads, rows, head_dim]`: the new
    rows only. Returns `[1, rows, num_qo_heads, head_dim]`. Nothing is copied on the way in.
    """
    step = current_step(module)
    _check_call(module, query, attention_mask, is_causal, kwargs)
    # Transformers counts the query itself in its window, FlashInfer and this engine do not.
    window_left = sliding_window - 1 if sliding_window is not None else -1
    latent, q = is_absorbed(module), query[0].transpose(0, 1)
    out = step.attend(
        module.layer_idx,
        latent_queries(module, q) if latent else q,
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        sm_scale=scaling,
        window_left=window_left,
        logits_soft_cap=softcap or 0.0,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return (head_values(module, out) if latent else out).unsqueeze(0), None


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
            raise InvalidArgument(
                f"{name} passes {argument!r}: attention with biases, sparsity or a sink for each row is not paged"
            )


AttentionInterface.register(ATTENTION, _attend)


def _text_part(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that has the configuration of its text: all of it, if it has no other."""
    config = text_config(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.config is config:
            return part
    raise InvalidArgument(f"{type(model).__name__} has no part that is built from its text configuration")


def attention_name(model: PreTrainedModel) -> str:
    """The name under which the text part of `model` looks its attention up."""
    return str(text_config(model)._attn_implementation)


def attach(model: PreTrainedModel) -> None:
    """Let `model` use the engine's attention from now on; `model.set_attn_implementation("eager")` undoes it.

    Of a model that also reads images or sound, the parts that do keep their own. Raises InvalidArgument where the
    model's attention does not go through `AttentionInterface`.
    """
    if attention_name(model) == ATTENTION:
        return
    part = _text_part(model)
    if not part._can_set_attn_implementation():
        raise InvalidArgument(
            f"{type(model).__name__} does not look its attention up in transformers' AttentionInterface: only a loop "
            "of your own can run it, with step.attend in place of its attention"
        )
    part.set_attn_implementation(ATTENTION)


@contextmanager
def engine_attention(model: PreTrainedModel) -> Iterator[None]:
    """Use the engine's attention inside the block, the model's own after it."""
    before = attention_name(model)
    attach(model)
    try:
        yield
    finally:
        if before != ATTENTION:
            _text_part(model).set_attn_implementation(before)


def forward(
    model: PreTrainedModel,
    step: Step,
    rows: torch.Tensor | None = None,
    *,
    embeds: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """One forward pass over all rows of an open `step`: the logits of each lease's last row, `[leases, vocabulary]`.

    Or of `rows`, int64 indices into the rows of the step: all of them where the tokens of each are to be judged.
    `embeds`, `[rows, hidden]`, is what the model is given in place of the step's tokens, where some stand for pictures,
    and `positions`, int64 `[3, rows]`, in place of the step's, where it places pictures by time, height and width.
    Writes K and V of every row into the leases' pages, layer by layer. Switches the model to the engine's attention
    (see `attach`). Call it under `torch.inference_mode()` or `torch.no_grad()`.
    """
    attach(model)
    rows = step.last_rows if rows is None else rows
    keep = {"logits_to_keep": rows} if _keeps_logits(model.__class__.forward) else {}
    config = text_config(model)
    more = keep | position_arguments(config, step.positions)
    given = {"input_ids": step.input_ids} if embeds is None else {"inputs_embeds": embeds}
    given = {name: x.unsqueeze(0) for name, x in given.items()}
    given["position_ids"] = step.positions.unsqueeze(0) if positions is None else positions.unsqueeze(1)
    with running(step_for(config, step)):
        logits = model(**given, use_cache=False, **more).logits[0]
    return cast("torch.Tensor", logits if keep else logits[rows])


@functools.lru_cache
def _keeps_logits(forward_of_class: Callable[..., Any]) -> bool:
    """Whether a model class can compute the logits of chosen rows only."""
    return "logits_to_keep" in inspect.signature(forward_of_class).parameters


# ---- what an engine for a model must hold ----


@dataclass(frozen=True)
class AttentionShape:
    """What a model's attention layers were seen to do, and so what an engine for it must hold."""

    layers: tuple[LayerShape, ...]
    """Those that store K and V of their own: layers that share another's need no layer of the engine."""
    dtype: torch.dtype
    window_left: int
    """How many keys before its own a row sees at most, in any layer; -1: all."""

    def engine(self, device: torch.device, **options: Any) -> Engine:
        """An engine of this shape; `options` are those of `Engine` that a model does not decide."""
        from radixkv.engine import Engine

        return Engine(layers=self.layers, dtype=self.dtype, device=device, **options)


def engine_for(
    model: PreTrainedModel,
    *,
    num_pages: int | None = None,
    capacity: str | float | None = None,
    page_size: int = 16,
    dtype: torch.dtype | None = None,
    kv_format: str | LayerFormat | KvPlan | Sequence[str | LayerFormat | None] | None = None,
    hierarchical: bool = False,
    tiers: TierOptions | None = None,
) -> Engine:
    """An engine with the layers, dtype and device of `model`; layers may differ in heads and dimensions.

    `num_pages` or `capacity` ("4GiB", a number of bytes, or a share of the free memory) sizes the pool, as for
    `Engine`. The geometry is observed, not guessed from the configuration: see `probe`, whose errors this raises.
    `dtype` is a check, not a conversion: the model computes K and V in it, and another dtype raises InvalidArgument.
    `kv_format` says what they are stored as, and `hierarchical` what namespaces find, as for `Engine`. `tiers` that
    name no weights get the model's `weights_digest`.
    The model's own attention stays in place; `forward` and `Generator` switch it. Warns of a model in 16 bits on a CPU
    that multiplies these slowly, unless `optimize` has rewritten it.
    """
    warn_of_slow_products(model)
    shape = probe(model)
    if isinstance(tiers, TierOptions) and tiers.weights is None:
        tiers = replace(tiers, weights=weights_digest(model))
    if dtype is not None and dtype != shape.dtype:
        raise InvalidArgument(
            f"the model computes K and V in {shape.dtype}, not {dtype}: convert it, model.to({dtype})"
        )
    return shape.engine(
        model.device,
        page_size=page_size,
        num_pages=num_pages,
        capacity=capacity,
        kv_format=kv_format,
        hierarchical=hierarchical,
        tiers=tiers,
    )


def probe(model: PreTrainedModel) -> AttentionShape:
    """Run two tokens through `model`, in both orders, and report the shapes its attention layers use.

    The attention implementation is restored afterwards. Raises InvalidArgument for what cannot run on the engine:
    encoder-decoders, models that need more than tokens, models whose attention is not reached through
    `AttentionInterface`, models with recurrent or convolutional state or with positions of their own counting, layers
    with linear or sparse attention, and windows that the layers do not tell the engine.
    """
    check_config(model)
    name = type(model).__name__
    one, two = _two_words(model)
    seen, swapped = _observe(model, [one, two], [0, 1]), _observe(model, [two, one], [1, 0])
    config = text_config(model)
    expected = stored_layers(config) or list(range(int(config.num_hidden_layers)))
    if seen.layers != expected:
        raise InvalidArgument(
            f"{name} has {len(expected)} layers, but the engine's attention was called for layers {seen.layers}: every "
            "layer must attend exactly once, in order; a loop of your own can have a layer of Engine(layers=...) for "
            "each attention"
        )
    dtypes = {q.dtype for q in seen.queries}
    if len(dtypes) != 1:
        raise InvalidArgument(f"{name} has layers in {sorted(map(str, dtypes))}: an engine computes in one dtype")
    layers = tuple(seen.shapes.values())
    _check_rows(model, seen, swapped)
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        _check_first_position(model, seen, _observe(model, [one, two], None))
    _check_windows(model, seen)
    lookbacks = [options.lookback for options in seen.options]
    return AttentionShape(layers, dtypes.pop(), -1 if -1 in lookbacks else max(lookbacks))


class _Probe:
    """Stands in for a step: notes what each layer passes to `attend` and answers zeros."""

    def __init__(self) -> None:
        self.layers: list[int] = []
        self.shapes: dict[int, LayerShape] = {}
        self.queries: list[torch.Tensor] = []
        self.written: list[torch.Tensor] = []
        self.options: list[Options] = []
        self.logits = torch.empty(0)

    @property
    def all_rows(self) -> list[torch.Tensor]:
        return [*self.queries, *self.written, self.logits]

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        window_left: int = -1,
        attention_chunk: int = 0,
        **options: object,
    ) -> torch.Tensor:
        if k is not None and v is not None:
            is_part = k.shape[1] == 1 and v.data_ptr() == k.data_ptr() and v.stride() == k.stride()
            self.shapes[layer] = LayerShape(q.shape[1], k.shape[1], k.shape[2], v.shape[2], latent=is_part)
            self.written += [k, v]
        self.layers.append(layer)
        self.queries.append(q)
        self.options.append(Options(window_left=window_left, attention_chunk=attention_chunk))
        return q.new_zeros(q.shape[0], q.shape[1], self.shapes[layer].v_dim)


def _two_words(model: PreTrainedModel) -> tuple[int, int]:
    """Two tokens of no special meaning: from the middle of the vocabulary, and no placeholders."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        raise InvalidArgument(f"{type(model).__name__} has no single vocabulary of tokens that it embeds")
    placeholders = placeholder_tokens(model)
    words = (token for token in range(len(weight) // 2, len(weight)) if token not in placeholders)
    return next(words), next(words)


def _observe(model: PreTrainedModel, tokens: list[int], positions: list[int] | None) -> _Probe:
    """What the attention layers of `model` are given in one forward pass, and its logits. None: it counts itself."""
    seen, more, config = _Probe(), {}, text_config(model)
    with engine_attention(model), running(step_for(config, seen)), torch.inference_mode():
        rows = torch.tensor([tokens], device=model.device)
        if positions is not None:
            at = torch.tensor(positions, device=model.device)
            more = {"position_ids": at[None], **position_arguments(config, at)}
        try:
            seen.logits = model(input_ids=rows, use_cache=False, **more).logits[0]
        except InvalidArgument:
            raise
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, AttributeError) and error.name == "logits":
                raise InvalidArgument(
                    f"{type(model).__name__} gives no logits to choose tokens by: load it as AutoModelForCausalLM"
                ) from error
            raise InvalidArgument(f"{type(model).__name__} cannot run on tokens alone: {error}") from error
    return seen


def _check_rows(model: PreTrainedModel, seen: _Probe, swapped: _Probe) -> None:
    """Refuse a model whose rows change with the order of the rows.

    Outside of attention a row must follow from its token and position alone: rows of other requests lie beside it, and
    what comes before it may be in the cache. Positions counted from the place in the batch, convolutions over tokens
    and recurrent state break that. The same products of the same sizes run both times, so rounding is no excuse.
    """
    if _differ(seen, [rows.flip(0) for rows in swapped.all_rows]):
        name = type(model).__name__
        if model.training:
            raise InvalidArgument(f"{name} is in training mode, where dropout may change its answers: model.eval()")
        raise InvalidArgument(
            f"{name} computes other rows when their order changes: it counts positions itself or keeps state "
            "between tokens, so a row does not follow from its token, its position and the pages alone"
        )


def _check_first_position(model: PreTrainedModel, seen: _Probe, uncounted: _Probe) -> None:
    """Refuse a model that counts from elsewhere than 0 where nobody tells it positions, as its `generate` may not."""
    if _differ(seen, uncounted.all_rows):
        raise InvalidArgument(
            f"{type(model).__name__} computes other rows at positions 0 and 1 than without position_ids: its own "
            "generate() counts positions in another way"
        )


def _differ(seen: _Probe, others: list[torch.Tensor]) -> bool:
    """Whether any rows are further apart than rounding puts them."""
    pairs = zip(seen.all_rows, others, strict=True)
    return any(bool((one.float() - other.float()).norm() > 0.02 * one.float().norm()) for one, other in pairs)


def _check_windows(model: PreTrainedModel, seen: _Probe) -> None:
    """Refuse layers with a window that lies in transformers' mask or cache only, which the engine does not see."""
    limit = length_limit(model)
    windows = (options.window_left + 1 if options.window_left >= 0 else None for options in seen.options)
    for layer, (found, expected) in enumerate(zip(windows, sliding_windows(model), strict=True)):
        never_full = expected is not None and limit is not None and expected >= limit
        if found != expected and not (found is None and never_full):
            raise InvalidArgument(
                f"layer {layer} of {type(model).__name__} has a window of {expected} keys for transformers' cache, but "
                f"tells its attention {found}: the engine cannot know which keys it may see. Where no sequence is "
                "longer than the window, load the model with sliding_window=max_position_embeddings"
            )
