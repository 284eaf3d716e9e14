"""How a layer stores its K and V. A format is a part of what makes two caches the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.shape import LayerShape

__all__ = ["LayerFormat", "RowFormat", "aligned", "fp8", "layer_formats"]

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_ALIGN = 16  # bytes: where every page begins, and every run in it


@dataclass(frozen=True)
class RowFormat:
    """How a row of one head lies in a page: numbers of `dtype`, which times `scale` are the row.

    Raises:
        InvalidArgument: a dtype that is not stored, or a scale that is not positive, finite and of 8 bits.
    """

    dtype: str
    """Of the names of torch: "float32", "bfloat16", "float16" or "float8_e4m3fn"."""
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in _ITEMSIZE:
            raise InvalidArgument(f"a row of {self.dtype!r}: rows are stored as {', '.join(_ITEMSIZE)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidArgument(f"scale is {self.scale}: use a positive finite factor")
        if self.scale != 1 and self.dtype != "float8_e4m3fn":
            raise InvalidArgument(f"scale is {self.scale}: only float8_e4m3fn is stored with one, not {self.dtype}")

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of one head."""
        return dim * _ITEMSIZE[self.dtype]

    def page_bytes(self, page_size: int, num_heads: int, dim: int) -> int:
        """Bytes of a page of one layer's K or V: its rows, up to a multiple of 16."""
        return aligned(page_size * num_heads * self.row_bytes(dim))


@dataclass(frozen=True)
class LayerFormat:
    """How one layer stores its K and its V."""

    k: RowFormat
    v: RowFormat

    def token_bytes(self, shape: LayerShape) -> int:
        """Bytes of a token of this layer, K and V."""
        return shape.num_kv_heads * (self.k.row_bytes(shape.k_dim) + self.v.row_bytes(shape.v_dim))

    def page_bytes(self, page_size: int, shape: LayerShape) -> int:
        """Bytes of a page of this layer, K and V."""
        heads = shape.num_kv_heads
        return self.k.page_bytes(page_size, heads, shape.k_dim) + self.v.page_bytes(page_size, heads, shape.v_dim)


def aligned(num_bytes: int) -> int:
    """Bytes that a run of so many takes in a page: it ends where the next may begin."""
    return -(-num_bytes // _ALIGN) * _ALIGN


def fp8(k_scale: float = 1.0, v_scale: float = 1.0) -> LayerFormat:
    """8-bit floats (e4m3): half the memory of 16 bits. What is stored times the scale is K or V.

    Choose scales for which the largest K and V are below 448 times them: what is larger is stored as the largest.
    """
    return LayerFormat(RowFormat("float8_e4m3fn", k_scale), RowFormat("float8_e4m3fn", v_scale))


def layer_formats(kv_format: object, dtype: str, num_layers: int) -> list[LayerFormat]:
    """The format of each layer from `Engine`'s kv_format: None for `dtype`, "fp8", a `LayerFormat`, or one a layer.

    Raises:
        InvalidArgument: another kind of argument, or another number of layers. BackendUnavailable: K and V of this
            dtype are not stored so.
    """
    if isinstance(kv_format, Sequence) and not isinstance(kv_format, str):
        if len(kv_format) != num_layers:
            raise InvalidArgument(f"kv_format has {len(kv_format)} formats for {num_layers} layers: give one a layer")
        return [_layer_format(one, dtype) for one in kv_format]
    return [_layer_format(kv_format, dtype)] * num_layers


def _layer_format(one: object, dtype: str) -> LayerFormat:
    if one is None:
        return LayerFormat(RowFormat(dtype), RowFormat(dtype))
    if isinstance(one, str):
        if one == "fp8":
            return fp8()
        if one == dtype:
            return _layer_format(None, dtype)
    if not isinstance(one, LayerFormat):
        raise InvalidArgument(f"kv_format is {one!r}: use None, 'fp8' or a LayerFormat, such as fp8(k_scale=0.5)")
    if one.k.dtype != one.v.dtype or one.k.dtype not in (dtype, "float8_e4m3fn"):
        raise BackendUnavailable(
            f"kv_format stores K as {one.k.dtype} and V as {one.v.dtype}: use {dtype}, the dtype of k and v, or "
            "float8_e4m3fn, for both"
        )
    return one
