"""Imports go down only, and `import radixkv` stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants import MUTANTS

ROOT = Path(__file__).parents[1]

# Top to bottom; a module imports from its own row or below.
LAYERS = [
    {"cli", "demo", "__main__"},
    {"hf", "bench"},
    {"scheduling"},
    {"engine", "step"},
    {"tiers"},
    {"attention"},
    {"pool"},
    {"capacity"},
    {"traces"},
    {"cache", "journal", "observe"},
    {"_core"},
    {"formats", "kv_plan"},
    {"shape", "memory", "content", "namespaces"},
    {"errors"},
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


NATIVE = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".cpp", ".hpp"})
NATIVE_LAYERS = {
    "base": {"base"},
    "cache": {"base", "cache"},
    "step": {"base", "cache", "step"},
    "attention": {"base", "step", "attention"},
    "python": {"base", "cache", "step", "attention", "python"},
}


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_native_includes_go_down_only(path):
    """A folder of csrc/ includes those below it; only the topmost includes Python, and none names torch."""
    own = path.relative_to(ROOT / "csrc").parts[0]
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        assert name.split("/")[0] in NATIVE_LAYERS[own], f"{path} includes {name}, which lies above it"
    system = re.findall(r"#include <([^>]+)>", path.read_text())
    if own != "python":
        assert not [name for name in system if "nanobind" in name or "Python.h" in name]
    assert not [name for name in system if "torch" in name]


def test_nothing_imports_flashinfer_before_it_is_needed():
    """Its backend does by name, when it is made."""
    for path in (ROOT / "radixkv").rglob("*.py"):
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


def python_functions(path):
    """(name, lines without the docstring) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            yield node.name, node.end_lineno - body[0].lineno + 1 if body else 0


def native_functions(path):
    """(first line, lines) of every block that is no namespace or type, at the indentation of a function or method."""
    lines = path.read_text().splitlines()
    for i, line in enumerate(lines):
        indent = re.match(" *", line)[0]
        kind = re.match(r"\s*(template <.*> )?(namespace|class|struct|enum|extern|union)\b", line)
        if line.endswith("{") and len(indent) <= 2 and not kind:
            end = next(k for k in range(i + 1, len(lines)) if lines[k].startswith(indent + "}"))
            yield line.strip(), end - i + 1


def test_a_person_reads_a_function_at_once():
    """Files may be as long as what they tell; a function fits on a screen."""
    python = [p for folder in ("radixkv", "tests", "bench") for p in (ROOT / folder).rglob("*.py")]
    found = [(path, *f) for path in python for f in python_functions(path)]
    found += [(path, *f) for path in NATIVE for f in native_functions(path)]
    assert len(found) > 1000
    assert [f for f in found if f[2] > 50] == []


def test_every_mutant_still_applies():
    """`make mutants` takes long; that its bugs can be seeded at all is seen here."""
    gone = [m.bug for m in MUTANTS if (ROOT / "csrc" / m.file).read_text().count(m.line) != 1]
    assert gone == []
