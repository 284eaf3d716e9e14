"""Is a backend right on this machine? Random ragged batches against dense attention in float64.

`radixkv doctor` runs this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from radixkv.attention import Attention, Options, PageTable
from radixkv.attention.cascade import CascadeCosts
from radixkv.attention.fp8 import quantize
from radixkv.errors import RadixKVError
from radixkv.formats import fp8, layer_formats
from radixkv.pool import KVPool, LayerKV
from radixkv.shape import LayerShape

__all__ = ["TOLERANCE", "Case", "Make", "Result", "cases", "run_case"]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest error allowed for inputs of unit variance, by dtype; relative where an output is larger than 1."""

Make = Callable[..., Attention]
"""Makes a backend from layers and the arguments that all have in common: dtype, and cascade for cascade cases."""

_GROUPS = (1, 2, 4, 7, 8)
_PAGE_SIZES = (1, 16, 64)
_KV_HEADS = 2
_LATENT_HEADS = (1, 4, 16, 128)
_LATENT_DIMS = (576, 512)  # of DeepSeek's keys, and of them that are the value
_SCALES = (0.5, 0.0625)  # of 8-bit K and V
_EXTRA_TOKENS = 150  # cached tokens of a request, at most
_NEW_ROWS = {"decode": (1,), "mixed": (1, 1, 2, 9, 40), "extend": (2, 5, 16, 40), "cascade": (1, 1, 1, 3, 16)}
_SHARE_ALL = CascadeCosts(min_tokens=1, launch_tokens=-1.0, merge_tokens=0.0, max_rows=0)


@dataclass(frozen=True)
class Case:
    """A kind of batch."""

    kind: str
    """What rows are in it. "decode": one new row for each request; "extend": several; "mixed": either; "cascade":
    mixed, and requests begin with the same pages, up to three levels in two families."""
    options: str
    """In words; empty for none."""
    dtype: torch.dtype
    sm_scale: float | None = None
    window_left: int = -1
    logits_soft_cap: float = 0.0
    attention_chunk: int = 0
    sinks: bool = False
    """Each head has a logit that takes part in its softmax."""
    fp8: bool = False
    """K and V stored in 8 bits."""
    head_dim: int = 64
    latent: bool = False
    """One row a token for all heads, the first numbers of which are the value (MLA)."""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.options}" if self.options else self.kind


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


def cases(dtypes: Sequence[torch.dtype]) -> list[Case]:
    """Every kind of batch with every option, for each dtype."""
    options: list[tuple[str, dict[str, Any]]] = [
        ("", {}),
        ("scale", {"sm_scale": 0.2}),
        ("window", {"window_left": 33}),
        ("wide window", {"window_left": 250}),
        ("soft cap", {"logits_soft_cap": 5.0}),
        ("window + soft cap", {"window_left": 33, "logits_soft_cap": 5.0}),
        ("chunks", {"attention_chunk": 100}),
        ("sinks", {"sinks": True}),
        ("head_dim 128", {"head_dim": 128}),
        ("8-bit", {"fp8": True}),
        ("8-bit, window", {"fp8": True, "window_left": 33}),
        ("8-bit, head_dim 128", {"fp8": True, "head_dim": 128}),
    ]
    found = [Case(kind, words, dtype, **chosen) for dtype in dtypes for words, chosen in options for kind in _NEW_ROWS]
    ragged = [kind for kind in _NEW_ROWS if kind != "cascade"]  # which FlashInfer has not for latent rows
    scale = 192**-0.5  # of the heads that these rows are of
    return found + [Case(kind, "latent", dtype, scale, latent=True) for dtype in dtypes for kind in ragged]


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
    page_size, shape = int(rng.choice(_PAGE_SIZES)), _shape(case, rng)
    prefixes = _family_prefixes(page_size) if case.kind == "cascade" else [[]] * int(rng.integers(1, 9))
    table, slots, num_pages = _random_table(prefixes, _NEW_ROWS[case.kind], page_size, rng)
    [stored] = layer_formats(fp8(*_SCALES) if case.fp8 else None, str(case.dtype).removeprefix("torch."), 1)
    pool = KVPool([shape], [stored], num_pages, page_size, device)
    options = {"cascade": _SHARE_ALL} if case.kind == "cascade" else {}
    backend = make(pool.layers, dtype=case.dtype, **options)
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))

    def randn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, shape.k_dim, generator=generator).to(case.dtype)

    q = randn(len(table.slots), shape.num_qo_heads)
    keys, values = randn(2, num_pages * page_size, shape.num_kv_heads)
    if case.latent:
        values = keys[..., : shape.v_dim]
    if case.fp8:  # values that 8 bits hold exactly
        keys, values = (quantize(x, s).to(case.dtype) * s for x, s in zip((keys, values), _SCALES, strict=True))
    out = _attend(case, backend, pool.layers[0], table, slots, q, (keys, values))
    worst = 0.0
    for b, mine in enumerate(slots):
        rows = slice(int(table.qo_indptr[b]), int(table.qo_indptr[b + 1]))
        expected = _dense(case, q[rows], keys[mine], values[mine])
        error = ((out[rows] - expected).abs() / expected.abs().clamp(min=1)).max().item()
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _shape(case: Case, rng: np.random.Generator) -> LayerShape:
    if case.latent:
        return LayerShape(int(rng.choice(_LATENT_HEADS)), 1, *_LATENT_DIMS, latent=True)
    return LayerShape(int(rng.choice(_GROUPS)) * _KV_HEADS, _KV_HEADS, case.head_dim)


def _attend(
    case: Case,
    backend: Attention,
    layer: LayerKV,
    table: PageTable,
    slots: list[np.ndarray],
    q: torch.Tensor,
    kv: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """The backend's rows, float64 on the CPU, over caches kv, [slot, head, dim] each, of which the new rows' slots and
    those that no request has hold NaN."""
    new, used = torch.from_numpy(table.slots.astype(np.int64)), torch.from_numpy(np.concatenate(slots))
    device = layer.k.device
    for place, rows, scale in zip((layer.k, layer.v), kv, _SCALES, strict=True):
        cache = torch.full_like(rows, torch.nan)
        cache[used] = rows[used]
        cache[new] = torch.nan
        place.copy_((quantize(cache, scale) if case.fp8 else cache).view(place.shape))
    k, v = (rows[new].to(device) for rows in kv)
    v = k[..., : v.shape[2]] if case.latent else v
    out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=case.dtype, device=device)
    backend.plan(table)
    if case.kind == "cascade":
        assert backend.cascade.shared, "a cascade was to be tested, but no segment is used"
    backend.append(0, k, v)
    options = Options(case.sm_scale, case.window_left, case.logits_soft_cap, case.attention_chunk)
    backend.run(0, q.to(device), out, options, _sinks(q.shape[1]).to(device) if case.sinks else None)
    return out.cpu().double()


def _sinks(num_qo_heads: int) -> torch.Tensor:
    """From logits that take next to nothing to logits that take most."""
    return torch.linspace(-4, 6, num_qo_heads)


def _family_prefixes(page_size: int) -> list[list[int]]:
    """Pages that each of nine requests begins with: two families of several levels, and one request alone.

    Every segment has 64 tokens or more, which is the least that every backend shares.
    """
    run = -(-64 // page_size)
    trunk, branch, twig, other, sprig = (list(range(i * run, (i + 1) * run)) for i in range(5))
    return [
        trunk + branch + twig, other, trunk, trunk + branch, other + sprig,
        trunk + branch + twig, trunk + branch, other + sprig, [],
    ]  # fmt: skip


def _random_table(
    prefixes: list[list[int]], row_choices: Sequence[int], page_size: int, rng: np.random.Generator
) -> tuple[PageTable, list[np.ndarray], int]:
    """A table of requests that go on from these pages, over scattered pages of a pool.

    Also returns the slot of every token of each request, and the pages of the pool.
    """
    rows = rng.choice(row_choices, len(prefixes))
    lengths = np.array([len(p) * page_size for p in prefixes]) + rows + rng.integers(0, _EXTRA_TOKENS, len(prefixes))
    fresh = 1 + max((page for prefix in prefixes for page in prefix), default=-1)
    requests = []
    for prefix, length in zip(prefixes, lengths.tolist(), strict=True):
        own = -(-length // page_size) - len(prefix)
        requests.append([*prefix, *range(fresh, fresh + own)])
        fresh += own
    num_pages = fresh + 3
    scattered = rng.permutation(num_pages)
    pages = [scattered[request] for request in requests]
    slots = [
        mine[np.arange(n) // page_size] * page_size + np.arange(n) % page_size
        for mine, n in zip(pages, lengths, strict=True)
    ]
    arrays = (
        np.concatenate([[0], np.cumsum(rows)]),
        np.concatenate([[0], np.cumsum([len(mine) for mine in pages])]),
        np.concatenate(pages),
        (lengths - 1) % page_size + 1,
        np.concatenate([s[len(s) - n :] for s, n in zip(slots, rows, strict=True)]),
    )
    return PageTable(*(a.astype(np.int32) for a in arrays)), slots, num_pages


def _dense(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Rows q at the end of the sequence k, v, from a matrix of scores in float64."""
    (rows, num_qo_heads, dim), length = q.shape, len(k)
    scale = dim**-0.5 if case.sm_scale is None else case.sm_scale
    groups = q.double().view(rows, k.shape[1], -1, dim)
    scores = torch.einsum("qhgd,khd->hgqk", groups, k.double()).flatten(0, 1) * scale
    if case.logits_soft_cap > 0:
        scores = case.logits_soft_cap * torch.tanh(scores / case.logits_soft_cap)
    position = torch.arange(length - rows, length)[:, None]
    key = torch.arange(length)
    hidden = key > position
    if case.window_left >= 0:
        hidden |= key < position - case.window_left
    if case.attention_chunk:
        hidden |= key < position // case.attention_chunk * case.attention_chunk
    scores.masked_fill_(hidden, -torch.inf)
    if case.sinks:
        beside = _sinks(num_qo_heads).double()[:, None, None].expand(-1, rows, 1)
        weights = torch.cat([scores, beside], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.view(k.shape[1], -1, rows, length)
    return torch.einsum("hgqk,khd->qhgd", weights, v.double()).flatten(1, 2)
