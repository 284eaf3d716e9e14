"""What the layers of a model attend with, and amounts of memory."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from radixkv.errors import InvalidArgument

__all__ = ["LayerShape", "checked_size", "parse_bytes"]

_UNITS = {
    "": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


@dataclass(frozen=True)
class LayerShape:
    """What one layer attends with: heads, and the dimensions of a key and of a value (those of a key by default).

    Raises:
        InvalidArgument: a size that is no int from 1 to 2**31 - 1, or query heads that kv heads do not divide.
    """

    num_qo_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.v_dim, int) and self.v_dim == 0:
            object.__setattr__(self, "v_dim", self.k_dim)
        for name, value in vars(self).items():
            object.__setattr__(self, name, checked_size(name, value))
        if self.num_qo_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_qo_heads must be a multiple of num_kv_heads; got {self.num_qo_heads} and {self.num_kv_heads}"
            )


def checked_size(name: str, value: object) -> int:
    """The value as an int; InvalidArgument unless it is one from 1 to 2**31 - 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 1 <= operator.index(value) < 2**31:
        raise InvalidArgument(f"{name} must be an int from 1 to 2**31 - 1; got {value!r}")
    return operator.index(value)


def parse_bytes(text: str) -> int:
    """Bytes in "4GiB", "512 MiB", "2.5GB" (GB is 10**9, GiB 2**30) or "1048576".

    Raises:
        InvalidArgument: not a positive amount in a known unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise InvalidArgument(f"cannot read {text!r} as an amount of memory: write it like '4GiB' or '512MiB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])
