"""K and V stored as 8-bit floats (e4m3): value = stored * scale."""

from __future__ import annotations

import torch

__all__ = ["FP8", "quantize", "rotation"]

FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(FP8).max


def quantize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale in e4m3, rounded to nearest. What is too large becomes the largest, as e4m3 has no infinity."""
    return (x.float() / scale).clamp(-_LARGEST, _LARGEST).to(FP8)


def rotation(dim: int, device: torch.device) -> torch.Tensor:
    """The matrix that rotates rows, fp32 [dim, dim]: symmetric, and its own inverse.

    Sylvester's Hadamard matrix, normalised, of the largest power of two that divides dim, along the diagonal.
    """
    size = dim & -dim
    block = torch.ones(1, 1, device=device)
    while len(block) < size:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.kron(torch.eye(dim // size, device=device), block / size**0.5)
