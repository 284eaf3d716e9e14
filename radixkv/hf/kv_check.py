"""Which formats a model's layers take: the cheapest plan whose loss, measured on a text, stays within a bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from radixkv.engine import Engine
from radixkv.errors import InvalidArgument
from radixkv.formats import FORMATS, LayerFormat, RowFormat
from radixkv.hf.adapter import AttentionShape, probe
from radixkv.hf.kv_measure import Loss, Reference
from radixkv.kv_plan import KvPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["KeyProfile", "KvCheck", "Tried", "kv_check"]

_LEAST_TOKENS = 64
Progress = Callable[[int, int], object]
"""Called with the passes over the text that are done, and those expected in all."""


@dataclass(frozen=True)
class KeyProfile:
    """What the keys of one layer look like; of its worst head."""

    constant_share: float
    """Of the keys' energy, what is the same vector in all of them. Near 1: the rest is lost in few bits."""
    large_channel: float
    """The largest channel's root mean square in units of the median channel's."""
    norm: float
    """The largest key in units of the median one."""


@dataclass(frozen=True)
class Tried:
    """A plan, what it costs and what it loses."""

    formats: tuple[str, ...]
    """By layer: a name of `FORMATS`, of the model's own dtype where K and V stay in it."""
    token_bytes: int
    loss: Loss


@dataclass(frozen=True)
class KvCheck:
    """What `kv_check` found."""

    plan: KvPlan
    chosen: Tried
    own_token_bytes: int
    """Of the model's own dtype."""
    tried: list[Tried]
    """All plans that were measured whole, in the order of their bytes."""
    profiles: list[KeyProfile]


def kv_check(
    model: PreTrainedModel,
    tokens: Sequence[int],
    max_kl: float,
    formats: Sequence[str] = ("int8", "k8v4", "int4"),
    progress: Progress | None = None,
) -> KvCheck:
    """The cheapest formats for a model's layers whose mean KL on the second half of `tokens` is at most `max_kl`.

    The keys' centres are the means over the first half. Every layer is measured alone in every format; then all layers
    begin in the cheapest, and those that lose most for the bytes they save go up one by one, until the whole plan, as
    it was measured, is within the bound. The last resort is the model's own dtype, which loses nothing. What is found
    holds for this text; it is a bound on nothing else.

    Cost: about layers * (formats + 0.3) passes over the text, and the memory of `Reference`.

    Raises:
        InvalidArgument: a model that cannot run on the engine, fewer than 64 tokens, an unknown format, or a negative
            or NaN max_kl.
    """
    if len(tokens) < _LEAST_TOKENS:
        raise InvalidArgument(f"{len(tokens)} tokens of text: give {_LEAST_TOKENS} or more, better a thousand")
    if not max_kl >= 0:
        raise InvalidArgument(f"max_kl is {max_kl}: give a bound of 0 or more, such as 0.001")
    unknown = [name for name in formats if name not in FORMATS or name in ("fp32", "bf16", "fp16")]
    if unknown or not formats:
        raise InvalidArgument(f"formats to try: {list(formats)}: give some of fp8, fp8_rotated, int8, k8v4, int4")
    shape = probe(model)
    return _Search(model, shape, tokens, max_kl, list(dict.fromkeys(formats)), progress or (lambda *_: None)).run()


class _Search:
    def __init__(
        self,
        model: PreTrainedModel,
        shape: AttentionShape,
        tokens: Sequence[int],
        max_kl: float,
        names: list[str],
        progress: Progress,
    ) -> None:
        self.shape, self.max_kl, self.progress = shape, max_kl, progress
        self.passes, self.expected = 0, len(shape.layers) * len(names) + len(names) + 8
        self.reference = Reference(model, shape, tokens)
        half = [k[: self.reference.first].flatten(1).mean(0) for k in self.reference.keys]
        self.profiles = [_profile(k) for k in self.reference.keys]
        self.choices = [{name: _centred(FORMATS[name], c) for name in names} for c in half]
        # From the model's own dtype down.
        bits = str(shape.dtype).removeprefix("torch.")
        self.own = LayerFormat(RowFormat(bits), RowFormat(bits)).name
        self.ladder = [self.own, *sorted(names, key=lambda n: -FORMATS[n].token_bytes(shape.layers[0]))]
        self.tried: dict[tuple[str, ...], Tried] = {}

    def run(self) -> KvCheck:
        layers = range(len(self.shape.layers))
        for name in self.ladder[1:]:
            self.measure([name for _ in layers])
        self.measure([self.own for _ in layers])
        cheapest = self.measure([self.ladder[-1] for _ in layers])
        if 0 < self.max_kl < cheapest.loss.kl_mean:
            self.mix()
        fits = [t for t in self.tried.values() if t.loss.kl_mean <= self.max_kl]
        chosen = min(fits, key=lambda t: (t.token_bytes, t.loss.kl_mean))
        tried = sorted(self.tried.values(), key=lambda t: t.token_bytes)
        return KvCheck(self.plan(chosen), chosen, self.bytes_of([self.own for _ in layers]), tried, self.profiles)

    def mix(self) -> None:
        """Measure plans of several formats, by halving, until two neighbours lie on both sides of the bound."""
        layers = range(len(self.shape.layers))
        alone = [{name: self.alone(i, name) for name in self.ladder[1:]} | {self.own: 0.0} for i in layers]
        plans = self.steps(alone)
        low, high = 0, len(plans) - 1  # the last is the model's own dtype everywhere
        while low < high:
            middle = (low + high) // 2
            if self.measure(plans[middle]).loss.kl_mean <= self.max_kl:
                high = middle
            else:
                low = middle + 1
        self.measure(plans[low])

    def steps(self, alone: list[dict[str, float]]) -> list[list[str]]:
        """Plans from all layers in the cheapest format to none, each by the step up that gains most for its bytes."""
        plan = [self.ladder[-1] for _ in alone]
        plans = [list(plan)]
        while any(name != self.own for name in plan):
            gains = [
                ((losses[name] - losses[up]) / max(1, self.bytes_of([up], [i]) - self.bytes_of([name], [i])), -i, up)
                for i, (name, losses) in enumerate(zip(plan, alone, strict=True))
                for up in self.ladder[: self.ladder.index(name)]
            ]
            _, layer, up = max(gains)
            plan[-layer] = up
            plans.append(list(plan))
        return plans

    def alone(self, layer: int, name: str) -> float:
        formats: list[LayerFormat | None] = [None] * len(self.shape.layers)
        formats[layer] = self.choices[layer][name]
        return self.pass_over(formats)[0].kl_mean

    def measure(self, names: list[str]) -> Tried:
        key = tuple(names)
        if key not in self.tried:
            loss = self.pass_over(self.formats_of(key))[0]
            self.tried[key] = Tried(key, self.bytes_of(names), loss)
        return self.tried[key]

    def pass_over(self, formats: Sequence[LayerFormat | None]) -> tuple[Loss, Engine]:
        found = self.reference.loss(formats)
        self.passes += 1
        self.progress(self.passes, max(self.expected, self.passes))
        return found

    def formats_of(self, names: Sequence[str]) -> list[LayerFormat | None]:
        return [None if name == self.own else self.choices[i][name] for i, name in enumerate(names)]

    def bytes_of(self, names: Sequence[str], layers: Sequence[int] | None = None) -> int:
        shapes = self.shape.layers if layers is None else [self.shape.layers[i] for i in layers]
        return sum(FORMATS[name].token_bytes(shape) for name, shape in zip(names, shapes, strict=True))

    def plan(self, chosen: Tried) -> KvPlan:
        """With the largest scales that the chosen plan stored of this text, so that larger ones can be counted."""
        formats = self.formats_of(chosen.formats)
        _, engine = self.pass_over(formats)
        usual = [_usual(stored, engine, i) for i, stored in enumerate(formats)]
        measured = {"text_tokens": len(self.reference.tokens), "max_kl": self.max_kl, **asdict(chosen.loss)}
        return KvPlan(self.shape.layers, tuple(usual), measured)


def _usual(stored: LayerFormat | None, engine: Engine, layer: int) -> LayerFormat | None:
    if stored is None:
        return None
    kv = engine.pool.layers[layer]
    largest = [float("inf") if s is None else float(s[s.isfinite()].max()) for s in (kv.k_scales, kv.v_scales)]
    return LayerFormat(stored.k, stored.v, stored.k_centre, (largest[0], largest[1]))


def _centred(stored: LayerFormat, centre: torch.Tensor) -> LayerFormat:
    return LayerFormat(stored.k, stored.v, tuple(centre.tolist()))


def _profile(k: torch.Tensor) -> KeyProfile:
    energy = k.square().sum(-1).mean(0)
    constant = k.mean(0).square().sum(-1) / energy.clamp(min=1e-30)
    channels = k.square().mean(0).sqrt()
    norms = k.norm(dim=-1)
    return KeyProfile(
        constant_share=float(constant.max()),
        large_channel=float((channels.amax(-1) / channels.median(-1).values.clamp(min=1e-30)).max()),
        norm=float((norms.amax(0) / norms.median(0).values.clamp(min=1e-30)).max()),
    )
