"""PrefixCache against the reference model, operation by operation, with a simulated K/V pool under it.

A step may be open meanwhile: its leases refuse to change, everything else goes on.
"""

from __future__ import annotations

import os

import hypothesis.strategies as st
import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

import radixkv
from tests.cache.hazard_model import HazardModel
from tests.cache.journal_shadow import Shadow
from tests.cache.model import NO_CEILING, Exhausted, Misuse, Model, ModelLease, Name

TOKENS = st.integers(0, 2)


class Machine(RuleBasedStateMachine):
    leases = Bundle("leases")
    pins = Bundle("pins")

    @initialize(
        num_pages=st.integers(4, 20),
        page_size=st.integers(1, 4),
        journal=st.booleans(),
        policy=st.sampled_from(["lru", "hierarchical", "hazard"]),
    )
    def start(self, num_pages: int, page_size: int, journal: bool, policy: str) -> None:
        hierarchical = policy == "hierarchical"
        evicts = "hazard" if policy == "hazard" else "lru"
        self.cache = radixkv.PrefixCache(num_pages, page_size, evicts, hierarchical=hierarchical)
        self.shadow = Shadow(self.cache.journal()) if journal else None
        self.model = (
            HazardModel(num_pages, page_size) if policy == "hazard" else Model(num_pages, page_size, hierarchical)
        )
        self.namespaces = ("b", "b/x", "b/x/y", "b/z") if hierarchical else ("", "b")
        self.seen: list[tuple[str, list[int]]] = [(self.namespaces[0], [0]), (self.namespaces[1], [0])]
        self.slots: dict[tuple[int, int], tuple[str, tuple[int, ...]]] = {}  # what "K and V" each slot holds
        self.live: list[tuple[radixkv.Lease, ModelLease]] = []
        self.live_pins: list[tuple[radixkv.Pin, list[object]]] = []
        self.table = radixkv._core.PageTable(self.cache)
        self.step: radixkv._core.Step | None = None
        self.stepping: list[tuple[radixkv.Lease, ModelLease]] = []  # the leases of the open step

    def tokens_like_before(self, data: st.DataObject) -> tuple[str, list[int]]:
        namespace, old = data.draw(st.sampled_from(self.seen))
        namespace = data.draw(st.sampled_from([namespace, *self.namespaces]))
        keep = data.draw(st.integers(0, len(old)))
        new = data.draw(st.lists(TOKENS, min_size=0 if keep else 1, max_size=12))
        return namespace, old[:keep] + new

    def both(self, real, model, *misuse):
        """Runs both; both succeed, or both refuse."""
        try:
            expected = model()
        except Exhausted:
            try:
                real()
            except radixkv.PoolExhausted:
                return None
            raise AssertionError("the model refused for lack of pages, the cache did not") from None
        except Misuse:
            try:
                real()
            except misuse:
                return None
            raise AssertionError("the model refused a misuse, the cache did not") from None
        return real(), expected

    # --- the K/V pool of a host that copies and writes as late as it may -------------------------------------------

    def slot(self, lease: radixkv.Lease, at: int) -> tuple[int, int]:
        size = self.cache.page_size
        return int(lease.pages[(at - lease.num_dropped) // size]), at % size

    def verify(self, lease: radixkv.Lease, model: ModelLease) -> None:
        """The K/V of every written token in its view is in the lease's pages, once pending copies are made."""
        copied = {(target, i): self.slots[source, i] for source, target, n in lease.copies for i in range(n)}
        for at in range(lease.num_dropped, lease.num_written):
            where = self.slot(lease, at)
            namespace, tokens = copied.get(where) or self.slots[where]
            assert namespace in self.model.chain(model.namespace)
            assert tokens == tuple(model.tokens[: at + 1])

    def write(self, lease: radixkv.Lease, model: ModelLease, n: int) -> None:
        for source, target, count in lease.copies:
            for i in range(count):
                self.slots[target, i] = self.slots[source, i]
        for at in range(lease.num_written, lease.num_written + n):
            self.slots[self.slot(lease, at)] = (model.namespace, tuple(model.tokens[: at + 1]))

    def published(self) -> set[Name]:
        """The pages of the tree, each as the model names it."""
        found, size = set(), self.cache.page_size
        open_nodes = [(root["namespace"], (), child) for root in self.cache.snapshot() for child in root["children"]]
        while open_nodes:
            namespace, name, node = open_nodes.pop()
            namespace, tokens = node.get("namespace", namespace), node["tokens"].tolist()
            for at in range(0, len(tokens), size):
                name = (*name, (namespace, tuple(tokens[at : at + size])))
                found.add(name)
            open_nodes += [(namespace, name, child) for child in node["children"]]
        return found

    def may_change(self, pair, change) -> bool:
        """Whether the pair is live and free to change; while it is in a step, that `change` is refused."""
        if pair in self.stepping:
            with pytest.raises(radixkv.LeaseError, match="in an open step"):
                change()
        return pair in self.live and pair not in self.stepping

    # --- rules ------------------------------------------------------------------------------------------------------

    @rule(data=st.data(), times=st.integers(1, 3))
    def serve(self, data, times):
        """Whole requests, one after the other: what makes trees grow."""
        for _ in range(times):
            namespace, tokens = self.tokens_like_before(data)
            done = self.both(
                lambda n=namespace, t=tokens: self.cache.acquire(t, n),
                lambda n=namespace, t=tokens: self.model.acquire(n, t),
            )
            if done is None:
                continue
            self.seen.append((namespace, tokens))
            lease, model = done
            unwritten = len(model.tokens) - model.written
            self.write(lease, model, unwritten)
            lease.advance()
            self.model.advance(model, unwritten)
            cold = data.draw(st.booleans())
            lease.release(cold=cold)
            self.model.release(model, True, cold)
            if self.shadow is not None:
                self.shadow.catch_up()  # the ring holds what one operation records, and some more

    @rule(target=leases, data=st.data())
    def acquire(self, data):
        namespace, tokens = self.tokens_like_before(data)
        done = self.both(lambda: self.cache.acquire(tokens, namespace), lambda: self.model.acquire(namespace, tokens))
        if done is None:
            return multiple()
        self.seen.append((namespace, tokens))
        self.live.append(done)
        return done

    @rule(pair=leases, tokens=st.lists(TOKENS, max_size=6), prompt=st.booleans())
    def extend(self, pair, tokens, prompt):
        if self.may_change(pair, lambda: pair[0].extend(tokens)):
            self.both(
                lambda: pair[0].extend(tokens, prompt=prompt), lambda: self.model.extend(pair[1], list(tokens), prompt)
            )
            self.seen.append((pair[1].namespace, list(pair[1].tokens)))

    @rule(pair=leases, data=st.data())
    def advance(self, pair, data):
        if self.may_change(pair, pair[0].advance):
            unwritten = len(pair[1].tokens) - pair[1].written
            n = data.draw(st.sampled_from([unwritten, unwritten, *range(unwritten + 1)]))
            self.write(*pair, n)
            pair[0].advance(n)
            self.model.advance(pair[1], n)

    @rule(pair=leases, data=st.data())
    def drop(self, pair, data):
        if self.may_change(pair, lambda: pair[0].drop(0)):
            n = data.draw(st.integers(0, pair[1].written))
            free = self.model.free
            self.model.drop(pair[1], n)
            assert pair[0].drop(n) == self.model.free - free

    @rule(data=st.data(), commit=st.booleans())
    def truncate(self, data, commit):
        if not self.live:
            return
        pair = data.draw(st.sampled_from(self.live))
        length = len(pair[1].tokens)
        if self.may_change(pair, lambda: pair[0].truncate(length)):
            if commit:
                pair[0].commit()
                self.model.commit(pair[1])
            n = data.draw(st.integers(max(length - 3, 0), length) | st.integers(0, length + 1))
            free = self.model.free
            done = self.both(
                lambda: pair[0].truncate(n), lambda: self.model.truncate(pair[1], n), radixkv.InvalidArgument
            )
            assert done is None or done[0] == self.model.free - free

    @rule(pair=leases)
    def commit(self, pair):
        if self.may_change(pair, pair[0].commit):
            pair[0].commit()
            self.model.commit(pair[1])

    @rule(pair=leases, commit=st.booleans(), cold=st.booleans())
    def release(self, pair, commit, cold):
        if self.may_change(pair, lambda: pair[0].release(commit, cold)):
            pair[0].release(commit, cold)
            self.model.release(pair[1], commit, cold)
            self.live.remove(pair)

    @rule(target=leases, pair=leases)
    def fork(self, pair):
        if not self.may_change(pair, pair[0].fork):
            return multiple()
        done = self.both(lambda: pair[0].fork(), lambda: self.model.fork(pair[1]), radixkv.LeaseError)
        if done is None:
            return multiple()
        self.live.append(done)
        return done

    @rule(data=st.data())
    def enter_step(self, data):
        ready = [pair for pair in self.live if pair[1].written < len(pair[1].tokens)]
        if not ready:
            return
        chosen = data.draw(st.lists(st.sampled_from(ready), min_size=1, max_size=4, unique_by=id))
        most = data.draw(st.none() | st.integers(1, 5))
        step = radixkv._core.Step(self.table, [lease for lease, _ in chosen], 0, most)
        if self.step is not None:
            with pytest.raises(radixkv.LeaseError, match="another step"):
                step.__enter__()
            return
        self.step, self.stepping = step.__enter__(), chosen
        self.most_rows = most or 10**6
        rows = [t for _, model in chosen for t in model.tokens[model.written :][:most]]
        assert self.table.input_ids.tolist() == rows

    @rule(how=st.sampled_from(["normally", "normally", "by an exception", "dropped"]))
    def leave_step(self, how):
        if self.step is None:
            return
        step, self.step = self.step, None
        pairs, self.stepping = self.stepping, []
        if how == "normally":
            for lease, model in pairs:
                rows = min(len(model.tokens) - model.written, self.most_rows)
                self.write(lease, model, rows)
                self.model.advance(model, rows)
            step.__exit__(None, None, None)
        elif how == "by an exception":
            step.__exit__(KeyError, KeyError(), None)
        del step

    @rule(target=pins, data=st.data())
    def pin(self, data):
        namespace, tokens = data.draw(st.sampled_from(self.seen))
        tokens = tokens[: data.draw(st.integers(1, len(tokens)))]
        done = self.both(
            lambda: self.cache.pin(tokens, namespace),
            lambda: self.model.pin(namespace, tokens),
            radixkv.NotCached,
        )
        if done is None:
            return multiple()
        self.live_pins.append(done)
        return done

    @rule(pair=pins)
    def unpin(self, pair):
        if pair in self.live_pins:
            pair[0].unpin()
            self.model.unpin(pair[1])
            self.live_pins.remove(pair)

    @rule(n=st.integers(0, 12))
    def evict(self, n):
        assert self.cache.evict(n) == len(self.model.evict(n))

    @rule(data=st.data(), floor=st.integers(0, 12), ceiling=st.integers(1, 20) | st.none())
    def set_quota(self, data, floor, ceiling):
        namespace = data.draw(st.sampled_from(self.namespaces))
        floor = min(floor, ceiling or floor)
        self.both(
            lambda: self.cache.set_quota(namespace, floor=floor, ceiling=ceiling),
            lambda: self.model.set_quota(namespace, floor, ceiling or NO_CEILING),
            radixkv.InvalidArgument,
        )

    @rule(data=st.data())
    def clear(self, data):
        namespace = data.draw(st.sampled_from(self.namespaces))
        free = self.model.free
        freed = self.cache.clear(namespace)
        self.model.clear(namespace)
        assert freed == self.model.free - free

    @rule(data=st.data())
    def match(self, data):
        namespace, tokens = self.tokens_like_before(data)
        path, _, shared = self.model.match(namespace, tokens)
        assert self.cache.match(tokens, namespace) == len(path) * self.cache.page_size + shared

    # --- what always holds --------------------------------------------------------------------------------------------

    @invariant()
    def agree(self):
        if not hasattr(self, "cache"):
            return
        self.cache.check()
        stats = self.cache.stats()
        states = self.model.states()
        assert {name: getattr(stats, name) for name in states} == states
        assert stats.free + stats.private + stats.protected + stats.evictable == stats.num_pages
        assert self.published() == set(self.model.tree)
        if self.shadow is not None:
            self.shadow.catch_up()
            full = [name for name in self.model.tree if len(name[-1][1]) == self.cache.page_size]
            as_recorded = [(name[-1][0], tuple(t for _, page in name for t in page)) for name in full]
            assert sorted(self.shadow.pages.values()) == sorted(as_recorded)
        assert stats.input_tokens == sum(counts[1] for counts in self.model.counts.values())
        for namespace, one in self.cache.namespaces().items():
            if namespace is not None:
                assert [one.requests, one.input_tokens, one.hit_tokens] == self.model.counts.get(namespace, [0, 0, 0])
                if namespace in self.model.quotas:
                    floor, ceiling = self.model.quotas[namespace]
                    assert (one.floor, one.ceiling) == (floor, None if ceiling == NO_CEILING else ceiling)
        for lease, model in self.live:
            assert list(lease.tokens) == model.tokens
            assert (lease.num_written, lease.num_cached) == (model.written, model.cached)
            assert lease.num_dropped == model.dropped * self.cache.page_size
            assert len(lease.pages) == model.pages - model.dropped
            self.verify(lease, model)

    def teardown(self):
        if not hasattr(self, "cache"):
            return
        self.step = None
        for lease, model in self.live:
            lease.release()
            self.model.release(model, True)
        for pin, pages in self.live_pins:
            pin.unpin()
            self.model.unpin(pages)
        self.cache.check()
        while self.cache.evict(1):  # page by page, in the model's order
            self.model.evict(1)
            assert self.published() == set(self.model.tree)
        self.cache.check()
        assert self.cache.stats().free == self.cache.num_pages
        assert self.cache.stats().num_nodes == 0
        assert self.cache.snapshot() == []


TestStateMachine = Machine.TestCase
TestStateMachine.settings = settings(
    max_examples=int(os.environ.get("RADIXKV_EXAMPLES", "200")),
    stateful_step_count=50,
    deadline=None,
    phases=[p for p in Phase if p is not Phase.shrink or os.environ.get("RADIXKV_SHRINK") != "0"],
)
