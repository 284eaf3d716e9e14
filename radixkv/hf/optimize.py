"""Llama-like decoder layers rewritten for one CPU: weights packed once, projections joined, few operations a layer.

`optimize(model)` takes the place of what a model's own layers do between the embedding and the logits, and nothing
else: transformers still runs the model, `Generator` and `forward` drive it as before. It pays where a step is short of
memory bandwidth and of Python, which decoding on a CPU is: on one core SmolLM2-135M in bf16 answers eight requests one
by one in 12.1 s instead of 19.2 (docs/benchmarks.md).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from radixkv.errors import InvalidArgument
from radixkv.hf.adapter import attach, engine_attention, running
from radixkv.hf.config import telling_positions
from radixkv.hf.linear import PackedLinear
from radixkv.hf.optimize_layers import Layer, Rotary, signed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["optimize"]

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_QKV = {"q_proj", "k_proj", "v_proj"}
_BUILDS: dict[str, list[set[str]]] = {
    "layer": [_LAYER, _LAYER | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}],
    "attention": [{*qkv, "o_proj", *norms} for qkv in (_QKV, {"qkv_proj"}) for norms in ((), ("q_norm", "k_norm"))],
    "mlp": [
        {"gate_proj", "up_proj", "down_proj", "act_fn"},
        {"gate_up_proj", "down_proj", "activation_fn"},
        {"gate", "experts"},
    ],
}
"""The parts of what can be rewritten. The first of each is Llama's, which errors compare with."""


def optimize(model: PreTrainedModel) -> None:
    """Rewrite the decoder layers and the output projection of `model`, in place and for good.

    For models on the CPU whose layers are built like Llama's (Llama, SmolLM, Mistral, Qwen, Phi-3, GLM, Gemma to 3,
    Mixtral and others): RMSNorms, rotary embedding, a gated MLP or a mixture of such, plain `nn.Linear` projections. A
    layer is not taken by its name: each is compared with its replacement in float32, on random rows at positions up to
    the model's last, before anything is replaced.

    On CPUs without products in 16 bits (no AVX-512), where torch multiplies bfloat16 and float16 several times slower
    than float32, weights stay in 16 bits and are widened as they are multiplied with: a model in bfloat16 then answers
    about as fast as in float32, in half the memory.

    The answers are those of the same model in other roundings: in bf16 a greedy token can differ from the original's
    where two logits are within rounding, as it can when a batch changes. That a cached prefix changes no answer holds
    as before. Afterwards the model runs on the engine only, and cannot be saved, converted or trained: the stored
    weights are let go of, layer after layer. While it runs, at most twice the weights are in memory.

    Raises InvalidArgument, and leaves the model as it was, for a model on another device, one in training mode, and
    one with layers of another build; it names the layer and what is different.
    """
    name = type(model).__name__
    if model.device.type != "cpu":
        raise InvalidArgument(f"{name} is on {model.device}: optimize() packs weights for CPUs only")
    if model.training:
        raise InvalidArgument(f"{name} is in training mode: call model.eval() first")
    decoder: Any = model.get_decoder()
    _expect(decoder, [{"embed_tokens", "layers", "norm", "rotary_emb"}], name)
    if isinstance(decoder.rotary_emb, Rotary):
        raise InvalidArgument(f"{name} is optimized already")
    with engine_attention(model), torch.inference_mode():
        options, positions = _attention_options(model), torch.tensor([telling_positions(model)])
        for index, layer in enumerate(decoder.layers):
            _check_layer(layer, f"layer {index} of {name}")
        pairs = _turns_pairs(decoder, positions, options[0], f"layer 0 of {name}")
        for index, layer in enumerate(decoder.layers):
            where = f"layer {index} of {name}"
            _compare(layer, _at(decoder, positions, index, where), options[index], pairs, where)
        layers = [Layer(layer, options[index], pairs) for index, layer in enumerate(decoder.layers)]
        head: Any = model.get_output_embeddings()
        packed_head = PackedLinear([head]) if type(head) is nn.Linear else None
    attach(model)
    decoder.layers = nn.ModuleList(layers)
    decoder.rotary_emb = Rotary(decoder.rotary_emb, pairs)
    if packed_head is not None:
        model.set_output_embeddings(packed_head)


# ---- what must be so before anything is replaced ----


class _Echo:
    """Stands in for a step: notes the options of each layer's attention, and answers with a mix of its q, k and v."""

    def __init__(self) -> None:
        self.options: dict[int, dict[str, Any]] = {}

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        self.options[layer] = options
        group = q.shape[1] // k.shape[1]
        out = 3 * v.repeat_interleave(group, 1)
        for part in torch.split(q - 2 * k.repeat_interleave(group, 1), v.shape[2], 2):  # keys may be wider than values
            out[..., : part.shape[2]] += part
        return out


def _attention_options(model: PreTrainedModel) -> dict[int, dict[str, Any]]:
    """What each layer passes to the engine's attention besides q, k and v: scale, window, soft cap."""
    echo = _Echo()
    zero = torch.zeros((1, 1), dtype=torch.int64)
    with running(echo):
        model(input_ids=zero, position_ids=zero, use_cache=False)
    return echo.options


def _expect(module: nn.Module, builds: Iterable[set[str]], where: str) -> None:
    """Refuse a module that has other parts than any of these. Dropout does nothing here."""
    found = {name for name, part in module.named_children() if type(part) is not nn.Dropout}
    if found in builds:
        return
    first = next(iter(builds))
    extra, missing = (", ".join(sorted(names)) or "nothing" for names in (found - first, first - found))
    raise InvalidArgument(
        f"{where} is not built like Llama's, nor as others that optimize() can rewrite: {type(module).__name__} also "
        f"has {extra} and lacks {missing}"
    )


def _check_layer(layer: Any, where: str) -> None:
    """Refuse a layer that has other parts than the replacement has, or parts that do more than they seem to."""
    _expect(layer, _BUILDS["layer"], where)
    _expect(layer.self_attn, _BUILDS["attention"], where)
    _expect(layer.mlp, _BUILDS["mlp"], where)
    for name, module in layer.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            raise InvalidArgument(f"{name} in {where} is a {type(module).__name__}: optimize() takes nn.Linear only")
        if module._forward_hooks or module._forward_pre_hooks:
            raise InvalidArgument(f"{name or 'it'} in {where} has forward hooks, which optimize() would lose")


class _At(NamedTuple):
    """Where a layer is compared: positions `[1, n]`, and their rotary embedding."""

    positions: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


def _at(decoder: Any, positions: torch.Tensor, index: int, where: str) -> _At:
    rotary = copy.deepcopy(decoder.rotary_emb)  # some change in use
    of_types = "layer_type" in inspect.signature(rotary.forward).parameters
    more = {"layer_type": decoder.config.layer_types[index]} if of_types else {}
    try:
        cos, sin = rotary(torch.zeros(1, 1), position_ids=positions, **more)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{where} has a rotary embedding that optimize() does not know: {error}") from error
    return _At(positions, cos, sin)


def _turns_pairs(decoder: Any, positions: torch.Tensor, options: dict[str, Any], where: str) -> bool:
    """Whether the first layer's rotary embedding turns neighbours in a head against each other (GLM), not halves."""
    at = _at(decoder, positions, 0, where)
    try:
        _compare(decoder.layers[0], at, options, False, where)
    except InvalidArgument as error:
        try:
            _compare(decoder.layers[0], at, options, True, where)
        except InvalidArgument:
            raise error from None
        return True
    return False


def _compare(layer: Any, at: _At, options: dict[str, Any], pairs: bool, where: str) -> None:
    """Refuse a layer whose replacement computes something else, told in float32 on random rows."""
    reference, (positions, cos, sin) = copy.deepcopy(layer).float(), at
    size = reference.self_attn.o_proj.out_features
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((1, positions.shape[1], size), generator=generator)
    try:
        with running(_Echo()):
            expected = reference(rows.clone(), position_embeddings=(cos, sin), position_ids=positions)
            found = Layer(reference, options, pairs)(rows, signed(cos, sin, pairs))
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{where} cannot be rewritten by optimize(): {error}") from error
    scale = float((expected - rows).abs().max())
    difference = float((expected - found).abs().max())
    if not difference <= 1e-3 * scale:
        raise InvalidArgument(
            f"{where} computes something else than a layer of Llama's build (it differs by {difference:.2g}, where a "
            f"layer adds up to {scale:.2g}), so optimize() cannot rewrite it"
        )
