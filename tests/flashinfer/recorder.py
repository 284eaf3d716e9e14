"""A stand-in for flashinfer that notes what it is called with."""

from __future__ import annotations

from typing import Any

import torch

from radixkv.attention import PageTable
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.formats import LayerFormat
from tests.attention.helpers import PLAIN, Heads, Options, layer_of
from tests.attention.test_attention_errors import int32

SIZES: dict[str, Any] = {"heads": Heads(6, 2, 64), "dtype": torch.float16, "num_pages": 8, "page_size": 4}
DECODE = PageTable(int32(0, 1, 2), int32(0, 2, 3), int32(3, 1, 0), int32(2, 4), int32(5, 3))


class Recorder:
    """Stands in for flashinfer: notes every call as (name, positional, keywords)."""

    def __init__(self, float_bytes: int = 3 << 20) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.float_bytes, self.error = float_bytes, None
        self.BatchPrefillWithPagedKVCacheWrapper = self._wrapper("BatchPrefillWithPagedKVCacheWrapper")
        self.BatchDecodeWithPagedKVCacheWrapper = self._wrapper("BatchDecodeWithPagedKVCacheWrapper")

    def append_paged_kv_cache(self, *arguments: Any, **keywords: Any) -> None:
        self.calls.append(("append_paged_kv_cache", arguments, keywords))

    def merge_state_in_place(self, *arguments: Any, **keywords: Any) -> None:
        self.calls.append(("merge_state_in_place", arguments, keywords))

    def _wrapper(self, name: str) -> Any:
        def make(*arguments: Any, **keywords: Any) -> RecordedWrapper:
            self.calls.append((f"{name}.__init__", arguments, keywords))
            return RecordedWrapper(self, name, len(arguments[0]))

        return make

    def named(self, end: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of the calls whose name ends so."""
        return [(arguments, keywords) for name, arguments, keywords in self.calls if name.endswith(end)]


class RecordedWrapper:
    def __init__(self, api: Recorder, name: str, float_bytes: int) -> None:
        self.api, self.name, self.float_bytes = api, name, float_bytes

    def note(self, method: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        self.api.calls.append((f"{self.name}.{method}", arguments, keywords))

    def workspace_size(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
        self.note("workspace_size", arguments, keywords)
        return self.api.float_bytes, 4096

    def reset_workspace_buffer(self, *arguments: Any) -> None:
        self.note("reset_workspace_buffer", arguments, {})
        self.float_bytes = len(arguments[0])

    def plan(self, *arguments: Any, **keywords: Any) -> None:
        if self.api.error is not None:
            raise self.api.error
        if self.float_bytes < self.api.float_bytes:
            raise RuntimeError("Buffer overflow")
        self.note("plan", arguments, keywords)

    def run(self, *arguments: Any, **keywords: Any) -> None:
        self.note("run", arguments, keywords)
        keywords["out"].fill_(1.0)


def recorded(
    heads: Heads = SIZES["heads"],
    dtype: torch.dtype = SIZES["dtype"],
    num_pages: int = SIZES["num_pages"],
    page_size: int = SIZES["page_size"],
    kv_format: str | LayerFormat | None = None,
    device: str = "cpu",
    **options: Any,
) -> tuple[FlashInferAttention, Recorder]:
    api = Recorder()
    layer = layer_of(heads, dtype, num_pages, page_size, kv_format, device)
    return FlashInferAttention([layer], dtype=dtype, **options, api=api), api


def half(*shape: int, **options: Any) -> torch.Tensor:
    return torch.zeros(*shape, **({"dtype": torch.float16} | options))


def step(attention: FlashInferAttention, table: PageTable, *options: Options) -> None:
    """A step with one call of layer 0 for each of the options."""
    attention.plan(table)
    for each in options or (PLAIN,):
        one_layer(attention, 0, len(table.slots), each)


def one_layer(attention: FlashInferAttention, layer: int, rows: int, options: Options = PLAIN) -> None:
    """Append and run zeros in the planned step."""
    shape = attention._layers[layer].kv.shape
    kv = half(rows, shape.num_kv_heads, shape.k_dim)
    attention.append(layer, kv, kv)
    out = half(rows, shape.num_qo_heads, shape.k_dim)
    attention.run(layer, half(*out.shape), out, options)
    assert (out != 0).all()
