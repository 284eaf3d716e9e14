"""The docstrings in the stub are those of the native module: after a change, `make stubs`."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def stub_docs():
    spec = importlib.util.spec_from_file_location("stub_docs", ROOT / ".ci" / "stub_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def docstrings(tree):
    """Of each class and function, by its place: line breaks and indentation are the formatter's."""
    found = {}
    for owner in [tree, *(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))]:
        for node in owner.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[getattr(owner, "name", ""), node.name] = ast.get_docstring(node)
    return found


def test_the_docstrings_of_the_stub_are_current():
    text = (ROOT / "radixkv" / "_core.pyi").read_text()
    assert docstrings(ast.parse(text)) == docstrings(stub_docs().documented(text))


def test_every_public_name_of_a_public_class_has_one():
    found = docstrings(ast.parse((ROOT / "radixkv" / "_core.pyi").read_text()))
    silent = [f"{owner}.{name}" for (owner, name), text in found.items()
              if owner in ("Cache", "Lease", "Pin", "Journal") and not name.startswith("_") and not text]  # fmt: skip
    assert silent == []
    assert "Reuse is exact to the token" in found["Cache", "acquire"]


def test_a_docstring_that_changed_is_noticed():
    text = (ROOT / "radixkv" / "_core.pyi").read_text().replace("Reuse is exact", "Reuse is nearly exact")
    assert docstrings(ast.parse(text)) != docstrings(stub_docs().documented(text))
