"""`radixkv tiers`: what a directory of the disk tier holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from radixkv.cli.common import Command, ProgressLine, print_json, printable
from radixkv.memory import format_bytes

if TYPE_CHECKING:
    from radixkv.tiers.inspect import Holding

__all__ = ["COMMAND"]


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("directory", metavar="DIR", type=Path, help="what TierOptions(disk=) was given")
    parser.add_argument(
        "--verify", action="store_true", help="read every page and compare it with its key and checksum"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Show the directory; 1 if something in it is damaged."""
    from radixkv.tiers.inspect import holdings

    found = [_described(holding, args.verify) for holding in holdings(args.directory)]
    if args.json:
        print_json({"directory": str(args.directory), "identities": found})
    else:
        for one in found:
            _print(one)
    return int(any(one["error"] or one.get("damaged") for one in found))


def _described(holding: Holding, check: bool) -> dict[str, Any]:
    from radixkv.tiers.inspect import verify

    what = {
        "folder": str(holding.folder),
        "identity": holding.identity,
        "pages": holding.num_pages,
        "tokens": holding.num_tokens,
        "bytes": holding.num_bytes,
        "file_bytes": holding.file_bytes,
        "namespaces": holding.namespaces,
        "age_seconds": holding.age,
        "in_use": holding.in_use,
        "error": holding.error,
    }
    if check and not holding.error:
        with ProgressLine("pages", holding.num_pages) as progress:
            try:
                what["damaged"] = verify(holding, progress)
            except sqlite3.Error as error:
                what["error"] = str(error)
    return what


def _print(one: dict[str, Any]) -> None:
    state = ", in use" if one["in_use"] else ""
    print(f"{printable(one['folder'])}: {one['pages']:,} pages, {one['tokens']:,} tokens{state}")
    print(f"  {format_bytes(one['bytes'])} of {format_bytes(one['file_bytes'])} on disk, "
          f"stored {_ago(one['age_seconds'])} ago")  # fmt: skip
    for name, value in one["identity"].items():
        print(f"  {name:<12}{value if isinstance(value, str | int) else json.dumps(value)}")
    for tag, pages in one["namespaces"].items():
        print(f"  namespace   {tag}  {pages:,} pages")
    if one["error"]:
        print(f"  the index cannot be read: {one['error']}")
    elif "damaged" in one:
        damaged = len(one["damaged"])
        print(f"  {damaged:,} pages are damaged: they are misses" if damaged else "  every page is whole")


def _ago(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


COMMAND = Command(
    "tiers",
    "what a disk tier's directory holds, by identity, and whether it is whole",
    "radixkv tiers DIR --verify",
    add,
    run,
    "Exit status 1 means that something is damaged; damaged pages are never served.",
)
