"""Where the FlashInfer backend is tested: on its semantic twin, and on a CUDA device, real or emulated."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import radixkv
import radixkv.engine
from radixkv.attention import Attention
from radixkv.attention.cascade import FLASHINFER, CascadeCosts
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.attention.fp8 import FP8, quantize
from radixkv.geometry import Geometry
from tests.attention.helpers import PLAIN, Heads, Options, Pool, Request, packed, storage

ROOT = Path(__file__).parents[2]
TOOL = Path(os.environ.get("RADIXKV_SHARED", ROOT.parent / "shared")) / "tools" / "flashinfer_on_cpu"
"""The folder of the twin and of the emulation (make flashinfer). Neither is part of this package."""

EMULATED = os.environ.get("FI_CPU_ACTIVE") == "1"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCE)


def _twin_is_missing() -> str | None:
    if EMULATED:
        return "the emulated device stands for the twin"
    return None if (TOOL / "semantic.py").exists() else f"no semantic twin of FlashInfer at {TOOL}: set RADIXKV_SHARED"


def _cuda_is_missing() -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device: run on one, or make flashinfer"
    return None if importlib.util.find_spec("flashinfer") else "no flashinfer: pip install 'radixkv[cuda]'"


each_target = pytest.mark.parametrize(
    "target",
    [
        pytest.param("twin", marks=pytest.mark.skipif(bool(_twin_is_missing()), reason=_twin_is_missing() or "")),
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(bool(_cuda_is_missing()), reason=_cuda_is_missing() or "")],
        ),
    ],
)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def many_modules() -> None:
    """Skips under the emulation what needs kernels that nothing else does: compiling them takes minutes."""
    if EMULATED and not os.environ.get("RADIXKV_ALL_MODULES"):
        pytest.skip("the emulation would compile more kernels for this: set RADIXKV_ALL_MODULES=1")


@functools.cache
def twin() -> Any:
    """The twin as a module that can stand in for flashinfer: with workspaces that overflow if they are too small."""
    spec = importlib.util.spec_from_file_location("flashinfer_semantic_twin", TOOL / "semantic.py")
    assert spec is not None
    assert spec.loader is not None
    semantic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(semantic)

    def with_workspace(wrapper: Any) -> Any:
        class WithWorkspace(wrapper):  # type: ignore[misc]
            def __init__(self, float_workspace_buffer: torch.Tensor, *arguments: Any, **keywords: Any) -> None:
                super().__init__(float_workspace_buffer, *arguments, **keywords)
                self.float_bytes, self.int_bytes = float_workspace_buffer.numel(), 8 << 20

            def workspace_size(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
                indices = next(a for a in arguments if isinstance(a, torch.Tensor) and a is not arguments[0])
                return 200_000 * int(indices.numel()), 1000 * int(indices.numel())

            def reset_workspace_buffer(self, float_workspace_buffer: torch.Tensor, int_workspace_buffer: Any) -> None:
                assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8
                self.float_bytes, self.int_bytes = float_workspace_buffer.numel(), int_workspace_buffer.numel()

            def plan(self, *arguments: Any, **keywords: Any) -> None:
                float_bytes, int_bytes = self.workspace_size(*arguments)
                if float_bytes > self.float_bytes or int_bytes > self.int_bytes:
                    raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")
                super().plan(*arguments, **keywords)

        return WithWorkspace

    def merge_state_in_place(v: torch.Tensor, s: torch.Tensor, v_other: torch.Tensor, s_other: torch.Tensor) -> None:
        assert v.shape[2] in (64, 128, 256, 512), "FlashInfer has no merge kernel for this head_dim"
        assert all(x.is_contiguous() for x in (v, s, v_other, s_other))
        semantic.merge_state_in_place(v, s, v_other, s_other)

    return SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=_with_graphs(with_workspace(semantic.BatchDecodeWithPagedKVCacheWrapper)),
        BatchPrefillWithPagedKVCacheWrapper=with_workspace(semantic.BatchPrefillWithPagedKVCacheWrapper),
        append_paged_kv_cache=semantic.append_paged_kv_cache,
        merge_state_in_place=merge_state_in_place,
    )


def _with_graphs(wrapper: Any) -> Any:
    """The twin's decode wrapper with use_cuda_graph, as FlashInfer has it.

    The kernels read pages and lengths from the caller's memory when they run; plan() writes both there. The batch size
    is that of the memory, and the workspaces stay as the first plan found them.
    """

    class WithGraphs(wrapper):  # type: ignore[misc]
        buffers: tuple[torch.Tensor, ...] | None = None

        def __init__(self, *arguments: Any, use_cuda_graph: bool = False, **keywords: Any) -> None:
            names = [f"paged_kv_{name}_buffer" for name in ("indptr", "indices", "last_page_len")]
            buffers = tuple(keywords.pop(name) for name in names if name in keywords)
            assert len(buffers) == 3 * use_cuda_graph
            super().__init__(*arguments, **keywords)
            if use_cuda_graph:
                assert len(buffers[0]) == len(buffers[2]) + 1
                self.buffers = buffers
                self.plans = 0

        def workspace_size(self, *arguments: Any, **keywords: Any) -> tuple[int, int]:
            if self.buffers is None:
                return super().workspace_size(*arguments, **keywords)
            return 3_000_000, 9000 * len(self.buffers[2])  # by the batch size, whatever the lengths

        def reset_workspace_buffer(self, *arguments: Any) -> None:
            assert self.buffers is None or self.plans == 0, "a captured graph has the places of the workspaces"
            super().reset_workspace_buffer(*arguments)

        def plan(self, indptr: Any, indices: Any, last: Any, *sizes: Any, **keywords: Any) -> None:
            super().plan(indptr, indices, last, *sizes, **keywords)
            if self.buffers is not None:
                assert len(last) == len(self.buffers[2]), "the batch size is fixed"
                assert len(indices) <= len(self.buffers[1])
                for buffer, values in zip(self.buffers, (indptr, indices, last), strict=True):
                    buffer[: len(values)].copy_(values)
                self.plans += 1
                self.sizes = sizes

        def run(self, *arguments: Any, **keywords: Any) -> Any:
            if self.buffers is not None:
                indptr, indices, last = (b.cpu() for b in self.buffers)
                planned, page_size = self._prefill._plan, self.sizes[3]
                lengths = ((indptr.diff() - 1) * page_size + last).tolist()
                assert lengths == planned["lens"], "the plan is of an earlier step than the memory"
                planned["indices"] = indices[: planned["indptr"][-1]].long()
            return super().run(*arguments, **keywords)

    return WithGraphs


def backend(target: str, **sizes: Any) -> FlashInferAttention:
    if target == "twin":
        return FlashInferAttention(**sizes, device=torch.device("cpu"), api=twin())
    return FlashInferAttention(**sizes, device=torch.device("cuda"))


def engine_attention(target: str, **options: Any) -> Callable[..., Attention]:
    """What can stand in for radixkv.engine._attention: makes this target's backend for an engine on the CPU."""

    def attention(
        g: Geometry,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device,
        storage: dict[str, Any],
        cuda_graphs: bool,
    ) -> Attention:
        return backend(
            target,
            num_qo_heads=g.num_qo_heads,
            num_kv_heads=g.num_kv_heads,
            head_dim=g.head_dim,
            num_pages=num_pages,
            page_size=g.page_size,
            dtype=dtype,
            **storage,
            cuda_graphs=cuda_graphs,
            **options,
        )

    return attention


@dataclass
class FlashInferPool(Pool):
    """A pool whose caches are filled on the CPU and attended to on the target's device."""

    dtype: torch.dtype = torch.float16
    target: str = "twin"
    eight_bit: bool = False
    """Whether the backend's caches have 8 bits: those filled on the CPU, in `dtype`, are quantized with `scales`."""
    flashinfer: FlashInferAttention = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.num_pages, 2, self.page_size, self.heads.kv, self.heads.dim)
        self.both = torch.full(shape, torch.nan, dtype=self.dtype)
        self.k, self.v = self.both[:, 0], self.both[:, 1]
        self.flashinfer = backend(
            self.target,
            num_qo_heads=self.heads.qo,
            num_kv_heads=self.heads.kv,
            head_dim=self.heads.dim,
            num_pages=self.num_pages,
            page_size=self.page_size,
            dtype=self.dtype,
            **storage(FP8 if self.eight_bit else None, self.scales),
        )

    def caches(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The caches as the backend takes them: on its device, and quantized if it has 8 bits."""
        if not self.eight_bit:
            both = self.both.to(self.flashinfer.device)
            return both[:, 0], both[:, 1]
        k, v = (quantize(x, s).to(self.flashinfer.device) for x, s in zip((self.k, self.v), self.scales, strict=True))
        return k, v

    def attend(
        self, requests: Sequence[Request], rng: np.random.Generator, options: Options = PLAIN
    ) -> list[torch.Tensor]:
        """Plan, append and run one step; returns each request's rows."""
        self.flashinfer.plan(self.load(requests, rng))
        device = self.flashinfer.device
        rows = [packed([getattr(r.sequence, n)[r.length - r.rows : r.length] for r in requests]) for n in "qkv"]
        q, k, v = (r.to(device) for r in rows)
        k_cache, v_cache = self.caches()
        self.flashinfer.append(k, v, k_cache, v_cache)
        out = torch.full(tuple(q.shape), torch.nan, dtype=self.dtype, device=device)
        self.flashinfer.run(
            q,
            k_cache,
            v_cache,
            out,
            sm_scale=options.sm_scale,
            window_left=options.window_left,
            logits_soft_cap=options.logits_soft_cap,
        )
        return list(out.cpu().split([r.rows for r in requests]))


def heads_of(group: int, kv: int = 2, dim: int = 64) -> Heads:
    return Heads(group * kv, kv, dim)


# --- the engine -----------------------------------------------------------------------------------------------------

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 2, 4, 2, 64, 50


def make_engine(
    monkeypatch: pytest.MonkeyPatch, target: str, cascade: CascadeCosts = FLASHINFER, **options: Any
) -> radixkv.Engine:
    """An engine over FlashInfer: on the CPU with the twin, else as anyone makes it. Or, as target, "native"."""
    sizes = {"num_layers": LAYERS, "num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, **options}
    if target == "native":
        return radixkv.Engine(**sizes, device="cpu")
    with monkeypatch.context() as patch:
        if target == "twin" or cascade != FLASHINFER:
            patch.setattr(radixkv.engine, "_attention", engine_attention(target, cascade=cascade))
        return radixkv.Engine(**sizes, device="cpu" if target == "twin" else "cuda")


def run_step(engine: radixkv.Engine, leases: list[radixkv.Lease], dtype: torch.dtype, step: Any = None) -> torch.Tensor:
    """A toy model whose rows do not see each other outside of attention, in a step or one of its own; the last rows."""
    if step is None:
        with engine.step(leases) as step:
            return run_step(engine, leases, dtype, step)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, HEADS, DIM, generator=generator)
    weights = torch.randn(LAYERS, 3, HEADS, DIM, generator=generator)
    assert step.input_ids.device == engine.pool.k[0].device
    positions = step.positions.cpu()
    x = (embedding[step.input_ids.cpu()] * (1 + positions[:, None, None] / 64)).to(dtype).to(engine.device)
    for layer in range(LAYERS):
        q, k, v = (x * weights[layer, i].to(dtype).to(engine.device) for i in range(3))
        x = x + step.attend(layer, q, k[:, :KV_HEADS], v[:, :KV_HEADS])
    return x.cpu()[step.last_rows.cpu()]
