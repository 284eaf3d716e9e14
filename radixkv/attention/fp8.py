"""K and V stored as 8-bit floats (e4m3): value = stored * scale."""

from __future__ import annotations

import torch

__all__ = ["FP8", "quantize"]

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale in e4m3, rounded to nearest. What is too large becomes the largest, as e4m3 has no infinity."""
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8)
