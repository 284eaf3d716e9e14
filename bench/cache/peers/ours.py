"""Driver of radixkv: PrefixCache, through its public methods alone."""

from __future__ import annotations

from typing import Any

import radixkv
from bench.cache.workload import PAGE, Tokens


class Ours:
    def __init__(self, pages: int) -> None:
        self.cache = radixkv.PrefixCache(pages, PAGE)

    def native(self, tokens: Tokens) -> Tokens:
        return tokens

    def acquire(self, tokens: Tokens) -> Any:
        lease = self.cache.acquire(tokens)
        lease.pages  # noqa: B018 (the array is made when it is read)
        return lease

    def release(self, claim: Any) -> None:
        claim.release(False)

    def serve(self, tokens: Tokens) -> int:
        lease = self.cache.acquire(tokens)
        hit = lease.num_cached
        lease.advance()
        lease.release()
        return hit

    def serve_full_pages(self, tokens: Tokens) -> int:
        """As the peers do: only full pages are published, and count as hit."""
        lease = self.cache.acquire(tokens)
        hit = lease.num_cached // PAGE * PAGE
        lease.advance(max(0, len(tokens) // PAGE * PAGE - lease.num_cached))
        lease.release()
        return hit

    def prepare(self, prompt: Tokens, whole: Tokens) -> Any:
        lease = self.cache.acquire(whole)
        lease.advance()
        return lease

    def commit(self, claim: Any) -> None:
        claim.commit()

    def finish(self, claim: Any) -> None:
        claim.release()

    def evict(self, pages: int) -> int:
        return self.cache.evict(pages)


def make(pages: int) -> Ours:
    return Ours(pages)
