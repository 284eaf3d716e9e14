"""KVPool: the K and V tensors of all pages."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
import torch

from radixkv import _core
from radixkv.errors import InvalidArgument
from radixkv.geometry import Geometry, parse_bytes

__all__ = ["KVPool", "copy_batched", "pages_for_capacity"]


class KVPool:
    """One allocation for the K and V of every layer and page; `k[layer]` and `v[layer]` are strided views of it.

    Each view is ``[num_pages, page_size, num_kv_heads, head_dim]`` (FlashInfer's NHD). The memory starts out
    uninitialized; where the operating system backs it lazily, pages cost memory when they are first written.

    Raises:
        InvalidArgument: the allocation fails; says how many bytes were asked for.
    """

    def __init__(self, geometry: Geometry, num_pages: int, dtype: torch.dtype, device: torch.device) -> None:
        g = geometry
        shape = (g.num_layers, 2, num_pages, g.page_size, g.num_kv_heads, g.head_dim)
        try:
            self.storage = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise InvalidArgument(
                f"cannot allocate {num_pages} pages of {g.bytes_per_page} bytes on {device}: "
                "lower num_pages or capacity"
            ) from error
        if device.type == "cpu":
            _core.prefer_huge_pages(self.storage.data_ptr(), self.storage.nbytes)
        self.k = [self.storage[layer, 0] for layer in range(g.num_layers)]
        self.v = [self.storage[layer, 1] for layer in range(g.num_layers)]

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def copy_pages(self, source: npt.NDArray[np.int32], target: npt.NDArray[np.int32]) -> None:
        """Copies pages `source` [n] onto pages `target` [n], K and V of all layers. No page is in both.

        On CUDA a gather and a scatter for every 64 MiB; on the CPU, where a copy costs no launch, page by page.
        """
        if self.storage.is_cpu:
            for s, t in zip(source.tolist(), target.tolist(), strict=True):
                self.storage[:, :, t].copy_(self.storage[:, :, s])
        elif len(source):
            copy_batched(self.storage, source, target)


def copy_batched(
    storage: torch.Tensor, source: npt.NDArray[np.int32], target: npt.NDArray[np.int32], most_bytes: int = 1 << 26
) -> None:
    """The same for any device, in two launches for every `most_bytes`, which is what it takes of memory meanwhile."""
    pages = storage.view(torch.uint8) if storage.itemsize == 1 else storage  # torch indexes no 8-bit floats
    places = torch.from_numpy(np.stack([source, target]).astype(np.int64)).to(storage.device)
    for s, t in torch.split(places, max(1, most_bytes * storage.shape[2] // storage.nbytes), dim=1):
        pages[:, :, t] = pages[:, :, s]


def pages_for_capacity(capacity: str | float, geometry: Geometry, device: torch.device) -> int:
    """Pages that fit: "4GiB", a number of bytes (int), or a share of the device's free memory (float in (0, 1])."""
    if isinstance(capacity, str):
        return geometry.pages_in(parse_bytes(capacity))
    if isinstance(capacity, int) and not isinstance(capacity, bool) and capacity > 0:
        return geometry.pages_in(capacity)
    if isinstance(capacity, float) and 0.0 < capacity <= 1.0:
        return geometry.pages_in(int(capacity * _free_bytes(device)))
    raise InvalidArgument(f"capacity must be like '4GiB', a number of bytes or a share in (0, 1]; got {capacity!r}")


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
