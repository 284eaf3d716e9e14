"""The command line: ``radixkv COMMAND``, a module for each of `COMMANDS`.

Exit status 0 is success, 1 an error (one line on standard error), 2 wrong usage, 130 an interrupt, 141 a reader of
standard output that is gone.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import radixkv
from radixkv.cli import (
    curve,
    demo,
    doctor,
    generate,
    info,
    kv_check,
    lint,
    log,
    plan,
    policies,
    record,
    replay,
    tiers,
    view,
)
from radixkv.cli.common import flush_output, say
from radixkv.errors import RadixKVError

__all__ = ["main"]


COMMANDS = (
    replay.COMMAND,
    curve.COMMAND,
    policies.COMMAND,
    plan.COMMAND,
    kv_check.COMMAND,
    view.COMMAND,
    lint.COMMAND,
    log.COMMAND,
    generate.COMMAND,
    record.COMMAND,
    tiers.COMMAND,
    info.COMMAND,
    doctor.COMMAND,
    demo.COMMAND,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. Raises SystemExit as argparse does (usage, --help, --version)."""
    try:
        return _run(argv)
    except BrokenPipeError:
        return 141
    except KeyboardInterrupt:
        return 130
    except (RadixKVError, OSError) as error:
        say(f"radixkv: {error}")
    except MemoryError as error:
        say(f"radixkv: out of memory ({error}): lower --capacity-tokens or --requests, or raise --page-size")
    return 1


def _run(argv: Sequence[str] | None) -> int:
    try:
        args = _parser().parse_args(argv)
        status: int = args.run(args)
        return status
    finally:
        flush_output()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="radixkv", description="A prefix-sharing KV-cache engine: its tools.")
    parser.add_argument("--version", action="version", version=f"radixkv {radixkv.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        made = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}. {command.details}",
            epilog=f"example:  {command.example}",
        )
        command.add(made)
        made.set_defaults(run=command.run)
    return parser
