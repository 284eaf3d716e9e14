"""What is imported without torch or transformers says what to install."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_without(package: str, statement: str, stub: str = "None") -> str:
    """Runs `statement` in an interpreter that has `stub` for `package`: "Class: message" of the error it raised."""
    code = f"""
import sys, types
sys.modules[{package!r}] = {stub}
try:
    {statement}
except Exception as error:
    print(f"{{type(error).__name__}}: {{error}}")
else:
    print("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["Engine", "Step", "*"])
def test_the_engine_without_torch(name):
    assert run_without("torch", f"exec('from radixkv import {name}')") == (
        f"BackendUnavailable: radixkv.{name.replace('*', 'Engine')} needs torch: pip install 'radixkv[engine]'"
    )


@pytest.mark.parametrize("package", ["torch", "transformers"])
@pytest.mark.parametrize("module", ["radixkv.hf", "radixkv.hf.adapter"])
def test_hf_without_torch_or_transformers(package, module):
    if package == "transformers":
        pytest.importorskip("torch")
    error = run_without(package, f"import {module}")
    assert error.startswith("BackendUnavailable: radixkv.hf needs torch and transformers (import of ")
    assert error.endswith(": pip install 'radixkv[hf]'")
    assert package in error.partition("(")[2]


def test_hf_with_transformers_of_old():
    pytest.importorskip("torch")
    error = run_without("transformers", "import radixkv.hf", stub="types.ModuleType('transformers')")
    assert error.startswith("BackendUnavailable: radixkv.hf needs torch and transformers (cannot import ")


def test_another_missing_module_is_not_mistaken_for_these():
    pytest.importorskip("transformers")
    assert run_without("radixkv.hf.request", "import radixkv.hf").startswith("ModuleNotFoundError")


def test_the_bookkeeping_needs_neither():
    assert run_without("torch", "from radixkv import PrefixCache; PrefixCache(8).close()") == "no error"
