"""From figures to a table: ours, each peer's, the ratio to the fastest peer in 16 bits, the goal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.common.table import OURS, Row
from bench.end_to_end.run import CONTENDERS

NOISE = 0.15


@dataclass(frozen=True)
class Measure:
    """One row: where its figure lies, and the goal for it with one thread, in seconds."""

    name: str
    mode: str
    key: str
    goal: float

    def of(self, figures: dict[str, Any]) -> float | None:
        value = figures.get(self.mode, {}).get(self.key)
        return None if value is None else float(value)


MEASURES = (
    Measure("first token, later requests", "one_by_one", "ttft_s", 0.11),
    Measure("one by one, total", "one_by_one", "total_s", 14.7),
    Measure("all at once, total", "all_at_once", "total_s", 3.3),
)


def first_difference(ours: list[list[int]], theirs: list[list[int]]) -> tuple[int, int] | None:
    """Request and token of the first difference, in order of tokens; None where all are equal."""
    where = [
        (next((i for i, (a, b) in enumerate(zip(x, y, strict=True)) if a != b), None), number)
        for number, (x, y) in enumerate(zip(ours, theirs, strict=True))
    ]
    different = [(token, request) for token, request in where if token is not None]
    if not different:
        return None
    token, request = min(different)
    return request, token


def rows(results: dict[str, dict[str, Any]], *, goals: bool) -> list[dict[str, Any]]:
    """A row for each measure: figures by contender, ratio of the fastest peer to ours, goal, verdict.

    `goals`: whether the goals apply, which were set for the whole workload on one thread.
    """
    out = []
    peers = [c.name for c in CONTENDERS if not c.name.startswith(OURS)]
    for measure in MEASURES:
        figures = {name: measure.of(found) for name, found in results.items()}
        ours = figures.get(OURS)
        rivals = {name: value for name, value in figures.items() if name in peers and value is not None}
        row: dict[str, Any] = {"measure": measure.name, "figures": figures}
        if ours is not None and rivals:
            fastest = min(rivals, key=lambda name: rivals[name])
            row |= {"fastest_peer": fastest, "ratio": rivals[fastest] / ours}
            row["noise"] = abs(row["ratio"] - 1) < NOISE
        if ours is not None and goals:
            row |= {"goal_s": measure.goal, "goal_met": ours <= measure.goal}
        out.append(row)
    return out


def goals(results: dict[str, Any]) -> Iterator[Row]:
    """The rows of every number of threads for the table of all benchmarks."""
    for threads, run in results["threads"].items():
        for row in run["rows"]:
            figures = {name: value for name, value in row["figures"].items() if value is not None}
            name = f"{row['measure']}, {threads} thread" + "s" * (threads != "1")
            ratio, goal = row.get("ratio"), f"<= {row['goal_s']:g}" if "goal_s" in row else ""
            yield Row(name, "s", figures, ratio, goal, row.get("goal_met"))


def notes(results: dict[str, Any]) -> Iterator[str]:
    """What could not be measured, and whether the contenders answered the same."""
    for threads, run in results["threads"].items():
        missing = [f"{name}: {found['error']}" for name, found in run["contenders"].items() if "error" in found]
        for note in [*missing, *_answers(run["contenders"])]:
            yield f"{threads} thread{'s' * (threads != '1')}, {note}"


def text(results: dict[str, Any]) -> str:
    lines = [f"{results['cpu']}, {results['cores']} cores, {results['command']}, {results['date']}"]
    for threads, run in results["threads"].items():
        clock = "CPU seconds" if threads == "1" else "wall seconds"
        lines += ["", f"{threads} thread(s), {clock}: {results['workload']}"]
        lines += _figures(run["contenders"])
        lines += [_verdict(row) for row in run["rows"]]
        lines += _answers(run["contenders"])
    return "\n".join(lines)


def _figures(contenders: dict[str, dict[str, Any]]) -> list[str]:
    head = f"{'':26}{'first token':>14}{'one by one':>12}{'tok/s':>8}{'all at once':>14}{'tok/s':>8}{'spread':>16}"
    lines = [head]
    for name, found in contenders.items():
        if "error" in found:
            lines.append(f"{name:26}{found['error']}")
            continue
        one, every = found["one_by_one"], found["all_at_once"]
        line = f"{name:26}{one['ttft_s']:>14.3f}{one['total_s']:>12.2f}{one['tokens_per_s']:>8.1f}"
        spread = f"{one['spread']:.0%}, {every['spread']:.0%}"
        lines.append(f"{line}{every['total_s']:>14.2f}{every['tokens_per_s']:>8.1f}{spread:>16}")
    return lines


def _verdict(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return f"{row['measure']}: no peer to compare with"
    out = f"{row['measure']}: {row['ratio']:.2f}x the fastest peer ({row['fastest_peer']})"
    if row["noise"]:
        out += ", within noise"
    elif row["ratio"] < 1:
        out += ", SHORT of it"
    if "goal_s" in row:
        out += f"; goal {row['goal_s']:g} s {'met' if row['goal_met'] else 'SHORT'}"
    return out


def _answers(contenders: dict[str, dict[str, Any]]) -> list[str]:
    """Whether the contenders answered the same, told from HF generate (or ours, where it did not run)."""
    known = {name: found for name, found in contenders.items() if "error" not in found}
    base = "HF generate" if "HF generate" in known else OURS
    if base not in known:
        return []
    truth, lines = known[base]["one_by_one"]["tokens"], []
    for name, found in known.items():
        for mode, spoken in (("one_by_one", "one by one"), ("all_at_once", "all at once")):
            tokens = found[mode]["tokens"]
            if name == base and mode == "one_by_one":
                continue
            where = first_difference(truth, tokens)
            same = sum(a == b for a, b in zip(truth, tokens, strict=True))
            at = "all equal" if where is None else f"{same} of {len(truth)} equal, first other token: {where[1]}"
            lines.append(f"answers of {name}, {spoken}: {at}")
    return [f"beside {base}, one by one:", *lines]
