"""What the layers of a model attend with."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from radixkv.errors import InvalidArgument

__all__ = ["LayerShape", "checked_size"]


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
