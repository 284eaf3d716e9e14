"""Where the FlashInfer backend is tested: on its semantic twin, and on a CUDA device, real or emulated."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import radixkv
import radixkv.engine
from radixkv.attention import Attention, PageTable
from radixkv.attention.cascade import FLASHINFER, CascadeCosts
from radixkv.attention.flashinfer import FlashInferAttention
from radixkv.formats import LayerFormat, fp8
from radixkv.pool import LayerKV
from radixkv.shape import LayerShape
from tests.attention.helpers import PLAIN, Heads, Options, Pool, Request, layer_of, packed

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
        append_paged_mla_kv_cache=semantic.append_paged_mla_kv_cache,
        mla=SimpleNamespace(
            BatchMLAPagedAttentionWrapper=semantic.BatchMLAPagedAttentionWrapper,
            MLAPlanMetadata=semantic.MLAPlanMetadata,
        ),
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


def backend(
    target: str,
    heads: Heads,
    dtype: torch.dtype,
    num_pages: int,
    page_size: int,
    kv_format: str | LayerFormat | None = None,
    **options: Any,
) -> FlashInferAttention:
    """The target's backend over one layer of these sizes, all zeros."""
    layer = layer_of(heads, dtype, num_pages, page_size, kv_format, "cpu" if target == "twin" else "cuda")
    layer.k_pages.zero_()
    layer.v_pages.zero_()
    return backend_over(target, [layer], dtype, **options)


def backend_over(target: str, layers: Sequence[LayerKV], dtype: torch.dtype, **options: Any) -> FlashInferAttention:
    return FlashInferAttention(layers, dtype=dtype, **options, api=twin() if target == "twin" else None)


def use_target(patch: pytest.MonkeyPatch, target: str, **options: Any) -> None:
    """Have engines on the CPU, or on CUDA, made with this target's backend."""

    def attention(layers: Sequence[LayerKV], dtype: torch.dtype, *, cuda_graphs: bool = False) -> Attention:
        return backend_over(target, layers, dtype, cuda_graphs=cuda_graphs, **options)

    patch.setattr(radixkv.engine, "backend_for", attention)
    patch.setattr(radixkv.engine, "check_device", lambda device, cuda_graphs: None)


@dataclass
class FlashInferPool(Pool):
    """A pool that is filled on the CPU and attended to on the target's device."""

    dtype: torch.dtype = torch.float16
    target: str = "twin"
    options: dict[str, Any] = field(default_factory=dict)
    """Of the backend."""
    flashinfer: FlashInferAttention = field(init=False)

    def __post_init__(self) -> None:
        sizes = (self.heads, self.dtype, self.num_pages, self.page_size, self.kv_format)
        self.layer = layer_of(*sizes)
        self.k, self.v = self.layer.k, self.layer.v
        self.served = layer_of(*sizes, "cpu" if self.target == "twin" else "cuda")
        self.flashinfer = backend_over(self.target, [self.served], self.dtype, **self.options)

    def load(self, requests: Sequence[Request], rng: np.random.Generator) -> PageTable:
        """As `Pool.load`, and copies the pages to where the backend has them."""
        table = super().load(requests, rng)
        self.served.k_pages.copy_(self.layer.k_pages)
        self.served.v_pages.copy_(self.layer.v_pages)
        return table

    def attend(
        self,
        requests: Sequence[Request],
        rng: np.random.Generator,
        options: Options = PLAIN,
        sinks: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Plan, append and run one step; returns each request's rows."""
        self.flashinfer.plan(self.load(requests, rng))
        device = self.flashinfer.device
        rows = [packed([getattr(r.sequence, n)[r.length - r.rows : r.length] for r in requests]) for n in "qkv"]
        q, k, v = (r.to(device) for r in rows)
        if self.heads.latent:
            v = k[..., : self.heads.latent]
        self.flashinfer.append(0, k, v)
        out = torch.full((*q.shape[:2], v.shape[2]), torch.nan, dtype=self.dtype, device=device)
        self.flashinfer.run(0, q, out, options, None if sinks is None else sinks.to(device))
        return list(out.cpu().split([r.rows for r in requests]))


def heads_of(group: int, kv: int = 2, dim: int = 64) -> Heads:
    return Heads(group * kv, kv, dim)


# --- the engine -----------------------------------------------------------------------------------------------------

LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 2, 4, 2, 64, 50
UNLIKE = {
    "layers": [LayerShape(4, 2, 64), LayerShape(4, 1, 128), LayerShape(4, 2, 64), LayerShape(4, 2, 64)],
    "kv_format": [None, None, fp8(1 / 32, 1 / 64), None],
}
"""Of an engine whose layers differ in shape and format; WINDOWS are theirs."""
WINDOWS = [20, -1, -1, -1]


def make_engine(
    monkeypatch: pytest.MonkeyPatch, target: str, cascade: CascadeCosts = FLASHINFER, **options: Any
) -> radixkv.Engine:
    """An engine over FlashInfer: on the CPU with the twin, else as anyone makes it. Or, as target, "native"."""
    sizes = {"num_layers": LAYERS, "num_qo_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    sizes = options if "layers" in options else {**sizes, **options}
    if target == "native":
        return radixkv.Engine(**sizes, device="cpu")
    with monkeypatch.context() as patch:
        if target == "twin" or cascade != FLASHINFER:
            use_target(patch, target, cascade=cascade)
        return radixkv.Engine(**sizes, device="cpu" if target == "twin" else "cuda")


def run_step(
    engine: radixkv.Engine,
    leases: list[radixkv.Lease],
    dtype: torch.dtype,
    step: Any = None,
    windows: Sequence[int] = (-1,) * 9,
) -> torch.Tensor:
    """A toy model whose rows do not see each other outside of attention, in a step or one of its own; the last rows."""
    if step is None:
        with engine.step(leases) as step:
            return run_step(engine, leases, dtype, step, windows)
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, HEADS * DIM, generator=generator)
    assert step.input_ids.device == engine.device
    positions = step.positions.cpu()
    x = (embedding[step.input_ids.cpu()] * (1 + positions[:, None] / 64)).to(dtype).to(engine.device)
    for layer, (shape, window) in enumerate(zip(engine.layers, windows, strict=False)):
        weights = torch.randn(3, HEADS * DIM, generator=generator).to(dtype).to(engine.device)
        columns = torch.arange(2 * x.shape[1], device=engine.device) % x.shape[1]  # repeated where a layer is wider
        q, k, v = (
            (x * w).index_select(1, columns[: heads * shape.k_dim]).view(len(x), heads, shape.k_dim)
            for w, heads in zip(weights, (shape.num_qo_heads, shape.num_kv_heads, shape.num_kv_heads), strict=True)
        )
        x = x + step.attend(layer, q, k, v, window_left=window).flatten(1)[:, : x.shape[1]]
    return x.cpu()[step.last_rows.cpu()]
