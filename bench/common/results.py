"""Keeps results: all of them under build/bench/, and of a whole run a summary in bench/results/, which is committed."""

from __future__ import annotations

import json
from typing import Any

from bench.common import ROOT

DETAILS = ("contenders", "results", "threads")


def keep(name: str, results: dict[str, Any], quick: bool) -> None:
    """Write both files; a shortened run leaves the summary as it is."""
    everything = ROOT / "build" / "bench" / f"{name}{'_quick' * quick}.json"
    everything.parent.mkdir(parents=True, exist_ok=True)
    everything.write_text(json.dumps(results) + "\n")
    if not quick:
        (ROOT / "bench" / "results" / f"{name}.json").write_text(spread(summary(results)) + "\n")


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """The table and under which conditions it came about, without what it was made from."""
    left_out = {key for key in DETAILS if "rows" in found and isinstance(found.get(key), dict | list)}
    kept = {key: value for key, value in found.items() if key not in left_out}
    return {key: summary(value) if isinstance(value, dict) else value for key, value in kept.items()}


def spread(value: Any, indent: str = "") -> str:
    """JSON with a line for each row of a table."""
    deeper = indent + " "
    if isinstance(value, dict) and "measure" not in value:
        lines = [f"{deeper}{json.dumps(key)}: {spread(inner, deeper)}" for key, inner in value.items()]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + spread(inner, deeper) for inner in value) + f"\n{indent}]"
    return json.dumps(value)
