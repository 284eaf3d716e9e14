"""From logits to a token: greedy, or drawn with temperature, top-k and top-p from a generator of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from radixkv.errors import InvalidArgument
from radixkv.hf.arguments import integer, number

__all__ = ["Sampler", "Sampling"]


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
    """Draws the tokens of one request. The i-th drawn token consumes the i-th number of a generator seeded once.

    So a request that is interrupted and continued later draws what it would have drawn at once.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """The next token for `logits`, `[vocabulary]` of any float dtype and device."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        weights, tokens = _candidates(logits.detach().to("cpu", torch.float64), self.sampling)
        cumulative = weights.cumsum(0)
        drawn = torch.rand((), generator=self._random, dtype=torch.float64) * cumulative[-1]
        index = int(torch.searchsorted(cumulative, drawn, right=True).clamp(max=len(weights) - 1))
        return index if tokens is None else int(tokens[index])


def _candidates(logits: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights of the tokens left to choose from, and their ids, likeliest first (None: all, in order of id)."""
    weights = torch.softmax((logits - logits.max()) / sampling.temperature, dim=0)
    if not sampling.top_k and sampling.top_p == 1:
        return weights, None
    weights, tokens = weights.sort(descending=True, stable=True)
    if sampling.top_k:
        weights, tokens = weights[: sampling.top_k], tokens[: sampling.top_k]
    before = weights.cumsum(0) - weights
    kept = int((before < sampling.top_p * weights.sum()).sum())
    return weights[:kept], tokens[:kept]
