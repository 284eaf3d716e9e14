"""Llama-like decoder layers rewritten for one CPU: weights packed once, projections joined, few operations a layer.

`optimize(model)` takes the place of what a model's own layers do between the embedding and the logits, and nothing
else: transformers still runs the model, `Generator` and `forward` drive it as before. It pays where a step is short of
memory bandwidth and of Python, which decoding on a CPU is: on one core SmolLM2-135M in bf16 answers eight requests one
by one in 12.1 s instead of 19.2 (docs/benchmarks.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from radixkv.errors import InvalidArgument
from radixkv.hf.adapter import attach, current_step, engine_attention, running
from radixkv.hf.config import original_lengths, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["PackedLinear", "optimize"]

_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def optimize(model: PreTrainedModel) -> None:
    """Rewrite the decoder layers and the output projection of `model`, in place and for good.

    For models on the CPU whose layers are built like Llama's (Llama, SmolLM, Mistral, Qwen2 and others): RMSNorm,
    rotary embedding of whole heads, a gated MLP, plain `nn.Linear` projections. A layer is not taken by its name: each
    is compared with its replacement in float32, on random rows at positions up to the model's last, before anything is
    replaced.

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
    _expect(decoder, {"embed_tokens", "layers", "norm", "rotary_emb"}, name)
    if isinstance(decoder.rotary_emb, _Rotary):
        raise InvalidArgument(f"{name} is optimized already")
    with engine_attention(model), torch.inference_mode():
        options, positions = _attention_options(model), _telling_positions(model)
        for index, layer in enumerate(decoder.layers):
            _check_layer(layer, f"layer {index} of {name}")
            _compare(layer, decoder.rotary_emb, positions, options[index], f"layer {index} of {name}")
        layers = [_Layer(layer, options[index]) for index, layer in enumerate(decoder.layers)]
        head: Any = model.get_output_embeddings()
        packed_head = PackedLinear([head]) if type(head) is nn.Linear else None
    attach(model)
    decoder.layers = nn.ModuleList(layers)
    decoder.rotary_emb = _Rotary(decoder.rotary_emb)
    if packed_head is not None:
        model.set_output_embeddings(packed_head)


class PackedLinear(nn.Module):
    """`nn.Linear` layers that read the same input, as one product with a weight in the layout of the matrix kernels.

    Takes `[..., in_features]` and returns `[..., sum of out_features]`, the layers' outputs side by side. Its weight is
    no parameter: it cannot be converted, moved or saved, and trying raises InvalidArgument.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [layer.bias for layer in layers]
        self.bias: torch.Tensor | None = None
        if any(bias is not None for bias in biases):
            zeros = [weight.new_zeros(layer.out_features) for layer in layers]
            self.bias = torch.cat([z if b is None else b.detach() for z, b in zip(zeros, biases, strict=True)])
        self.in_features, self.out_features = layers[0].in_features, len(weight)
        self._packs = _packs(weight.dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self._packs else weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if not self._packs:
            return nn.functional.linear(rows, self._weight, self.bias)
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")
        return out

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NoReturn:
        raise InvalidArgument("an optimized model cannot be moved or converted: do that before radixkv.hf.optimize()")

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InvalidArgument("an optimized model has no weights to save: save it before radixkv.hf.optimize()")


def _packs(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies by packed weights of `dtype`."""
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


class _Rotary(nn.Module):
    """The model's rotary embedding once a step, in the form in which the layers apply it: see `_rotate`."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original

    def forward(self, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.original(hidden, position_ids=position_ids)
        return _signed(cos, sin)


def _signed(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`[1, rows, head_dim]` both, as `[rows, 1, head_dim]`, the first half of `sin` negated."""
    sin = sin[0].clone()
    sin[:, : sin.shape[1] // 2].neg_()
    return cos[0].unsqueeze(1), sin.unsqueeze(1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of `[rows, heads, head_dim]`: the halves of a head swapped, not sliced, negated and joined."""
    return (heads * cos).add_(heads.roll(heads.shape[2] // 2, 2).mul_(sin))


class _Layer(nn.Module):
    """One decoder layer over the packed rows of a step, `[1, rows, hidden]` in and out."""

    def __init__(self, layer: Any, options: dict[str, Any]) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index = attention.layer_idx
        self.options = options
        self.head_dim = attention.head_dim
        self.split = (attention.q_proj.out_features // self.head_dim, attention.k_proj.out_features // self.head_dim)
        self.norms = [_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)]
        self.qkv = PackedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = PackedLinear([attention.o_proj])
        self.gate_up = PackedLinear([mlp.gate_proj, mlp.up_proj])
        self.down = PackedLinear([mlp.down_proj])
        self.activation = mlp.act_fn

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        step = current_step(self)
        cos, sin = position_embeddings
        rows = len(cos)
        hidden = hidden_states[0]
        (size, first, epsilon), (_, second, epsilon_2) = self.norms
        heads = self.qkv(nn.functional.rms_norm(hidden, size, first, epsilon)).view(rows, -1, self.head_dim)
        q_heads, k_heads = self.split
        rotated = _rotate(heads[:, : q_heads + k_heads], cos, sin)
        attended = step.attend(
            self.index, rotated[:, :q_heads], rotated[:, q_heads:], heads[:, q_heads + k_heads :], **self.options
        )
        hidden = self.o(attended.view(rows, -1)).add_(hidden)
        gate, up = self.gate_up(nn.functional.rms_norm(hidden, size, second, epsilon_2)).chunk(2, 1)
        out: torch.Tensor = self.down(self.activation(gate).mul_(up)).add_(hidden).unsqueeze(0)
        return out


def _norm(module: Any) -> tuple[tuple[int], torch.Tensor, float]:
    """Size, weight and epsilon of an RMSNorm."""
    epsilon = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return tuple(module.weight.shape), module.weight.detach(), float(epsilon)


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


def _telling_positions(model: PreTrainedModel) -> torch.Tensor:
    """Positions `[1, n]` at which a layer that looks at them would show it.

    Layers that do change at the length of the first training, at multiples of it, or slowly; so: around that length and
    twice that length, around every power of two, and the last.
    """
    config = text_config(model)
    last = getattr(config, "max_position_embeddings", None)
    if last is None:
        raise InvalidArgument(
            f"{type(model).__name__} does not say how many positions it has (max_position_embeddings), so optimize() "
            "cannot compare its layers at all of them"
        )
    edges = {2**power for power in range(int(last).bit_length())} | {int(last)}
    for original in original_lengths(config):
        edges |= {original, 2 * original}
    return torch.tensor([sorted({position for edge in edges for position in (edge - 1, edge)} - {int(last)})])


def _expect(module: nn.Module, children: set[str], where: str) -> None:
    found = {name for name, _ in module.named_children()}
    if found != children:
        extra = ", ".join(sorted(found - children)) or "nothing"
        missing = ", ".join(sorted(children - found)) or "nothing"
        raise InvalidArgument(
            f"{where} is not built like Llama's, so optimize() cannot rewrite it: {type(module).__name__} also has "
            f"{extra} and lacks {missing}"
        )


def _check_layer(layer: Any, where: str) -> None:
    """Refuse a layer that has other parts than the replacement has, or parts that do more than they seem to."""
    _expect(layer, _LAYER, where)
    _expect(layer.self_attn, _ATTENTION, where)
    _expect(layer.mlp, _MLP, where)
    for name, module in layer.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            raise InvalidArgument(f"{name} in {where} is a {type(module).__name__}: optimize() takes nn.Linear only")
        if module._forward_hooks or module._forward_pre_hooks:
            raise InvalidArgument(f"{name or 'it'} in {where} has forward hooks, which optimize() would lose")


def _compare(layer: Any, rotary: Any, positions: torch.Tensor, options: dict[str, Any], where: str) -> None:
    """Refuse a layer whose replacement computes something else, told in float32 on random rows at `positions`."""
    reference, rotary = copy.deepcopy(layer).float(), copy.deepcopy(rotary)  # some rotary embeddings change in use
    size = reference.self_attn.q_proj.in_features
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn((1, positions.shape[1], size), generator=generator)
    try:
        with running(_Echo()):
            embeddings = rotary(rows, position_ids=positions)
            expected = reference(rows.clone(), position_embeddings=embeddings, position_ids=positions)
            found = _Layer(reference, options)(rows, _signed(*embeddings))
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise InvalidArgument(f"{where} cannot be rewritten by optimize(): {error}") from error
    scale = float((expected - rows).abs().max())
    difference = float((expected - found).abs().max())
    if not difference <= 1e-3 * scale:
        raise InvalidArgument(
            f"{where} computes something else than a layer of Llama's build (it differs by {difference:.2g}, where a "
            f"layer adds up to {scale:.2g}), so optimize() cannot rewrite it"
        )
