"""The contenders, and all figures of one."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

from bench.cache.npz_traces import traces_folder
from bench.cache.peers.setup import VENV
from bench.common.process import Contender, run
from bench.common.table import OURS

TRACE = "mooncake_conversation.jsonl"
CONTENDERS = (
    Contender(OURS, "ours"),
    Contender("sglang rust", "sglang_rust", VENV, "sglang"),
    Contender("sglang python", "sglang_python", VENV, "sglang"),
    Contender("vllm xxhash", "vllm_blocks", VENV, "vllm", ("--hash", "xxhash")),
    Contender("vllm sha256", "vllm_blocks", VENV, "vllm", ("--hash", "sha256"), quick=False),
)

_STAND_INS = "from bench.cache.peers.stand_ins import stand_in; stand_in({}); "
_SGLANG = _STAND_INS.format(("torchvision", "tvm_ffi", "compressed_tensors"))
IMPORTS = {
    "ours": "import radixkv",
    "sglang_rust": _SGLANG + "import sglang.srt.mem_cache.rust_tree_core.adapter",
    "sglang_python": _SGLANG + "import sglang.srt.mem_cache.radix_cache",
    "vllm_blocks": _STAND_INS.format(("xgrammar", "llguidance")) + "import vllm.v1.core.kv_cache_manager",
}
"""What a process imports to have the cache, by driver."""


def wall(python: str, code: str) -> float:
    start = time.perf_counter()
    run(python, "-c", code)
    return time.perf_counter() - start


def cold_start(contender: Contender, repeats: int) -> float:
    """ms of the import beyond Python itself: medians of fresh processes, the two kinds in turn; files are in memory."""
    python, code = contender.python, IMPORTS[contender.driver]
    pairs = [(wall(python, code), wall(python, "pass")) for _ in range(repeats)]
    return 1e3 * (statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs))


def measure(contender: Contender, quick: bool, trace: Path | None) -> dict[str, Any]:
    """All figures of one contender, or {"error": why there are none}."""
    ours = contender.name == OURS
    nodes = [1000, 10_000]
    if ours:
        nodes += [100_000] if quick else [100_000, 1_000_000]
    extent = [*(["--quick"] if quick else []), *(["--trace", str(trace)] if trace else []), "--nodes", *map(str, nodes)]
    out = contender.measure("bench.cache.peers.measure", *extent)
    if "error" not in out:
        out["cold_start_ms"] = cold_start(contender, 15 if ours else 3) if ours or not quick else out["import_ms"]
    return out


def trace_file() -> Path | None:
    """The trace of the replay; None, and a word about it, where it is not at hand."""
    folder = traces_folder()
    if folder and (folder / TRACE).exists():
        return folder / TRACE
    print(f"no trace: set RADIXKV_TRACES to the folder of {TRACE}", file=sys.stderr)
    return None
