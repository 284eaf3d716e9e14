"""What decides the bytes of a page, and what pages are called because of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any, NamedTuple

from radixkv import _core
from radixkv.formats import LayerFormat
from radixkv.namespaces import seen_by
from radixkv.shape import LayerShape

__all__ = ["ALL", "Keys", "Named", "Seen", "canonical", "difference", "layers_identity"]

ALL = b""
"""The name of the nonce that is in every namespace's tag."""

_NO_NONCE = bytes(16)


def canonical(identity: Mapping[str, Any]) -> bytes:
    """The same text for the same identity: JSON, keys sorted, ASCII."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def layers_identity(shapes: Sequence[LayerShape], formats: Sequence[LayerFormat]) -> list[dict[str, Any]]:
    """What of the layers decides the bytes of a page: runs of equal ones."""
    layers = [
        {"kv_heads": s.num_kv_heads, "k_dim": s.k_dim, "v_dim": s.stored_v_dim, "k": _fields(f.k), "v": _fields(f.v)}
        | ({"k_centre": _digest(f.k_centre)} if f.k_centre else {})
        for s, f in zip(shapes, formats, strict=True)
    ]
    return [{"layers": len(list(run)), **layer} for layer, run in groupby(layers)]


def _fields(stored: Any) -> dict[str, Any]:
    """All that a format of rows says, to the last bit."""
    return {name: value.hex() if isinstance(value, float) else value for name, value in asdict(stored).items()}


def _digest(numbers: Sequence[float]) -> str:
    """Many numbers in short, to the last bit."""
    return hashlib.sha256(" ".join(x.hex() for x in numbers).encode()).hexdigest()[:32]


def difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """How two identities differ, in words."""
    parts = [
        f"{n} {theirs.get(n)!r}, not {ours.get(n)!r}" for n in sorted({*ours, *theirs}) if ours.get(n) != theirs.get(n)
    ]
    return "; ".join(parts)


class Named(NamedTuple):
    """What a page is called, and what the names after it are made of."""

    key: bytes
    link: bytes  #: of the chain of keys of the top namespace
    tag: bytes
    top: bytes  #: the tag of the top namespace


class Seen(NamedTuple):
    """A namespace that a request sees, and what the pages of its prompt would be called there."""

    namespace: str
    tag: bytes
    keys: list[bytes]


class Keys:
    """Names of pages and namespaces below the pool. Another identity or secret gives other names, so nothing is found.

    A new nonce in a namespace's tag makes all that was stored under the old one unfindable, everywhere and at once. In
    a hierarchical cache it is in the tags of those below as well, and a page of a lower namespace is called by its tag
    and by what the same tokens are called in the top one: so its name does not depend on where the pages of one
    namespace end and those of the next begin.
    """

    def __init__(
        self, identity: Mapping[str, Any], secret: bytes, page_size: int, *, hierarchical: bool = False
    ) -> None:
        text = canonical(identity)
        self.fingerprint = hashlib.sha256(text).digest()[:16]
        self.page_size, self._hierarchical = page_size, hierarchical
        self.nonces: dict[bytes, bytes] = {}
        self._key = hashlib.blake2b(text, key=secret, digest_size=32).digest()

    def base(self, namespace: str) -> bytes:
        """What a namespace's nonce is kept under: the name itself is never stored."""
        return self._tag(namespace, _NO_NONCE, _NO_NONCE)

    def tag(self, namespace: str) -> bytes:
        everywhere = self.nonces.get(ALL, _NO_NONCE)
        own = [self.nonces.get(self.base(name), _NO_NONCE) for name in seen_by(namespace, self._hierarchical)]
        return self._tag(namespace, everywhere, b"".join(own))

    def pages(self, tokens: _core.Tokens, parent: bytes) -> list[bytes]:
        """The keys of the full pages of tokens that follow `parent`: a tag, or the key of the page before."""
        return _core.page_keys(tokens, self.page_size, self._key, parent)

    def root(self, namespace: str) -> Named:
        """What stands before a namespace's first page."""
        tag, highest = self.tag(namespace), seen_by(namespace, self._hierarchical)[0]
        top = tag if highest == namespace else self.tag(highest)
        return Named(tag, top, tag, top)

    def after(self, before: Named, tokens: _core.Tokens, namespace: str | None = None) -> Named:
        """The page with these tokens that follows another: of the same namespace, or of one below."""
        tag = before.tag if namespace is None else self.tag(namespace)
        (link,) = self.pages(tokens, before.link)
        return Named(self._key_of(link, tag, before.top), link, tag, before.top)

    def seen(self, tokens: _core.Tokens, namespace: str) -> list[Seen]:
        """What the full pages of tokens are called in each namespace that a request of this one sees, the top first."""
        tags = {name: self.tag(name) for name in seen_by(namespace, self._hierarchical)}
        top = next(iter(tags.values()))
        links = self.pages(tokens, top)
        return [Seen(name, tag, [self._key_of(link, tag, top) for link in links]) for name, tag in tags.items()]

    def _key_of(self, link: bytes, tag: bytes, top: bytes) -> bytes:
        if tag == top:
            return link
        return hashlib.blake2b(tag + link, key=self._key, person=b"rkv.page", digest_size=16).digest()

    def _tag(self, namespace: str, everywhere: bytes, own: bytes) -> bytes:
        message = namespace.encode() + b"\0" + everywhere + own
        return hashlib.blake2b(message, key=self._key, person=b"rkv.namespace", digest_size=16).digest()
