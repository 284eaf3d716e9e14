"""Latent attention in its absorbed form: what an attention module gives the engine where its K and V are latents.

A module that expands latents has for each head h a key [U_h c, r] and a value V_h c, of a token's latent c and rotated
part r. As q·(U c) = (U^T q)·c, and as the mean of V c is V times the mean of c, the heads can attend to [c, r] itself:
U goes to the query, V to the output, and one row a token is all there is to store. U and V are views of `kv_b_proj`.
"""

from __future__ import annotations

import types
from typing import Any

import torch

from radixkv.hf.linear import WIDENED_BYTES, multiplies

__all__ = ["absorb", "head_values", "is_absorbed", "latent_queries"]

_MARK = "_radixkv_absorbed"


def absorb(module: Any, attention: str) -> None:
    """Let an attention module attend to its latents wherever its attention is looked up under the name `attention`."""

    def expand_kv(self: Any, kv_nope: torch.Tensor, k_rot: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not is_absorbed(self):
            expanded: tuple[torch.Tensor, torch.Tensor] = type(self).expand_kv(self, kv_nope, k_rot)
            return expanded
        rows = torch.cat([kv_nope, k_rot], -1)
        return rows, rows[..., : kv_nope.shape[-1]]

    module.expand_kv = types.MethodType(expand_kv, module)
    setattr(module, _MARK, attention)


def is_absorbed(module: Any) -> bool:
    """Whether the module attends to latents now: stock transformers still expands them."""
    name = getattr(module, _MARK, None)
    return name is not None and module.config._attn_implementation == name


def latent_queries(module: Any, q: torch.Tensor) -> torch.Tensor:
    """Queries `[rows, heads, nope + rope]` of the heads as queries of latent rows, `[rows, heads, rank + rope]`."""
    nope: int = module.qk_nope_head_dim
    up = _by_head(module)[:, :nope]
    return torch.cat([_products(q[..., :nope], up), q[..., nope:]], -1)


def head_values(module: Any, out: torch.Tensor) -> torch.Tensor:
    """Means of latents `[rows, heads, rank]` as means of the heads' values, `[rows, heads, v_head_dim]`."""
    up = _by_head(module)[:, module.qk_nope_head_dim :]
    return _products(out, up.transpose(1, 2))


def _products(rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Each head's rows `[rows, heads, in]` times its weight, of `[heads, in, out]`.

    In 16 bits on a CPU that has no such products, some heads at a time are widened: torch takes 35 times longer there.
    """
    by_head = rows.transpose(0, 1)
    if rows.device.type != "cpu" or multiplies(rows.dtype):
        return torch.bmm(by_head, weights).transpose(0, 1)
    out = rows.new_empty(*rows.shape[:2], weights.shape[2])
    block = max(WIDENED_BYTES // (4 * weights[0].numel()), 1)
    for begin in range(0, len(weights), block):
        some = slice(begin, begin + block)
        out[:, some] = torch.bmm(by_head[some].float(), weights[some].float()).transpose(0, 1)
    return out


def _by_head(module: Any) -> torch.Tensor:
    """What expands latents, `[heads, nope + v_head_dim, rank]`: a view."""
    weight: torch.Tensor = module.kv_b_proj.weight
    return weight.view(-1, module.qk_nope_head_dim + module.v_head_dim, weight.shape[1])
