"""Runs contenders, each in a process of its own, and collects what they print."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

from bench.common import ROOT
from bench.common.venv import Venv

LONGEST = 900  # seconds for one contender


@dataclass(frozen=True)
class Contender:
    """One column of a table: `driver` is the module that a measuring process drives it with."""

    name: str
    driver: str
    venv: Venv | None = None
    """Where it is installed; None for where radixkv is."""
    peer: str = ""
    """What the venv calls it."""
    arguments: tuple[str, ...] = ()
    quick: bool = True
    """Whether it takes part in a shortened run."""

    @property
    def python(self) -> str:
        return str(self.venv.python) if self.venv else sys.executable

    def measure(self, module: str, *arguments: str, threads: int = 1) -> dict[str, Any]:
        """What `module` prints of this contender, or {"error": why there is nothing}.

        RADIXKV_BENCH_LOCK, a command such as `flock FILE`, is put before the process: other work on the machine waits.
        """
        if self.venv and (why := self.venv.why_missing(self.peer)):
            return {"error": why}
        lock = shlex.split(os.environ.get("RADIXKV_BENCH_LOCK", ""))
        try:
            out = run(*lock, self.python, "-m", module, self.driver, *self.arguments, *arguments, threads=threads)
        except RuntimeError as error:
            return {"error": f"cannot be driven: {error}"}
        figures: dict[str, Any] = json.loads(out.splitlines()[-1])
        return figures


def environment(threads: int = 1) -> dict[str, str]:
    """As many threads for every library, no GPU, the same hashes. vLLM keeps what it compiles under build/."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    rest = {
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONHASHSEED": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CACHE_ROOT": str(ROOT / "build" / "vllm-cache"),
    }
    return {**os.environ, **dict.fromkeys(names, str(threads)), **rest}


def run(*command: str, threads: int = 1) -> str:
    """What a process prints; RuntimeError with the last line of its errors where it fails."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment(threads), capture_output=True, text=True, timeout=LONGEST
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {LONGEST} s") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(lines[-1] if lines else f"exit status {done.returncode}")
    return done.stdout
