"""Imports go down only, and `import radixkv` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Top to bottom; a module imports from its own row or below.
LAYERS = [
    {"cli", "demo", "__main__"},
    {"hf", "bench"},
    {"engine", "step"},
    {"attention"},
    {"pool"},
    {"traces", "view"},
    {"cache"},
    {"_core"},
    {"geometry", "errors"},
]


def layer(module: str) -> int:
    """The row of "radixkv.a.b": the longest first word that a row's name begins."""
    first = module.split(".")[1] if "." in module else "__init__"
    for row, names in enumerate(LAYERS):
        if first in names or any(first.startswith(name + "_") for name in names):
            return row
    raise AssertionError(f"{module} has no layer: add it to LAYERS")


def imports(path: Path) -> set[str]:
    """Modules of radixkv that a file imports, anywhere but under `if TYPE_CHECKING`."""
    package = path.relative_to(ROOT).with_suffix("").parts
    tree = ast.parse(path.read_text())
    skipped = {
        id(n)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for n in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level]) + "." if node.level else ""
            module = (base + (node.module or "")).rstrip(".")
            found |= {f"{module}.{a.name}" for a in node.names} if module == "radixkv" else {module}
    return {m for m in found if m.startswith("radixkv.")}


MODULES = sorted(p for p in (ROOT / "radixkv").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "radixkv")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down_only(path):
    own = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for module in imports(path):
        if not module.removeprefix("radixkv.")[0].isupper():
            assert layer(module) >= layer(own), f"{own} imports {module}, which lies above it"


def test_only_the_bindings_include_python_and_nothing_native_names_torch():
    for path in (ROOT / "csrc").iterdir():
        if path.suffix in {".cpp", ".hpp"}:
            text = path.read_text()
            if not path.name.startswith("bindings"):
                assert "nanobind" not in text.replace("nanobind builds", "")
                assert "Python.h" not in text
            assert "#include <torch" not in text


def test_only_the_flashinfer_backend_imports_flashinfer():
    for path in (ROOT / "radixkv").rglob("*.py"):
        if path.name != "flashinfer.py":
            tree = ast.parse(path.read_text())
            names = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
            names += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level]
            assert not any(name.split(".")[0] == "flashinfer" for name in names), path


def test_import_is_light():
    code = """
import sys
import radixkv
cache = radixkv.PrefixCache(num_pages=8, page_size=4)
with cache.acquire([1, 2, 3]) as lease:
    lease.advance()
heavy = {"torch", "transformers", "flashinfer", "numpy", "msgpack", "sortedcontainers"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_are_of_readable_size():
    paths = [*(ROOT / "radixkv").rglob("*.py"), *(ROOT / "csrc").iterdir(), *(ROOT / "tests").glob("*.py")]
    lines = {p.name: len(p.read_text().splitlines()) for p in paths if p.suffix in {".py", ".cpp", ".hpp"}}
    assert {name: n for name, n in lines.items() if n > 500} == {}
