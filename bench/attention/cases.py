"""What is measured of attention, for every contender alike. Imports nothing of radixkv: some venvs do not have it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

OUT_OF_CACHE_BYTES = 192 << 20


@dataclass(frozen=True)
class Heads:
    qo: int
    kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.qo}/{self.kv} d{self.dim}"


GQA = (Heads(9, 3, 64), Heads(32, 4, 128))


@dataclass(frozen=True)
class Case:
    """`batch` requests of `length` tokens, of which the last `rows` are queries: one row is a decode."""

    heads: Heads
    batch: int
    rows: int
    length: int
    dtype: str
    repeats: int
    block: int
    """Tokens a block of the cache."""
    kv_dtype: str = "auto"
    """vLLM's name of how K and V are stored: "auto" as `dtype`, or "fp8"."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Case:
        fields = json.loads(text)
        return cls(**fields | {"heads": Heads(**fields["heads"])})


def decode_rounds(repeats: int, layers: int) -> int:
    """How often a decode is timed when each call reads another of so many layers."""
    return max(5, repeats * min(40, layers))


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
