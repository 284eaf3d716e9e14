"""A pool on a GPU as the tiers see it: copies on streams of their own, in order with what the steps have launched.

out   the worker's stream waits for all that the steps have launched so far, gathers pages and copies them to the
      hub. A page was published after its last write was launched, so this is in what is copied; and where a later
      step writes to it meanwhile, it has left the tree before, and the journal says so afterwards.
in    records go from the hub into memory that nobody else has, on a third stream that waits for nothing. The steps'
      stream waits for it and puts them into their pages: after what earlier steps still read there, before what
      later ones attend to. The host waits for the first half only, after which the hub's slots may be others'.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from radixkv.pool import KVPool
from radixkv.tiers.record import Bytes

__all__ = ["Cuda", "DevicePages", "DevicePool", "device_pages_of"]

_BATCH = 16  # pages: what a batch takes of the GPU's memory meanwhile


class DevicePool(Protocol):
    """What of `KVPool` is used."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_bytes(self) -> int: ...
    def gather(self, pages: npt.NDArray[np.int32]) -> torch.Tensor: ...
    def scatter(self, pages: npt.NDArray[np.int32], data: torch.Tensor) -> None: ...


class Cuda:
    """What of torch.cuda is used, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> Any:
        return torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    def current(self) -> Any:
        return torch.cuda.current_stream(self._device)

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        return torch.cuda.stream(stream)

    def empty(self, num_rows: int, size: int) -> torch.Tensor:
        return torch.empty((num_rows, size), dtype=torch.uint8, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """On the current stream; from and to pinned memory the host does not wait."""
        target.copy_(source, non_blocking=True)

    def mark(self) -> Any:
        """A moment of the current stream: `query()` says whether it is past, `elapsed_time(later)` milliseconds."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(self.current())
        return event

    def keep(self, memory: torch.Tensor, stream: Any) -> None:
        """It is not given to others before this stream has done what it was told so far."""
        memory.record_stream(stream)

    def pin(self, memory: Bytes) -> None:
        """Lock pages in RAM, as long as the array lives: else copies go through the driver's own memory."""
        runtime, address = torch.cuda.cudart(), memory.ctypes.data  # type: ignore[no-untyped-call]
        if (status := int(runtime.cudaHostRegister(address, memory.nbytes, 0))) != 0:
            warnings.warn(
                f"{memory.nbytes} bytes for the tiers could not be pinned (CUDA error {status}): copies are slower",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        weakref.finalize(memory, runtime.cudaHostUnregister, address)


class DevicePages:
    """A `PageStore` over a pool on a GPU."""

    def __init__(self, pool: DevicePool, cuda: Cuda) -> None:
        self.num_pages, self.page_bytes = pool.num_pages, pool.page_bytes
        self._pool, self._cuda = pool, cuda
        self._out, self._in = cuda.stream(), cuda.stream()
        self.steps = cuda.current()
        self._begun: Any = None
        self._timed: tuple[int, Any, Any] | None = None  # rows, and the marks before and after them

    def pin(self, memory: Bytes) -> None:
        self._cuda.pin(memory)

    def step_begins(self, timed: bool) -> tuple[int, float] | None:
        """A step runs on the current stream from here on; rows and seconds of the last timed one, once it is done."""
        self.steps, done = self._cuda.current(), None
        if self._timed is not None and self._timed[2].query():
            rows, begin, end = self._timed
            self._timed, done = None, (rows, begin.elapsed_time(end) / 1000)
        self._begun = self._cuda.mark() if timed else None
        return done

    def step_ends(self, rows: int) -> None:
        """All that a timed step computes is launched."""
        self._timed = rows, self._begun, self._cuda.mark()

    def read_pages(self, pages: npt.NDArray[np.int32], out: Sequence[Bytes]) -> None:
        """In any thread. Returns when the pages are in `out`."""
        with self._cuda.on(self._out):
            self._out.wait_stream(self.steps)
            for i in range(0, len(pages), _BATCH):
                gathered = self._pool.gather(pages[i : i + _BATCH])
                for row, page in zip(out[i : i + _BATCH], gathered, strict=True):
                    self._cuda.copy(torch.from_numpy(row), page)
            self._out.synchronize()

    def write_pages(self, pages: npt.NDArray[np.int32], data: Sequence[Bytes]) -> None:
        """In the thread that runs steps. Returns when `data` is read; what is launched next finds it in the pages."""
        steps = self._cuda.current()
        for i in range(0, len(pages), _BATCH):
            rows = data[i : i + _BATCH]
            with self._cuda.on(self._in):
                staged = self._cuda.empty(len(rows), self.page_bytes)
                for row, memory in zip(rows, staged, strict=True):
                    self._cuda.copy(memory, torch.from_numpy(row))
            steps.wait_stream(self._in)
            self._pool.scatter(pages[i : i + _BATCH], staged)
            self._cuda.keep(staged, steps)
        self._in.synchronize()


def device_pages_of(pool: KVPool) -> DevicePages | None:
    """None for a pool in RAM, which the tiers read as it is."""
    return None if pool.device.type == "cpu" else DevicePages(pool, Cuda(pool.device))
