"""`radixkv doctor`: what is installed, which attention backend runs here, and whether it computes the right thing."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from radixkv.cli.common import Command, ProgressLine, count, print_json, seed
from radixkv.cli.info import describe
from radixkv.errors import BackendUnavailable

if TYPE_CHECKING:
    import torch

    from radixkv.attention import Attention
    from radixkv.attention.parity import Result
    from radixkv.pool import LayerKV

__all__ = ["COMMAND", "examine"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where torch finds one")
    parser.add_argument(
        "--dtype",
        action="append",
        choices=["float32", "bfloat16", "float16"],
        help="only this one (repeatable; default: all the backend has)",
    )
    parser.add_argument("--batches", type=count, default=20, metavar="N", help="of each case (default: %(default)s)")
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Examine; 1 if any case fails."""
    found = examine(args.device, args.dtype or (), args.batches, args.seed)
    if args.json:
        print_json(found)
    else:
        _print(found)
    return 0 if found["ok"] else 1


def examine(device: str | None = None, dtypes: Sequence[str] = (), batches: int = 20, seed: int = 0) -> dict[str, Any]:
    """Describe the installation, then compare the backend of `device` with dense attention; one JSON object.

    device: "cpu" or "cuda"; by default "cuda" where torch finds one. dtypes: names such as "bfloat16"; by default all
    that the backend has. `ok` in the answer says whether every case passed.
    """
    found = describe()
    try:
        import torch
    except ModuleNotFoundError:
        why = "the page pool needs torch: pip install 'radixkv[engine]'"
        return found | {"attention": {"backend": None, "why": why}, "cases": [], "ok": False}
    from radixkv.attention import check_device, parity

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    attention = {"backend": "native" if where.type == "cpu" else "flashinfer", "why": _why(where, device)}
    found |= {"device": _name(where), "attention": attention}
    names = dtypes or (["float32"] if where.type == "cpu" else []) + ["bfloat16", "float16"]

    try:
        check_device(where)
    except BackendUnavailable as error:
        return found | {"attention": attention | {"backend": None, "why": str(error)}, "cases": [], "ok": False}
    cases = list(parity.cases([getattr(torch, name) for name in names]))
    results = []
    with ProgressLine("cases", len(cases)) as progress:
        for i, case in enumerate(cases):
            results.append(parity.run_case(case, batches, _backend, where, seed + i))
            progress(i + 1)
    return found | {"cases": [_row(r) for r in results], "ok": all(r.ok for r in results), "notes": _notes(where)}


def _print(found: dict[str, Any]) -> None:
    """Print what `examine` found, for a person."""
    machine, attention = found["machine"], found["attention"]
    print(f"radixkv     {found['radixkv']} on Python {found['python']}")
    print(f"machine     {machine['system']}, {machine['cpus']} CPUs, kernels for {machine['isa']}")
    print("packages    " + ", ".join(f"{name} {v}" for name, v in found["packages"].items() if v))
    print(f"device      {found['device']}")
    print(f"attention   {attention['backend'] or 'none'}: {attention['why']}")
    cases = found["cases"]
    if cases:
        print(f"\n{'case':<30}{'dtype':<10}{'batches':>8}{'largest error':>15}{'allowed':>9}")
    for row in cases:
        error = "none" if row["error"] is None else f"{row['error']:.1e}"
        verdict = "ok" if row["ok"] else "FAILED"
        print(f"{row['case']:<30}{row['dtype']:<10}{row['batches']:>8}{error:>15}{row['allowed']:>9.0e}  {verdict}")
        if row["problem"]:
            print(f"  {row['problem']}")
    for note in found.get("notes", ()):
        print(f"\nnote: {note}")
    passed = sum(row["ok"] for row in cases)
    print(f"\n{passed} of {len(cases)} cases are right" if cases else "\nnothing could be tested")


def _notes(device: torch.device) -> list[str]:
    """What makes models of transformers slow here, and what to do about it."""
    import torch

    try:
        from radixkv.hf.linear import multiplies
    except BackendUnavailable:  # no transformers
        return []
    slow = [name for name in ("bfloat16", "float16") if not multiplies(getattr(torch, name))]
    if device.type != "cpu" or not slow:
        return []
    return [
        f"torch multiplies {' and '.join(slow)} on this CPU several times slower than float32: call "
        "radixkv.hf.optimize(model), or load models in float32"
    ]


def _backend(layers: Sequence[LayerKV], dtype: torch.dtype, **options: Any) -> Attention:
    if layers[0].k.device.type == "cpu":
        from radixkv.attention.native import NativeAttention

        return NativeAttention(layers, dtype=dtype, **options)
    from radixkv.attention.flashinfer import FlashInferAttention

    return FlashInferAttention(layers, dtype=dtype, **options)


def _why(device: torch.device, asked: str | None) -> str:
    reason = (
        "asked for" if asked else "torch finds a CUDA device" if device.type == "cuda" else "torch finds no CUDA device"
    )
    kernels = "FlashInfer's kernels" if device.type == "cuda" else "the C++ kernels of this package"
    return f"{reason}, so {kernels} run"


def _name(device: torch.device) -> str:
    import torch

    if device.type != "cuda" or not torch.cuda.is_available():
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return (
        f"{device}: {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}, CUDA {torch.version.cuda}"
    )


def _row(result: Result) -> dict[str, Any]:
    return {
        "case": result.case.name,
        "dtype": str(result.case.dtype).removeprefix("torch."),
        "batches": result.batches,
        "error": result.error if math.isfinite(result.error) else None,
        "allowed": result.allowed,
        "ok": result.ok,
        "problem": result.problem,
    }


COMMAND = Command(
    "doctor",
    "check that attention computes the right thing on this machine",
    "radixkv doctor --device cuda",
    add,
    run,
    "Compares the backend with dense attention on random batches; exit status 1 if any case fails. On CUDA the "
    "first run compiles kernels, which takes minutes.",
)
