"""KVPool: the K and V of all pages, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from radixkv import _core
from radixkv.errors import InvalidArgument
from radixkv.formats import LayerFormat, RowFormat
from radixkv.memory import bytes_of
from radixkv.shape import LayerShape

__all__ = ["KVPool", "LayerKV", "pages_for_capacity"]

_COPY_BYTES = 1 << 26  # what a batched copy takes of memory meanwhile


@dataclass(frozen=True, eq=False)
class LayerKV:
    """One layer's memory in the pool. A page of its K, and of its V, is one contiguous run of bytes.

    `k` and `v` are views of the pages as the stored numbers, ``[num_pages, page_size, num_kv_heads, dim]``
    (FlashInfer's NHD); a page's rows lie one after the other. Rows of int4 are bytes of two codes: half of `dim`. In a
    latent layer `v_pages` are `k_pages`, and `v` is the first numbers of the rows of `k`.
    """

    shape: LayerShape
    format: LayerFormat
    page_size: int
    k_pages: torch.Tensor
    """uint8 [num_pages, bytes of a page]."""
    v_pages: torch.Tensor
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)
    k_scales: torch.Tensor | None = field(init=False)
    """bfloat16 [num_pages, page_size, num_kv_heads], where rows have a scale of their own."""
    v_scales: torch.Tensor | None = field(init=False)
    _centre: torch.Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.format.check(self.shape)
        object.__setattr__(self, "_centre", torch.tensor(self.format.k_centre, dtype=torch.float32))
        for name, pages, stored, dim in (
            ("k", self.k_pages, self.format.k, self.shape.k_dim),
            ("v", self.v_pages, self.format.v, self.shape.v_dim),
        ):
            object.__setattr__(self, name, self._rows(pages, stored, dim))
            object.__setattr__(self, f"{name}_scales", self._scales(pages, stored, dim))
        if self.shape.latent:
            object.__setattr__(self, "v", self.k[..., : self.shape.v_dim])

    def _rows(self, pages: torch.Tensor, stored: RowFormat, dim: int) -> torch.Tensor:
        dtype = torch.uint8 if stored.dtype == "int4" else getattr(torch, stored.dtype)
        width = dim // 2 if stored.dtype == "int4" else dim
        shape = (len(pages), self.page_size, self.shape.num_kv_heads, width)
        return pages[:, : math.prod(shape[1:]) * dtype.itemsize].view(dtype).view(shape)

    def _scales(self, pages: torch.Tensor, stored: RowFormat, dim: int) -> torch.Tensor | None:
        if not stored.has_row_scales:
            return None
        shape = (len(pages), self.page_size, self.shape.num_kv_heads)
        begin = stored.scales_offset(*shape[1:], dim)
        return pages[:, begin : begin + 2 * math.prod(shape[1:])].view(torch.bfloat16).view(shape)

    @property
    def num_pages(self) -> int:
        return len(self.k_pages)

    @property
    def core(self) -> _core.LayerKV:
        """Addresses and sizes for the native kernels; valid as long as the pages are."""
        shape, stored = self.shape, self.format
        centre = self._centre.data_ptr() if len(self._centre) else 0
        k_usual, v_usual = stored.usual_scales
        k = self._core(self.k_pages, stored.k, shape.k_dim, centre, k_usual)
        if shape.latent:
            return _core.LayerKV.latent(num_qo_heads=shape.num_qo_heads, k=k, v_dim=shape.v_dim)
        return _core.LayerKV(
            num_qo_heads=shape.num_qo_heads,
            num_kv_heads=shape.num_kv_heads,
            k=k,
            v=self._core(self.v_pages, stored.v, shape.v_dim, 0, v_usual),
        )

    def _core(self, pages: torch.Tensor, stored: RowFormat, dim: int, centre: int, usual: float) -> _core.LayerCache:
        heads = self.shape.num_kv_heads
        return _core.LayerCache(
            address=pages.data_ptr(), dtype=stored.dtype, num_heads=heads, dim=dim, scale=stored.scale,
            rotated=stored.rotated, page_bytes=pages.stride(0), scales=stored.scales_offset(self.page_size, heads, dim),
            centre=centre, usual_scale=usual,
        )  # fmt: skip


class KVPool:
    """The memory of the K and V of every layer and page: `layers[i]` is layer i's.

    Layers may differ in shape and format. Pages of equal size lie in one allocation, whatever layer they belong to, so
    copying a page is one gather and one scatter for each size. Of a latent layer there is the K run only. The memory
    starts out uninitialized; where the operating system backs it lazily, pages cost memory when they are first written.

    Raises:
        InvalidArgument: the allocation fails; says how many bytes were asked for. Or a layer cannot be stored in its
            format.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        formats: Sequence[LayerFormat],
        num_pages: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        for s, f in zip(shapes, formats, strict=True):
            f.check(s)
        runs = [f.run_bytes(page_size, s) for s, f in zip(shapes, formats, strict=True)]
        sizes = [size for run in runs for size in run if size]
        self.page_bytes = sum(sizes)
        """Of all layers, K and V."""
        self.num_pages = num_pages
        try:
            self._blocks = {
                size: torch.empty((sizes.count(size), num_pages, size), dtype=torch.uint8, device=device)
                for size in dict.fromkeys(sizes)
            }
        except RuntimeError as error:
            raise InvalidArgument(
                f"cannot allocate {num_pages} pages of {self.page_bytes} bytes on {device}: lower num_pages or capacity"
            ) from error
        if device.type == "cpu":
            for block in self._blocks.values():
                _core.prefer_huge_pages(block.data_ptr(), block.nbytes)
        unused = {size: iter(block) for size, block in self._blocks.items()}
        self._pages = [next(unused[size]) for size in sizes]  # K, V, K, V, ...; of a latent layer only K
        pages = iter(self._pages)
        self._host = _host_views(list(self._blocks.values()), self._pages) if device.type == "cpu" else []
        self.layers = []
        for s, f in zip(shapes, formats, strict=True):
            k = next(pages)
            self.layers.append(LayerKV(s, f, page_size, k, k if s.latent else next(pages)))

    @property
    def device(self) -> torch.device:
        device: torch.device = self._pages[0].device
        return device

    @property
    def nbytes(self) -> int:
        return self.num_pages * self.page_bytes

    def copy_pages(self, source: npt.NDArray[np.int32], target: npt.NDArray[np.int32]) -> None:
        """Copies pages `source` [n] onto pages `target` [n], K and V of all layers. No page is in both."""
        for block in self._blocks.values() if len(source) else ():
            if block.is_cpu:  # a copy costs no launch
                for s, t in zip(source.tolist(), target.tolist(), strict=True):
                    block[:, t].copy_(block[:, s])
            else:
                copy_batched(block, source, target)

    def read_pages(self, pages: npt.NDArray[np.int32], out: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Copy pages [n] to n rows of page_bytes: for each its K and V of layer 0, then of layer 1, and so on.

        Of a latent layer K only.
        """
        if not self._host:
            for row, gathered in zip(out, self.gather(pages), strict=True):
                torch.from_numpy(row).copy_(gathered)
            return
        for page, row in zip(pages.tolist(), out, strict=True):
            for memory, part in self._host_parts(row):
                part[...] = memory[page]

    def write_pages(self, pages: npt.NDArray[np.int32], data: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Copy n rows, laid out as by `read_pages`, to pages [n]."""
        if not self._host:
            self.scatter(pages, torch.stack([torch.from_numpy(row) for row in data]).to(self.device))
            return
        for page, row in zip(pages.tolist(), data, strict=True):
            for memory, part in self._host_parts(row):
                memory[page] = part

    def gather(self, pages: npt.NDArray[np.int32]) -> torch.Tensor:
        """Pages [n] one after the other, as by `read_pages`: uint8 [n, page_bytes] on the pool's device."""
        index = self._index(pages)
        return torch.cat([place.index_select(0, index) for place in self._pages], dim=1)

    def scatter(self, pages: npt.NDArray[np.int32], data: torch.Tensor) -> None:
        """The reverse of `gather`."""
        index = self._index(pages)
        for place, part in zip(self._pages, self._parts(data), strict=True):
            place.index_copy_(0, index, part)

    def _host_parts(self, row: npt.NDArray[np.uint8]) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]]:
        """Memory [num_pages, runs, bytes], and its place in a row [runs, bytes]."""
        begin = 0
        for memory in self._host:
            _, runs, size = memory.shape
            yield memory, row[begin : begin + runs * size].reshape(runs, size)
            begin += runs * size

    def _index(self, pages: npt.NDArray[np.int32]) -> torch.Tensor:
        index = torch.from_numpy(pages.astype(np.int64))
        if self.device.type == "cpu":
            return index
        return index.pin_memory().to(self.device, non_blocking=True)  # else the host would wait for the whole stream

    def _parts(self, data: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(data, [place.shape[1] for place in self._pages], dim=1)


def _host_views(blocks: list[torch.Tensor], pages: list[torch.Tensor]) -> list[npt.NDArray[np.uint8]]:
    """Memory as [num_pages, runs, bytes], in the order of layers: numpy copies a page in one call, without the GIL.

    Where all runs of a page have one size that is everything at once, else a layer's K or V after the other.
    """
    if len(blocks) == 1:
        return [blocks[0].numpy().transpose(1, 0, 2)]
    return [page.numpy()[:, None] for page in pages]


def copy_batched(
    block: torch.Tensor, source: npt.NDArray[np.int32], target: npt.NDArray[np.int32], most_bytes: int = _COPY_BYTES
) -> None:
    """`copy_pages` within [layers, pages, bytes] on any device, in two launches for every `most_bytes`."""
    places = torch.from_numpy(np.stack([source, target]).astype(np.int64)).to(block.device)
    for s, t in torch.split(places, max(1, most_bytes * block.shape[1] // block.nbytes), dim=1):
        block[:, t] = block[:, s]


def pages_for_capacity(capacity: str | float, page_bytes: int, device: torch.device) -> int:
    """Pages that fit: "4GiB", a number of bytes (int), or a share of the device's free memory (float in (0, 1])."""
    if isinstance(capacity, float):
        if not 0.0 < capacity <= 1.0:
            raise InvalidArgument(f"capacity must be a share in (0, 1], '4GiB' or a number of bytes; got {capacity!r}")
        num_bytes = int(capacity * _free_bytes(device))
    else:
        num_bytes = bytes_of("capacity", capacity)
    if num_bytes < page_bytes:
        raise InvalidArgument(f"{num_bytes} bytes hold no page: one takes {page_bytes} bytes")
    return num_bytes // page_bytes


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # no better word on this system
