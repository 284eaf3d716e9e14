"""What the commands share: arguments that name a trace, outputs that are whole or absent, and a line of progress."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO, cast

from radixkv.errors import InvalidArgument, TraceError
from radixkv.journal_log import read_log
from radixkv.traces.formats import open_trace, read_trace
from radixkv.traces.request import MOONCAKE_BLOCK, TraceRequest
from radixkv.traces.workload import WORKLOADS, generate

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from radixkv.journal_story import Story
    from radixkv.observe import Decode

__all__ = [
    "TRACE_HELP",
    "Command",
    "ProgressLine",
    "add_json",
    "add_page_size",
    "add_trace",
    "add_trace_options",
    "all_requests",
    "binary_output",
    "count",
    "decoder_of",
    "flush_output",
    "points",
    "print_json",
    "printable",
    "read_story",
    "refuse_shared_output",
    "requests_of",
    "say",
    "seed",
    "text_output",
    "tokenizer_of",
]


_BAR = 30  # characters


@dataclass(frozen=True)
class Command:
    """`add` gives a parser the command's arguments; `run` runs it with them and returns the exit status."""

    name: str
    help: str
    example: str
    add: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    details: str = ""


TRACE_HELP = (
    "TRACE is a file, - for standard input, or a made-up workload: " + ", ".join(WORKLOADS) + " (./chat is a file). "
    "Files are Mooncake JSON lines (hash_ids), JSON lines (ids with unit and input_length, or input and output), "
    "or radixkv msgpack; their content says which."
)


def add_trace(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which requests: TRACE, --block-size, --requests and --seed."""
    parser.add_argument("trace", metavar="TRACE", help="file, - or " + ", ".join(WORKLOADS))
    add_trace_options(parser)


def add_trace_options(parser: argparse.ArgumentParser) -> None:
    """--block-size, --requests and --seed, for a command that names its trace otherwise."""
    parser.add_argument(
        "--block-size",
        type=count,
        default=MOONCAKE_BLOCK,
        metavar="N",
        help="tokens per hash id of a Mooncake trace (default: %(default)s)",
    )
    parser.add_argument(
        "--requests",
        type=count,
        metavar="N",
        help="only the first N requests (default: all of a file, 1000 of a workload)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="S", help="seed of a workload (default: %(default)s)")


def add_page_size(parser: argparse.ArgumentParser) -> None:
    """--page-size."""
    parser.add_argument(
        "--page-size", type=count, default=16, metavar="P", help="tokens per page (default: %(default)s)"
    )


def requests_of(args: argparse.Namespace, progress: ProgressLine | None = None) -> Iterator[TraceRequest]:
    """The requests that the arguments of `add_trace` ask for. ``progress`` is told how many there are, or how much of
    the file has been read.
    """
    progress = progress or ProgressLine()
    if args.trace in WORKLOADS:
        progress.total = args.requests or 1000
        yield from generate(args.trace, args.requests or 1000, args.seed)
        return
    if args.trace.isalpha() and not os.path.exists(args.trace):
        raise TraceError(f"{args.trace} is neither a file nor a workload: these are {', '.join(WORKLOADS)}")
    with ExitStack() as stack:
        source: str | BinaryIO = args.trace
        if os.path.isfile(args.trace):
            source = stack.enter_context(open_trace(args.trace))
            size = os.path.getsize(args.trace)
        for number, request in enumerate(read_trace(source, args.block_size)):
            if number == args.requests:
                return
            if not isinstance(source, str) and size:
                progress.share = source.tell() / size
            yield request


def all_requests(args: argparse.Namespace) -> list[TraceRequest]:
    """The requests of `requests_of`, in memory."""
    found = []
    with ProgressLine("requests read") as progress:
        for request in requests_of(args, progress):
            found.append(request)
            progress(len(found))
    return found


def read_story(path: str) -> Story:
    """The story of an operation log."""
    with ProgressLine("bytes read", os.path.getsize(path) if os.path.isfile(path) else None) as progress:
        return read_log(path, progress)


def add_json(parser: argparse.ArgumentParser, what: str = "print one JSON object") -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help=what)


def refuse_shared_output(*outputs: str | None) -> None:
    """Raises InvalidArgument where two outputs have one name; ``-`` is standard output, None no output."""
    named = [name for name in outputs if name is not None]
    if len(set(named)) < len(named):
        raise InvalidArgument("two outputs cannot share standard output or a file: give one of them another name")


def decoder_of(tokenizer: str | None) -> Decode | None:
    """What makes text of tokens, special ones included, by the tokenizer of this path; None without one."""
    if tokenizer is None:
        return None
    made = tokenizer_of(tokenizer)
    return lambda ids: str(made.decode(ids, skip_special_tokens=False))


def tokenizer_of(path: str) -> Tokenizer:
    """A model's tokenizer: its folder, or its tokenizer.json. Raises InvalidArgument."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InvalidArgument("--tokenizer needs the package tokenizers: pip install 'radixkv[hf]'") from error
    file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
    try:
        return Tokenizer.from_file(file)
    except Exception as error:  # of no class of its own
        raise InvalidArgument(f"{file} is no tokenizer: {error}: give a model's folder or its tokenizer.json") from None


_DECIMAL = re.compile(r"[0-9]+\.[0-9]+")


def count(text: str, at_least: int = 1) -> int:
    """A count of ``at_least`` or more: 100000, 100_000, 100k, 1.5M or 1G (decimal)."""
    units = {"k": 10**3, "m": 10**6, "g": 10**9}
    factor = units.get(text[-1:].lower(), 1)
    number = text[:-1] if factor > 1 else text
    try:
        exact = (Fraction(number) if _DECIMAL.fullmatch(number) else Fraction(int(number))) * factor
        if exact.denominator > 1:
            raise ValueError("no whole number")
        value = int(exact)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a count such as 100000, 100k or 1.5M") from None
    if value < at_least:
        raise argparse.ArgumentTypeError(f"{text} is less than {at_least}")
    return value


def seed(text: str) -> int:
    """A count of 0 or more."""
    return count(text, at_least=0)


def points(text: str) -> int:
    """A count of 2 or more."""
    return count(text, at_least=2)


def print_json(value: dict[str, Any]) -> None:
    """Print an object on one line."""
    print(json.dumps(value))


@contextmanager
def binary_output(path: str) -> Iterator[BinaryIO]:
    """Open a file to write; it appears under its name when it is whole, and not at all after an error.

    ``-`` is standard output. A name that is no regular file (a device, a pipe) is written directly. Raises OSError,
    whose message names ``path``.
    """
    if path == "-":
        with _standard_output() as stream:
            yield stream
        return
    with _named(path, ": check the folder, its permissions and the room on the disk"):
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as stream:
                yield stream
        else:
            with _whole_or_absent(os.path.realpath(path) if os.path.islink(path) else path) as stream:
                yield stream


@contextmanager
def text_output(path: str) -> Iterator[TextIO]:
    """As ``binary_output``, for UTF-8 text."""
    with binary_output(path) as stream:
        if path == "-":
            yield sys.stdout
            return
        text = io.TextIOWrapper(cast(io.BufferedWriter, stream), encoding="utf-8", newline="\n")
        yield text
        text.detach()  # which flushes


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    with _named("standard output"):
        if sys.stdout is None:
            raise OSError("it is closed")
        sys.stdout.flush()
        yield sys.stdout.buffer
        sys.stdout.flush()


@contextmanager
def _whole_or_absent(path: str) -> Iterator[BinaryIO]:
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as stream:
            yield stream
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise


@contextmanager
def _named(what: str, remedy: str = "") -> Iterator[None]:
    """Makes an OSError name what could not be written, not a temporary file. A closed pipe is none of its business."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write {what}: {error.strerror or error}{remedy}") from error


def flush_output() -> None:
    """Write out what standard output holds back. Raises OSError."""
    if sys.stdout is not None:
        with _named("standard output"):
            _flush(sys.stdout)


def say(message: str) -> None:
    """Print a line on standard error, if anyone listens."""
    if sys.stderr is not None:
        with suppress(OSError):
            print(message, file=sys.stderr)
        with suppress(OSError):
            _flush(sys.stderr)


def _flush(stream: TextIO) -> None:
    """Flush a standard stream; what it cannot get rid of is dropped, or Python would try again at its exit."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
        raise


def printable(name: str) -> str:
    """A file name as standard output can print it."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return name.encode(encoding, "backslashreplace").decode(encoding)


class ProgressLine:
    """Counts on standard error while it is a terminal, a few times a second, and wipes the line at the end.

    A bar shows how much is done, where ``total`` or ``share`` (0 to 1) says it.
    """

    def __init__(self, what: str = "requests", total: int | None = None) -> None:
        self.total, self.share = total, 0.0
        self._what = what
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._started = self._last = time.monotonic()

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def __call__(self, done: int, total: int | None = None) -> None:
        """Show that ``done`` are done, of ``total`` if that is known only now."""
        if not self._shown:
            return
        now = time.monotonic()
        if now - self._last >= 0.2:
            self._last = now
            self.total = total or self.total
            rate = done / (now - self._started)
            self.show(f"{self._bar(done)}{done:,} {self._what}, {rate:,.3g}/s")

    def show(self, words: str) -> None:
        """Show what is done now, where it cannot be counted."""
        if self._shown:
            sys.stderr.write(f"\r\x1b[K{words}")
            sys.stderr.flush()

    def _bar(self, done: int) -> str:
        share = done / self.total if self.total else self.share
        if not share:
            return ""
        filled = min(_BAR, int(_BAR * share))
        return f"[{'#' * filled}{'.' * (_BAR - filled)}] {100 * share:.0f} % "
