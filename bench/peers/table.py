"""The table: a row for each measure, a column for each contender, the ratio to the fastest peer, the goal."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from bench.peers.run import OURS
from bench.peers.workload import COMMIT_UNDER, LENGTHS

TREES = ("sglang rust", "sglang python")
HIT_TOLERANCE = 1e-4  # of a hit rate: caches that break ties differently differ by less


@dataclass(frozen=True)
class Row:
    """`ratio`: how many times better than the fastest peer. `met` is None where there is no goal or no figure."""

    measure: str
    unit: str
    figures: dict[str, float]
    ratio: float | None
    goal: str
    met: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        yield _spread("commit, most / least", list(commits.values()), "<= 1.2")
    evict = make.ours.get("evict", {})
    for nodes in evict:
        name = f"evict, {int(nodes):,} nodes"
        compared = any(nodes in make.contenders.get(peer, {}).get("evict", {}) for peer in TREES)
        goal, met = (">= 10x of trees", _at_least(10)) if compared else ("", None)
        yield make.row(name, "ns/page", ("evict", nodes, "ns_per_page"), goal, met, peers=TREES)
    if evict:
        yield _spread("evict, most / least", [found["ns_per_page"] for found in evict.values()], "<= 1.2")
    yield make.row("metadata", "B/token", ("metadata_bytes",), "<= 6", _most(6))
    rate = make.row("replay", "requests/s", ("replay", "requests_per_s"), ">= 60000", _least(60_000), True)
    yield rate
    if rate.figures:
        replays = [found["replay"] for name, found in make.contenders.items() if name != OURS and "replay" in found]
        same = make.ours.get("replay", {}).get("requests")
        best = max((found["hit_rate"] for found in replays if found["requests"] == same), default=None)
        met = None if best is None else _least(best - HIT_TOLERANCE)
        yield make.row("replay, hit rate", "%", ("replay", "hit_rate"), "no peer's is better", met, True)
    yield make.row("cold start", "ms", ("cold_start_ms",), "<= 60", _most(60))


def _most(limit: float) -> Callable[[float, float | None], bool]:
    return lambda own, _: operator.le(own, limit)


def _least(limit: float) -> Callable[[float, float | None], bool]:
    return lambda own, _: operator.ge(own, limit)


def _spread(name: str, values: list[float], goal: str) -> Row:
    spread = max(values) / min(values)
    return Row(name, "", {OURS: spread}, None, goal, spread <= 1.2)


def _figure(row: Row, name: str) -> str:
    value = row.figures.get(name)
    if value is None:
        return "-"
    if row.unit == "%":
        return f"{100 * value:.3f}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def text(results: dict[str, Any]) -> str:
    """The table, then what could not be measured and what was measured in part."""
    names = list(results["contenders"])
    head = ["measure", "unit", *names, "ratio", "goal", ""]
    body = [
        [
            row.measure,
            row.unit,
            *(_figure(row, name) for name in names),
            "-" if row.ratio is None else f"{row.ratio:.1f}x" if row.unit != "%" else f"{row.ratio:.4f}x",
            row.goal,
            {None: "", True: "met", False: "SHORT"}[row.met],
        ]
        for row in rows(results)
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [f"{results['cpu']}, {results['cores']} cores, load {results['load_before']} to {results['load_after']}"]
    lines.append("memcmp: " + ", ".join(f"{v:.2f} us for {k} tokens" for k, v in results["memcmp_us"].items()))
    for line in [head, *body]:
        cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))]  # noqa: B905
        lines.append("  ".join(cells).rstrip())
    for name, found in results["contenders"].items():
        if "error" in found:
            lines.append(f"{name}: {found['error']}")
            continue
        replay = found.get("replay")
        if replay:
            lines.append(f"{name}: replay of {replay['requests']:,} requests, median of {replay['repeats']}")
        for nodes, evicted in found["evict"].items():
            if evicted["share"] < 1:
                lines.append(f"{name}: {100 * evicted['share']:.1f} % of the tree of {int(nodes):,} nodes was evicted")
    return "\n".join(lines)
