"""The contenders, and all figures of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.common.process import Contender
from bench.common.table import OURS
from bench.end_to_end.setup import VENV

CONTENDERS = (
    Contender(OURS, "ours"),
    Contender("radixkv, model as it is", "ours_as_it_is", quick=False),
    Contender("HF generate", "hf_plain", quick=False),
    Contender("HF DynamicCache prefix", "hf_prefix"),
    Contender("HF continuous batching", "hf_continuous", quick=False),
    Contender("vLLM-CPU", "vllm_cpu", VENV, "vllm_cpu", quick=False),
    Contender("llama.cpp", "llama_cpp", VENV, "llama_cpp", quick=False),
)
SLOW = ("hf_plain", "hf_continuous")


def measure(contender: Contender, workload: Path, threads: int, quick: bool) -> dict[str, Any]:
    """All figures of one contender, or {"error": why there are none}."""
    repeats = 1 if quick else 2 if contender.driver in SLOW else 3
    return contender.measure("bench.end_to_end.measure", str(workload), str(repeats), threads=threads)
