"""The rows of the table: `ratio` is how many times better than the fastest peer."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Callable, Iterator
from typing import Any

from bench.cache.workload import COMMIT_UNDER, LENGTHS
from bench.common import table
from bench.common.table import OURS, Row

TREES = ("sglang rust", "sglang python")
HIT_TOLERANCE = 1e-4  # of a hit rate: caches that break ties differently differ by less


class _Rows:
    def __init__(self, results: dict[str, Any]) -> None:
        self.contenders = {name: c for name, c in results["contenders"].items() if "error" not in c}
        self.ours = self.contenders.get(OURS, {})

    def row(
        self,
        measure: str,
        unit: str,
        path: tuple[str, ...],
        goal: str,
        met: Callable[[float, float | None], bool] | None,
        more_is_better: bool = False,
        peers: tuple[str, ...] | None = None,
    ) -> Row:
        """`met` is given our figure and the ratio (None where no peer has a figure)."""
        figures = {}
        for name, found in self.contenders.items():
            value: Any = found
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None:
                figures[name] = float(value)
        others = [v for name, v in figures.items() if name != OURS and (peers is None or name in peers)]
        own, ratio = figures.get(OURS), None
        if own is not None and others:
            ratio = own / max(others) if more_is_better else min(others) / own
        return Row(measure, unit, figures, ratio, goal, None if own is None or met is None else met(own, ratio))


def _at_least(times: float) -> Callable[[float, float | None], bool]:
    return lambda own, ratio: ratio is not None and ratio >= times


def rows(results: dict[str, Any]) -> Iterator[Row]:
    make = _Rows(results)
    for length in map(str, LENGTHS):
        name = f"acquire {int(length) // 1024}k"
        most = 1.5 * results["memcmp_us"][length] + 1
        yield make.row(f"{name}, of memcmp", "us", ("acquire_us", length), f"<= {most:.2f}", _most(most))
        yield make.row(f"{name}, of peers", "us", ("acquire_us", length), ">= 8x", _at_least(8))
    for length in map(str, COMMIT_UNDER):
        name = f"commit 1k under {int(length) / 1024:g}k"
        yield make.row(name, "us", ("commit_us", length), ">= 10x", _at_least(10))
        yield make.row(f"turn of 1k on {int(length) / 1024:g}k", "us", ("turn_us", length), "", None)
    commits = make.ours.get("commit_us")
    if commits:
        yield _flat("commit, from its median", list(commits.values()))
    evict = make.ours.get("evict", {})
    for nodes in evict:
        name = f"evict, {int(nodes):,} nodes"
        compared = any(nodes in make.contenders.get(peer, {}).get("evict", {}) for peer in TREES)
        goal, met = (">= 10x of trees", _at_least(10)) if compared else ("", None)
        yield make.row(name, "ns/page", ("evict", nodes, "ns_per_page"), goal, met, peers=TREES)
    if evict:
        yield _flat("evict, from its median", [found["ns_per_page"] for found in evict.values()])
    yield make.row("metadata", "B/token", ("metadata_bytes",), "<= 6", _most(6))
    whole = (
        make.ours.get("replay", {}).get("requests", 0) > 10_000
    )  # the first requests find nothing and touch new memory
    goal, met = (">= 60000", _least(60_000)) if whole else ("", None)
    rate = make.row("replay", "requests/s", ("replay", "requests_per_s"), goal, met, True)
    yield rate
    if rate.figures:
        aligned = ("replay_aligned", "requests_per_s")
        yield make.row("replay, full pages only", "requests/s", aligned, goal, met, True)
        replays = [found["replay"] for name, found in make.contenders.items() if name != OURS and "replay" in found]
        same = make.ours.get("replay", {}).get("requests")
        best = max((found["hit_rate"] for found in replays if found["requests"] == same), default=None)
        met = None if best is None else _least(best - HIT_TOLERANCE)
        yield make.row("hit rate", "%", ("replay", "hit_rate"), "no peer's is better", met, True)
        ours = make.ours.get("replay_aligned", {}).get("hit_rate")
        if ours is not None and best is not None:
            figures = {OURS: ours, "best peer": best}
            yield Row("hit rate, full pages only", "%", figures, ours / best, "no peer's is better", ours >= best)
    yield make.row("cold start", "ms", ("cold_start_ms",), "<= 60", _most(60))


def _most(limit: float) -> Callable[[float, float | None], bool]:
    return lambda own, _: operator.le(own, limit)


def _least(limit: float) -> Callable[[float, float | None], bool]:
    return lambda own, _: operator.ge(own, limit)


def _flat(name: str, values: list[float]) -> Row:
    """How far our own figures lie apart: the largest deviation from their median, as a share of it."""
    median = statistics.median(values)
    most = max(abs(value / median - 1) for value in values)
    return Row(name, "%", {OURS: most}, None, "<= 20", most <= 0.2)


def text(results: dict[str, Any]) -> str:
    """The table, then what could not be measured and what was measured in part."""
    lines = [f"{results['cpu']}, {results['cores']} cores, load {results['load_before']} to {results['load_after']}"]
    lines.append("memcmp: " + ", ".join(f"{v:.2f} us for {k} tokens" for k, v in results["memcmp_us"].items()))
    return "\n".join([*lines, table.text(rows(results)), *notes(results)])


def notes(results: dict[str, Any]) -> Iterator[str]:
    """What could not be measured, and what was measured in part."""
    for name, found in results["contenders"].items():
        if "error" in found:
            yield f"{name}: {found['error']}"
            continue
        replay = found.get("replay")
        if replay:
            yield f"{name}: replay of {replay['requests']:,} requests, median of {replay['repeats']}"
        for nodes, evicted in found["evict"].items():
            if evicted["share"] < 1:
                yield f"{name}: {100 * evicted['share']:.1f} % of the tree of {int(nodes):,} nodes was evicted"
