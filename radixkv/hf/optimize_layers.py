"""What `optimize` puts in the place of a decoder layer: joined products, few operations, the engine's attention."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from radixkv.hf.adapter import current_step
from radixkv.hf.linear import PackedLinear

__all__ = ["Layer", "Rotary", "signed"]


class Rotary(nn.Module):
    """The model's rotary embedding once a step, in the form in which the layers apply it: see `_rotate`."""

    def __init__(self, original: nn.Module, pairs: bool) -> None:
        super().__init__()
        self.original, self.pairs = original, pairs

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor, *layer_type: str, **options: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = self.original(hidden, position_ids, *layer_type, **options)
        return signed(cos, sin, self.pairs)


def signed(cos: torch.Tensor, sin: torch.Tensor, pairs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`[1, rows, dim]` both, as `[rows, 1, dim]`, and `sin` negated where the swapped half goes: see `_rotate`."""
    cos, sin = cos[0], sin[0].clone()
    half = sin.shape[1] // 2
    if pairs:
        cos, sin = (x[:, :half].repeat_interleave(2, 1) for x in (cos, sin))
        sin[:, ::2].neg_()
    else:
        sin[:, :half].neg_()
    return cos.unsqueeze(1), sin.unsqueeze(1)


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, pairs: bool) -> torch.Tensor:
    """Rotary embedding of `[rows, heads, head_dim]`, of its first dimensions where `cos` has fewer.

    The halves of a head are swapped, or with `pairs` each two neighbours; nothing is sliced, negated and joined.
    """
    dim = cos.shape[2]
    part = heads[..., :dim]
    swapped = part.reshape(*part.shape[:2], -1, 2).flip(3).flatten(2) if pairs else part.roll(dim // 2, 2)
    rotated = (part * cos).add_(swapped.mul_(sin))
    return rotated if dim == heads.shape[2] else torch.cat([rotated, heads[..., dim:]], 2)


class _Norm:
    """An RMSNorm, multiplied by its weight or, as Gemma's, by one more; that sum is not rounded to 16 bits."""

    def __init__(self, module: Any) -> None:
        self.epsilon = float(module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps)
        self.weight = module.weight.detach()
        self.size = tuple(self.weight.shape)
        rows = torch.linspace(-1, 2, 3 * self.weight.numel()).view(3, -1)
        expected, plain = copy.deepcopy(module).float()(rows), self.weight.float()
        off, off_by_one = ((self._of(rows, weight) - expected).norm() for weight in (plain, plain + 1))
        self.wide = bool(off_by_one < off)
        if self.wide:
            self.weight = plain + 1

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._of(x.float(), self.weight).to(x.dtype) if self.wide else self._of(x, self.weight)

    def _of(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.rms_norm(x, self.size, weight, self.epsilon)


def _norms(module: Any, names: Iterable[str]) -> list[_Norm | None]:
    """The norms of these names; None where there is none."""
    return [_Norm(getattr(module, name)) if hasattr(module, name) else None for name in names]


class _GatedMlp(nn.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        packed = hasattr(mlp, "gate_up_proj")
        self.gate_up = PackedLinear([mlp.gate_up_proj] if packed else [mlp.gate_proj, mlp.up_proj])
        self.down = PackedLinear([mlp.down_proj])
        self.activation = mlp.act_fn if hasattr(mlp, "act_fn") else mlp.activation_fn

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(rows).chunk(2, 1)
        out: torch.Tensor = self.down(self.activation(gate).mul_(up))
        return out


class _Expert(nn.Module):
    """What `_GatedMlp` takes: the projections of one expert."""

    def __init__(self, experts: Any, number: int) -> None:
        super().__init__()
        self.gate_up_proj = _linear(experts.gate_up_proj[number])
        self.down_proj = _linear(experts.down_proj[number])
        self.act_fn = experts.act_fn


def _linear(weight: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return linear


class _Mixture(nn.Module):
    """A mixture of experts: each runs over the rows that the model's own router gives it."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.router = mlp.gate
        count = len(mlp.experts.gate_up_proj)
        self.experts = nn.ModuleList([_GatedMlp(_Expert(mlp.experts, number)) for number in range(count)])

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        _, weights, chosen = self.router(rows)
        out = torch.zeros_like(rows)
        for number in chosen.unique().tolist():
            row, place = torch.where(chosen == number)
            share = self.experts[number](rows[row]) * weights[row, place, None]
            out.index_add_(0, row, share.to(out.dtype))
        return out


class Layer(nn.Module):
    """One decoder layer over the packed rows of a step, `[1, rows, hidden]` in and out.

    pairs: which dimensions of a head its rotary embedding turns against each other, see `_rotate`.
    """

    def __init__(self, layer: Any, options: dict[str, Any], pairs: bool) -> None:
        super().__init__()
        attention = layer.self_attn
        self.index = attention.layer_idx
        self.options, self.pairs = options, pairs
        self.head_dim = attention.head_dim
        packed = hasattr(attention, "qkv_proj")
        names = ["qkv_proj"] if packed else ["q_proj", "k_proj", "v_proj"]
        self.qkv = PackedLinear([getattr(attention, name) for name in names])
        self.o = PackedLinear([attention.o_proj])
        self.q_heads = attention.o_proj.in_features // self.head_dim
        self.kv_heads = (self.qkv.out_features // self.head_dim - self.q_heads) // 2
        self.head_norms = _norms(attention, ("q_norm", "k_norm"))
        sandwich = hasattr(layer, "pre_feedforward_layernorm")
        before_mlp = "pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"
        before = (_Norm(layer.input_layernorm), _Norm(getattr(layer, before_mlp)))
        after = _norms(layer, ("post_attention_layernorm", "post_feedforward_layernorm")) if sandwich else [None, None]
        self.norms = (before, after)
        self.mlp = _Mixture(layer.mlp) if hasattr(layer.mlp, "experts") else _GatedMlp(layer.mlp)

    def forward(
        self, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor], **kwargs: Any
    ) -> torch.Tensor:
        (before_attention, before_mlp), (after_attention, after_mlp) = self.norms
        hidden = hidden_states[0]
        attended = self._attend(before_attention(hidden), *position_embeddings)
        hidden = (attended if after_attention is None else after_attention(attended)).add_(hidden)
        out: torch.Tensor = self.mlp(before_mlp(hidden))
        return (out if after_mlp is None else after_mlp(out)).add_(hidden).unsqueeze(0)

    def _attend(self, rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        step, (q_norm, k_norm) = current_step(self), self.head_norms
        heads = self.qkv(rows).view(len(rows), -1, self.head_dim)
        keys_end = self.q_heads + self.kv_heads
        qk = heads[:, :keys_end]
        if q_norm is not None and k_norm is not None:
            qk = torch.cat([q_norm(heads[:, : self.q_heads]), k_norm(heads[:, self.q_heads : keys_end])], 1)
        rotated = _rotate(qk, cos, sin, self.pairs)
        q, k = rotated[:, : self.q_heads], rotated[:, self.q_heads :]
        attended = step.attend(self.index, q, k, heads[:, keys_end:], **self.options)
        out: torch.Tensor = self.o(attended.view(len(rows), -1))
        return out
