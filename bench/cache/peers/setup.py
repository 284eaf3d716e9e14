"""Installs the peers into build/peers-venv, which belongs to nothing else.

    python -m bench.cache.peers.setup

sglang and vllm come without their dependencies, of which most are for GPUs; requirements.txt has the imports that lie
on the way to their caches. torch is the CPU release of constraints.txt. A peer that cannot be installed is no error
here: `python -m bench.cache.peers` reports it with pip's reason.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENV = ROOT / "build" / "peers-venv"
PYTHON = VENV / "bin" / "python"
FAILED = VENV / "failed.json"
PEERS = {"sglang": "sglang==0.5.23", "vllm": "vllm==0.33.0"}


def pip(*arguments: str) -> str:
    """Install; returns an empty string, or the last line of what pip says went wrong."""
    command = [str(PYTHON), "-m", "pip", "install", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    return "" if done.returncode == 0 else (errors or done.stderr.splitlines() or ["pip failed"])[-1]


def install() -> dict[str, str]:
    """Make the venv and install all; returns the peers that could not be installed, and why."""
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    reason = pip("-c", "constraints.txt", "-r", "bench/cache/peers/requirements.txt")
    failed = {}
    for name, requirement in PEERS.items():
        why = reason or pip("--no-deps", requirement)
        if why:
            failed[name] = why
    FAILED.write_text(json.dumps(failed, indent=1) + "\n")
    return failed


def main() -> int:
    print(f"installing the peers into {VENV.relative_to(ROOT)} (minutes the first time)", flush=True)
    failed = install()
    for name, why in failed.items():
        print(f"{name} is not installed: {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
