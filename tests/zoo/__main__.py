"""All families, or those named: `python -m tests.zoo [family ...]`. `--write` rewrites the table in docs/models.md."""

from __future__ import annotations

import argparse
import sys

import torch

from tests.zoo.families import families
from tests.zoo.judge import Verdict, judge
from tests.zoo.table import write_table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("families", nargs="*", help="all by default")
    parser.add_argument("--write", action="store_true", help="rewrite the table in docs/models.md; takes all families")
    arguments = parser.parse_args()
    names = arguments.families or list(families())
    if unknown := set(names) - set(families()):
        parser.error(f"no family of the installed transformers: {', '.join(sorted(unknown))}")
    if arguments.write and arguments.families:
        parser.error("--write takes all families")
    torch.set_num_threads(1)
    verdicts: dict[str, Verdict] = {}
    for name in names:
        verdicts[name] = verdict = judge(name)
        print(f"{name:34} {verdict}", flush=True)
    counts = {kind: sum(v.verdict == kind for v in verdicts.values()) for kind in ("runs", "refused", "untestable")}
    wrong = [name for name, verdict in verdicts.items() if verdict.verdict == "wrong"]
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()), f"{len(wrong)} wrong", *wrong, sep=", ")
    if arguments.write:
        write_table(verdicts)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
