"""Hit rates on real traces, beside the figures that a correct LRU must give, and what token-exact reuse adds.

    python -m bench.cache.hit_rates                       the whole table, each cell by replay through PrefixCache
    python -m bench.cache.hit_rates tau_airline --quick   one trace, by the one-pass curve only
    python -m bench.cache.hit_rates --agree               curve == replay at ten capacities on two traces, with times

The traces are read from RADIXKV_TRACES, or from shared/traces beside the repository. Exit status 1 where a cell is more
than 0.1 points from the expected figure or the curve differs from replay.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.cache.npz_traces import read_npz, traces_folder
from radixkv.traces.curve import CapacityCurve, capacity_curve
from radixkv.traces.curve.clairvoyant import clairvoyant_hit_rates
from radixkv.traces.replay import replay
from radixkv.traces.request import TraceRequest

TOLERANCE = 0.1
SHARES = (1, 2, 5, 10, 20, 50)
BOUND_SHARES = (1, 5, 10)


@dataclass(frozen=True)
class Expected:
    """A trace of the table: its page size, the LRU hit rates (%) at SHARES and the bounds (%) at BOUND_SHARES."""

    page_size: int
    lru: tuple[float, ...]
    bound: tuple[float, ...]
    token_ids: bool = False  # real token ids, so token-exact reuse can find more than whole pages


TABLE = {
    "mooncake_conv": Expected(512, (5.3, 7.8, 19.8, 28.2, 35.0, 37.0), (23.7, 37.3, 37.3)),
    "cc_dev": Expected(64, (32.0, 57.8, 86.6, 93.8, 95.7, 96.2), (42.3, 90.6, 95.3)),
    "tau_airline": Expected(16, (56.0, 70.5, 88.6, 94.2, 94.8, 94.8), (59.6, 92.8, 94.8), True),
    "bbh_zipf": Expected(16, (70.8, 85.4, 89.8, 90.3, 90.6, 90.9), (89.2, 91.0, 91.0), True),
    "react_hotpot": Expected(16, (62.0, 83.6, 91.6, 96.2, 96.8, 97.8), (62.0, 95.2, 97.0), True),
    "tot_game24": Expected(16, (96.8, 97.4, 97.6, 97.6, 97.7, 97.7), (97.7, 97.7, 97.7), True),
}


@dataclass(frozen=True)
class Cell:
    """One cell: hit rates in percent at one share of the footprint; ``token_exact`` is None without real token ids."""

    trace: str
    measure: str  # "lru" or "clairvoyant"
    share: int
    capacity_pages: int
    ours: float
    expected: float
    token_exact: float | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether ours is within TOLERANCE of the expected figure, which has one decimal."""
        return abs(self.ours - self.expected) <= TOLERANCE


def capacity_pages(curve: CapacityCurve, share: int) -> int:
    """A share in percent of the distinct pages of the trace, rounded down."""
    return curve.distinct_pages * share // 100


def cells(name: str, path: Path, quick: bool) -> Iterator[Cell]:
    """The cells of one trace: LRU by replay (by the curve if ``quick``), then the clairvoyant bounds."""
    expected, requests = TABLE[name], list(read_npz(path))
    curve = capacity_curve(requests, expected.page_size)
    for share, figure in zip(SHARES, expected.lru, strict=True):
        pages = capacity_pages(curve, share)
        started = time.perf_counter()
        rate, exact = curve.hit_rate(pages), None
        if not quick:
            rate = replay(requests, pages * expected.page_size, expected.page_size, page_aligned=True).hit_rate
        seconds = time.perf_counter() - started
        if expected.token_ids:
            exact = 100 * replay(requests, pages * expected.page_size, expected.page_size).hit_rate
        yield Cell(name, "lru", share, pages, 100 * rate, figure, exact, seconds)
    started = time.perf_counter()
    capacities = [capacity_pages(curve, share) for share in BOUND_SHARES]
    bounds = clairvoyant_hit_rates(requests, expected.page_size, capacities)
    seconds = (time.perf_counter() - started) / len(capacities)
    for share, pages, bound, figure in zip(BOUND_SHARES, capacities, bounds, expected.bound, strict=True):
        yield Cell(name, "clairvoyant", share, pages, 100 * bound, figure, None, seconds)


def print_cell(cell: Cell) -> None:
    """One line of the table."""
    exact = "" if cell.token_exact is None else f"{cell.token_exact:8.2f} ({cell.token_exact - cell.ours:+.2f})"
    print(
        f"{cell.trace:<14} {cell.measure:<12} {cell.share:>3} %  {cell.capacity_pages:>7,} {cell.ours:7.2f} "
        f"{cell.expected:7.1f} {cell.ours - cell.expected:+6.2f}  {'PASS' if cell.passed else 'FAIL'} "
        f"{cell.seconds:7.2f} s {exact}",
        flush=True,
    )


def agreement(name: str, path: Path) -> dict[str, object]:
    """Curve and replay at ten capacities from 0.5 % to 100 % of the footprint: equal hit tokens, and the times."""
    page_size = TABLE[name].page_size
    requests: list[TraceRequest] = list(read_npz(path))
    started = time.perf_counter()
    curve = capacity_curve(requests, page_size)
    curve_seconds = time.perf_counter() - started
    capacities = [max(1, int(curve.distinct_pages * 200 ** (step / 9 - 1))) for step in range(10)]
    started = time.perf_counter()
    replayed = [replay(requests, pages * page_size, page_size, page_aligned=True).hit_tokens for pages in capacities]
    return {
        "trace": name,
        "capacity_pages": capacities,
        "curve_hit_tokens": [curve.hit_tokens(pages) for pages in capacities],
        "replay_hit_tokens": replayed,
        "curve_seconds": round(curve_seconds, 3),
        "replay_seconds": round(time.perf_counter() - started, 3),
    }


def run_table(folder: Path, names: list[str], quick: bool, as_json: bool) -> bool:
    """Print the table of the named traces; returns whether every cell passed."""
    if not as_json:
        print(f"{'trace':<14} {'measure':<12} {'share':>5} {'pages':>8} {'ours':>7} {'table':>7} {'diff':>6}", end="")
        print(f"{'time':>15}   token-exact")
    passed = True
    for name in names:
        for cell in cells(name, folder / f"{name}.npz", quick):
            passed &= cell.passed
            print(json.dumps({**asdict(cell), "pass": cell.passed})) if as_json else print_cell(cell)
    return passed


def run_agreement(folder: Path, names: list[str], as_json: bool) -> bool:
    """Print curve beside replay; returns whether all are equal."""
    equal = True
    for name in names:
        found = agreement(name, folder / f"{name}.npz")
        same = found["curve_hit_tokens"] == found["replay_hit_tokens"]
        equal &= same
        if as_json:
            print(json.dumps({**found, "equal": same}))
            continue
        print(f"{name}: curve {found['curve_seconds']} s, ten replays {found['replay_seconds']} s, ", end="")
        print("equal" if same else "DIFFERENT")
        for key in ("capacity_pages", "curve_hit_tokens", "replay_hit_tokens"):
            print(f"  {key:<18} {found[key]}")
    return equal


def main() -> int:
    """Parse the arguments and run; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", metavar="TRACE", help=f"of {', '.join(TABLE)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="take the LRU figures from the one-pass curve")
    parser.add_argument(
        "--agree", action="store_true", help="compare curve and replay (default: tau_airline, bbh_zipf)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    args = parser.parse_args()
    folder = traces_folder()
    if folder is None:
        print("no traces: set RADIXKV_TRACES to the folder that holds the .npz files", file=sys.stderr)
        return 1
    unknown = set(args.traces) - set(TABLE)
    if unknown:
        parser.error(f"unknown trace {', '.join(sorted(unknown))}")
    if args.agree:
        return 0 if run_agreement(folder, args.traces or ["tau_airline", "bbh_zipf"], args.json) else 1
    return 0 if run_table(folder, args.traces or list(TABLE), args.quick, args.json) else 1


if __name__ == "__main__":
    sys.exit(main())
