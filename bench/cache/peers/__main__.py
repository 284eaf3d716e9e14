"""radixkv beside the peers that a user would pick: tree operations, replay of a trace, cold start.

    make peers-venv                     install the peers, once
    python -m bench.cache.peers [--quick] [--json]

Every contender does the same work on the same tokens, in a process of its own, on one thread, in one run. Ratios are to
the fastest peer; a peer that cannot be installed or driven is listed with the reason. What is called of each is in its
driver: ours, sglang_rust, sglang_python (both with sglang_tree), vllm_blocks.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from bench.cache import workload
from bench.cache.memory import memcmp_us
from bench.cache.peers.run import CONTENDERS, measure, trace_file
from bench.cache.peers.table import notes, rows, text
from bench.common.machine import conditions, load
from bench.common.results import keep
from bench.common.table import OURS, rows_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, nodes and requests; vLLM with xxhash")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead of the table")
    args = parser.parse_args()
    trace = trace_file()
    results: dict[str, Any] = conditions("bench.cache.peers") | {"contenders": {}}
    for contender in CONTENDERS:
        if args.quick and not contender.quick:
            continue
        print(f"{contender.name} ...", file=sys.stderr, flush=True)
        if contender.name == OURS:
            prompts = {length: workload.long_prompt(length)[:length] for length in workload.LENGTHS}
            results["memcmp_us"] = {str(length): memcmp_us(tokens) for length, tokens in prompts.items()}
        results["contenders"][contender.name] = measure(contender, args.quick, trace)
    results["load_after"] = load()
    results |= rows_of(rows(results)) | {"notes": list(notes(results))}
    keep("peers", results, args.quick)
    print(json.dumps(results) if args.json else text(results))
    return 1 if "error" in results["contenders"][OURS] else 0


if __name__ == "__main__":
    sys.exit(main())
