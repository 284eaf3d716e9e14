"""What FlashInfer's kernels are made for, and the wait until they are compiled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from radixkv.errors import BackendUnavailable, InvalidArgument

__all__ = ["COMMON_HEAD_DIMS", "check_supported", "preparing"]

COMMON_HEAD_DIMS = (64, 128, 256)
"""What the kernels that append and merge take, and decode without tensor cores."""

_HEAD_DIMS = (64, 128, 192, 256)  # FA2's swizzle needs multiples of 64: it computes garbage with 96, silently

_prepared: set[str] = set()
"""Kernels that this process has used before."""


def check_supported(dtype: torch.dtype, head_dim: int, backend: str) -> None:
    """Raise unless there are kernels for queries of this dtype and size."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise BackendUnavailable(
            f"dtype is {dtype}: FlashInfer has kernels for torch.bfloat16 and torch.float16; convert the model, or use "
            "device='cpu', which also takes torch.float32"
        )
    if head_dim not in _HEAD_DIMS:
        raise BackendUnavailable(
            f"head_dim is {head_dim}: FlashInfer's kernels are used with {', '.join(map(str, _HEAD_DIMS))}; pad the "
            "heads with zeros, or use device='cpu'"
        )
    if backend not in ("fa2", "auto"):
        raise InvalidArgument(f"kernels is {backend!r}: use 'fa2' or 'auto'")


@contextmanager
def preparing(name: str) -> Iterator[None]:
    """Say on standard error that kernels are compiled or loaded, the first time they are used.

    An error at that first time raises `BackendUnavailable`.
    """
    if name in _prepared:
        yield
        return
    print(f"radixkv: FlashInfer prepares its {name} (minutes where they must be compiled)", file=sys.stderr)
    begin = time.perf_counter()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(
            f"FlashInfer cannot prepare its {name}: {error}. It compiles them with nvcc and ninja: install the "
            "CUDA toolkit, or the package flashinfer-jit-cache of FlashInfer's own version"
        ) from error
    _prepared.add(name)
    print(f"radixkv: ready after {time.perf_counter() - begin:.1f} s", file=sys.stderr)
