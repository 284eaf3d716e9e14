"""All benchmarks, one after the other, and one table of what has a goal.

    python -m bench [--quick] [--json]          make bench, make bench-quick

Each runs in a process of its own, on one thread, and is a command by itself (python -m bench.cache.operations, ...).
What falls short of its goal is marked SHORT. The table goes to bench/results/all.json, all figures to build/bench/
(of a shortened run these only).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from bench.common import ROOT
from bench.common.machine import conditions, load
from bench.common.results import keep
from bench.common.table import Row, text

BENCHMARKS = (
    ("The cache beside its peers", "cache.peers", ()),
    ("Page table and step", "cache.operations", ()),
    ("CPU attention", "attention.speed", ("--threads", "1")),
    ("A shared prefix read once", "attention.cascade", ("--threads", "1")),
    ("Tiers below the pool", "cache.tiers", ()),
    ("SmolLM2-135M end to end", "end_to_end", ("--threads", "1")),
)


def run(name: str, arguments: tuple[str, ...]) -> dict[str, Any]:
    """What a benchmark prints with --json, or {"error": why there is nothing}."""
    command = [sys.executable, "-m", f"bench.{name}", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return {"error": f"{' '.join(command[1:])} ended with status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and cases: about five minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args()
    quick = ("--quick",) if options.quick else ()
    results: dict[str, Any] = conditions("bench")
    for title, name, arguments in BENCHMARKS:
        print(f"bench.{name} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        results[name] = run(name, (*arguments, *quick)) | {"seconds": round(time.perf_counter() - start, 1)}
        if not options.json:
            show(title, results[name])
    results["load_after"] = load()
    keep("all", results, options.quick)
    if options.json:
        print(json.dumps(results))
    else:
        short = [
            row["measure"] for _, name, _ in BENCHMARKS for row in results[name].get("rows", ()) if row["met"] is False
        ]
        print("Short of the goal: " + (", ".join(short) or "nothing"))
    return 1 if any("error" in results[name] for _, name, _ in BENCHMARKS) else 0


def show(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title} ({found['seconds']:.0f} s)")
    print(found["error"] if "error" in found else text(Row(**row) for row in found["rows"]))
    for note in found.get("notes", ()):
        print(note)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
