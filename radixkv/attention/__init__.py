"""Attention over a page table: what every backend offers.

A backend is told about a step once (`plan`) and then serves every layer of it (`append`, then `run`):

    backend = backend_for(pool.layers, dtype)
    backend.plan(table)
    for layer in range(num_layers):
        backend.append(layer, k, v)
        backend.run(layer, q, out, Options(window_left=1024))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from radixkv.errors import BackendUnavailable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from radixkv import _core
    from radixkv.attention.cascade import CascadePlan
    from radixkv.pool import LayerKV

__all__ = ["Attention", "Options", "PageTable", "StepInputs", "StoredRows", "backend_for", "check_device"]


class Options(NamedTuple):
    """What layers of one model may differ in, beside what they store."""

    sm_scale: float | None = None
    """Factor of q·k; None: k_dim ** -0.5, which a latent layer does not take."""
    window_left: int = -1
    """How many keys before its own a query sees; -1: all."""
    logits_soft_cap: float = 0.0
    """0: none; else scaled logits x become cap * tanh(x / cap)."""
    attention_chunk: int = 0
    """0: none; else positions are cut at its multiples, and a query sees no key before the last cut."""

    @property
    def lookback(self) -> int:
        """How many keys before its own a query sees at most; -1: all."""
        if not self.attention_chunk:
            return self.window_left
        in_chunk = self.attention_chunk - 1
        return in_chunk if self.window_left < 0 else min(self.window_left, in_chunk)


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


class StoredRows(NamedTuple):
    """Counts of rows, each of one head, that were stored in 8 or 4 bits."""

    rows: int
    not_finite: int
    """With NaN or an infinity: whoever sees such a row gets NaN. Counted where rows have a scale of their own."""
    unusual: int
    """With a scale above the largest that `radixkv kv-check` saw or, of fp8, with numbers that are too large for it."""
    sampled: int
    """One of 1,024: those of which the errors are."""
    mean_error: float
    """||stored - x|| / ||x||: of storage, not of answers."""
    largest_error: float

    @classmethod
    def of(cls, counts: _core.RowCounts) -> StoredRows:
        """From the core's counts."""
        mean = counts.error_sum / counts.sampled if counts.sampled else 0.0
        return cls(counts.rows, counts.not_finite, counts.unusual, counts.sampled, mean, counts.error_most)


class Attention(Protocol):
    """A backend over the layers of one pool. It holds the plan of one step at a time.

    All tensors lie on the backend's device in its dtype, with a contiguous last dimension; other strides are free
    except where a shape says contiguous. Whatever does not fit raises `InvalidArgument` before anything is written.
    """

    view_unit: int
    """A request's first tokens may be missing from a table in multiples of this, and its bits stay the same."""

    def warm_up(self) -> None:
        """Get ready what would make the first steps slow. The pool must hold nothing yet: it may be written to."""

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

    @property
    def graph_window(self) -> int:
        """What a replay of the planned step may look back: the widest window_left of steps with its key; -1: all."""

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write k [rows, num_kv_heads, k_dim] and v [rows, num_kv_heads, v_dim] into the slots of the layer's pages.

        Of a latent layer v is k[..., :v_dim].
        """

    def run(
        self, layer: int, q: torch.Tensor, out: torch.Tensor, options: Options = ..., sinks: torch.Tensor | None = None
    ) -> None:
        """Attend q [rows, num_qo_heads, k_dim] to the layer's pages; out: [rows, num_qo_heads, v_dim], contiguous.

        sinks: float32 [num_qo_heads], contiguous: a logit for each head, part of its softmax, without a value.
        """


def check_device(device: torch.device, *, cuda_graphs: bool = False) -> None:
    """Raise `BackendUnavailable` unless there is a backend for this device; says what to change."""
    if device.type == "cuda":
        from radixkv.attention.flashinfer import load

        load(device)
    elif device.type != "cpu":
        raise BackendUnavailable(f"no attention backend for device {device}: use device='cpu' or device='cuda'")
    elif cuda_graphs:
        raise BackendUnavailable(f"cuda_graphs on {device}: leave it out there, or use device='cuda'")


def backend_for(layers: Sequence[LayerKV], dtype: torch.dtype, *, cuda_graphs: bool = False) -> Attention:
    """The backend for the device on which these layers lie. dtype: of q, k, v and the outputs.

    Raises:
        BackendUnavailable: none for this device, dtype or these layers, or a package is missing; says what to change.
    """
    device = layers[0].k.device
    check_device(device, cuda_graphs=cuda_graphs)
    if device.type == "cuda":
        from radixkv.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(layers, dtype=dtype, cuda_graphs=cuda_graphs)
    from radixkv.attention.native import NativeAttention

    return NativeAttention(layers, dtype=dtype)
