"""What a model keeps of a token: its layers, and the bytes they take in a format."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat

__all__ = [
    "Layer",
    "Model",
    "bytes_per_page",
    "bytes_per_request",
    "bytes_per_token",
    "checked_layers",
    "expanded",
    "fits_latent",
]

_MAX_LAYERS = 4096
"""So that a damaged file costs no memory."""


@dataclass(frozen=True)
class Layer:
    """One attention layer. A latent layer (MLA) has one key-value head and ``v_dim`` 0: its V is a part of its K."""

    num_qo_heads: int
    num_kv_heads: int
    k_dim: int
    v_dim: int
    window: int | None = None
    """How many tokens a row sees, itself among them; None: all."""
    head_dims: tuple[int, int] | None = field(default=None, compare=False)
    """Of a latent layer, if known: dimensions of a key and of a value of each query head, which it stands for."""

    def __post_init__(self) -> None:
        for name in ("num_qo_heads", "num_kv_heads", "k_dim", "v_dim", "window"):
            value, least = getattr(self, name), 0 if name == "v_dim" else 1
            if name == "window" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidArgument(f"{name} of a layer must be an int of at least {least}; got {value!r:.60}")

    @property
    def kind(self) -> str:
        """MHA, GQA, MQA or MLA: how many query heads share K and V."""
        if self.v_dim == 0:
            return "MLA"
        return "MHA" if self.num_kv_heads == self.num_qo_heads else "MQA" if self.num_kv_heads == 1 else "GQA"

    def __str__(self) -> str:
        heads = f"{self.num_kv_heads} KV head{'s' * (self.num_kv_heads > 1)}"
        dims = f"{self.k_dim}" if self.k_dim == self.v_dim else f"{self.k_dim} + {self.v_dim}"
        what = f"a latent of {self.k_dim}" if self.v_dim == 0 else f"{heads} of {dims}"
        return f"{self.kind}, {what}" + (f", window of {self.window:,}" if self.window else "")


@dataclass(frozen=True)
class Model:
    """The layers that keep K and V of every token, and what else decides how much memory is left for them."""

    name: str
    layers: tuple[Layer, ...]
    weight_bytes: int | None = None
    max_length: int | None = None
    """Tokens of the longest request the model was built for."""
    num_state_layers: int = 0
    """Layers that keep a state of fixed size for each request instead (Mamba, linear attention): not counted here."""
    num_sharing_layers: int = 0
    """Layers that read the K and V of another layer."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise InvalidArgument(f"{self.name}: no layer keeps K and V, so there is nothing to cache")

    def groups(self) -> list[tuple[Layer, int]]:
        """The different layers, and how many there are of each."""
        return list(Counter(self.layers).items())


def fits_latent(model: Model, kv_format: LayerFormat) -> bool:
    """Whether the model's layers can be stored so: latent ones in formats without rotation or scales of rows."""
    return kv_format.fits_latent or all(layer.v_dim for layer in model.layers)


def expanded(model: Model) -> Model | None:
    """The model as it is stored where `radixkv.hf.latent` is left out: K and V of every head. None: it is no other."""
    if not any(layer.head_dims for layer in model.layers):
        return None
    layers = (
        Layer(layer.num_qo_heads, layer.num_qo_heads, *layer.head_dims, layer.window) if layer.head_dims else layer
        for layer in model.layers
    )
    return replace(model, layers=tuple(layers))


def checked_layers(count: int, name: str) -> int:
    """``count``, if a model can have so many layers."""
    if not 1 <= count <= _MAX_LAYERS:
        raise InvalidArgument(f"{name} says that it has {count} layers: a model has from 1 to {_MAX_LAYERS}")
    return count


def bytes_per_token(model: Model, kv_format: LayerFormat) -> int:
    """Bytes that all layers keep of one token, scales included: for 16 bits 2 * layers * kv_heads * head_dim * 2."""
    return sum(count * _row(layer, kv_format) for layer, count in model.groups())


def bytes_per_page(model: Model, kv_format: LayerFormat, page_size: int = 16) -> int:
    """Bytes of a page of all layers, with the padding that a page of a small format has."""
    if page_size < 1:
        raise InvalidArgument(f"page_size must be at least 1, not {page_size}")
    return sum(
        count
        * (
            kv_format.k.page_bytes(page_size, layer.num_kv_heads, layer.k_dim)
            + kv_format.v.page_bytes(page_size, layer.num_kv_heads, layer.v_dim)
        )
        for layer, count in model.groups()
    )


def bytes_per_request(model: Model, kv_format: LayerFormat, length: int, keep_windows_only: bool = False) -> int:
    """Bytes of one token each, ``length`` times.

    ``keep_windows_only``: a layer with a window keeps no more tokens than it sees. Such a request can be served, but
    what fell out of a window is not found again by the next one that begins with the same tokens.
    """
    if length < 0:
        raise InvalidArgument(f"a request has 0 tokens or more, not {length}")
    kept = 0
    for layer, count in model.groups():
        tokens = min(length, layer.window) if keep_windows_only and layer.window else length
        kept += count * tokens * _row(layer, kv_format)
    return kept


def _row(layer: Layer, kv_format: LayerFormat) -> int:
    k = kv_format.k.row_bytes(layer.k_dim)
    v = kv_format.v.row_bytes(layer.v_dim)
    return layer.num_kv_heads * (k + v)
