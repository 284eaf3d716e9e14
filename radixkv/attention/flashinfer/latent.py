"""Latent layers on FlashInfer: rows of 512 + 64 that all query heads attend to, by its kernels for MLA.

These kernels take no window, soft cap, chunks or sinks, and are planned outside of CUDA graphs only; layers that share
segments have no cascade.
"""

from __future__ import annotations

from typing import Any

import torch

from radixkv.attention import Options
from radixkv.attention.flashinfer.kernels import LATENT_DIMS, preparing
from radixkv.attention.flashinfer.plans import Kind, Planner, Schedule, Scratch, StepTensors, Wrapper
from radixkv.errors import BackendUnavailable, InvalidArgument
from radixkv.pool import LayerKV

__all__ = ["LatentPlanner", "check_latent_call"]

_TILE_ROWS = 64  # query vectors of a tile, at least
_MOST_TILES = 16384  # of a plan
_MANY_PROCESSORS = 256  # more than any GPU has: where there is none to ask


class LatentPlanner(Planner):
    """A `Planner` for latent layers of one number of query heads. There is no plan for graphs."""

    def __init__(self, api: Any, scratch: Scratch, kv: LayerKV, *, backend: str, dtype: torch.dtype) -> None:
        shape = kv.shape
        self.api = api
        self.kind = Kind(shape.num_qo_heads, 1, shape.k_dim, kv.k.dtype)
        self.common = self.eight_bit = False
        self.suffix = f"kernels for {str(dtype).removeprefix('torch.')}, latents"
        self._scratch, self._backend, self._dtype, self._page_size = scratch, backend, dtype, kv.page_size

    def row_shapes(self, rows: int) -> dict[str, tuple[int, int, int]]:
        """Of q, out, k and v."""
        (latent, _), heads, width = LATENT_DIMS, self.kind.num_qo_heads, self.kind.head_dim
        return {"q": (rows, heads, width), "out": (rows, heads, latent), "k": (rows, 1, width), "v": (rows, 1, latent)}

    def append(self, kv: LayerKV, at: StepTensors, k: torch.Tensor) -> None:
        """Write rows k [rows, 1, 576] into their slots."""
        latent, _ = LATENT_DIMS
        rows, pages = k[:, 0], kv.k[:, :, 0]
        with preparing(f"append {self.suffix}"):
            self.api.append_paged_mla_kv_cache(
                rows[:, :latent], rows[:, latent:], at.request, at.position, pages[..., :latent], pages[..., latent:],
                at.kv_indices, at.kv_indptr, at.kv_last_page_len,
            )  # fmt: skip

    def plan(self, wrapper: Wrapper, schedule: Schedule, options: Options, causal: bool = True) -> None:
        """Plan a wrapper. A row of a decode step sees all keys: told so, the kernels take any number of heads."""
        qo_indptr, kv_indptr, kv_indices, last = schedule[:4]
        heads, (latent, rotated) = self.kind.num_qo_heads, LATENT_DIMS
        tiles = int((-(-qo_indptr.diff() * heads // _TILE_ROWS)).sum())
        if tiles > _MOST_TILES:
            raise InvalidArgument(
                f"a step of {int(qo_indptr[-1])} rows of {heads} heads takes {tiles} tiles of FlashInfer's kernels for "
                f"latents, which have {_MOST_TILES} at most: compute fewer rows a step"
            )
        lengths = (kv_indptr.diff() - 1) * self._page_size + last
        metadata = self.api.mla.MLAPlanMetadata.csr(qo_indptr, kv_indptr, kv_indices, lengths)
        with preparing(f"{'decode' if wrapper.decode else 'prefill'} {self.suffix}"):
            wrapper.handle.plan(
                metadata=metadata, num_heads=heads, head_dim_ckv=latent, head_dim_kpe=rotated,
                page_size=self._page_size, causal=causal and not wrapper.decode, sm_scale=options.sm_scale,
                q_data_type=self._dtype, kv_data_type=self._dtype, query_layout="packed", kv_cache_layout="packed",
                lse_mode="none",
            )  # fmt: skip

    def _new_wrapper(self, decode: bool) -> Wrapper:
        device, (latent, _) = self._scratch.buffer.device, LATENT_DIMS
        cuda = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if cuda else _MANY_PROCESSORS
        self._scratch.grow(2 * processors * _TILE_ROWS * (2 * latent + 4))  # whatever the batch
        handle = self.api.mla.BatchMLAPagedAttentionWrapper(self._scratch.buffer, backend=self._backend)
        return _LatentWrapper(handle, decode, self._scratch.buffer)


class _LatentWrapper(Wrapper):
    def run(
        self, q: torch.Tensor, caches: tuple[torch.Tensor, ...], out: torch.Tensor, scales: Any, sinks: Any = None
    ) -> None:
        """Attend as planned."""
        self.handle.run(query=q, kv_cache=caches[0][:, :, 0], out=out)


def check_latent_call(layer: int, options: Options, sinks: torch.Tensor | None) -> None:
    """Raise `BackendUnavailable` for what the kernels have not."""
    sm_scale, *more = options
    if more != [-1, 0.0, 0] or sinks is not None:
        raise BackendUnavailable(
            f"layer {layer} is latent and has a window, a soft cap, chunks or sinks ({options}): FlashInfer's kernels "
            "for latents have none of these, use device='cpu'"
        )
    if sm_scale is not None and sm_scale <= 0:
        raise BackendUnavailable(
            f"sm_scale is {sm_scale}: FlashInfer's softmax needs a positive factor; negate q, or use device='cpu'"
        )
