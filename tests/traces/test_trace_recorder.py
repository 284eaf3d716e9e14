"""The recorder: a live cache's requests land in a trace that replays to the same cache."""

import errno
import threading
import time

import pytest

from radixkv import InvalidArgument, PrefixCache, TraceError
from radixkv.traces.formats import read_trace
from radixkv.traces.recorder import Recorder
from radixkv.traces.workload import generate


def serve(cache, request, namespace=""):
    with cache.acquire(request.tokens_in, namespace) as lease:
        lease.advance()
        if request.num_out:
            lease.extend(request.tokens_out)
            lease.advance()


def test_a_recorded_trace_holds_every_request_and_replays_to_the_same_state(tmp_path):
    path = str(tmp_path / "requests.msgpack")
    requests = list(generate("chat", 60, seed=3))
    with PrefixCache(num_pages=500, page_size=16) as cache, PrefixCache(num_pages=500, page_size=16) as again:
        with Recorder(path).attach(cache) as recorder:
            for i, request in enumerate(requests):
                serve(cache, request, namespace=f"tenant-{i % 2}")
        assert recorder.num_requests == len(requests)
        recorded = list(read_trace(path))
        for i, (request, back) in enumerate(zip(requests, recorded, strict=True)):
            assert back.tokens_in.tolist() == request.tokens_in.tolist()
            assert back.tokens_out.tolist() == request.tokens_out.tolist()
            assert back.namespace == f"tenant-{i % 2}"
            serve(again, back, back.namespace)
        assert str(again.snapshot()) == str(cache.snapshot())
        assert again.stats() == cache.stats()
        again.check()


def test_several_recorders_follow_one_cache(tmp_path):
    paths = [str(tmp_path / name) for name in "ab"]
    with PrefixCache(num_pages=8, page_size=2) as cache:
        cache.acquire([9]).release()
        with Recorder(paths[0]).attach(cache):
            cache.acquire([1, 2, 3]).release()
            with Recorder(paths[1]).attach(cache):
                cache.acquire([4, 5]).release()
        cache.acquire([6]).release()
    found = [[request.tokens_in.tolist() for request in read_trace(path)] for path in paths]
    assert found == [[[1, 2, 3], [4, 5]], [[4, 5]]]


def test_a_dropped_lease_is_recorded_too(tmp_path):
    path = str(tmp_path / "trace")
    with PrefixCache(num_pages=8, page_size=2) as cache, Recorder(path).attach(cache):
        lease = cache.acquire([1, 2, 3])
        del lease
    assert [request.tokens_in.tolist() for request in read_trace(path)] == [[1, 2, 3]]


def test_requests_that_end_too_fast_end_the_recording(tmp_path, monkeypatch):
    monkeypatch.setattr(Recorder, "_follow", lambda self: None)
    with PrefixCache(num_pages=1 << 15, page_size=16) as cache:
        recorder = Recorder(str(tmp_path / "trace")).attach(cache)
        for _ in range(6):
            cache.acquire(range(400_000)).release(False)
        with pytest.raises(TraceError, match="after 0 requests: 1 requests ended faster than they could be written"):
            recorder.close()


def test_the_thread_writes_while_the_cache_serves(tmp_path):
    with PrefixCache(num_pages=8, page_size=2) as cache, Recorder(str(tmp_path / "trace")).attach(cache) as recorder:
        cache.acquire([1, 2, 3]).release()
        deadline = time.monotonic() + 10
        while recorder.num_requests == 0 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert recorder.num_requests == 1


def test_a_full_disk_ends_the_recording_not_the_serving(tmp_path, monkeypatch):
    with PrefixCache(num_pages=8, page_size=2) as cache:
        recorder = Recorder(str(tmp_path / "trace")).attach(cache)
        cache.acquire([1, 2, 3]).release()
        recorder.pump()

        def write(request):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(recorder._writer, "write", write)
        for _ in range(3):
            cache.acquire([1, 2, 3]).release()
        assert cache.stats().num_leases == 0
        with pytest.raises(TraceError, match="after 1 requests: No space left on device"):
            recorder.close()


def test_a_recorder_is_used_once_and_needs_a_writable_path(tmp_path):
    with PrefixCache(num_pages=8, page_size=2) as cache:
        recorder = Recorder(str(tmp_path / "trace")).attach(cache)
        with pytest.raises(InvalidArgument):
            recorder.attach(cache)
        recorder.close()
        with pytest.raises(InvalidArgument):
            recorder.attach(cache)
        with pytest.raises(TraceError, match="cannot write"):
            Recorder(str(tmp_path / "no" / "trace"))


def test_requests_of_several_threads_are_all_recorded(tmp_path):
    path = str(tmp_path / "trace")

    def work(cache, thread):
        for i in range(100):
            cache.acquire([thread, i, i + 1]).release()

    with PrefixCache(num_pages=64, page_size=2) as cache:
        with Recorder(path).attach(cache):
            threads = [threading.Thread(target=work, args=(cache, n)) for n in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        cache.check()
    found = sorted(tuple(request.tokens_in.tolist()) for request in read_trace(path))
    assert found == sorted((thread, i, i + 1) for thread in range(4) for i in range(100))
