"""What a reader of a cache's journal knows of its tree."""

from __future__ import annotations

from radixkv.journal import NAMESPACE, REMOVED, STORED


class Shadow:
    """A tree's full pages, from its journal alone."""

    def __init__(self, journal, cursor=0):
        self.journal, self.cursor = journal, cursor
        self.roots: dict[int, str] = {}
        self.pages: dict[int, tuple[str, tuple[int, ...]]] = {}  # page: its namespace, the tokens up to its end
        self.parents: dict[int, int] = {}

    def apply(self, batch):
        for i, (op, page, parent, root) in enumerate(zip(batch.op, batch.page, batch.parent, batch.root, strict=True)):
            if op == NAMESPACE:
                self.roots[root] = batch.names[i]
            elif op == STORED:
                assert page not in self.pages, "stored twice"
                namespace, before = self.pages[parent] if parent >= 0 else ("", ())
                assert root >= 0 or parent >= 0
                assert root < 0 or parent < 0 or self.roots[root].startswith(namespace + "/")
                namespace = self.roots[root] if root >= 0 else namespace
                self.pages[page] = namespace, (*before, *batch.tokens[i].tolist())
                self.parents[page] = int(parent)
            else:
                assert op == REMOVED
                assert page not in self.parents.values(), "removed before its children"
                del self.pages[page], self.parents[page]

    def catch_up(self, limit=4096):
        while True:
            batch = self.journal.read(self.cursor, limit)
            assert not batch.lost
            self.apply(batch)
            self.cursor = batch.cursor
            if self.cursor == self.journal.end:
                return
