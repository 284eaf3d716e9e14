"""The journal of a cache: what entered its tree, what left it, and which requests ended, in numbered records.

    journal = cache.journal()                      # records from now on, after what is there already
    cursor = 0
    batch = journal.read(cursor)                   # as often as the reader likes; it keeps its own cursor
    for record in range(len(batch)):
        ...
    cursor = batch.cursor

A record is one of

    NAMESPACE   `root` stands for the namespace `names[i]` from here on
    STORED      `page`, with its `tokens`, follows the page `parent`, -1 where it is a first one. It is of the namespace
                `root`; where root is -1, of its parent's. (Both: a page below one of a namespace above.)
    REMOVED     `page` is no longer in the tree

A parent is stored before its children and removed after them; a page that is stored again was removed before. Only full
pages are recorded. Replaying all records gives the full pages of the tree, exactly.

Nobody is called and nobody waits: the cache keeps the last 4 * num_pages records, and a reader that comes too late is
told so (`lost`). It can begin anew with `dump`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from radixkv import _core

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["NAMESPACE", "REMOVED", "STORED", "Batch", "Journal", "Release"]

NAMESPACE, STORED, REMOVED = 0, 1, 2


class Batch(NamedTuple):
    """Some records of a journal, column by column; what a record does not have is -1 (tokens: 0)."""

    op: npt.NDArray[np.int32]
    """[records]: NAMESPACE, STORED or REMOVED."""
    page: npt.NDArray[np.int32]
    parent: npt.NDArray[np.int32]
    root: npt.NDArray[np.int32]
    request: npt.NDArray[np.int64]
    """[records]: the number of the request whose call it was, from 1 in the order of acquire; 0: no request's."""
    tokens: npt.NDArray[np.int32]
    """[records, page_size]."""
    names: dict[int, str]
    """The namespace of each NAMESPACE record, by its index here."""
    cursor: int
    """The number to read from next."""
    lost: bool
    """Records before these are gone unread: the reader came too late."""


class Release(NamedTuple):
    """A lease that ended, by release or by being dropped."""

    namespace: str
    num_prompt: int
    tokens: npt.NDArray[np.int32]
    """All its tokens, those that acquire was given first."""
    request: int
    """Its number, from 1 in the order of acquire; a fork has its parent's."""
    num_cached: int
    """Tokens that acquire found."""
    at: int
    """The number that the next record got."""


class Journal(_core.Journal):
    """A reader's view of a cache's journal. Made by `PrefixCache.journal`; any number may read, from any thread.

    The first one turns recording on, which costs a record at each change and 4 * num_pages records of memory (as many
    tokens as four pools hold, backed as they are used); it stays on as long as the cache lives.
    """

    @property
    def end(self) -> int:
        """The number that the next record gets."""
        return self._ends()[0]

    @property
    def releases_end(self) -> int:
        """The number that the next release gets."""
        return self._ends()[1]

    def read(self, cursor: int, limit: int = 4096) -> Batch:
        """Up to `limit` records from number `cursor` on. O(records read).

        Raises:
            InvalidArgument: a number is negative or no int.
        """
        return self._batch(self._read(cursor, limit))

    def dump(self) -> Batch:
        """The tree as it is, as the records that would make it; `cursor` is where to go on. O(cached tokens)."""
        return self._batch(self._dump())

    def releases(self, cursor: int, limit: int = 256) -> tuple[list[Release], int, int]:
        """Up to `limit` releases from number `cursor` on, the cursor to go on with, and how many are gone unread.

        The cache keeps the last ones, with as many tokens as four pools hold, 2**20 at least.
        """
        found, cursor, lost = self._releases(cursor, limit)
        return [Release(*release) for release in found], cursor, lost

    def _batch(self, columns: _core.JournalColumns) -> Batch:
        op, page, parent, root, request, tokens, names, cursor, lost = columns
        return Batch(op, page, parent, root, request, tokens.reshape(len(op), self.page_size), names, cursor, lost)
