"""What the layers of a model attend with."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from radixkv.errors import InvalidArgument

__all__ = ["LayerShape", "checked_size"]


@dataclass(frozen=True)
class LayerShape:
    """What one layer attends with: heads, and the dimensions of a key and of a value (those of a key by default).

    A latent layer (MLA in its absorbed form) has one kv head, and the first v_dim numbers of a key are its value, so
    that one row a token is stored: ``LayerShape(128, 1, 576, 512, latent=True)`` for DeepSeek-V3.

    Raises:
        InvalidArgument: a size that is no int from 1 to 2**31 - 1, query heads that kv heads do not divide, or a latent
            layer with several kv heads or values longer than keys.
    """

    num_qo_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int = 0
    latent: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.v_dim, int) and self.v_dim == 0:
            object.__setattr__(self, "v_dim", self.k_dim)
        for name in ("num_qo_heads", "num_kv_heads", "k_dim", "v_dim"):
            object.__setattr__(self, name, checked_size(name, getattr(self, name)))
        if self.num_qo_heads % self.num_kv_heads:
            raise InvalidArgument(
                f"num_qo_heads must be a multiple of num_kv_heads; got {self.num_qo_heads} and {self.num_kv_heads}"
            )
        if not isinstance(self.latent, bool):
            raise InvalidArgument(f"latent must be True or False; got {self.latent!r}")
        if self.latent and (self.num_kv_heads != 1 or self.v_dim > self.k_dim):
            raise InvalidArgument(
                "a latent layer has 1 kv head, the first v_dim of the k_dim numbers of which are the value; got "
                f"{self.num_kv_heads} kv heads, k_dim {self.k_dim} and v_dim {self.v_dim}"
            )

    @property
    def stored_v_dim(self) -> int:
        """Dimensions of the values that are stored beside the keys: 0 in a latent layer."""
        return 0 if self.latent else self.v_dim


def checked_size(name: str, value: object) -> int:
    """The value as an int; InvalidArgument unless it is one from 1 to 2**31 - 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or not 1 <= operator.index(value) < 2**31:
        raise InvalidArgument(f"{name} must be an int from 1 to 2**31 - 1; got {value!r}")
    return operator.index(value)
