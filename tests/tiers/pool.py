"""A pool of bytes and a cache over it: every page's bytes follow from its namespace and the tokens up to its end."""

from __future__ import annotations

import hashlib

import numpy as np

import radixkv
from radixkv.namespaces import seen_by
from radixkv.tiers import TierOptions, Tiers

IDENTITY = {"model": "m", "weights": "w", "kv_dtype": "bfloat16", "k_scale": "0x1p0", "arithmetic": "native:test"}
PAGE_SIZE, PAGE_BYTES = 4, 1000


def content(namespace, tokens):
    """The "K and V" of the page that ends with these tokens."""
    seed = hashlib.sha256(repr((namespace, list(map(int, tokens)))).encode()).digest()
    return np.resize(np.frombuffer(seed, np.uint8), PAGE_BYTES)


class Pool:
    """What an engine has: a cache, the pages it counts, and tiers below."""

    def __init__(
        self, options=None, *, num_pages=64, identity=IDENTITY, stores=(), page_size=PAGE_SIZE, hierarchical=False
    ):
        self.page_bytes, self.num_pages = PAGE_BYTES, num_pages
        self.bytes = np.zeros((num_pages, PAGE_BYTES), np.uint8)
        self.cache = radixkv.PrefixCache(num_pages, page_size, hierarchical=hierarchical)
        self.tiers = Tiers(self.cache, self, identity, options or TierOptions(threads=0), stores)

    def read_pages(self, pages, out):
        for page, row in zip(pages, out, strict=True):
            row[:] = self.bytes[page]

    def write_pages(self, pages, data):
        for page, row in zip(pages, data, strict=True):
            self.bytes[page] = row

    def compute(self, lease):
        """Writes what is not written, as a model would."""
        size = self.cache.page_size
        for i in range(lease.num_written // size, len(lease.pages)):
            self.bytes[lease.pages[i]] = content(lease.namespace, lease.tokens[: (i + 1) * size])
        lease.advance()

    def verify(self, lease):
        """Every written full page of a lease holds its own bytes, as a namespace computed them that it sees."""
        size, seen = self.cache.page_size, seen_by(lease.namespace, self.cache.hierarchical)
        for i, page in enumerate(lease.pages[: lease.num_written // size]):
            right = [content(name, lease.tokens[: (i + 1) * size]) for name in seen]
            assert any(np.array_equal(self.bytes[page], bytes_) for bytes_ in right)

    def serve(self, tokens, namespace=""):
        """Fetch, acquire, fill, compute the rest; the tokens that the tiers gave."""
        fetch = self.tiers.fetch(tokens, namespace)
        if not self.tiers._worker.is_alive():
            self.tiers.pump()
        fetch.wait(5)
        with self.cache.acquire(tokens, namespace) as lease:
            gained = self.tiers.fill(lease, fetch)
            self.verify(lease)
            assert lease.num_written < lease.num_tokens
            self.compute(lease)
        self.cache.check()
        self.tiers.hub.check()
        return gained

    def close(self):
        self.tiers.close()
