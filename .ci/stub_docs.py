"""Writes the docstrings of the native module into radixkv/_core.pyi, for editors and the API reference: make stubs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

from radixkv import _core

STUB = Path(__file__).parents[1] / "radixkv" / "_core.pyi"


def docstring(thing: Any, name: str) -> str:
    """What the module says of a class, a function or a property, without the signature that nanobind begins with."""
    text = (thing.__doc__ or "").strip()
    if text.startswith((f"{name}(", "(self")):
        text = text.partition("\n\n")[2]
    return text.strip()


def documented(stub: str) -> ast.Module:
    """The stub with the module's docstrings in place of its own."""
    tree = ast.parse(stub)
    owners: list[tuple[ast.Module | ast.ClassDef, Any]] = [(tree, _core)]
    while owners:
        node, owner = owners.pop()
        for child in node.body:
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and hasattr(owner, child.name):
                thing = getattr(owner, child.name)
                if isinstance(child, ast.ClassDef):
                    owners.append((child, thing))
                own = not child.name.startswith("__")  # those of object say nothing
                put(child, docstring(thing, child.name) if own else "", indent=4 * (1 + (owner is not _core)))
    return tree


def put(node: ast.FunctionDef | ast.ClassDef, text: str, indent: int) -> None:
    if ast.get_docstring(node) is not None:
        del node.body[0]
    if text:
        lines = [" " * indent * bool(line) + line for line in text.splitlines()]
        end = "\n" + " " * indent if len(lines) > 1 else ""
        said = ast.Constant("\n".join(lines).strip() + end)
        node.body = [ast.Expr(said), *(n for n in node.body if not _is_dots(n))]
    if not node.body:
        node.body = [ast.Expr(ast.Constant(...))]


def _is_dots(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is ...


def main() -> int:
    STUB.write_text(ast.unparse(ast.fix_missing_locations(documented(STUB.read_text()))) + "\n")
    for command in (["check", "-q", "--fix", "--select", "I"], ["format", "-q"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, str(STUB)], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
