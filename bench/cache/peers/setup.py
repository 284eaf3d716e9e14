"""Installs the peers into build/peers-venv.

    python -m bench.cache.peers.setup

sglang and vllm come without their dependencies, of which most are for GPUs; requirements.txt has the imports that lie
on the way to their caches. torch is the release of constraints.txt. `python -m bench.cache.peers` reports a peer that
cannot be installed, with pip's reason.
"""

from __future__ import annotations

import sys

from bench.common.venv import Venv

VENV = Venv("peers-venv")
PEERS = {"sglang": "sglang==0.5.23", "vllm": "vllm==0.33.0"}


def main() -> int:
    VENV.create()
    why = VENV.pip("install", "-c", "constraints.txt", "-r", "bench/cache/peers/requirements.txt")
    failed = {name: why or VENV.pip("install", "--no-deps", requirement) for name, requirement in PEERS.items()}
    VENV.finish({name: why for name, why in failed.items() if why})
    return 0


if __name__ == "__main__":
    sys.exit(main())
