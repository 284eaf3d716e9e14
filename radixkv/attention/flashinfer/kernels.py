"""What FlashInfer's kernels are made for, and the wait until they are compiled."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.pool import LayerKV

__all__ = ["COMMON_HEAD_DIMS", "LATENT_DIMS", "check_layer", "check_supported", "preparing"]

COMMON_HEAD_DIMS = (64, 128, 256)
"""What the kernels that append and merge take, and decode without tensor cores."""

_HEAD_DIMS = (64, 128, 192, 256)  # FA2's swizzle needs multiples of 64: it computes garbage with 96, silently

LATENT_DIMS = (512, 64)
"""Of a row of a latent layer: its value, and what is rotated of it. FlashInfer's kernels append no others."""

_LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)  # of others a plan can be refused, by how rows and tiles fall

_prepared: set[str] = set()
"""Kernels that this process has used before."""


def check_supported(dtype: torch.dtype, backend: str) -> None:
    """Raise unless there are kernels for queries of this dtype."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise BackendUnavailable(
            f"dtype is {dtype}: FlashInfer has kernels for torch.bfloat16 and torch.float16; convert the model, or use "
            "device='cpu', which also takes torch.float32"
        )
    if backend not in ("fa2", "auto"):
        raise InvalidArgument(f"kernels is {backend!r}: use 'fa2' or 'auto'")


def check_layer(number: int, kv: LayerKV, dtype: torch.dtype) -> None:
    """Raise unless there are kernels for this layer and rows of `dtype`."""
    shape, k, v = kv.shape, kv.format.k, kv.format.v
    rows = str(dtype).removeprefix("torch.")
    if shape.latent:
        _check_latent_layer(number, kv, rows)
        return
    if shape.k_dim != shape.v_dim:
        raise BackendUnavailable(
            f"layer {number} has keys of {shape.k_dim} and values of {shape.v_dim} dimensions: FlashInfer's kernels "
            "are used with one head_dim for both; use device='cpu'"
        )
    if shape.k_dim not in _HEAD_DIMS:
        raise BackendUnavailable(
            f"layer {number}: head_dim is {shape.k_dim}: FlashInfer's kernels are used with "
            f"{', '.join(map(str, _HEAD_DIMS))}; pad the heads with zeros, or use device='cpu'"
        )
    plain = k.dtype == v.dtype and k.rotated == v.rotated and not (k.has_row_scales or kv.format.k_centre)
    if plain and k.dtype in (rows, "float8_e4m3fn"):
        return
    if plain and k.dtype in ("float32", "bfloat16", "float16"):
        raise InvalidArgument(
            f"layer {number}: K and V are stored as {k.dtype}: use {rows}, the dtype of k and v, or float8_e4m3fn"
        )
    raise BackendUnavailable(
        f"layer {number} stores {kv.format.name}{', keys with a centre' * bool(kv.format.k_centre)}: FlashInfer's "
        f"kernels read {rows} or float8_e4m3fn, the same for both; use device='cpu' for others, or 'fp8_rotated'"
    )


def _check_latent_layer(number: int, kv: LayerKV, rows: str) -> None:
    shape, (latent, rotated) = kv.shape, LATENT_DIMS
    if (shape.k_dim, shape.v_dim) != (latent + rotated, latent) or shape.num_qo_heads not in _LATENT_HEADS:
        raise BackendUnavailable(
            f"layer {number} is latent, {shape.num_qo_heads} heads over rows of {shape.v_dim} + "
            f"{shape.k_dim - shape.v_dim}: FlashInfer's kernels are used with {latent} + {rotated} and "
            f"{', '.join(map(str, _LATENT_HEADS))} heads; leave radixkv.hf.latent() out where keys and values of "
            "a head have one dimension, or use device='cpu'"
        )
    if kv.format.k.dtype != rows:
        raise BackendUnavailable(
            f"layer {number} is latent and stores {kv.format.name}: FlashInfer's kernels read latents as {rows} "
            "here; leave kv_format out, or use device='cpu'"
        )


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
