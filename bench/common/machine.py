"""What a figure depends on besides the code."""

from __future__ import annotations

import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any


def conditions(module: str) -> dict[str, Any]:
    """The command that runs `module`, the date, the machine, and how busy it is before the benchmark."""
    return {
        "command": " ".join([f"python -m {module}", *sys.argv[1:]]),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": load(),
    }


def load() -> float:
    """Processes that ran or waited to, over the last minute."""
    return round(os.getloadavg()[0], 2)


def cpu_model() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
