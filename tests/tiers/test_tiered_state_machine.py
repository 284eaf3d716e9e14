"""The cache's state machine over tiers: fetches, fills, clears and evictions interleaved with all that a cache does.

Every slot of the simulated pool says which namespace and tokens its K and V are of, and every written slot of every
lease is compared after each operation: a page that the tiers filled wrongly shows at once.
"""

from __future__ import annotations

import os

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import initialize, invariant, multiple, precondition, rule, run_state_machine_as_test

import radixkv
from radixkv.tiers import TierOptions, Tiers
from radixkv.tiers.cache import TieredCache
from tests.cache.journal_shadow import Shadow
from tests.cache.test_state_machine import Machine
from tests.tiers.pool import IDENTITY
from tests.tiers.test_tiers import Faulty

FILLS = {"at once": 0, "after a head": 0, "of a namespace above": 0}
"""How many fills gained tokens: that the machine tries what it is for."""


class Slots:
    """The pool's simulated slots as pages of bytes: eight bytes a slot, the number of what it holds."""

    def __init__(self, slots, num_pages, page_size):
        self.slots, self.num_pages, self.page_size, self.page_bytes = slots, num_pages, page_size, 8 * page_size
        self.numbers, self.things = {}, []

    def read_pages(self, pages, out):
        for row, page in zip((row.view(np.int64) for row in out), pages.tolist(), strict=True):
            for i in range(self.page_size):
                thing = self.slots.get((page, i))
                if thing not in self.numbers:
                    self.numbers[thing] = len(self.things)
                    self.things.append(thing)
                row[i] = self.numbers[thing]

    def write_pages(self, pages, data):
        for row, page in zip((row.view(np.int64) for row in data), pages.tolist(), strict=True):
            for i in range(self.page_size):
                self.slots[page, i] = self.things[row[i]]


class TieredMachine(Machine):
    hierarchical = False

    @initialize(
        num_pages=st.integers(4, 20), page_size=st.integers(1, 4), journal=st.booleans(), hub=st.integers(2, 30),
        write=st.sampled_from(["all", "all", "all", "second"]),
    )  # fmt: skip
    def start(self, num_pages, page_size, journal, hub, write):
        Machine.start(self, num_pages, page_size, False, "hierarchical" if self.hierarchical else "lru")
        self.cache = TieredCache(num_pages, page_size, hierarchical=self.hierarchical)
        self.shadow = Shadow(self.cache.journal()) if journal else None
        self.table = radixkv._core.PageTable(self.cache)
        self.store = Faulty()
        pages = Slots(self.slots, num_pages, page_size)
        options = TierOptions(threads=0, ram=hub * 4096, write=write)
        self.tiers = Tiers(self.cache, pages, IDENTITY, options, [self.store])
        self.fetches = []

    def keeps_up(self):
        return self.shadow.catch_up() if self.shadow is not None else None

    @rule(data=st.data())
    def fetch(self, data):
        namespace, tokens = self.tokens_like_before(data)
        if len(self.fetches) < 4:
            self.fetches.append(self.tiers.fetch(tokens, namespace))

    @rule(pair=Machine.leases)
    def fetch_for(self, pair):
        """For a lease that is there already, whatever it has written by the time it is filled."""
        if pair in self.live and len(self.fetches) < 4:
            self.fetches.append(self.tiers.fetch(pair[1].tokens, pair[1].namespace))
            self.tiers.pump()

    @rule()
    def pump(self):
        self.tiers.pump()

    @rule(how=st.sampled_from(["cancel", "drop"]))
    @precondition(lambda self: getattr(self, "fetches", None))
    def let_go(self, how):
        fetch = self.fetches.pop(0)
        if how == "cancel":
            fetch.cancel()

    @rule(
        target=Machine.leases,
        data=st.data(),
        before=st.sampled_from([20, 20, 20, 0]),
        after=st.sampled_from([0, 0, 5]),
        head=st.booleans(),
    )
    def restore(self, data, before, after, head):
        """A request over tiers, of which the pool may have lost some: fetched, acquired, partly computed, filled."""
        namespace, tokens = self.tokens_like_before(data)
        tokens = tokens + data.draw(st.lists(st.integers(0, 2), max_size=5))
        namespace = data.draw(st.sampled_from([namespace, self.namespaces[0]]))
        self.served(namespace, tokens)
        namespace = data.draw(st.sampled_from([n for n in self.namespaces if namespace in self.model.chain(n)]))
        tokens = tokens + data.draw(st.lists(st.integers(0, 2), max_size=5))
        self.evict_both(before)
        fetch = self.tiers.fetch(tokens, namespace)
        self.tiers.pump()
        self.evict_both(after)
        self.keeps_up()
        namespace = data.draw(st.sampled_from([namespace] * 8 + [*self.namespaces]))  # another's is filled with nothing
        done = self.both(lambda: self.cache.acquire(tokens, namespace), lambda: self.model.acquire(namespace, tokens))
        if done is None:
            return multiple()
        if head:
            n = data.draw(st.integers(0, len(tokens) - done[1].written))
            self.write(*done, n)
            done[0].advance(n)
            self.model.advance(done[1], n)
        FILLS["after a head" if head else "at once"] += self.filled(done, fetch) > 0
        self.seen.append((namespace, tokens))
        self.live.append(done)
        return done

    def served(self, namespace, tokens):
        """Served and stored before, if the pool has room."""
        done = self.both(lambda: self.cache.acquire(tokens, namespace), lambda: self.model.acquire(namespace, tokens))
        if done is not None:
            n = len(tokens) - done[1].written
            self.write(*done, n)
            done[0].advance()
            self.model.advance(done[1], n)
            done[0].release()
            self.model.release(done[1], True)
        self.tiers.pump()
        self.keeps_up()

    def evict_both(self, n):
        assert self.cache.evict(n) == len(self.model.evict(n))

    @rule(pair=Machine.leases, data=st.data())
    @precondition(lambda self: getattr(self, "fetches", None))
    def fill(self, pair, data):
        """Any fetch for any lease."""
        fetch = self.fetches[data.draw(st.integers(0, len(self.fetches) - 1))]  # what Hypothesis draws, it keeps
        if self.may_change(pair, lambda: self.tiers.fill(pair[0], fetch)):
            self.filled(pair, fetch)

    def filled(self, pair, fetch):
        """Fill; the model learns of the tokens as if they had been computed. What they are of is checked by `agree`."""
        lease, model = pair
        before, tag = model.written, self.tiers._keys.tag(model.namespace)
        gained = self.tiers.fill(lease, fetch)
        size = self.cache.page_size
        FILLS["of a namespace above"] += gained > 0 and fetch.owner(before // size) != model.namespace
        if gained:
            assert fetch.namespace == model.namespace
            assert fetch.tag == tag
            assert (before + gained) % self.cache.page_size == 0
            assert before + gained < len(model.tokens)
            self.model.commit(model)  # what the lease computed is of its own namespace
            for i in range(before // size, (before + gained) // size):  # each page is again of who had published it
                self.model.advance(model, (i + 1) * size - model.written)
                self.model.commit(model, namespace=fetch.owner(i))
        assert sum(fetch.restored.values()) >= gained
        return gained

    @rule(data=st.data())
    def clear(self, data):
        """Through the cache: it reaches the tiers."""
        namespace = data.draw(st.sampled_from([None, *self.namespaces]))
        free = self.model.free
        freed = self.cache.clear(namespace)
        for name in self.namespaces if namespace is None else [namespace]:
            self.model.clear(name)
        assert freed == self.model.free - free
        gone = [n for n in self.namespaces if namespace in (None, *self.model.chain(n))]
        for name in gone:
            fetch = self.tiers.fetch(max((t for n, t in self.seen if n in (name, self.namespaces[0])), key=len), name)
            self.tiers.pump()
            assert not {fetch.owner(i) for i in range(fetch.first, fetch.first + fetch.num_pages)} & set(gone)
            assert fetch.tokens == 0 or not set(self.model.chain(name)) <= set(gone)

    @invariant()
    def tiers_agree(self):
        if hasattr(self, "tiers"):
            self.tiers.hub.check()
            for fetch in self.fetches:
                held = [slot for slot in fetch.slots if slot is not None]
                assert len(held) == len(set(held))

    def teardown(self):
        if hasattr(self, "tiers"):
            for fetch in self.fetches:
                fetch.cancel()
            self.tiers.pump()
            assert self.tiers.hub.num_used == 0
        Machine.teardown(self)
        if hasattr(self, "tiers"):
            self.tiers.close()


class FamilyMachine(TieredMachine):
    hierarchical = True


@pytest.mark.parametrize("machine", [TieredMachine, FamilyMachine])
def test_tiers_under_any_traffic(machine):
    FILLS.update(dict.fromkeys(FILLS, 0))
    examples = int(os.environ.get("RADIXKV_EXAMPLES", "200")) // 2
    phases = [p for p in Phase if p is not Phase.shrink or os.environ.get("RADIXKV_SHRINK") != "0"]
    run_state_machine_as_test(
        machine,
        settings=settings(max_examples=examples, stateful_step_count=50, deadline=None, phases=phases),
    )
    assert FILLS["at once"] + FILLS["after a head"] > 0
    assert machine.hierarchical == (FILLS["of a namespace above"] > 0)
