"""How rows of K and V are stored, as far as it decides their size."""

from __future__ import annotations

from dataclasses import dataclass

from radixkv.errors import InvalidArgument
from radixkv.formats import aligned

__all__ = ["FORMATS", "Format", "Row", "format_named"]


@dataclass(frozen=True)
class Row:
    """A row of one head: ``bits`` a value, and ``scale_bytes`` of its own scale (0: it has none)."""

    bits: int
    scale_bytes: int = 0

    def row_bytes(self, dim: int) -> int:
        """Bytes of a row of ``dim`` values; 0 where there is no row."""
        return self._codes(dim) + self.scale_bytes if dim else 0

    def page_bytes(self, num_heads: int, dim: int, page_size: int) -> int:
        """Bytes of the rows of a page: codes, then scales, each from a multiple of 16 on."""
        if dim == 0:
            return 0
        rows = page_size * num_heads
        return aligned(rows * self._codes(dim)) + aligned(rows * self.scale_bytes)

    def _codes(self, dim: int) -> int:
        if dim * self.bits % 8:
            raise InvalidArgument(f"a row of {dim} values of {self.bits} bits ends inside a byte: use 8 bits")
        return dim * self.bits // 8


@dataclass(frozen=True)
class Format:
    """How K and V are stored."""

    name: str
    k: Row
    v: Row


_INT8, _INT4 = Row(8, scale_bytes=2), Row(4, scale_bytes=2)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", Row(32), Row(32)),
        Format("bf16", Row(16), Row(16)),
        Format("fp16", Row(16), Row(16)),
        Format("fp8", Row(8), Row(8)),
        Format("int8", _INT8, _INT8),
        Format("k8v4", _INT8, _INT4),
        Format("int4", _INT4, _INT4),
    )
}
"""By name: 32 and 16 bits, 8-bit floats with one scale a tensor, and rows of 8 or 4 bits with a 16-bit scale each."""


def format_named(name: str) -> Format:
    """The format of this name; raises InvalidArgument for any other."""
    if name not in FORMATS:
        raise InvalidArgument(f"no KV format {name!r:.60}: give one of {', '.join(FORMATS)}")
    return FORMATS[name]
