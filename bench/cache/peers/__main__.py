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
import os
import sys
from datetime import datetime, timezone
from typing import Any

from bench.cache.memory import memcmp_us
from bench.cache.peers.run import CONTENDERS, cpu_model, measure, trace_file
from bench.cache.peers.setup import ROOT
from bench.cache.peers.table import notes, rows, text
from bench.common.table import OURS, rows_of

RESULTS = ROOT / "bench" / "results"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, nodes and requests; vLLM with xxhash")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object instead of the table")
    args = parser.parse_args()
    trace = trace_file()
    if trace is None:
        print("no trace: set RADIXKV_TRACES to the folder of mooncake_conversation.jsonl", file=sys.stderr)
    results: dict[str, Any] = {
        "command": "python -m bench.cache.peers" + " --quick" * args.quick,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "load_before": round(os.getloadavg()[0], 2),
        "contenders": {},
    }
    for contender in CONTENDERS[:-1] if args.quick else CONTENDERS:
        print(f"{contender.name} ...", file=sys.stderr, flush=True)
        if contender.name == OURS:
            results["memcmp_us"] = memcmp_us()
        results["contenders"][contender.name] = measure(contender, args.quick, trace)
    results["load_after"] = round(os.getloadavg()[0], 2)
    results |= rows_of(rows(results)) | {"notes": list(notes(results))}
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / ("peers_quick.json" if args.quick else "peers.json")
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results) if args.json else text(results))
    return 1 if "error" in results["contenders"][OURS] else 0


if __name__ == "__main__":
    sys.exit(main())
