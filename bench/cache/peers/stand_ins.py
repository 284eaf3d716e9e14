"""Empty modules in place of packages that a peer imports on the way to its cache and that its cache never uses.

A peer's cache sits behind imports of image transforms, grammars and GPU kernels, some of which have no build for this
machine's torch. Where such a package is absent, a name looked up in it is an empty class. Nothing that is measured runs
any of it; a cold start is shortened by what is not imported, in the peer's favour.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType


class _Empty(type):
    """A class whose every attribute is another such class: also good as a base class or a decorator's argument."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _StandIn(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(name, (), {})


class _Finder:
    def __init__(self, packages: frozenset[str]) -> None:
        self.packages = packages

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give it a version, which some importers parse."""
        module.__version__ = "0"  # type: ignore[attr-defined]


def stand_in(packages: Iterable[str]) -> list[str]:
    """Make those of `packages` that are not installed importable as empty modules; returns which these are."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    sys.meta_path.append(_Finder(frozenset(absent)))  # type: ignore[arg-type]
    return absent
