"""From logits to tokens: greedy, or drawn with temperature, top-k and top-p from a generator of each request's own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from radixkv.errors import InvalidArgument
from radixkv.scheduling.arguments import integer, number

__all__ = ["Draw", "Sampler", "Sampling", "likeliest", "sample"]

_BLOCK = 16
"""Rows whose argmax is taken at a time on the CPU: widened to 32 bits, a few rows stay in the processor's cache."""

_LIKELIEST = 1024
"""Tokens that top-p looks at before it sorts the whole vocabulary."""

_DOUBT = 1e-9
"""Share of the weights by which sums in another order cannot differ."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy (argmax) and ignores the rest.

    `top_k` 0 and `top_p` 1 are off. The order is that of transformers: temperature, then top-k, then top-p over what
    top-k left. Raises InvalidArgument for values of a wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        values = {
            "temperature": number("temperature", self.temperature),
            "top_k": integer("top_k", self.top_k, 0),
            "top_p": number("top_p", self.top_p),
            "seed": integer("seed", self.seed, -(2**63)),
        }
        if not (math.isfinite(values["temperature"]) and values["temperature"] >= 0):
            raise InvalidArgument(f"temperature is {self.temperature}: give a finite number, 0 (greedy) or above")
        if not 0 < values["top_p"] <= 1:
            raise InvalidArgument(f"top_p is {self.top_p}: give a probability above 0, at most 1 (off)")
        for name, value in values.items():
            object.__setattr__(self, name, value)  # as plain numbers


class Sampler:
    """How the tokens of one request are chosen, and its random numbers: one a token, from a generator seeded once.

    So a request that is interrupted and continued later draws what it would have drawn at once.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._random = torch.empty(0)
        self._number = -1

    def random(self, number: int) -> torch.Tensor:
        """The random number, 0 to 1, of the token of this `number`: the last one that was asked for, or the next."""
        if number > self._number:
            self._random = torch.rand((), generator=self._generator, dtype=torch.float64)
            self._number += 1
        assert number == self._number, "tokens are drawn in order"
        return self._random


class Draw(NamedTuple):
    """A token to choose: by which row of the logits, how, and which number in its request it has, from 0."""

    row: int
    sampler: Sampler
    number: int


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """A token for each of `draws`, from logits `[rows, vocabulary]` of any float dtype and device.

    Each is what it would be alone, bit for bit. The greedy ones are taken together, and wait for the device once. The
    others follow from 64-bit sums over their own row, whose order must not depend on the batch, so each is on its own;
    with real vocabularies that costs no more than doing them together.
    """
    logits = logits.detach()
    hot = [draw.sampler.sampling.temperature > 0 for draw in draws]
    best = [] if all(hot) else _argmax(logits)
    host = logits.to("cpu") if any(hot) else logits
    return [
        _drawn(host[row].to(torch.float64), sampler.sampling, sampler.random(number))
        if sampler.sampling.temperature
        else best[row]
        for row, sampler, number in draws
    ]


def _argmax(logits: torch.Tensor) -> list[int]:
    """The first of the largest logits of each row. On the CPU by NumPy, whose argmax uses vector instructions."""
    if logits.device.type != "cpu":
        return [int(token) for token in logits.argmax(1).tolist()]
    wide = torch.promote_types(logits.dtype, torch.float32)
    blocks = (logits[i : i + _BLOCK] for i in range(0, len(logits), _BLOCK))
    return [token for block in blocks for token in block.to(wide).numpy().argmax(1).tolist()]


def _drawn(logits: torch.Tensor, sampling: Sampling, random: torch.Tensor) -> int:
    """The token that `random`, 0 to 1, falls on."""
    weights = torch.softmax((logits - logits.max()) / sampling.temperature, dim=0)
    if not sampling.top_k and sampling.top_p == 1:
        return _place_of(random, weights)
    left = likeliest(weights, sampling)
    place = _place_of(random, left)
    weight = left[place]
    equals = (weights == weight).nonzero()[:, 0]  # of equal ones the smaller id comes first
    return int(equals[place - int((left > weight).sum())])


def _place_of(random: torch.Tensor, weights: torch.Tensor) -> int:
    cumulative = weights.cumsum(0)
    place = torch.searchsorted(cumulative, random * cumulative[-1], right=True)
    return int(place.clamp(max=len(weights) - 1))


def likeliest(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The weights of the tokens left to choose from, largest first."""
    if sampling.top_k:
        top = weights.topk(min(sampling.top_k, len(weights))).values
        return top[: int(((top.cumsum(0) - top) < sampling.top_p * top.sum()).sum())]
    top = weights.topk(min(_LIKELIEST, len(weights))).values
    before, limit = top.cumsum(0) - top, sampling.top_p * weights.sum()
    if before[-1] < limit * (1 + _DOUBT) or bool(((before - limit).abs() <= limit * _DOUBT).any()):
        top = weights.sort(descending=True).values  # more are needed, or the order of the sum might decide
        before, limit = top.cumsum(0) - top, sampling.top_p * top.sum()
    return top[: int((before < limit).sum())]
