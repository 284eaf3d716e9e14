"""Is a backend right on this machine? Random ragged batches against dense attention in float64.

`radixkv doctor` runs this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import RadixKVError
from . import Attention, PageTable
from .fp8 import FP8, quantize

__all__ = ["TOLERANCE", "Case", "Make", "Result", "cases", "run_case"]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error allowed for inputs of unit variance, by dtype; relative where an output is larger than 1."""

Make = Callable[[dict[str, Any]], Attention]
"""Makes a backend from the arguments that all have in common, kv_dtype and its scales only for 8-bit K and V."""

_GROUPS = (1, 2, 4, 7, 8)
_PAGE_SIZES = (1, 16, 64)
_KV_HEADS, _HEAD_DIM = 2, 64
_SCALES = (0.5, 0.0625)  # of 8-bit K and V
_EXTRA_TOKENS = 150  # cached tokens of a request, at most


@dataclass(frozen=True)
class Case:
    """A kind of batch."""

    name: str
    dtype: torch.dtype
    decode: bool
    """One new row for each request; else also prefill and extend."""
    sm_scale: float | None = None
    window_left: int = -1
    logits_soft_cap: float = 0.0
    fp8: bool = False
    """K and V stored in 8 bits."""


@dataclass(frozen=True)
class Result:
    """How a case went.

    `error` is the largest difference, relative where an output is larger than 1; infinite if there was a NaN or an
    exception.
    """

    case: Case
    batches: int
    error: float
    allowed: float
    problem: str | None = None

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


def cases(dtypes: Sequence[torch.dtype], fp8: bool) -> list[Case]:
    """Decode and mixed batches of each dtype, plain and with every option; fp8: also over 8-bit K and V."""
    eight_bit = [(", 8-bit", (None, -1, 0.0, True))] if fp8 else []
    return [
        Case(f"{kind}{name}", dtype, kind == "decode", *options)
        for dtype in dtypes
        for name, options in (
            ("", (None, -1, 0.0, False)),
            (", scale", (0.2, -1, 0.0, False)),
            (", window", (None, 33, 0.0, False)),
            (", soft cap", (None, -1, 5.0, False)),
            *eight_bit,
        )
        for kind in ("decode", "mixed")
    ]


def run_case(case: Case, batches: int, make: Make, device: torch.device, seed: int) -> Result:
    """Run a case on backends from `make`. An exception is a result, not an end."""
    rng = np.random.default_rng(seed)
    error, done = 0.0, 0
    allowed = TOLERANCE[case.dtype]
    try:
        for _ in range(batches):
            error = max(error, _batch_error(case, make, device, rng))
            done += 1
    except (RadixKVError, RuntimeError, ValueError, TypeError, AssertionError) as problem:
        return Result(case, done, float("inf"), allowed, f"{type(problem).__name__}: {problem}")
    return Result(case, done, error, allowed)


def _batch_error(case: Case, make: Make, device: torch.device, rng: np.random.Generator) -> float:
    """The largest error of one random batch."""
    page_size, group = int(rng.choice(_PAGE_SIZES)), int(rng.choice(_GROUPS))
    batch = int(rng.integers(1, 9))
    rows = np.ones(batch, int) if case.decode else rng.choice([1, 1, 2, 9, 40], batch)
    lengths = rows + rng.integers(0, _EXTRA_TOKENS, batch)
    num_pages = int((-(-lengths // page_size)).sum()) + 3
    sizes = {
        "num_qo_heads": group * _KV_HEADS,
        "num_kv_heads": _KV_HEADS,
        "head_dim": _HEAD_DIM,
        "num_pages": num_pages,
        "page_size": page_size,
        "dtype": case.dtype,
    }
    if case.fp8:
        sizes |= {"kv_dtype": FP8, "k_scale": _SCALES[0], "v_scale": _SCALES[1]}
    table, slots = _random_table(rows, lengths, num_pages, page_size, rng)

    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def randn(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, _HEAD_DIM, generator=generator).to(case.dtype)

    k, v = (randn(int(lengths.sum()), _KV_HEADS) for _ in range(2))
    q = randn(int(rows.sum()), group * _KV_HEADS)
    new = np.concatenate([np.arange(n) >= n - r for n, r in zip(lengths, rows, strict=True)])
    if case.fp8:  # values that 8 bits hold exactly
        k, v = (quantize(x, s).to(case.dtype) * s for x, s in zip((k, v), _SCALES, strict=True))
    caches = torch.full((2, num_pages * page_size, _KV_HEADS, _HEAD_DIM), torch.nan, dtype=case.dtype)
    for cache, tokens in zip(caches, (k, v), strict=True):
        cache[slots[~new]] = tokens[~new]
    if case.fp8:
        caches = torch.stack([quantize(x, s) for x, s in zip(caches, _SCALES, strict=True)])
    k_cache, v_cache = caches.view(2, num_pages, page_size, _KV_HEADS, _HEAD_DIM).to(device)
    out = torch.full(tuple(q.shape), torch.nan, dtype=case.dtype, device=device)

    backend = make(sizes)
    backend.plan(table)
    backend.append(k[new].to(device), v[new].to(device), k_cache, v_cache)
    backend.run(
        q.to(device), k_cache, v_cache, out,
        sm_scale=case.sm_scale, window_left=case.window_left, logits_soft_cap=case.logits_soft_cap,
    )  # fmt: skip
    ends, q_ends = np.cumsum(lengths), np.cumsum(rows)
    expected = torch.cat(
        [
            _dense(case, q[qe - r : qe], k[e - n : e], v[e - n : e])
            for qe, r, e, n in zip(q_ends, rows, ends, lengths, strict=True)
        ]
    )
    error = ((out.cpu().double() - expected).abs() / expected.abs().clamp(min=1)).max().item()
    return error if error == error else float("inf")


def _random_table(
    rows: np.ndarray, lengths: np.ndarray, num_pages: int, page_size: int, rng: np.random.Generator
) -> tuple[PageTable, np.ndarray]:
    """A table over random pages, and the slot of every token of every request."""
    counts = -(-lengths // page_size)
    kv_indptr = np.concatenate([[0], np.cumsum(counts)])
    pages = rng.permutation(num_pages)[: kv_indptr[-1]]
    slots = [
        pages[first + np.arange(n) // page_size] * page_size + np.arange(n) % page_size
        for first, n in zip(kv_indptr, lengths, strict=False)
    ]
    new_slots = [s[len(s) - r :] for s, r in zip(slots, rows, strict=True)]
    qo_indptr = np.concatenate([[0], np.cumsum(rows)])
    arrays = (qo_indptr, kv_indptr, pages, (lengths - 1) % page_size + 1, np.concatenate(new_slots))
    return PageTable(*(a.astype(np.int32) for a in arrays)), np.concatenate(slots)


def _dense(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows q at the end of the sequence k, v, from a matrix of scores in float64."""
    group, rows, length = q.shape[1] // k.shape[1], len(q), len(k)
    keys, values = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scale = q.shape[2] ** -0.5 if case.sm_scale is None else case.sm_scale
    scores = torch.einsum("qhd,khd->hqk", q.double(), keys) * scale
    if case.logits_soft_cap > 0:
        scores = case.logits_soft_cap * torch.tanh(scores / case.logits_soft_cap)
    position = torch.arange(length - rows, length)[:, None]
    key = torch.arange(length)
    hidden = key > position
    if case.window_left >= 0:
        hidden |= key < position - case.window_left
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)
