"""The table of families in docs/models.md: written from verdicts, and read back by the test."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from radixkv.hf.pictures import FAMILIES
from tests.zoo.judge import Verdict

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
_BEGIN = re.compile(r"<!-- zoo: transformers (\S+) -->\n")
_END = "<!-- end of zoo -->\n"


def write_table(verdicts: dict[str, Verdict]) -> None:
    """Put the table between the marks of docs/models.md, which keep the version of transformers."""
    text = PAGE.read_text()
    begin = _BEGIN.search(text)
    assert begin, f"{PAGE} has lost its mark"
    head, tail = text[: begin.start()], text[text.index(_END) :]
    PAGE.write_text(f"{head}<!-- zoo: transformers {transformers.__version__} -->\n{table_of(verdicts)}\n{tail}")


def read_table() -> tuple[str, dict[str, Verdict]]:
    """The version of transformers that the table was made with, and its verdicts."""
    text = PAGE.read_text()
    begin = _BEGIN.search(text)
    assert begin, f"{PAGE} has lost its mark"
    verdicts = {}
    for line in text[begin.end() : text.index(_END)].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 7 and cells[0].startswith("`"):
            verdicts[cells[0].strip("`")] = Verdict(*cells[1:6])
    return begin[1], verdicts


def table_of(verdicts: dict[str, Verdict]) -> str:
    """Three lists: what runs, what is refused, what transformers could not build here."""
    runs, refused, untestable = (
        {name: v for name, v in verdicts.items() if v.verdict == kind} for kind in ("runs", "refused", "untestable")
    )
    parts = [
        f"\n### {len(runs)} families run\n",
        *_rows(runs),
        f"\n### {len(refused)} families are refused\n",
        *_rows(refused),
        f"\n### {len(untestable)} families could not be tried\n",
        "Transformers cannot build them small from a configuration alone, or its own `generate` fails.\n",
        *_rows(untestable),
    ]
    return "\n".join(parts) + "\n"


def _rows(verdicts: dict[str, Verdict]) -> list[str]:
    names = ("family", "verdict", "why not", "`optimize`", "`EngineCache`", "`latent`", "pictures")
    rows = [
        (f"`{name}`", v.verdict, v.reason, v.optimized, v.cached, v.latent, _pictures(name) if v.optimized else "")
        for name, v in verdicts.items()
    ]
    return [f"| {' | '.join(cells)} |" for cells in (names, ["---"] * len(names), *rows)]


def _pictures(name: str) -> str:
    """Of a family that runs. Empty for one that reads text only."""
    if name in FAMILIES:
        return "yes"
    return "no" if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else ""
