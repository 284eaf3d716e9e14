"""What objects say of themselves, and that they are neither pickled nor copied."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest

import radixkv
from radixkv.observe import tree_html


def test_a_lease():
    cache = radixkv.PrefixCache(8, 4)
    lease = cache.acquire(range(6))
    lease.advance(5)
    assert repr(lease) == "Lease(6 tokens, 0 cached, 5 written, 2 pages)"
    said = []
    thread = threading.Thread(target=lambda: said.append(repr(lease)))
    thread.start()
    thread.join()
    assert said == ["Lease(of another thread)"]
    lease.release()
    assert repr(lease) == "Lease(released)"
    named = cache.acquire([0, 1, 9], "it's")
    assert repr(named) == 'Lease(3 tokens, 0 cached, 0 written, 1 pages, namespace "it\'s")'


def test_a_pin():
    cache = radixkv.PrefixCache(8, 4)
    with cache.acquire([1, 2, 3]) as lease:
        lease.advance()
    pin = cache.pin([1, 2])
    assert repr(pin) == "Pin(2 tokens)"
    pin.unpin()
    assert repr(pin) == "Pin(2 tokens, undone)"


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_neither_pickled_nor_copied(copied):
    cache = radixkv.PrefixCache(8, 4)
    lease = cache.acquire([1, 2, 3])
    lease.advance()
    lease.commit()
    for one in (cache, lease, cache.pin([1])):
        with pytest.raises(
            TypeError, match=f"a {type(one).__name__} cannot be pickled or copied: it .* this process|pool"
        ):
            copied(one)
    cache.check()


def test_an_engine_neither():
    torch = pytest.importorskip("torch")
    engine = radixkv.Engine(num_layers=1, num_qo_heads=1, num_kv_heads=1, head_dim=16, num_pages=2, dtype=torch.float32)
    with pytest.raises(TypeError, match="an Engine cannot be pickled or copied"):
        copy.copy(engine)


def test_a_scheduler_neither():
    from radixkv.scheduling import Scheduler
    from tests.scheduling.helpers import Host

    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="a Scheduler cannot be pickled or copied: its requests hold leases"):
            copied(Scheduler(Host(4)))


def test_a_notebook_shows_a_cache():
    cache = radixkv.PrefixCache(600, 1)
    with cache.acquire([1, 2, 3], "<b>") as lease:
        lease.advance()
    assert cache._repr_svg_().startswith("<svg")
    assert cache.to_html() == tree_html(cache.snapshot())
    assert cache.to_html(str) == tree_html(cache.snapshot(), str) != cache.to_html()
    shown = cache._repr_html_()
    assert "PrefixCache(600 pages of 1" in shown
    assert "<svg" in shown
    assert "<b>" not in shown
    for i in range(250):
        with cache.acquire([i, 10]) as lease:
            lease.advance()
    assert cache._repr_svg_() is None
    assert "nodes: see to_html()" in cache._repr_html_()
