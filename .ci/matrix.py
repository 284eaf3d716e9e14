"""The core and adapter tests on the lowest and the newest versions that pyproject.toml allows, on each Python.

    python .ci/matrix.py [ROW...]

A row is a Python and an end of the range, such as 3.10-lowest; without arguments all are run. 3.10-lowest-core leaves
out torch, transformers and the tests that need them: a quick answer where torch is gigabytes. Each row has an
environment of its own in build/matrix, with one wheel of radixkv built here; it is deleted when its tests passed. The
table is printed and left in build/matrix/table.md. Exit status 1 if a row failed; one without its Python has not.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
ROWS = [f"3.{minor}-{end}" for minor, end in itertools.product(range(10, 14), ("lowest", "newest"))]
CORE = ("state_machine", "cache", "refusals", "threads", "trace*", "replay", "curve", "workload")
ADAPTERS = ("drop", "engine", "attention*", "cascade*", "hf_*")
SHOWN = ("numpy", "torch", "transformers")
VERSIONS = f"""
from importlib.metadata import distributions
found = {{d.name: d.version for d in distributions()}}
print(*(found.get(name, "-") for name in {SHOWN}), sep=" | ")
"""


def main() -> int:
    rows = sys.argv[1:] or ROWS
    if unknown := sorted({row.removesuffix("-core") for row in rows} - set(ROWS)):
        sys.exit(f"no row {', '.join(unknown)}: there are {', '.join(ROWS)}")
    wheel = prepare()
    table = FOLDER / "table.md"
    table.write_text(f"| Python | versions | {' | '.join(SHOWN)} | result |\n|---|---|---|---|---|---|\n")
    failed = 0
    for row in rows:
        print(f"== {row}", flush=True)
        cells, passed = run(row, wheel)
        failed += not passed
        with table.open("a") as file:
            file.write(f"| {' | '.join(row.split('-', 1))} | {cells} |\n")
    print(table.read_text())
    return int(failed > 0)


def prepare() -> Path:
    """Build the wheel, and copy the tests to where the package's sources are not; returns the wheel."""
    shutil.rmtree(FOLDER / "site", ignore_errors=True)
    shutil.copytree(ROOT / "tests", FOLDER / "site" / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", FOLDER / "site")
    for old in FOLDER.glob("*.whl"):
        old.unlink()
    call(FOLDER / "wheel.log", sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", FOLDER, ROOT)
    return next(FOLDER.glob("*.whl"))


def run(row: str, wheel: Path) -> tuple[str, bool]:
    """One row: its cells after the first two, and whether nothing failed."""
    python, end, *only = row.split("-")
    extras = ("test",) if only else ("test", "engine", "demo")
    interpreter = f"python{python}"
    if subprocess.run(["sh", "-c", f"{interpreter} --version"], capture_output=True).returncode:
        return f"- | - | - | not run: no {interpreter} found", True
    place = FOLDER / row
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    venv, log = place / "venv", place / "log"
    options = ["--python", interpreter, "--only-binary", ":all:", *(f"--extra={extra}" for extra in extras)]
    lowest = ["--resolution", "lowest-direct"] if end == "lowest" else []
    try:
        call(log, sys.executable, ROOT / ".ci" / "lock.py", place, *options, *lowest)
        call(log, ROOT / ".ci" / "install", interpreter, venv, place)
        call(log, venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", wheel)
    except subprocess.CalledProcessError:
        return f"- | - | - | **not installed**: see {log.relative_to(ROOT)}", False
    versions = subprocess.run([venv / "bin" / "python", "-c", VERSIONS], capture_output=True, text=True).stdout.strip()
    passed, result = test(venv, CORE if only else CORE + ADAPTERS, log)
    if passed:
        shutil.rmtree(venv)
    return f"{versions} | {result if passed else f'**{result}**'}", passed


def test(venv: Path, names: tuple[str, ...], log: Path) -> tuple[bool, str]:
    """Run the tests on the wheel that is installed; whether they passed, and pytest's count."""
    site = FOLDER / "site"
    files = sorted(file for name in names for file in (site / "tests").rglob(f"test_{name}.py"))
    with log.open("a+") as output:
        command = [venv / "bin" / "python", "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", *files]
        status = subprocess.run(command, cwd=site, stdout=output, stderr=output).returncode
        output.seek(0)
        counts = re.findall(r"^((?:\d+ \w+,? ?)+) in [\d.]+s", output.read(), re.MULTILINE)
    return status == 0, counts[-1] if counts else f"pytest ended with status {status}: see {log.relative_to(ROOT)}"


def call(log: Path, *command: str | Path) -> None:
    """Run a command in the root, its output into a log, of which the end is printed if it fails."""
    with log.open("a") as output:
        done = subprocess.run([str(part) for part in command], cwd=ROOT, stdout=output, stderr=output)
    if done.returncode:
        print("".join(log.read_text().splitlines(keepends=True)[-20:]), flush=True)
        raise subprocess.CalledProcessError(done.returncode, command)


if __name__ == "__main__":
    sys.exit(main())
