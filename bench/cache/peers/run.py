"""Runs every driver as a subprocess, in the venv that it needs, and collects what it prints."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cache.npz_traces import traces_folder
from bench.cache.peers.setup import FAILED, PYTHON, ROOT
from bench.common.table import OURS

TRACE = "mooncake_conversation.jsonl"


@dataclass(frozen=True)
class Contender:
    """One column of the table. `import_` is what a process imports to have the cache."""

    name: str
    package: str
    driver: str
    import_: str
    arguments: tuple[str, ...] = ()

    @property
    def python(self) -> str:
        return sys.executable if self.name == OURS else str(PYTHON)


_STAND_INS = "from bench.cache.peers.stand_ins import stand_in; stand_in({}); "
_SGLANG = _STAND_INS.format(("torchvision", "tvm_ffi", "compressed_tensors"))
_VLLM = _STAND_INS.format(("xgrammar", "llguidance")) + "import vllm.v1.core.kv_cache_manager"
CONTENDERS = (
    Contender(OURS, "radixkv", "ours", "import radixkv"),
    Contender("sglang rust", "sglang", "sglang_rust", _SGLANG + "import sglang.srt.mem_cache.rust_tree_core.adapter"),
    Contender("sglang python", "sglang", "sglang_python", _SGLANG + "import sglang.srt.mem_cache.radix_cache"),
    Contender("vllm xxhash", "vllm", "vllm_blocks", _VLLM, ("--hash", "xxhash")),
    Contender("vllm sha256", "vllm", "vllm_blocks", _VLLM, ("--hash", "sha256")),
)


def environment() -> dict[str, str]:
    """One thread for every library, so that a figure is that of one core."""
    one = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **one, "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}


def run(python: str, *arguments: str, timeout: float = 900) -> str:
    """The standard output of a Python process; RuntimeError with the last line of its errors where it fails."""
    try:
        done = subprocess.run(
            [python, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {timeout:.0f} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout


def wall(python: str, code: str) -> float:
    start = time.perf_counter()
    run(python, "-c", code)
    return time.perf_counter() - start


def cold_start(contender: Contender, repeats: int) -> float:
    """ms of the import beyond Python itself: medians of fresh processes, the two kinds in turn; files are in memory."""
    pairs = [(wall(contender.python, contender.import_), wall(contender.python, "pass")) for _ in range(repeats)]
    return 1e3 * (statistics.median(a for a, _ in pairs) - statistics.median(b for _, b in pairs))


def measure(contender: Contender, quick: bool, trace: Path | None) -> dict[str, Any]:
    """All figures of one contender, or {"error": why there are none}."""
    if contender.name != OURS:
        if not PYTHON.exists():
            return {"error": "not installed: run make peers-venv"}
        why = json.loads(FAILED.read_text()).get(contender.package) if FAILED.exists() else None
        if why:
            return {"error": f"not installed: {why}"}
    nodes = [1000, 10_000]
    if contender.name == OURS:
        nodes += [100_000] if quick else [100_000, 1_000_000]
    arguments = ["-m", "bench.cache.peers.measure", contender.driver, *contender.arguments]
    speed = [*(["--quick"] if quick else []), *(["--trace", str(trace)] if trace else []), "--nodes", *map(str, nodes)]
    try:
        out: dict[str, Any] = json.loads(run(contender.python, *arguments, *speed))
        ours = contender.name == OURS
        out["cold_start_ms"] = cold_start(contender, 15 if ours else 3) if ours or not quick else out["import_ms"]
    except RuntimeError as error:
        return {"error": f"cannot be driven: {error}"}
    return out


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def trace_file() -> Path | None:
    folder = traces_folder()
    return folder / TRACE if folder and (folder / TRACE).exists() else None
