"""`radixkv log`: an operation log: the tree at a step, what changed between two, why a prompt misses."""

from __future__ import annotations

import argparse
from typing import Any

from radixkv.cli.common import (
    Command,
    ProgressLine,
    add_json,
    count,
    decoder_of,
    print_json,
    printable,
    read_story,
    seed,
    tokenizer_of,
)
from radixkv.errors import InvalidArgument
from radixkv.journal_story import PageState, Story
from radixkv.observe import Decode

__all__ = ["COMMAND"]

_SHOWN = 8  # tokens of a page


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("log", metavar="FILE", help="a log that PrefixCache.record wrote")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--state", type=seed, metavar="STEP", help="the pages of the tree after STEP changes")
    what.add_argument("--diff", type=seed, nargs=2, metavar=("A", "B"), help="what came and went between two steps")
    what.add_argument(
        "--explain",
        metavar="PROMPT",
        help="why a prompt is cached as far as it is: token ids, or text with --tokenizer",
    )
    what.add_argument(
        "--request", type=count, metavar="N", help="why request N was cached as far as it was when it came"
    )
    parser.add_argument("--namespace", default="", help="of the prompt to explain")
    parser.add_argument("--tokenizer", metavar="PATH", help="a model's folder or tokenizer.json; for text in and out")
    parser.add_argument(
        "--top", type=count, default=50, metavar="N", help="show at most N pages (default: %(default)s)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Read the log; print what was asked for."""
    story = read_story(args.log)
    if args.state is not None:
        _show(args, {"step": args.state}, {"pages": story.state(args.state)})
    elif args.diff is not None:
        came, went = story.diff(*args.diff)
        _show(args, {"from": args.diff[0], "to": args.diff[1]}, {"came": came, "went": went})
    elif args.explain is not None or args.request is not None:
        _explain(args, story)
    else:
        _summary(args, story)
    return 0


def _summary(args: argparse.Namespace, story: Story) -> None:
    stored = sum(change.stored for change in story.changes)
    found = {
        "log": args.log,
        "num_pages": story.num_pages,
        "page_size": story.page_size,
        "first_step": story.begin,
        "last_step": story.end,
        "stored": stored,
        "removed": len(story.changes) - stored,
        "requests": len(story.releases),
        "lost": [list(gap) for gap in story.gaps],
        "lost_requests": story.lost_releases,
    }
    if args.json:
        print_json(found)
        return
    print(f"log         {printable(args.log)}: {story.num_pages:,} pages of {story.page_size} tokens")
    print(f"steps       {story.begin:,} to {story.end:,}: {stored:,} pages stored, {found['removed']:,} removed")
    print(f"requests    {len(story.releases):,} ended")
    if story.lost_releases:
        print(f"lost        {story.lost_releases:,} requests")
    for begin, end in story.gaps:
        print(f"lost        steps {begin:,} to {end:,}")


def _show(args: argparse.Namespace, numbers: dict[str, Any], groups: dict[str, list[PageState]]) -> None:
    if args.json:
        print_json(numbers | {name: [page._asdict() for page in pages] for name, pages in groups.items()})
        return
    for name, pages in groups.items():
        print(f"{name:<6}{len(pages):,}")
        for page in pages[: args.top]:
            above = f"after {page.parent:,}" if page.parent >= 0 else f"begins {page.namespace!r}"
            dots = " ..." if len(page.tokens) > _SHOWN else ""
            print(f"  page {page.page:>7,}  {above:<16}  {' '.join(map(str, page.tokens[:_SHOWN]))}{dots}")
        if len(pages) > args.top:
            print(f"  {len(pages) - args.top:,} more: --top, or --json for all")


def _explain(args: argparse.Namespace, story: Story) -> None:
    with ProgressLine() as progress:
        if args.request is not None:
            decode = decoder_of(args.tokenizer)
            found = story.explain_request(args.request, progress)
        else:
            tokens, decode = _tokens(args.explain, args.tokenizer)
            found = story.explain(tokens, args.namespace, progress=progress)
    if args.json:
        print_json({**vars(found), "text": found.text(decode)})
    else:
        print(found.text(decode))


def _tokens(prompt: str, tokenizer: str | None) -> tuple[list[int], Decode | None]:
    """The prompt's ids, and how to read ids, where there is a tokenizer."""
    if tokenizer is None:
        words = prompt.replace(",", " ").split()
        if not words or not all(word.isdecimal() for word in words):
            raise InvalidArgument(f"{prompt[:40]!r} are no token ids: give numbers, or --tokenizer for text")
        return [int(word) for word in words], None
    return tokenizer_of(tokenizer).encode(prompt).ids, decoder_of(tokenizer)


COMMAND = Command(
    "log",
    "an operation log: the cache at any step, what changed between two, why a prompt misses",
    'radixkv log cache.log --explain "12 7 1921 88"',
    add,
    run,
    "PrefixCache.record(FILE) writes one. A step is a page that was stored or removed.",
)
