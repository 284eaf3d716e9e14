"""What every contender is given, as a file. Imports nothing, so that it can be read in every venv."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workload:
    """`prompts` all begin with `system`; each contender generates `new` greedy tokens for each, whatever they are."""

    folder: str
    gguf: str
    system: list[int]
    prompts: list[list[int]]
    new: int
    threads: int

    def save(self, file: Path) -> None:
        file.write_text(json.dumps(vars(self)))

    @staticmethod
    def load(file: Path) -> Workload:
        return Workload(**json.loads(file.read_text()))
