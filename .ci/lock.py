"""Pins every package that some extras of pyproject.toml bring, directly or not: python .ci/lock.py FOLDER UV_OPTION...

The options are those of `uv pip compile`. Two files are written into FOLDER: requirements.lock, with hashes, and
torch.lock: torch and what only its CUDA build needs. The latter has no hashes and is used as pip's constraints, since
the same release of torch lies in several places as different files, of which not all need CUDA's packages.
"""

import pathlib
import re
import subprocess
import sys

OF_TORCH = re.compile(r"(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==")
HEADER = "# Written by `make lock`.\n"


def main(folder: str, *options: str) -> None:
    command = ["uv", "pip", "compile", "pyproject.toml", "--generate-hashes", "--no-header", "--no-python-downloads"]
    done = subprocess.run([*command, "--quiet", *options], check=True, stdout=subprocess.PIPE, text=True)
    entries = re.split(r"^(?=[a-z])", done.stdout, flags=re.MULTILINE)
    ours = [entry for entry in entries if not OF_TORCH.match(entry)]
    torch = [entry.split("\\\n")[0].rstrip() + "\n" for entry in entries if OF_TORCH.match(entry)]
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "requirements.lock").write_text(HEADER + "".join(ours))
    (target / "torch.lock").write_text(HEADER + "".join(torch))


if __name__ == "__main__":
    main(*sys.argv[1:])
