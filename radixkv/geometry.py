"""The sizes of a model's KV cache: what a token and a page cost, and how many pages fit."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from radixkv.errors import InvalidArgument

__all__ = ["Geometry", "parse_bytes"]

_UNITS = {
    "": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


@dataclass(frozen=True)
class Geometry:
    """Shape of a model's K and V: each ``[num_pages, page_size, num_kv_heads, head_dim]``, per layer."""

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    itemsize: int  #: bytes of one stored value

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not hasattr(value, "__index__") or not 1 <= value < 2**31:
                raise InvalidArgument(f"{name} must be an int from 1 to 2**31 - 1; got {value!r}")
            object.__setattr__(self, name, operator.index(value))
        if self.num_qo_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_qo_heads must be a multiple of num_kv_heads; got {self.num_qo_heads} and {self.num_kv_heads}"
            )

    @property
    def bytes_per_token(self) -> int:
        """2 (K and V) * layers * kv heads * head_dim * bytes a value."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.itemsize

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size

    def pages_in(self, num_bytes: int) -> int:
        """Whole pages that fit into `num_bytes`; at least one, or InvalidArgument."""
        pages = num_bytes // self.bytes_per_page
        if pages < 1:
            raise InvalidArgument(f"{num_bytes} bytes hold no page: one takes {self.bytes_per_page} bytes")
        return pages


def parse_bytes(text: str) -> int:
    """Bytes in "4GiB", "512 MiB", "2.5GB" (GB is 10**9, GiB 2**30) or "1048576".

    Raises:
        InvalidArgument: not a positive amount in a known unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise InvalidArgument(f"cannot read {text!r} as an amount of memory: write it like '4GiB' or '512MiB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])
