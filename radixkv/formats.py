"""How a layer stores its K and V. A format is a part of what makes two caches the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.shape import LayerShape

__all__ = ["FORMATS", "LayerFormat", "RowFormat", "aligned", "fp8", "layer_formats"]

_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "float8_e4m3fn": 8, "int8": 8, "int4": 4}
_ALIGN = 16  # bytes: where every page begins, and every run in it
_SCALE_BYTES = 2  # of a row's scale: bfloat16


@dataclass(frozen=True)
class RowFormat:
    """How a row of one head lies in a page: as numbers of `dtype`, which times `scale` are the row, or its rotation.

    A rotated row is stored as its product with a Hadamard matrix, which makes its elements alike in size and leaves
    products of rows what they are. Rows of int8 and int4 are always rotated and have a scale of their own, in bfloat16:
    a page holds its rows' codes, then their scales.

    Raises:
        InvalidArgument: a dtype that is not stored so, or a scale that is not positive, finite and of float8_e4m3fn.
    """

    dtype: str
    """Of the names of torch: "float32", "bfloat16", "float16", "float8_e4m3fn" or "int8"; or "int4"."""
    scale: float = 1.0
    rotated: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in _BITS:
            raise InvalidArgument(f"a row of {self.dtype!r}: rows are stored as {', '.join(_BITS)}")
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InvalidArgument(f"scale is {self.scale}: use a positive finite factor")
        if self.scale != 1 and self.dtype != "float8_e4m3fn":
            own = ", whose rows have their own" if self.has_row_scales else ""
            raise InvalidArgument(
                f"scale is {self.scale}: only float8_e4m3fn is stored with one, not {self.dtype}{own}"
            )
        if self.has_row_scales:
            object.__setattr__(self, "rotated", True)
        elif self.rotated and self.dtype != "float8_e4m3fn":
            raise InvalidArgument(f"rotated rows of {self.dtype}: only those of 8 and 4 bits gain by it")

    @property
    def has_row_scales(self) -> bool:
        """Whether every row has a scale of its own."""
        return self.dtype in ("int8", "int4")

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of one head, its scale included; 0 where there is no row.

        Raises:
            InvalidArgument: the row would end inside a byte.
        """
        return self._codes(dim) + (_SCALE_BYTES if self.has_row_scales else 0) if dim else 0

    def page_bytes(self, page_size: int, num_heads: int, dim: int) -> int:
        """Bytes of a page of one layer's K or V: its rows, then their scales, each up to a multiple of 16."""
        scales = page_size * num_heads * _SCALE_BYTES if self.has_row_scales and dim else 0
        return self.scales_offset(page_size, num_heads, dim) + aligned(scales)

    def scales_offset(self, page_size: int, num_heads: int, dim: int) -> int:
        """Bytes from a page's first to its rows' scales."""
        return aligned(page_size * num_heads * self._codes(dim))

    def _codes(self, dim: int) -> int:
        if dim * _BITS[self.dtype] % 8:
            raise InvalidArgument(f"a row of {dim} values of {_BITS[self.dtype]} bits ends inside a byte: use 8 bits")
        return dim * _BITS[self.dtype] // 8


@dataclass(frozen=True)
class LayerFormat:
    """How one layer stores its K and its V."""

    k: RowFormat
    v: RowFormat
    k_centre: tuple[float, ...] = ()
    """[num_kv_heads * k_dim]: subtracted from every key before it is stored; none if empty. Softmax does not see it, so
    that what a model has in all its keys need not be stored. `radixkv kv-check` measures it."""
    usual_scales: tuple[float, float] = field(default=(math.inf, math.inf), compare=False)
    """The largest scales of rows of K, and of V, that a check saw; rows with larger ones are counted."""

    def __post_init__(self) -> None:
        if self.k_centre and _BITS[self.k.dtype] > 8:
            raise InvalidArgument(f"a centre of keys stored as {self.k.dtype}: only those of 8 and 4 bits gain by it")
        if not all(map(math.isfinite, self.k_centre)):
            raise InvalidArgument("k_centre has numbers that are not finite")

    @property
    def name(self) -> str:
        """Its name in `FORMATS`, or what it is made of."""
        names = [name for name, stored in FORMATS.items() if (stored.k, stored.v) == (self.k, self.v)]
        return names[0] if names else f"K as {self.k.dtype}, V as {self.v.dtype}"

    @property
    def fits_latent(self) -> bool:
        """Whether a row of it can be a key and begin with its value, as in a latent layer."""
        return self.k == self.v and not self.k.rotated and not self.k_centre

    def token_bytes(self, shape: LayerShape) -> int:
        """Bytes of a token of this layer, K and V."""
        return shape.num_kv_heads * (self.k.row_bytes(shape.k_dim) + self.v.row_bytes(shape.stored_v_dim))

    def page_bytes(self, page_size: int, shape: LayerShape) -> int:
        """Bytes of a page of this layer, K and V."""
        return sum(self.run_bytes(page_size, shape))

    def run_bytes(self, page_size: int, shape: LayerShape) -> tuple[int, int]:
        """Bytes of the two runs of a page of this layer: its K, and its V (0 in a latent layer)."""
        heads = shape.num_kv_heads
        k, v = self.k.page_bytes(page_size, heads, shape.k_dim), self.v.page_bytes(page_size, heads, shape.stored_v_dim)
        return k, v

    def check(self, shape: LayerShape) -> None:
        """Raise `InvalidArgument` unless a layer of this shape can be stored so."""
        size = shape.num_kv_heads * shape.k_dim
        if self.k_centre and len(self.k_centre) != size:
            raise InvalidArgument(
                f"k_centre has {len(self.k_centre)} numbers: this layer's keys have {size} of all heads"
            )
        if shape.latent and not self.fits_latent:
            raise InvalidArgument(
                f"a latent layer is not stored as {self.name}{' with a centre' if self.k_centre else ''}: the first "
                f"{shape.v_dim} numbers of a key are the value, so both must have one format, neither rotated nor "
                "centred. Use the model's own dtype, or fp8(scale, scale)"
            )


def aligned(num_bytes: int) -> int:
    """Bytes that a run of so many takes in a page: it ends where the next may begin."""
    return -(-num_bytes // _ALIGN) * _ALIGN


def fp8(k_scale: float = 1.0, v_scale: float = 1.0, *, rotated: bool = False) -> LayerFormat:
    """8-bit floats (e4m3): half the memory of 16 bits. What is stored times the scale is K or V, or its rotation.

    Choose scales for which the largest K and V are below 448 times them: what is larger is stored as the largest.
    """
    k, v = (RowFormat("float8_e4m3fn", scale, rotated) for scale in (k_scale, v_scale))
    return LayerFormat(k, v)


def _both(dtype: str) -> LayerFormat:
    return LayerFormat(RowFormat(dtype), RowFormat(dtype))


FORMATS: dict[str, LayerFormat] = {
    "fp32": _both("float32"),
    "bf16": _both("bfloat16"),
    "fp16": _both("float16"),
    "fp8": fp8(),
    "fp8_rotated": fp8(rotated=True),
    "int8": _both("int8"),
    "k8v4": LayerFormat(RowFormat("int8"), RowFormat("int4")),
    "int4": _both("int4"),
}
"""By name. docs/formats.md says what each costs and loses."""


def layer_formats(kv_format: object, dtype: str, num_layers: int) -> list[LayerFormat]:
    """The format of each layer from `Engine`'s kv_format: None for `dtype`, a name, a `LayerFormat`, or one a layer.

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
        return _both(dtype)
    if isinstance(one, str) and one in FORMATS:
        one = FORMATS[one]
    if not isinstance(one, LayerFormat):
        raise InvalidArgument(
            f"kv_format is {one!r}: use None, one of {', '.join(FORMATS)}, or a LayerFormat, such as fp8(k_scale=0.5)"
        )
    for what, stored in (("K", one.k), ("V", one.v)):
        if stored.dtype != dtype and _BITS[stored.dtype] > 8:
            raise BackendUnavailable(
                f"kv_format stores {what} as {stored.dtype}: use {dtype}, the dtype of k and v, or a format of 8 or "
                "4 bits"
            )
    return one
