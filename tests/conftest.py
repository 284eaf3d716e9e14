"""One line says how many tests were skipped and why; `pytest -rs` lists them."""

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        terminalreporter.write_line(f"skipped {len(skipped)}: {why} (pytest -rs lists them)")
