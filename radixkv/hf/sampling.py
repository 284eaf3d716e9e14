"""From logits to tokens: greedy, or drawn with temperature, top-k, top-p and min-p by each request's own generator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from radixkv.errors import InvalidArgument, InvalidLogits
from radixkv.hf.processors import Penalties, Processor, Processors
from radixkv.scheduling.arguments import integer, number

__all__ = ["Draw", "Sampler", "Sampling", "TokenLogprob", "likeliest", "log_probability", "sample"]

_BLOCK = 16
"""Rows whose argmax is taken at a time on the CPU: widened to 32 bits, a few rows stay in the processor's cache."""

_LIKELIEST = 1024
"""Tokens that top-p looks at before it sorts the whole vocabulary."""

_DOUBT = 1e-9
"""Share of the weights by which sums in another order cannot differ."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy (argmax) and ignores top_k, top_p, min_p and seed.

    `top_k` 0, `top_p` 1 and `min_p` 0 are off, and so are penalties of 1 (repetition) and 0. The order is that of
    transformers: repetition penalty, temperature, top-k, top-p over what top-k left, and of the rest those at least
    `min_p` times as likely as the likeliest. `repetition_penalty` divides the positive scores of all tokens so far,
    the prompt's included, and multiplies negative ones; as in OpenAI's API, `presence_penalty` is taken from the scores
    of generated tokens and `frequency_penalty` once for each time they were. Raises InvalidArgument for values of a
    wrong type or out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        values = {
            "temperature": number("temperature", self.temperature),
            "top_k": integer("top_k", self.top_k, 0),
            "top_p": number("top_p", self.top_p),
            "seed": integer("seed", self.seed, -(2**63)),
            "min_p": number("min_p", self.min_p),
            "repetition_penalty": number("repetition_penalty", self.repetition_penalty),
            "presence_penalty": number("presence_penalty", self.presence_penalty),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty),
        }
        if not (math.isfinite(values["temperature"]) and values["temperature"] >= 0):
            raise InvalidArgument(f"temperature is {self.temperature}: give a finite number, 0 (greedy) or above")
        if not 0 < values["top_p"] <= 1:
            raise InvalidArgument(f"top_p is {self.top_p}: give a probability above 0, at most 1 (off)")
        if not 0 <= values["min_p"] <= 1:
            raise InvalidArgument(f"min_p is {self.min_p}: give 0 (off) to 1")
        if not (math.isfinite(values["repetition_penalty"]) and values["repetition_penalty"] > 0):
            raise InvalidArgument(f"repetition_penalty is {self.repetition_penalty}: give a number above 0, 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(values[name]):
                raise InvalidArgument(f"{name} is {values[name]}: give a finite number, 0 is off")
        for name, value in values.items():
            object.__setattr__(self, name, value)  # as plain numbers

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class Sampler:
    """How the tokens of one request are chosen, and its random numbers: one a token, from a generator seeded once.

    So a request that is interrupted and continued later draws what it would have drawn at once.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: np.ndarray | None = None,
        max_new_tokens: int = 0,
        processors: Sequence[Processor] = (),
    ) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._random: list[float] = []
        self._penalties = self._processors = None
        if prompt is not None and sampling.penalizes:
            self._penalties = Penalties(sampling, prompt, max_new_tokens)
        if prompt is not None and processors:
            self._processors = Processors(list(processors), prompt, max_new_tokens)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token of the model's own logits."""
        return not (self.sampling.temperature or self._penalties or self._processors)

    def random(self, number: int) -> float:
        """The random number, 0 to 1, of the token of this `number`: one that was asked for before, or the next."""
        if number == len(self._random):
            self._random.append(float(torch.rand((), generator=self._generator, dtype=torch.float64)))
        return self._random[number]

    def accept(self, token: int) -> None:
        """The next token of the request, for those that look at what was said."""
        for history in (self._penalties, self._processors):
            if history is not None:
                history.accept(token)

    def rewind(self, number: int) -> None:
        """Forget the tokens from this `number` on, which were accepted and then drawn once more."""
        for history in (self._penalties, self._processors):
            if history is not None:
                history.rewind(number)

    def draw(self, logits: torch.Tensor, number: int) -> int:
        """The token of this `number` by a row of logits `[vocabulary]` on the CPU."""
        if self._penalties or self._processors:
            logits = logits.to(torch.float32, copy=True)
            if self._penalties:
                self._penalties.apply(logits)
            if self._processors:
                logits = self._processors.apply(logits).to("cpu")
        if not self.sampling.temperature:
            best = int(logits.argmax())
            _check_best(float(logits[best]))
            return best
        return _drawn(logits.to(torch.float64), self.sampling, self.random(number))


class Draw(NamedTuple):
    """A token to choose: by which row of the logits, how, and which number in its request it has, from 0."""

    row: int
    sampler: Sampler
    number: int
    drafts: Sequence[int] = ()
    """Guesses of it and of what follows; the rows after `row` are those of these tokens."""


def sample(logits: torch.Tensor, draws: Sequence[Draw]) -> list[list[int] | Exception]:
    """The tokens of each of `draws`, from logits `[rows, vocabulary]` of any float dtype and device.

    One token each; where it is the draw's first guess the next one as well, by the row after it, and so on. Each is
    what it would be alone, bit for bit. The plain greedy ones are taken together, and wait for the device once.
    The others follow from 64-bit sums over their own row, whose order must not depend on the batch, so each is on its
    own; with real vocabularies that costs no more than doing them together. In place of tokens stands what went wrong:
    InvalidLogits, or what a processor raised. After guesses that were right it only ends the list.
    """
    rows = _Rows(logits.detach(), [draw.sampler for draw in draws])
    return [_tokens(rows, draw) for draw in draws]


def _tokens(rows: _Rows, draw: Draw) -> list[int] | Exception:
    tokens: list[int] = []
    if draw.drafts:
        draw.sampler.rewind(draw.number)
    for ahead, guess in enumerate([*draw.drafts, None]):
        try:
            tokens.append(rows.token(draw.row + ahead, draw.sampler, draw.number + ahead))
        except Exception as error:
            return tokens or error
        if tokens[-1] != guess:
            break
        draw.sampler.accept(tokens[-1])
    return tokens


class _Rows:
    """Logits to choose tokens by, for these samplers: what can be done for all rows together is."""

    def __init__(self, logits: torch.Tensor, samplers: Sequence[Sampler]) -> None:
        plain = [sampler.plain for sampler in samplers]
        self._best = _argmax(logits) if any(plain) else []
        self._host = logits if all(plain) else logits.to("cpu")

    def token(self, row: int, sampler: Sampler, number: int) -> int:
        """The token of this `number` in its request, by this row; raises InvalidLogits, or what a processor raised."""
        if not sampler.plain:
            return sampler.draw(self._host[row], number)
        token, value = self._best[row]
        _check_best(value)
        return token


def _check_best(value: float) -> None:
    """Refuse a row by its largest logit, which is NaN if any is."""
    if not math.isfinite(value):
        why = "a processor left no token to choose" if value == -math.inf else "the model computed NaN or overflowed"
        raise InvalidLogits(f"the largest logit is {value}: {why}")


def _argmax(logits: torch.Tensor) -> list[tuple[int, float]]:
    """The first of the largest logits of each row, and it. On the CPU by NumPy: its argmax uses vector instructions."""
    if logits.device.type != "cpu":
        values, tokens = logits.max(1)
        both = torch.stack([tokens.double(), values.double()], dim=1).tolist()
        return [(int(token), value) for token, value in both]
    wide = torch.promote_types(logits.dtype, torch.float32)
    found: list[tuple[int, float]] = []
    for i in range(0, len(logits), _BLOCK):
        block = logits[i : i + _BLOCK].to(wide).numpy()
        tokens = block.argmax(1)
        found += zip(tokens.tolist(), block[np.arange(len(block)), tokens].tolist(), strict=True)
    return found


def _drawn(logits: torch.Tensor, sampling: Sampling, random: float) -> int:
    """The token that `random`, 0 to 1, falls on."""
    largest = logits.max()
    _check_best(float(largest))
    weights = torch.softmax((logits - largest) / sampling.temperature, dim=0)
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return _place_of(random, weights)
    left = likeliest(weights, sampling)
    place = _place_of(random, left)
    weight = left[place]
    equals = (weights == weight).nonzero()[:, 0]  # of equal ones the smaller id comes first
    return int(equals[place - int((left > weight).sum())])


def _place_of(random: float, weights: torch.Tensor) -> int:
    cumulative = weights.cumsum(0)
    place = torch.searchsorted(cumulative, random * cumulative[-1], right=True)
    return int(place.clamp(max=len(weights) - 1))


def likeliest(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The weights of the tokens left to choose from, largest first."""
    left = _by_min_p(weights, sampling) if sampling.top_k == 0 and sampling.top_p == 1 else _by_top(weights, sampling)
    return left[left >= sampling.min_p * left[0]]


def _by_min_p(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    return weights[weights >= sampling.min_p * weights.max()].sort(descending=True).values


def _by_top(weights: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """What top-k and top-p leave."""
    if sampling.top_k:
        top = weights.topk(min(sampling.top_k, len(weights))).values
        return top[: int(((top.cumsum(0) - top) < sampling.top_p * top.sum()).sum())]
    top = weights.topk(min(_LIKELIEST, len(weights))).values
    before, limit = top.cumsum(0) - top, sampling.top_p * weights.sum()
    if before[-1] < limit * (1 + _DOUBT) or bool(((before - limit).abs() <= limit * _DOUBT).any()):
        top = weights.sort(descending=True).values  # more are needed, or the order of the sum might decide
        before, limit = top.cumsum(0) - top, sampling.top_p * top.sum()
    return top[: int((before < limit).sum())]


class TokenLogprob(NamedTuple):
    """How likely the model held a token to be, by its own logits: before penalties, processors and temperature."""

    token: int
    logprob: float
    top: dict[int, float]
    """The likeliest tokens and their log-probabilities, falling; as many as were asked for."""


def log_probability(row: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """The log-probability of `token`, and of the `count` likeliest, by logits `[vocabulary]`."""
    logprobs = row.detach().to(torch.float32).log_softmax(0)
    top = logprobs.topk(min(count, len(logprobs)))
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return TokenLogprob(token, float(logprobs[token]), dict(pairs))
