"""Hostile input to the native core: a clear error or a clear answer, never a crash, a hang or a wrong error.

What used to kill or hang the process runs in a process of its own.
"""

from __future__ import annotations

import array
import collections
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import radixkv
from tests.cache.test_cache import state


@pytest.fixture
def cache():
    cache = radixkv.PrefixCache(num_pages=16, page_size=4)
    yield cache
    cache.check()


def run(script, timeout=60):
    """The output of a script in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


# --- tokens -----------------------------------------------------------------------------------------------------------


class Raises:
    """Raises `error` from the method of this name."""

    def __init__(self, name, error):
        self.__class__ = type(name, (Raises,), {name: lambda *a, **k: self.throw()})
        self.error = error

    def throw(self):
        raise self.error


class Unprintable:
    def __str__(self):
        raise RuntimeError("cannot be printed")


class OddArray:
    dtype, shape = Unprintable(), (1,)


class OddShape:
    dtype = np.dtype("int32")

    @property
    def shape(self):
        raise RuntimeError("no shape")


class Nameless(type):
    @property
    def __name__(cls):
        raise RuntimeError("no name")


class OfANamelessType(metaclass=Nameless):
    pass


REFUSED = {
    "a number of 5,000 digits": [10**5000],
    "the same, negative": [-(10**5000)],
    "its dtype cannot be printed": OddArray(),
    "its shape cannot be asked for": OddShape(),
    "its type has no name": OfANamelessType(),
    "bools": [True, False],
    "a bool among ints": [1, True],
    "a numpy bool": [np.bool_(True)],
    "an array of bools": np.array([True]),
    "a masked array": np.ma.array([1, 2, 3], mask=[0, 1, 0]),
    "a masked array without a mask": np.ma.array(np.arange(3, dtype=np.int32)),
    "another byte order": np.array([1], ">i4"),
    "unsigned": np.array([1], np.uint32),
    "bytes in a memoryview": memoryview(b"abc"),
    "a dict": {1: 2},
    "a set": {1, 2},
    "an iterator": iter([1]),
    "objects": np.array([1], object),
    "0-D": np.array(3),
    "nested": [[1]],
    "an __index__ that raises TypeError": [Raises("__index__", TypeError("no"))],
    "a __dlpack__ that raises BufferError": Raises("__dlpack__", BufferError("no")),
}


@pytest.mark.parametrize("tokens", REFUSED.values(), ids=REFUSED)
def test_refused_as_tokens(cache, tokens):
    lease = cache.acquire([1, 2, 3])
    before = state(cache)
    for call in (cache.acquire, cache.match, cache.pin, lease.extend):
        with pytest.raises(radixkv.InvalidTokens, match=r"^token"):
            call(tokens)
    assert state(cache) == before
    assert lease.tokens.tolist() == [1, 2, 3]


def test_a_refused_array_says_what_it_is(cache):
    with pytest.raises(radixkv.InvalidTokens, match=r"got .*MaskedArray of int64, shape \(1,\), which may be masked"):
        cache.acquire(np.ma.array([1]))
    with pytest.raises(radixkv.InvalidTokens, match=r"got list with bool at index 1"):
        cache.acquire([1, True])
    with pytest.raises(radixkv.InvalidTokens, match=r"token of more than 64 bits at index 1"):
        cache.acquire([1, 2**70])


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("name", ["__index__", "__dlpack__"])
def test_what_is_no_error_of_the_tokens_passes_through(cache, name, error):
    hostile = Raises(name, error("stop"))
    with pytest.raises(error, match="stop"):
        cache.acquire([hostile] if name == "__index__" else hostile)


def test_lists_that_lie_about_themselves(cache):
    class Lies(list):
        def __len__(self):
            raise RuntimeError("no length")

        def __iter__(self):
            raise RuntimeError("no items")

    assert cache.acquire(Lies([1, 2])).tokens.tolist() == [1, 2]

    class Sequence(collections.abc.Sequence):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            raise LookupError("its own error")

    with pytest.raises(LookupError, match="its own error"):
        cache.acquire(Sequence())


def test_a_list_that_shrinks_while_it_is_read(cache):
    items = [1] * 40

    class Shrinks:
        def __index__(self):
            items.clear()
            return 2

    items[1] = Shrinks()
    assert cache.acquire(items).tokens.tolist() == [1, 2]


def records(kind):
    out = np.zeros(3, dtype=[("a", "i1"), ("b", kind)])
    out["b"] = [5, 6, 7]
    return out["b"]


READ = {
    "an int32 field of a record": records("i4"),
    "an int64 field of a record": records("i8"),
    "numpy ints": [np.int64(5), np.uint8(6), np.int32(7)],
    "a subclass of an array": np.array([5, 6, 7], np.int32).view(np.recarray),
    "read-only": np.frombuffer(np.array([5, 6, 7], np.int32).tobytes(), np.int32),
    "reversed": np.array([7, 6, 5], np.int32)[::-1],
    "an array of C ints": array.array("i", [5, 6, 7]),
    "a range": range(5, 8),
    "a deque": collections.deque([5, 6, 7]),
}


@pytest.mark.parametrize("tokens", READ.values(), ids=READ)
def test_read_as_tokens(cache, tokens):
    assert cache.acquire(tokens).tokens.tolist() == [5, 6, 7]


# --- numbers and names ------------------------------------------------------------------------------------------------

NUMBERS = {
    "evict": lambda cache, lease, n: cache.evict(n),
    "advance": lambda cache, lease, n: lease.advance(n),
    "drop": lambda cache, lease, n: lease.drop(n),
    "truncate": lambda cache, lease, n: lease.truncate(n),
    "num_pages": lambda cache, lease, n: radixkv.PrefixCache(n, 4),
    "page_size": lambda cache, lease, n: radixkv.PrefixCache(4, n),
}


@pytest.mark.parametrize("call", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(
    "n", [2**63, -(2**63) - 1, 10**5000, -1, 1.0, "1", True, np.float32(1), [1], b"1"], ids=lambda n: type(n).__name__
)
def test_refused_as_a_number(cache, call, n):
    lease = cache.acquire([1, 2, 3])
    before = state(cache)
    with pytest.raises(radixkv.InvalidArgument):
        call(cache, lease, n)
    assert state(cache) == before
    with pytest.raises(KeyboardInterrupt):
        call(cache, lease, Raises("__index__", KeyboardInterrupt()))


@pytest.mark.parametrize("kind", [int, np.int64, np.int32, np.uint8])
def test_every_kind_of_int_is_one(kind):
    cache = radixkv.PrefixCache(kind(8), kind(4))
    lease = cache.acquire([kind(i) for i in range(9)])
    lease.advance(kind(9))
    assert lease.drop(kind(8)) == 2
    assert lease.truncate(kind(9)) == 0
    lease.release()
    assert cache.evict(kind(3)) == 0
    assert (cache.num_pages, cache.page_size) == (8, 4)


@pytest.mark.parametrize("name", [None, 5, b"tenant", "\ud800", ["a"]])
def test_refused_as_a_namespace(cache, name):
    before = state(cache)
    calls = [lambda: cache.acquire([1], name), lambda: cache.match([1], name), lambda: cache.pin([1], name)]
    if name is not None:
        calls.append(lambda: cache.clear(name))
    for call in calls:
        with pytest.raises(radixkv.InvalidArgument, match="a namespace (is a str|must have a UTF-8 form)"):
            call()
    assert state(cache) == before


@pytest.mark.parametrize("name", ["", "tenant", "é\0", "名", "x" * 10_000])
def test_every_text_is_a_namespace(cache, name):
    with cache.acquire([1, 2], name) as lease:
        assert lease.namespace == name
        lease.advance()
    assert cache.match([1, 2], name) == 2


def test_page_size_is_bounded():
    with pytest.raises(radixkv.InvalidArgument, match="page_size must be 1 to 67108864; got 67108865"):
        radixkv.PrefixCache(1, 2**26 + 1)
    with pytest.raises(radixkv.InvalidArgument, match=r"num_pages \* page_size must be below 2\*\*31"):
        radixkv.PrefixCache(2**62, 2**26)


def test_children_of_the_largest_pages_are_told_apart():
    """Their first difference lies in the page's last token: 32 bits for each token before it must be countable."""
    cache = radixkv.PrefixCache(3, 2**26)
    tokens = np.zeros(2**26 + 1, np.int32)
    for last in (1, 2):
        tokens[2**26 - 1] = last
        with cache.acquire(tokens[:-1]) as lease:
            lease.advance()
    for last in (2, 1):
        tokens[2**26 - 1] = last
        assert cache.match(tokens) == 2**26


def test_objects_that_were_never_made():
    out = run("""
        import radixkv, pickle, copy
        lease = radixkv.PrefixCache(4, 4).acquire([1])
        for make in (radixkv.Lease, radixkv.Pin, lambda: radixkv.Lease.__new__(radixkv.Lease),
                     lambda: radixkv.Pin.__new__(radixkv.Pin), lambda: radixkv.PrefixCache.__new__(radixkv.PrefixCache),
                     lambda: copy.copy(lease), lambda: pickle.loads(pickle.dumps(lease))):
            try:
                thing = make()
            except TypeError:
                continue
            for name in dir(type(thing)):
                if name.startswith("__") and name not in ("__enter__", "__exit__", "__repr__", "__del__"):
                    continue
                for arguments in ((), ([1],), (None, None, None)):
                    try:
                        getattr(thing, name)(*arguments)
                    except (TypeError, RuntimeWarning, radixkv.RadixKVError):
                        pass
        try:
            cache = radixkv.PrefixCache(4, 4)
            held = cache.acquire([1, 2])
            cache.__init__(8, 4)
        except TypeError:
            pass
        held.release()
        cache.check()
        print("alive")
    """)
    assert out == "alive\n"


# --- a pin ------------------------------------------------------------------------------------------------------------


def test_leaving_a_pin_that_was_undone(cache):
    with cache.acquire([1, 2, 3]) as lease:
        lease.advance()
    with cache.pin([1, 2, 3]) as pin:
        pin.unpin()
    with pytest.raises(radixkv.LeaseError, match="undone already"):
        pin.unpin()


# --- processes and imports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["lease.pages", "lease.tokens", "cache.snapshot()", "cache.acquire(Other())"])
def test_two_threads_may_be_the_first_to_need_numpy(use):
    """Numpy's import gives up the GIL, so both are inside at the same time."""
    for _ in range(3):
        run(
            f"""
            import radixkv, sys, threading
            class Other:
                dtype, shape = "none", ()
            cache = radixkv.PrefixCache(64, 4)
            with cache.acquire([7]) as lease:
                lease.advance()
            assert "numpy" not in sys.modules
            start = threading.Barrier(2)
            def work():
                lease = cache.acquire([1, 2, 3])
                start.wait()
                try:
                    {use}
                except radixkv.InvalidTokens:
                    pass
            threads = [threading.Thread(target=work) for _ in range(2)]
            [t.start() for t in threads]
            [t.join() for t in threads]
            """,
            timeout=30,
        )
