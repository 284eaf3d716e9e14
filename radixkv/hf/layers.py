"""What the layers of some models leave unsaid when they call their attention, and what they ask of a cache.

For most models there is nothing to do here, and the step is handed to them as it is.
"""

from __future__ import annotations

from typing import Any

import torch

from radixkv.errors import InvalidArgument
from radixkv.hf.config import attention_chunks, cache_argument, stored_layers

__all__ = ["position_arguments", "step_for"]


def step_for(config: Any, step: Any) -> Any:
    """`step`, or a stand-in that knows what layers do not tell their attention. `config`: of the model's text part."""
    stored, chunks = stored_layers(config), attention_chunks(config)
    return step if stored is None and chunks is None else _LayeredStep(step, stored, chunks)


class _LayeredStep:
    """A step of a model with layers that attend to another's K and V (Gemma 3n, Gemma 4 E) or in chunks (Llama 4).

    Of K and V that several layers share one layer of the engine has the only copy, and it is written once.
    """

    def __init__(self, step: Any, stored: list[int] | None, chunks: list[int] | None) -> None:
        self._step = step
        self._stored = stored
        self._chunks = chunks
        self._keys: dict[int, torch.Tensor] = {}  # of each layer of the engine, as it was written

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> Any:
        if self._chunks is not None:
            options["attention_chunk"] = self._chunks[layer]
        if self._stored is None:
            return self._step.attend(layer, q, k, v, **options)
        target = self._stored[layer]
        written = self._keys.setdefault(target, k)
        if written is k:
            return self._step.attend(target, q, k, v, **options)
        if written.data_ptr() != k.data_ptr() or written.shape != k.shape:
            raise InvalidArgument(
                f"layer {layer} shares the K and V of an earlier layer by its configuration, but attends to others"
            )
        return self._step.attend(target, q, **options)


def position_arguments(config: Any, positions: torch.Tensor) -> dict[str, Any]:
    """What to call a model with, besides position_ids, so that its rows stand at `positions`, int64 `[rows]`."""
    if getattr(config, "attn_temperature_tuning", None):
        return {cache_argument(): _RowPositions(positions)}
    return {}


class _RowPositions:
    """Stands in for a cache: Llama 4 scales queries by positions that it counts from the length of its cache on."""

    def __init__(self, positions: torch.Tensor) -> None:
        self._before = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer: int = 0) -> torch.Tensor:
        """For each row, how many tokens precede the step's first row if they are counted from there."""
        return self._before

    def update(self, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return k, v
