"""Linear layers in the layout of a CPU's matrix kernels, and what to do where it has none for 16 bits.

Without AVX-512 or AMX, torch multiplies matrices in bfloat16 and float16 with plain loops: about six times slower than
in float32. There a `PackedLinear` keeps its weight in 16 bits and widens it as it goes, as much at once as caches hold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn

from radixkv.errors import InvalidArgument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["WIDENED_BYTES", "PackedLinear", "multiplies", "warn_of_slow_products"]

_WORTH_A_WARNING = 1 << 24  # parameters of a model that are multiplied with

WIDENED_BYTES = 1 << 22
"""Of a weight at once, in float32, where torch multiplies its dtype slowly."""


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
        self._widens = not multiplies(weight.dtype)
        self._packs = not self._widens and weight.dtype != torch.float64 and torch._C._has_mkldnn
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, 1) if self._packs else weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self._packs:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._weight, self.bias, "none", [], "")
            return out
        if self._widens and rows.numel() != self.in_features:  # torch reads the weight for a single row fast enough
            return self._widened(rows.flatten(0, -2)).view(*rows.shape[:-1], self.out_features)
        return nn.functional.linear(rows, self._weight, self.bias)

    def _widened(self, rows: torch.Tensor) -> torch.Tensor:
        wide, out = rows.float(), rows.new_empty(len(rows), self.out_features)
        block = max(WIDENED_BYTES // (4 * self.in_features), 1)
        for begin in range(0, self.out_features, block):
            product = wide @ self._weight[begin : begin + block].float().T
            if self.bias is not None:
                product += self.bias[begin : begin + block]
            out[:, begin : begin + block] = product
        return out

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> NoReturn:
        raise InvalidArgument("an optimized model cannot be moved or converted: do that before radixkv.hf.optimize()")

    def _save_to_state_dict(self, *arguments: Any, **options: Any) -> NoReturn:
        raise InvalidArgument("an optimized model has no weights to save: save it before radixkv.hf.optimize()")


def multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices in `dtype` on this CPU with kernels made for it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    if not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def warn_of_slow_products(model: PreTrainedModel) -> None:
    """Warn whoever called the caller of a model whose products are slow here. A small model is fast enough anyway."""
    if model.device.type != "cpu" or multiplies(model.dtype):
        return
    slow = sum(layer.weight.numel() for layer in model.modules() if type(layer) is nn.Linear)
    if slow >= _WORTH_A_WARNING and not any(isinstance(layer, PackedLinear) for layer in model.modules()):
        dtype = str(model.dtype).removeprefix("torch.")
        warnings.warn(
            f"{type(model).__name__} is in {dtype}, which torch multiplies on this CPU several times slower than "
            "float32: call radixkv.hf.optimize(model) before engine_for, or load the model in float32",
            RuntimeWarning,
            stacklevel=3,
        )
