"""Types of the native core. The docstrings are those of the module itself, copied by ``make stubs``."""

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

class DLPack(Protocol):
    """A tensor on the CPU, of any library."""

    def __dlpack__(self) -> Any: ...

Tokens: TypeAlias = Sequence[int] | npt.NDArray[np.int32] | npt.NDArray[np.int64] | DLPack

class Cache:
    """The native half of radixkv.PrefixCache."""

    def __init__(
        self, num_pages: int, page_size: int = 16, policy: str = "lru", *, hierarchical: bool = False
    ) -> None: ...
    @property
    def num_pages(self) -> int:
        """Pages of the pool."""

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""

    @property
    def hierarchical(self) -> bool:
        """Whether namespace "a/b" finds what "a" published as well."""

    def acquire(self, tokens: Tokens, namespace: str = "") -> Lease:
        """Match the longest cached prefix, lock it, and take pages for the rest of the tokens.

        At least one token is always left to compute, so lease.num_cached < len(tokens). Reuse is exact to the token: where the
        match ends inside a page, lease.copies says what to copy before writing.

        Args:
            tokens: list of ints, or 1-D int32 or int64 array or tensor on the CPU; 0 <= token < 2**31; not empty. An int32
                array is read in place.
            namespace: prefixes are found again in the same namespace only (tenant, LoRA adapter, model revision).

        Raises:
            PoolExhausted: free and evictable pages do not suffice; nothing has changed.
            InvalidTokens: empty, of a wrong type or out of range.
            InvalidArgument: the namespace is no str.

        Cost: O(tokens) comparisons of memory, O(1) a page evicted.
        """

    def match(self, tokens: Tokens, namespace: str = "") -> int:
        """Tokens of the longest cached prefix, up to len(tokens). Changes nothing, recency included. O(tokens matched)."""

    def _would_fit(self, tokens: Tokens, namespace: str = "") -> tuple[int, int, int, int]:
        """(needed, free, evictable, cached) of a prompt: see PrefixCache.would_fit."""

    def pin(self, tokens: Tokens, namespace: str = "") -> Pin:
        """Keep a cached prefix (a system prompt, few-shot examples) resident until unpin() is called on the result.

        The pin is on the tokens: it stays although the object is dropped, and moves to the fuller page where one replaces the
        prefix's last, partly filled page. Its pages count as protected.

        Raises:
            NotCached: not all of the tokens are cached.
            PoolExhausted: pins would hold more than num_pages - max(1, num_pages // 8) pages.
        """

    def evict(self, num_pages: int) -> int:
        """Take back up to num_pages evictable pages now, coldest first; returns how many. O(1) a page."""

    def clear(self, namespace: str | None = None) -> int:
        """Forget all prefixes, or those of one namespace and of those below it; returns the number of pages freed at once.

        For weights that change under a running cache: nothing cached so far is found again. Leases and pins stay valid and keep
        their pages until they let go; what such a lease writes later is not published.
        """

    def set_quota(self, namespace: str, *, floor: int = 0, ceiling: int | None = None) -> None:
        """Say how many pages a namespace keeps whatever the others do, and how many it may have. Without both: no quota.

        Its pages are those that it has published and those that its leases have taken; in a hierarchical cache those of all
        namespaces below it as well, which have no quotas of their own.

        Args:
            floor: while it has no more pages than this, no other namespace's request evicts any of them. Pages that it has not
                taken yet are not kept free. evict() is the host's and heeds no floor.
            ceiling: a request that would have more evicts its namespace's own coldest pages first. None: as many as there are.

        Raises:
            InvalidArgument: floors of more pages than the pool has, a floor above the ceiling, a namespace below another, more
                than 1000 quotas, or the policy is "hazard".

        What is evicted first is the least recently used of what may be, and within a namespace the least recently used, always.
        Cost: O(pages of the tree) now; each node evicted later costs a look at each namespace that has a quota.
        """

    def snapshot(self) -> list[dict[str, Any]]:
        """The tree, a copy: one dict a namespace, in alphabetical order, {namespace, locks, pins, children}; a child is {tokens, pages, locks, pins, children}. O(cached tokens)."""

    def check(self) -> None:
        """Recompute every count, link and state from scratch; AssertionError if any is wrong. O(pages)."""

    def _coldest_first(self) -> npt.NDArray[np.int32]:
        """The last page of each run of the tree that nobody has locked, in the order of their eviction."""

    def close(self) -> None:
        """Take nothing new from now on; live leases can still be released."""

    def _stats(self) -> dict[str, int]: ...
    def _most_pages(self, namespace: str) -> int: ...
    def _namespaces(self) -> list[tuple[str | None, int, int, int, int, int, int, int | None]]: ...
    def _what_if(self) -> tuple[list[float], list[int]]: ...
    def _refuse_pages(self, n: int) -> None: ...

JournalColumns: TypeAlias = tuple[
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int32],
    npt.NDArray[np.int64],
    npt.NDArray[np.int32],
    dict[int, str],
    int,
    bool,
]

class Journal:
    """The native half of radixkv.journal.Journal."""

    def __init__(self, cache: Cache) -> None: ...
    @property
    def page_size(self) -> int:
        """Tokens a page holds."""

    def _read(self, cursor: int, limit: int) -> JournalColumns: ...
    def _dump(self) -> JournalColumns: ...
    def _releases(
        self, cursor: int, limit: int
    ) -> tuple[list[tuple[str, int, npt.NDArray[np.int32], int, int, int]], int, int]: ...
    def still(self, pages: Sequence[int], numbers: Sequence[int]) -> list[bool]:
        """For each page, whether it is still in the tree, and has been since the STORED record with that number. Who copied a page without a lock asks afterwards: if so, what was copied is what was published."""

    def _ends(self) -> tuple[int, int]: ...

class Pin:
    """Keeps a cached prefix resident until unpin(); dropping the object does not unpin."""

    @property
    def num_tokens(self) -> int:
        """Tokens of the pinned prefix."""

    def unpin(self) -> None:
        """Let the prefix be evicted again. LeaseError if done already."""

    def __enter__(self) -> Pin: ...
    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

class Lease:
    """The claim of one request on its pages. A context manager: leaving normally commits what was advanced and releases,
    an exception only releases. One that is dropped is released without a commit.

    It belongs to the thread that acquired it, until another calls adopt(). While a step is open over it, it can be read;
    what would change it raises LeaseError.
    """

    @property
    def num_tokens(self) -> int:
        """Tokens it has room for."""

    @property
    def num_cached(self) -> int:
        """Tokens whose K and V lay in its pages at acquire; less than num_prompt."""

    @property
    def num_written(self) -> int:
        """Tokens whose K and V are written."""

    @property
    def num_prompt(self) -> int:
        """Tokens given to acquire(), and to extend() as more of the prompt."""

    @property
    def namespace(self) -> str:
        """The namespace that it was acquired in."""

    @property
    def released(self) -> bool:
        """Whether it has ended."""

    @property
    def num_dropped(self) -> int:
        """Tokens, from the first on, whose pages it dropped; a multiple of page_size."""

    @property
    def pages(self) -> npt.NDArray[np.int32]:
        """int32 array (a copy): the page of each run of page_size tokens after those that were dropped, in order. commit() may change it."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]:
        """int32 array (a copy) of all its tokens. O(num_tokens)."""

    @property
    def copies(self) -> list[tuple[int, int, int]]:
        """[(source page, target page, tokens)]: copy the K and V of these leading tokens before writing; pending, and the source kept, until the next advance()."""

    def extend(self, tokens: Tokens, *, prompt: bool = False) -> None:
        """Room for more tokens. O(new tokens).

        An open page that commit() published never changes: the lease goes on in a copy of it (`copies`), or, where no page is
        left for a copy and nobody else uses that one, in the page itself, which leaves the tree.

        Args:
            prompt: a further piece of a prompt that is computed in pieces, not of an answer: it counts as input in the
                statistics of the cache, and to `num_prompt`.

        Raises:
            PoolExhausted: free and evictable pages do not suffice, or the pages it would hold are more than the pool's; the
                lease is as it was. Pages that drop() freed do not count.
        """

    def advance(self, n: int | None = None) -> None:
        """K and V of the next n tokens (all by default) are written, and pending copies made."""

    def drop(self, num_tokens: int) -> int:
        """No later row sees the first num_tokens tokens (a sliding window): take the pages that lie wholly in them from its view.

        Pages that are shared through the tree stay there, as long as the lease lives. Private ones are freed, and nothing from
        there on can be published any more: commit() first what later requests shall find. Positions do not change, nor
        lease.tokens. With an Engine use Engine.drop.

        Returns:
            The number of pages freed.

        Raises:
            InvalidArgument: more than the tokens written.
        """

    def truncate(self, num_tokens: int) -> int:
        """Keep the first num_tokens tokens and take the others back, written or not: drafts that were wrong, a branch given up.

        Pages that hold none of the kept tokens are freed, and extend() goes on from there. What later requests may have found
        stays: tokens that came from the cache, were published by commit(), or were dropped.

        Returns:
            The number of pages freed.

        Raises:
            InvalidArgument: more than the lease has, or fewer than must stay; it gives both numbers.
        """

    def commit(self) -> None:
        """Publish what is written, so that other requests match it. Duplicates of pages that another request published first are freed, so `pages` may change. O(tokens since the last commit)."""

    def release(self, commit: bool = True, cold: bool = False) -> None:
        """Commit (unless told not to), then let go of all pages.

        cold: no request of this session will follow. The pages that no other request ever branched off (the session's own, from
        its last page back to the first that it shares) are then evicted before anything else. A hint: they are found as
        long as they are there, and whoever uses them again makes them like any others. Where it is not known whether a session
        has ended, leave it out: wrong hints cost more than right ones gain.
        """

    def _commit_as(self, namespace: str) -> None:
        """Publish the full pages that are written as those of a namespace above its own: what had published them."""

    def fork(self) -> Lease:
        """A second lease on the same tokens. Commits this one: full pages are shared through the tree, the open page is copied
        on write.

        Raises:
            LeaseError: tokens are unwritten, copies are not made (advance() says they are), what was dropped was not committed,
                or the namespace was cleared. PoolExhausted: no page is left for the copy.
        """

    def adopt(self) -> None:
        """From now on the lease belongs to the calling thread."""

    def _of(self, cache: Cache) -> bool:
        """Whether this cache acquired it."""

    def __enter__(self) -> Lease: ...
    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

class Table:
    """The page table of one step; each array is a copy."""

    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def qo_indptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def kv_indptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def kv_indices(self) -> npt.NDArray[np.int32]:
        """O(pages); raises LeaseError once the step has ended."""

    @property
    def kv_last_page_len(self) -> npt.NDArray[np.int32]: ...
    @property
    def slots(self) -> npt.NDArray[np.int32]: ...
    @property
    def input_ids(self) -> npt.NDArray[np.int64]: ...
    @property
    def positions(self) -> npt.NDArray[np.int64]: ...
    @property
    def last_rows(self) -> npt.NDArray[np.int64]: ...
    @property
    def staged_entries(self) -> int:
        """Entries of 4 bytes that stage() writes."""

    def stage(self, address: int, entries: int) -> list[tuple[int, int]]:
        """Write all arrays end to end into this memory; returns where each begins and ends, in entries of 4 bytes."""

class ArrayTable(Table):
    """A table of arrays, checked and copied. It has no inputs."""

    def __init__(
        self,
        qo_indptr: npt.NDArray[np.int32],
        kv_indptr: npt.NDArray[np.int32],
        kv_indices: npt.NDArray[np.int32],
        kv_last_page_len: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        num_pages: int,
        page_size: int,
    ) -> None: ...

class PageTable(Table):
    """Opens steps over leases of one cache; the table of the last one."""

    def __init__(self, cache: Cache) -> None: ...
    @property
    def window_limit(self) -> int: ...
    @property
    def copy_source(self) -> npt.NDArray[np.int32]: ...
    @property
    def copy_target(self) -> npt.NDArray[np.int32]: ...

class Step:
    """A step over the unwritten tokens of some leases, open inside its `with` block. The native half of radixkv.Step.

    max_rows: of each lease at most so many, the first ones. None: all.

    Entering and leaving are native, so no signal finds them half done. Entering assembles the page table and calls
    _prepare(); if that raises, nothing is open. Leaving normally advances each lease by the rows that were planned for it,
    provided that every layer was attended; an exception advances none. In either case, and where the step is dropped
    without being left, its leases are free again.
    """

    def __init__(
        self, table: PageTable, leases: Sequence[Lease], num_layers: int, max_rows: int | None = None
    ) -> None: ...
    @property
    def is_open(self) -> bool:
        """Whether it was entered and not left yet."""

    @property
    def num_leases(self) -> int: ...
    def _prepare(self) -> None:
        """What a subclass does on entering, once the page table is assembled."""

    def _has_attended(self, layer: int) -> bool: ...
    def _attended(self, layer: int) -> None:
        """Note that this layer's K and V are written."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, type: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

CHUNK_KEYS: int

def prefer_huge_pages(address: int, nbytes: int) -> None:
    """Ask that memory be backed by huge pages as it is first touched. A wish: never an error."""

class CascadeCosts:
    def __init__(
        self,
        min_users: int,
        min_tokens: int,
        launch_tokens: float,
        merge_tokens: float,
        max_levels: int,
        max_rows: int,
        granularity: int,
    ) -> None: ...

class Cascade:
    """What the requests of a step share, and its page table."""

    @property
    def qo_indptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def kv_indptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def kv_indices(self) -> npt.NDArray[np.int32]:
        """Asked for the first time once the step has ended, it raises LeaseError."""

    @property
    def kv_last_page_len(self) -> npt.NDArray[np.int32]: ...
    @property
    def order(self) -> npt.NDArray[np.int32]: ...
    @property
    def segments(self) -> list[tuple[Any, ...]]:
        """Of each: user_begin, user_end, page_begin, page_end, first_page, token_begin, token_end, parent, level, verdict, saved, spent."""

    @property
    def shared_pages(self) -> npt.NDArray[np.int32]: ...
    @property
    def levels(self) -> int: ...
    @property
    def tokens_saved(self) -> int: ...
    @property
    def tokens_read(self) -> int: ...
    @property
    def page_size(self) -> int: ...

class CascadeFinder:
    """Finds the cascade of one step after another."""

    def __init__(self, costs: CascadeCosts) -> None: ...
    def find(self, table: Table) -> Cascade:
        """Derived again only where the batch is another one than last time."""

class LayerCache:
    """Where the pages of one layer's keys, or of its values, lie, and how rows do in them."""

    def __init__(
        self,
        *,
        address: int,
        dtype: str,
        num_heads: int,
        dim: int,
        scale: float,
        rotated: bool,
        page_bytes: int,
        scales: int,
        centre: int,
        usual_scale: float,
    ) -> None: ...

class RowCounts:
    """What was stored of one layer's keys, or values, in 8 or 4 bits."""

    @property
    def rows(self) -> int: ...
    @property
    def not_finite(self) -> int: ...
    @property
    def unusual(self) -> int: ...
    @property
    def sampled(self) -> int: ...
    @property
    def error_sum(self) -> float: ...
    @property
    def error_most(self) -> float: ...

class LayerKV:
    """Where one layer's K and V pages lie; see radixkv.pool.LayerKV."""

    def __init__(self, *, num_qo_heads: int, num_kv_heads: int, k: LayerCache, v: LayerCache) -> None: ...
    @staticmethod
    def latent(*, num_qo_heads: int, k: LayerCache, v_dim: int) -> LayerKV:
        """A layer with one head of keys, whose first v_dim numbers are the values."""

class AttentionPlan:
    """Attention over a page table: plan once a step, append and run once a layer."""

    def __init__(
        self, layers: Sequence[LayerKV], dtype: str, num_pages: int, page_size: int, num_threads: int, isa: str = ""
    ) -> None: ...
    def plan(self, table: Table) -> None: ...
    def append(self, layer: int, k: int, k_row: int, k_head: int, v: int, v_row: int, v_head: int) -> None: ...
    def run(
        self,
        layer: int,
        q: int,
        q_row: int,
        q_head: int,
        out: int,
        sm_scale: float,
        window_left: int,
        logits_soft_cap: float,
        attention_chunk: int,
        sinks: int,
    ) -> None: ...
    def set_costs(self, costs: CascadeCosts) -> None: ...
    def counts(self, layer: int) -> tuple[RowCounts, RowCounts]: ...
    @property
    def cascade(self) -> Cascade: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def isa(self) -> str: ...
    num_threads: int

def isa() -> str:
    """The instruction set that attention uses: the machine's best, or the environment's RADIXKV_ISA."""

def isas() -> list[str]:
    """The instruction sets that this machine supports, best first."""

def page_keys(tokens: Tokens, page_size: int, secret: bytes, parent: bytes) -> list[bytes]:
    """The keys of the full pages of these tokens: a chain of keyed BLAKE2b-128 that begins with a namespace's tag, or with the key of the page before."""
