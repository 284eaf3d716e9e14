"""What is imported without torch or transformers says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_without(package: str, statement: str) -> str:
    """Runs `statement` in an interpreter that has no `package`; returns the error it raised, as "Class: message"."""
    code = f"""
import sys
sys.modules[{package!r}] = None
try:
    {statement}
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
else:
    print("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    "statement", ["exec('from radixkv import *')", "from radixkv import Engine", "from radixkv import Step"]
)
def test_the_engine_without_torch(statement):
    name = "Step" if "Step" in statement else "Engine"
    assert run_without("torch", statement) == (
        f"BackendUnavailable: radixkv.{name} needs torch: pip install 'radixkv[engine]'"
    )


@pytest.mark.parametrize("package", ["torch", "transformers"])
@pytest.mark.parametrize(
    "statement", ["import radixkv.hf", "from radixkv.hf import Generator", "import radixkv.hf.adapter"]
)
def test_hf_without_torch_or_transformers(package, statement):
    if package == "transformers":
        pytest.importorskip("torch")
    assert run_without(package, statement) == (
        f"BackendUnavailable: radixkv.hf needs {package}: pip install 'radixkv[hf]'"
    )


def test_another_missing_module_is_not_mistaken_for_these():
    pytest.importorskip("transformers")
    assert run_without("radixkv.hf.request", "import radixkv.hf").startswith("ModuleNotFoundError")


def test_the_bookkeeping_needs_neither():
    code = "from radixkv import PrefixCache; PrefixCache(8).close()"
    assert run_without("torch", code) == "no error"
