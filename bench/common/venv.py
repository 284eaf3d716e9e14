"""A virtual environment that peers are installed into, and belongs to nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import venv

from bench.common import ROOT


class Venv:
    """The one that `make NAME` installs, under build/. A peer that cannot be installed is no error, but is reported."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = ROOT / "build" / name
        self.python = self.folder / "bin" / "python"
        self._failed = self.folder / "failed.json"

    def create(self) -> None:
        print(f"installing the peers into {self.folder.relative_to(ROOT)} (minutes the first time)", flush=True)
        if not self.python.exists():
            venv.create(self.folder, with_pip=True)

    def pip(self, *arguments: str) -> str:
        """An empty string, or the last line of what pip says went wrong. torch may come from TORCH_INDEX."""
        command = [str(self.python), "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
        index = os.environ.get("TORCH_INDEX") if arguments[0] == "install" else None
        command += ["--extra-index-url", index] if index else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return "" if done.returncode == 0 else (errors or done.stderr.splitlines() or ["pip failed"])[-1]

    def finish(self, failed: dict[str, str]) -> None:
        """Remember which peers are missing, and why."""
        self._failed.write_text(json.dumps(failed, indent=1) + "\n")
        for peer, why in failed.items():
            print(f"{peer} is not installed: {why}")

    def why_missing(self, peer: str) -> str:
        """Why a peer is not there; an empty string if it is."""
        if not self._failed.exists():
            return f"not installed: run make {self.name}"
        why = json.loads(self._failed.read_text()).get(peer)
        return f"not installed: {why}" if why else ""
