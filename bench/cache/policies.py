"""What each policy of eviction gives on real traces, beside what a simulator of them, written for itself, gave.

    python -m bench.cache.policies                all six traces, about two minutes
    python -m bench.cache.policies tau_airline    one

The traces are read from RADIXKV_TRACES, or from shared/traces beside the repository. Exit status 1 where hazard is more
than 0.5 points below its figure, both more than 0.3, or a policy more than 0.3 below LRU. Cells that are better than
their figure are no fault.
"""

from __future__ import annotations

import argparse
import sys

from bench.cache.hit_rates import TABLE
from bench.cache.npz_traces import read_npz, traces_folder
from radixkv.traces.policies import LOSS, SHARES, Cell, compare_policies

HAZARD = {
    "mooncake_conv": (10.2, 14.8, 22.3, 29.6, 35.2, 36.8),
    "cc_dev": (32.2, 57.7, 86.5, 93.9, 95.7, 96.2),
    "tau_airline": (55.8, 70.2, 88.5, 94.1, 94.8, 94.8),
    "bbh_zipf": (86.7, 89.9, 90.6, 90.8, 91.0, 91.0),
    "react_hotpot": (62.0, 83.7, 93.0, 96.2, 96.8, 97.9),
    "tot_game24": (97.6, 97.6, 97.7, 97.7, 97.7, 97.7),
}
"""Hit rates at SHARES of the footprint, in percent."""

BOTH = {
    "cc_dev": (32.4, 58.2, 87.3, 94.3, 96.1, 96.3),
    "tau_airline": (56.3, 72.0, 91.4, 94.8, 94.8, 94.8),
    "react_hotpot": (62.0, 83.7, 93.4, 96.3, 96.8, 98.0),
    "tot_game24": (97.6, 97.6, 97.7, 97.7, 97.7, 97.7),
}

_ROUNDING = 0.05


def faults(name: str, cell: Cell) -> list[str]:
    """What is wrong with a cell, in words."""
    found, place = [], SHARES.index(cell.percent_of_footprint)
    for policy, table, most in (("hazard", HAZARD, 0.5), ("both", BOTH, 0.3)):
        if name in table and 100 * cell.rates[policy] < table[name][place] - most - _ROUNDING:
            found.append(f"{policy} is below {table[name][place]} by more than {most}")
    found += [f"{policy} loses to LRU" for policy, rate in cell.rates.items() if rate < cell.rates["lru"] - LOSS]
    return found


def main() -> int:
    """Print the table; 1 if a cell is at fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", metavar="TRACE", default=list(HAZARD), help=", ".join(HAZARD))
    args = parser.parse_args()
    folder = traces_folder()
    if folder is None:
        print("no traces: set RADIXKV_TRACES to the folder of the .npz files", file=sys.stderr)
        return 1
    wrong = 0
    heads = ("lru", 8), ("hint", 8), ("hazard", 8), ("(figure)", 10), ("both", 8), ("(figure)", 10), ("bound", 8)
    print(f"{'trace':<14}{'share':>6}" + "".join(f"{head:>{width}}" for head, width in heads))
    for name in args.traces:
        found = compare_policies(list(read_npz(folder / f"{name}.npz")), TABLE[name].page_size)
        for place, cell in enumerate(found.cells):
            rates = {policy: f"{100 * rate:.1f}" for policy, rate in cell.rates.items()}
            figures = [table[name][place] if name in table else "" for table in (HAZARD, BOTH)]
            line = f"{name:<14}{cell.percent_of_footprint:>4} %{rates['lru']:>8}{rates.get('hint', ''):>8}"
            line += f"{rates['hazard']:>8}{figures[0]:>10}{rates.get('both', ''):>8}{figures[1]:>10}"
            wrong += bool(told := faults(name, cell))
            print(f"{line}{100 * cell.clairvoyant:>8.1f}  {'; '.join(told)}".rstrip(), flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
