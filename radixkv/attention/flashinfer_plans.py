"""Two sets of index arrays and wrappers for the FlashInfer backend, used in turn.

FlashInfer's plan() writes into pinned memory and queues copies from it without waiting. If the host ran ahead and
planned the next step over the same memory, the step that is still queued would read the next one's schedule. So steps
alternate between two sets, and a set is filled again only after the copies that were queued from it have been made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["IndexArrays", "PlanSet", "Wrapper"]

_ALIGN = 4  # entries: every array begins at a multiple of 16 bytes


@dataclass
class Wrapper:
    """A FlashInfer wrapper and the sizes of its workspaces."""

    handle: Any
    float_workspace: torch.Tensor
    int_bytes: int = 0


@dataclass
class IndexArrays:
    """The same int32 arrays twice: in pinned memory of the host, and on the device."""

    host: list[torch.Tensor]
    device: list[torch.Tensor]


@dataclass
class PlanSet:
    """What one step needs to itself until the device has run it."""

    device: torch.device
    wrappers: dict[bool, list[Wrapper]] = field(default_factory=lambda: {False: [], True: []})
    """By whether they are decode wrappers. A step takes one for each combination of options its layers use."""

    def __post_init__(self) -> None:
        cuda = self.device.type == "cuda"
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self._pinned = cuda
        self._host = torch.empty(0, dtype=torch.int32)
        self._on_device = torch.empty(0, dtype=torch.int32, device=self.device)
        self.taken = {False: 0, True: 0}

    def fill(self, arrays: Sequence[npt.NDArray[np.int32]]) -> IndexArrays:
        """Begin a step: copy these arrays to pinned memory and from there, without waiting, to the device."""
        if self._copied is not None:
            self._copied.synchronize()
        self.taken = {False: 0, True: 0}
        begins = np.cumsum([0, *(-(-len(a) // _ALIGN) * _ALIGN for a in arrays)]).tolist()
        if begins[-1] > len(self._host):
            size = max(begins[-1], 2 * len(self._host), 1024)
            self._host = torch.empty(size, dtype=torch.int32, pin_memory=self._pinned)
            self._on_device = torch.empty(size, dtype=torch.int32, device=self.device)
        staging = self._host.numpy()
        for begin, array in zip(begins, arrays, strict=False):
            staging[begin : begin + len(array)] = array
        self._on_device[: begins[-1]].copy_(self._host[: begins[-1]], non_blocking=True)
        self.copies_queued()
        spans = [slice(begin, begin + len(array)) for begin, array in zip(begins, arrays, strict=False)]
        return IndexArrays([self._host[s] for s in spans], [self._on_device[s] for s in spans])

    def copies_queued(self) -> None:
        """Note that copies from this set's memory were queued: the next fill() waits for them."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.device))
