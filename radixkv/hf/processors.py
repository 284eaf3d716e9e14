"""What changes a row of logits before a token is drawn: penalties, and processors of transformers' convention."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from radixkv.errors import InvalidArgument

if TYPE_CHECKING:
    from radixkv.hf.sampling import Sampling

__all__ = ["Penalties", "Processor", "Processors", "check_processors"]

Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Called with the tokens so far, int64 `[1, tokens]`, and their scores, float32 `[1, vocabulary]`, for each token to
come; returns the scores to draw from. Every `LogitsProcessor` of transformers is one."""


def check_processors(processors: Any) -> list[Processor]:
    """A sequence of callables, such as a `LogitsProcessorList`."""
    if callable(processors) and not isinstance(processors, Iterable):
        raise InvalidArgument(f"processors is {shown(processors)}: give a list of it")
    if isinstance(processors, str) or not isinstance(processors, Iterable):
        raise InvalidArgument(f"processors is {shown(processors)}: give a list of LogitsProcessors or callables")
    found: list[Processor] = list(processors)
    for i, processor in enumerate(found):
        if not callable(processor):
            raise InvalidArgument(f"processors[{i}] is {shown(processor)}: give a LogitsProcessor or another callable")
    return found


class Penalties:
    """Lowers the scores of tokens that were there already. Holds each such token once, with how often it was made."""

    def __init__(self, sampling: Sampling, prompt: np.ndarray, max_new_tokens: int) -> None:
        self._sampling = sampling
        known = np.unique(prompt) if sampling.repetition_penalty != 1 else prompt[:0]
        self._places = {int(token): place for place, token in enumerate(known)}
        self._ids = torch.zeros(len(known) + max_new_tokens, dtype=torch.int64)
        self._ids[: len(known)] = torch.from_numpy(known)
        self._counts = torch.zeros(len(self._ids))
        self._known = len(known)
        self._made: list[int] = []

    def accept(self, token: int) -> None:
        place = self._places.setdefault(token, len(self._places))
        self._ids[place] = token
        self._counts[place] += 1
        self._made.append(token)

    def rewind(self, number: int) -> None:
        while len(self._made) > number:
            token = self._made.pop()
            place = self._places[token]
            self._counts[place] -= 1
            if self._counts[place] == 0 and place >= self._known:
                del self._places[token]  # the last one: those that came after it are gone already

    def apply(self, row: torch.Tensor) -> None:
        """Change the scores `[vocabulary]` in place."""
        s, count = self._sampling, len(self._places)
        ids, counts = self._ids[:count], self._counts[:count]
        scores = row[ids]
        scores = torch.where(scores < 0, scores * s.repetition_penalty, scores / s.repetition_penalty)
        row[ids] = scores - s.presence_penalty * (counts > 0) - s.frequency_penalty * counts


class Processors:
    """The processors of one request, and its tokens as they take them."""

    def __init__(self, processors: list[Processor], prompt: np.ndarray, max_new_tokens: int) -> None:
        self._processors = processors
        self._ids = torch.zeros((1, len(prompt) + max_new_tokens), dtype=torch.int64)
        self._ids[0, : len(prompt)] = torch.from_numpy(prompt)
        self._prompt = self._count = len(prompt)

    def accept(self, token: int) -> None:
        self._ids[0, self._count] = token
        self._count += 1

    def rewind(self, number: int) -> None:
        self._count = min(self._count, self._prompt + number)

    def apply(self, row: torch.Tensor) -> torch.Tensor:
        """The scores `[vocabulary]` that the processors make of `row`, float32."""
        scores = row[None]
        for processor in self._processors:
            changed = processor(self._ids[:, : self._count], scores)
            if not isinstance(changed, torch.Tensor) or changed.shape != scores.shape:
                what = f"shape {tuple(changed.shape)}" if isinstance(changed, torch.Tensor) else shown(changed)
                raise InvalidArgument(
                    f"{type(processor).__name__} returned {what}: return scores of shape {tuple(scores.shape)}"
                )
            scores = changed
        return scores[0]
