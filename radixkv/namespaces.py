"""What a namespace sees of others."""

from __future__ import annotations

__all__ = ["seen_by"]


def seen_by(namespace: str, hierarchical: bool) -> list[str]:
    """The namespaces whose pages a request of this one finds, from the top down to itself.

    In a hierarchical cache what stands before a "/" lies above: "a/b/c" sees "a", "a/b" and itself.
    """
    if not hierarchical:
        return [namespace]
    return [namespace[:i] for i, letter in enumerate(namespace) if letter == "/"] + [namespace]
