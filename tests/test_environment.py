"""What `make` sets up and how the suite reports: the locks, the `radixkv` command, warnings and skips."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging import markers, requirements

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PINNED = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[\w.]+)(?: ; (?P<marker>[^\\]+?))?(?P<hashed> \\)?", re.ASCII)


def locked(file: str) -> list[re.Match[str]]:
    """The packages that a lock names; every line of it is one, a hash of one, or a comment."""
    found = []
    for line in (ROOT / file).read_text().splitlines():
        if re.fullmatch(r" *#.*|    --hash=sha256:[0-9a-f]{64}( \\)?", line):
            continue
        match = PINNED.fullmatch(line)
        assert match, f"{file}: {line}"
        found.append(match)
    return found


def test_every_package_is_pinned_and_all_but_torchs_have_hashes() -> None:
    assert all(package["hashed"] for package in locked("requirements.lock"))
    assert {"numpy", "transformers", "pytest", "ruff"} <= {package["name"] for package in locked("requirements.lock")}
    assert {"torch", "triton"} <= {package["name"] for package in locked("torch.lock")}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_locks_have_what_pyproject_asks_for(python: str) -> None:
    """A requirement added, or a floor raised, without `make lock`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    where = {"python_version": python, "python_full_version": f"{python}.4", "sys_platform": "linux"}
    versions = {
        package["name"]: package["version"]
        for package in (*locked("requirements.lock"), *locked("torch.lock"))
        if not package["marker"] or markers.Marker(package["marker"]).evaluate(where)
    }
    for text in [*project["dependencies"], *(line for e in ("engine", "hf", "test", "dev") for line in extras[e])]:
        wanted = requirements.Requirement(text)
        assert wanted.name in versions, text
        assert versions[wanted.name] in wanted.specifier, text


BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
LINES = [line for language, block in BLOCKS if not language for line in block.splitlines()]
COMMANDS = [line.split("#")[0].strip() for line in LINES if line.startswith("radixkv ")]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_runs_as_it_stands(command: str, tmp_path: Path) -> None:
    """In the environment that make sets up, from any folder."""
    name, *arguments = command.split()
    program = Path(sys.executable).with_name(name)
    assert program.exists(), f"{program} is not there: run make build"
    done = subprocess.run([program, *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_readme_has_commands() -> None:
    assert {command.split()[1] for command in COMMANDS} >= {"replay", "curve"}


def test_a_copy_of_the_package_on_pythonpath_goes_first(tmp_path: Path) -> None:
    """Sanitizers and mutants are tested in such copies; if these sources went first, nothing would be found in them."""
    copy = tmp_path / "radixkv" / "__init__.py"
    copy.parent.mkdir()
    copy.touch()
    command = [sys.executable, "-c", "import radixkv; print(radixkv.__file__)"]
    done = subprocess.run(command, cwd=ROOT.anchor, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.strip() == str(copy)


def pytest_on(folder: Path, *arguments: str) -> str:
    """What pytest prints about the tests in a folder, with this project's settings."""
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(folder), "-p", "tests.conftest"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *settings, *arguments, str(folder)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


def test_a_warning_is_an_error_where_it_is_about_our_code(tmp_path: Path) -> None:
    (tmp_path / "test_warnings.py").write_text(
        """
import warnings
import pytest

OURS = ["radixkv", "radixkv.hf.cache", "tests.mutants"]

@pytest.mark.parametrize("module", [*OURS, "transformers.cache", "radixkv_other"])
def test_warn(module):
    exec("import warnings; warnings.warn('old', FutureWarning)", {"__name__": module})

def test_unraisable():
    class Broken:
        def __del__(self):
            raise ValueError
    Broken()
"""
    )
    failed = re.findall(r"^FAILED \S*::(\S+)", pytest_on(tmp_path, "-rf"), re.MULTILINE)
    assert failed == [
        "test_warn[radixkv]",
        "test_warn[radixkv.hf.cache]",
        "test_warn[tests.mutants]",
        "test_unraisable",
    ]


def test_one_line_says_how_many_tests_are_skipped_and_why(tmp_path: Path) -> None:
    (tmp_path / "test_skips.py").write_text(
        """
import pytest

@pytest.mark.skipif(True, reason="no GPU here")
@pytest.mark.parametrize("i", range(3))
def test_gpu(i):
    pass

def test_traces():
    pytest.skip("no traces here")

def test_runs():
    pass
"""
    )
    lines = [line for line in pytest_on(tmp_path).splitlines() if "here" in line]
    assert lines == ["skipped 4: 3 no GPU here; 1 no traces here (pytest -rs lists them)"]
    assert pytest_on(tmp_path, "-rs").count("SKIPPED") == 2
    assert "skipped 4" not in pytest_on(tmp_path, "-k", "runs")
