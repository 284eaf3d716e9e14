"""K and V stored as 8-bit floats (e4m3): value = stored * scale."""

from __future__ import annotations

import math

import torch

from radixkv.errors import BackendUnavailable, InvalidArgument

__all__ = ["FP8", "check_storage", "quantize"]

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale in e4m3, rounded to nearest. What is too large becomes the largest, as e4m3 has no infinity."""
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8)


def check_storage(dtype: torch.dtype, kv_dtype: torch.dtype, k_scale: float, v_scale: float) -> None:
    """Raise unless K and V of `dtype` can be stored as `kv_dtype` with these scales."""
    if kv_dtype not in (dtype, FP8):
        raise BackendUnavailable(f"kv_dtype is {kv_dtype}: use {dtype}, the dtype of k and v, or {FP8}")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if not (math.isfinite(scale) and scale > 0):
            raise InvalidArgument(f"{name} is {scale}: use a positive finite factor")
        if kv_dtype != FP8 and scale != 1:
            raise InvalidArgument(f"{name} is {scale} and kv_dtype {kv_dtype}: only {FP8} is stored with scales")
