"""Attention over a page table: what every backend offers.

A backend is told about a step once (`plan`) and then serves every layer of it (`append`, then `run`):

    backend.plan(table)
    for layer in range(num_layers):
        backend.append(k, v, pool.k[layer], pool.v[layer])
        backend.run(q, pool.k[layer], pool.v[layer], out)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from radixkv import _core
    from radixkv.attention.cascade import CascadePlan

__all__ = ["Attention", "PageTable", "StepInputs"]


class PageTable(NamedTuple):
    """The arrays of one step of B requests, all int32 and one-dimensional, in FlashInfer's layout and names.

    Request b has the rows qo_indptr[b]..qo_indptr[b+1] and the pages kv_indices[kv_indptr[b]..kv_indptr[b+1]]. Its
    length, new rows included, is (pages - 1) * page_size + kv_last_page_len[b]. Row r of its n rows is the token at
    position length - n + r and sees the keys 0..its own position.
    """

    qo_indptr: npt.NDArray[np.int32]
    """[B + 1]: first row of each request."""
    kv_indptr: npt.NDArray[np.int32]
    """[B + 1]: first entry of each request in kv_indices."""
    kv_indices: npt.NDArray[np.int32]
    """[kv_indptr[B]]: page ids."""
    kv_last_page_len: npt.NDArray[np.int32]
    """[B]: tokens in each request's last page, 1 to page_size."""
    slots: npt.NDArray[np.int32]
    """[qo_indptr[B]]: page * page_size + offset, where each row's K and V go."""


class StepInputs(NamedTuple):
    """What a model's forward pass takes, int64 and on the backend's device; empty for a table of arrays."""

    input_ids: torch.Tensor
    """[rows]: the rows' tokens."""
    positions: torch.Tensor
    """[rows]: each row's index in its sequence."""
    last_rows: torch.Tensor
    """[B]: the last row of each request."""


class Attention(Protocol):
    """A backend for one geometry (heads, head_dim, pages, dtype). It holds the plan of one step at a time.

    All tensors lie on the backend's device in its dtype, with a contiguous last dimension; other strides are free
    except where a shape says contiguous. Whatever does not fit raises `InvalidArgument` before anything is written.
    """

    view_unit: int
    """A request's first tokens may be missing from a table in multiples of this, and its bits stay the same."""

    def warm_up(self, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Get ready what would make the first steps slow. The caches must hold nothing yet: they may be written to."""

    def plan(self, table: PageTable | _core.Table) -> StepInputs:
        """Take a table, check it and schedule the work of every later call; returns the step's inputs.

        An engine's own table is copied but for the pages, which are read where its leases keep them: O(requests + rows)
        on the CPU. Once its step has ended the CPU backend refuses to append and run (`LeaseError`).
        """

    @property
    def cascade(self) -> CascadePlan:
        """What the planned requests share, which of it is read once for all of them, and why."""

    @property
    def graph_key(self) -> int | None:
        """Not None if the planned step can be captured in a CUDA graph, or replayed from that of a step with its key.

        Then append and run launch work and do nothing else, and all they read beside their arguments lies in memory
        that every step with this key has; plan() fills it.
        """

    def append(self, k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
        """Write k, v [rows, num_kv_heads, head_dim] into the slots of the caches.

        k_cache, v_cache: [num_pages, page_size, num_kv_heads, head_dim] with equal strides.
        """

    def run(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        out: torch.Tensor,
        *,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
    ) -> None:
        """Attend q [rows, num_qo_heads, head_dim] to the caches; out: the same shape, contiguous.

        sm_scale: factor of q·k, head_dim**-0.5 by default. window_left: how many keys before its own a query sees, -1
        for all. logits_soft_cap: 0 for none, else scaled logits x become cap * tanh(x / cap).
        """
