"""What a reader of a cache's journal knows of its tree."""

from __future__ import annotations

from radixkv.journal import NAMESPACE, REMOVED, STORED


class Shadow:
    """A tree's full pages, from its journal alone."""

    def __init__(self, journal, cursor=0):
        self.journal, self.cursor = journal, cursor
        self.roots: dict[int, str] = {}
        self.pages: dict[int, tuple[str, tuple[int, ...]]] = {}  # page: its namespace, the tokens up to its end

    def apply(self, batch):
        for i, (op, page, parent, root) in enumerate(zip(batch.op, batch.page, batch.parent, batch.root, strict=True)):
            if op == NAMESPACE:
                self.roots[root] = batch.names[i]
            elif op == STORED:
                assert page not in self.pages, "stored twice"
                assert (parent < 0) == (root >= 0)
                namespace, before = self.pages[parent] if parent >= 0 else (self.roots[root], ())
                self.pages[page] = namespace, (*before, *batch.tokens[i].tolist())
            else:
                assert op == REMOVED
                assert not [p for p in self.pages.values() if p[1][: -len(batch.tokens[i])] == self.pages[page][1]
                            and p[0] == self.pages[page][0]], "removed before its children"  # fmt: skip
                del self.pages[page]

    def catch_up(self, limit=4096):
        while True:
            batch = self.journal.read(self.cursor, limit)
            assert not batch.lost
            self.apply(batch)
            self.cursor = batch.cursor
            if self.cursor == self.journal.end:
                return
