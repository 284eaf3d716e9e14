"""What a format stores of a row, in torch: the reference for what append writes."""

from __future__ import annotations

import torch

from radixkv.formats import RowFormat

CODEBOOK = torch.tensor([-127, -96, -75, -58, -44, -31, -18, -6, 6, 18, 31, 44, 58, 75, 96, 127], dtype=torch.float32)
MIDPOINTS = (CODEBOOK[1:] + CODEBOOK[:-1]) / 2
DEVIATION = 46.5
FP8 = torch.float8_e4m3fn


def rotation_size(dim: int) -> int:
    return dim & -dim


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x times the Hadamard matrix of each block, by butterflies: distance 1, then 2, then 4, ..."""
    size, h = rotation_size(x.shape[-1]), 1
    while h < size:
        pairs = x.unflatten(-1, (-1, 2, h))
        x = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).flatten(-3)
        h *= 2
    return x


def tree_sum(x: torch.Tensor) -> torch.Tensor:
    """The second half is added to the first, then again; an odd one in the middle waits."""
    while (n := x.shape[-1]) > 1:
        half = (n + 1) // 2
        x = torch.cat([x[..., : n // 2] + x[..., half:], x[..., n // 2 : half]], -1)
    return x[..., 0]


def bf16_above(x: torch.Tensor) -> torch.Tensor:
    bits = (x.view(torch.int32).long() + 0xFFFF) >> 16
    return bits.clamp(min=1).to(torch.int16).view(torch.bfloat16)


def store(rows: torch.Tensor, stored: RowFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """rows [..., dim] as they lie in a page, and the scales [...] of those that have one of their own."""
    if stored.dtype not in ("float8_e4m3fn", "int8", "int4"):
        return rows, None
    y = rows.float()
    if stored.rotated:
        y = rotate(y)
    if stored.dtype == "float8_e4m3fn":
        root = torch.tensor(float(rotation_size(y.shape[-1]))).sqrt() if stored.rotated else torch.tensor(1.0)
        return (y / (torch.tensor(stored.scale) * root)).clamp(-448, 448).to(FP8), None
    most = y.abs().amax(-1)
    codes, scales = (_int8 if stored.dtype == "int8" else _int4)(y, most)
    finite = most.isfinite() & (most > 0)
    codes = codes.masked_fill(~finite[..., None], 0)
    scales = scales.masked_fill(most == 0, 0.0).masked_fill(~most.isfinite(), torch.nan)
    return codes, scales


def _int8(y: torch.Tensor, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = bf16_above(most / 127)
    return (y / scales.float()[..., None]).round().nan_to_num(0, 0, 0).to(torch.int8), scales


def _int4(y: torch.Tensor, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y, dim = y / most[..., None], y.shape[-1]
    deviation = (tree_sum(y * y) / dim).double().sqrt().float()  # torch's sqrt in fp32 is not always the nearest
    index = torch.bucketize(y / deviation[..., None] * DEVIATION, MIDPOINTS)
    level = CODEBOOK[index]
    scales = most * (tree_sum(y * level) / (level * level).sum(-1))
    return (index[..., : dim // 2] | index[..., dim // 2 :] << 4).to(torch.uint8), scales.to(torch.bfloat16)


def load(codes: torch.Tensor, scales: torch.Tensor | None, stored: RowFormat) -> torch.Tensor:
    """The rows that are stored so, in float64."""
    if stored.dtype == "int4":
        index = codes.long()
        values = CODEBOOK.double()[torch.cat([index & 15, index >> 4], -1)]
    else:
        values = codes.double() * stored.scale
    if scales is not None:
        values = values * scales.double()[..., None]
    if stored.rotated:
        size = rotation_size(values.shape[-1])
        values = rotate(values) / (size**0.5 if stored.dtype == "float8_e4m3fn" else size)
    return values


def as_stored(rows: torch.Tensor, stored: RowFormat) -> torch.Tensor:
    """The rows after a stay in the cache, in float64."""
    return load(*store(rows, stored), stored)
