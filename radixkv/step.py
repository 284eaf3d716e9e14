"""Step: one forward pass over a batch of leases."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from radixkv import _core
from radixkv.attention import Options
from radixkv.attention.checks import layer_at
from radixkv.cache import Lease
from radixkv.content import FIRST_CONTENT_TOKEN
from radixkv.errors import InvalidArgument, LeaseError

if TYPE_CHECKING:
    from radixkv.attention.cascade import CascadePlan
    from radixkv.engine import Engine

__all__ = ["Step"]

_TIMED_ROWS = 64  # steps of fewer rows do not tell how fast prompts are computed


class Step(_core.Step):
    """The packed rows of all leases of a batch, and attention over them. Made by `Engine.step`; a context manager.

    A lease's rows are its unwritten tokens, in order, or the first `max_rows` of them. Entering makes the leases'
    pending page copies and plans attention; leaving normally advances each lease by its rows; an exception leaves them
    as they were. In between the leases can be read only. A step that is dropped without being left lets go of them.

    Raises (on entering):
        InvalidArgument: no lease, one twice, one of another engine, one with nothing to compute.
        LeaseError: another step of the engine is open, or a lease is released, another thread's or in another step.

    Attributes (set on entering):
        input_ids: int64 [rows], the rows' tokens. On CUDA this and the next two lie in memory that later steps fill
            again: clone what you keep.
        positions: int64 [rows], each row's index in its sequence.
        last_rows: int64 [leases], the last row of each lease: its logits predict the token that follows it.
        graph_key: the number of leases, if the step can be captured in a CUDA graph or replayed from one; else None.
            So it is for steps with one row for each lease of an engine with cuda_graphs=True. Steps with equal keys
            have the same memory for the three tensors above and all that `attend` reads beside its arguments: see
            `replay`.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    last_rows: torch.Tensor
    graph_key: int | None = None
    _clock: float = 0.0  # when it was entered, where the tiers want to know how fast prompts are computed

    def __init__(self, engine: Engine, leases: Sequence[Lease], max_rows: int | None = None) -> None:
        super().__init__(engine.table, leases, len(engine.layers), max_rows)
        self._engine = engine
        self._plan: CascadePlan | None = None

    def _prepare(self) -> None:
        """Makes the pending copies and plans attention; the page table is assembled."""
        engine, table = self._engine, self._engine.table
        engine.pool.copy_pages(table.copy_source, table.copy_target)
        self.input_ids, self.positions, self.last_rows = engine.attention.plan(table)
        self.graph_key = engine.attention.graph_key
        self._rows = len(self.input_ids)
        self._window_limit = table.window_limit
        self._plan = None
        timed = engine.tiers is not None and self._rows >= _TIMED_ROWS
        self._clock = time.perf_counter() if timed else 0.0
        done = None if engine.device_pages is None else engine.device_pages.step_begins(timed)
        if done is not None and engine.tiers is not None:
            engine.tiers.planner.computed(*done)

    def replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """Launch a forward pass that was captured in a step with the same graph_key, in place of attending.

            with engine.step(leases) as step:
                if step.graph_key in graphs:
                    graph, logits = graphs[step.graph_key]
                    step.replay(graph)
                else:
                    logits = forward(step)
                    if step.graph_key is not None:
                        graph = torch.cuda.CUDAGraph()
                        with torch.cuda.graph(graph):  # records, runs nothing
                            graphs[step.graph_key] = graph, forward(step)

        The graph's output lies in its own memory and is overwritten by its next replay.

        Raises:
            LeaseError: the step is not open. InvalidArgument: the step has no graph_key, or a lease has dropped pages
                that a step with this key attended to.
        """
        if not self.is_open:
            raise LeaseError("the step is not open: replay inside `with engine.step(leases) as step`")
        if self.graph_key is None:
            raise InvalidArgument(
                f"a step of {self.num_leases} leases and {self._rows} rows without a graph_key cannot be "
                "replayed: run its layers, or make the engine with cuda_graphs=True"
            )
        self._check_window(self._engine.attention.graph_window)
        graph.replay()
        for layer in range(len(self._engine.layers)):
            self._attended(layer)

    @property
    def content_rows(self) -> torch.Tensor:
        """int64, the rows whose tokens are of `radixkv.content_tokens`: the model needs your embeddings there.

        `positions` and `last_rows` say of which lease each is, and which of its content's rows.
        """
        return (self.input_ids >= FIRST_CONTENT_TOKEN).nonzero().flatten()

    @property
    def plan(self) -> CascadePlan:
        """What the leases of this step share and what is made of it: ``print(step.plan.explain())``.

        Made when first asked for, which the step must be open for; it stays valid after the step.

        Raises:
            LeaseError: the step is not open.
        """
        if self._plan is None:
            if not self.is_open:
                raise LeaseError("the step is not open: ask for its plan inside `with engine.step(leases) as step`")
            self._plan = self._engine.attention.cascade
        return self._plan

    def attend(
        self,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor | None = None,
        v: torch.Tensor | None = None,
        *,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float = 0.0,
        attention_chunk: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes k and v of the rows into their pages, then attends causally to everything up to each row.

        Without k and v it attends to what this step has written to the layer already: a model whose layers share the
        K and V of another needs one layer of the engine for all of them.

        Args:
            layer: 0 to num_layers - 1; each must be given k and v once before the step is left.
            q: [rows, num_qo_heads, k_dim]; k: [rows, num_kv_heads, k_dim]; v: [rows, num_kv_heads, v_dim]; of the
                engine's dtype, rotary embedding applied, last dimension contiguous (other strides are free: no copy is
                made). Of a latent layer v is k[..., :v_dim], and q and out are in the latent's dimensions.
            sm_scale: factor on the logits; k_dim ** -0.5 by default, and required by a latent layer.
            window_left: a query sees at most this many keys before its own; -1: all, which no lease that dropped pages
                allows.
            logits_soft_cap: c > 0 turns a scaled logit x into c * tanh(x / c).
            attention_chunk: n > 0 hides from a query at position p the keys before p // n * n (Llama 4).
            sinks: float32 [num_qo_heads], contiguous: a logit for each head that takes part in its softmax and has no
                value (gpt-oss).

        Returns:
            [rows, num_qo_heads, v_dim], contiguous, of the engine's dtype.

        Raises:
            InvalidArgument: a shape, dtype, stride or window that does not fit, or no k and v for a layer that has
                none of this step. LeaseError: the step is not open.
        """
        if not self.is_open:
            raise LeaseError("the step is not open: attend inside `with engine.step(leases) as step`")
        engine = self._engine
        shape = layer_at(engine.pool.layers, layer).shape
        options = Options(sm_scale, window_left, logits_soft_cap, attention_chunk)
        self._check_window(options.lookback)
        if k is None or v is None:
            self._check_written(layer, k, v)
        out = torch.empty((self._rows, shape.num_qo_heads, shape.v_dim), dtype=engine.dtype, device=engine.device)
        if k is not None and v is not None:
            engine.attention.append(layer, k, v)
        engine.attention.run(layer, q, out, options, sinks)
        self._attended(layer)
        if self._clock and layer == len(engine.layers) - 1:
            self._was_timed()
        return out

    def _was_timed(self) -> None:
        """The last layer is computed, or launched."""
        engine = self._engine
        assert engine.tiers is not None
        if engine.device_pages is not None:
            engine.device_pages.step_ends(self._rows)
        else:
            engine.tiers.planner.computed(self._rows, time.perf_counter() - self._clock)
        self._clock = 0.0

    def _check_written(self, layer: int, k: torch.Tensor | None, v: torch.Tensor | None) -> None:
        """Raise unless neither k nor v is given and this step has written the layer."""
        if k is not None or v is not None:
            raise InvalidArgument(
                f"layer {layer} is given {'v' if k is None else 'k'} alone: give both k and v, or none"
            )
        if not self._has_attended(layer):
            raise InvalidArgument(
                f"layer {layer} is given no k and v, but this step has written none to it: attend it with k and v first"
            )

    def _check_window(self, window_left: int) -> None:
        """Raise if rows would look at dropped pages."""
        if self._window_limit >= 0 and not 0 <= window_left <= self._window_limit:
            raise InvalidArgument(
                f"window_left is {window_left}, but a lease of this step has dropped its first tokens: rows may look "
                f"back {self._window_limit} keys at most"
            )
