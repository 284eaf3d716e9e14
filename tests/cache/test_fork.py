"""A child may be forked whatever other threads do in the core at the time: fork waits for them, and both go on.

Each test is a script in a process of its own: a hang is a timeout there, and pytest itself is not forked.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

FORKS = """
import contextlib, os, signal, sys, threading, time

def forks(use, times):
    '''Forks `times` children, each of which calls use() and must end within a few seconds.'''
    for _ in range(times):
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            try:
                use()
            except BaseException as error:
                print(type(error), error, file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
        time.sleep(0.001)

def busy(work):
    '''Runs work() over and over in another thread.'''
    def loop():
        while not stop.is_set():
            work()
            running.set()
    stop, running = threading.Event(), threading.Event()
    thread = threading.Thread(target=loop, daemon=True)  # so that a failure ends the process
    thread.start()
    running.wait()
    return lambda: (stop.set(), thread.join())
"""


def run(script: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS + textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.parametrize("work", ["cache.match(prompt)", "cache.check()", "serve(prompt)", "cache.evict(0)"])
def test_forked_while_another_thread_is_in_the_cache(work):
    run(f"""
        import numpy as np, radixkv
        cache = radixkv.PrefixCache(40_000, 4)
        prompt = np.arange(100_000, dtype=np.int32)

        def serve(tokens):
            with cache.acquire(tokens) as lease:
                lease.advance()

        def use():
            cache.check()
            serve([1, 2, 3])
            assert cache.match([1, 2, 3]) == 3
            with mine:
                mine.extend([5])

        serve(prompt)
        mine = cache.acquire([9, 9])
        end = busy(lambda: {work})
        forks(use, 60)
        end()
        cache.check()
    """)


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_while_another_thread_attends(threads):
    pytest.importorskip("torch")
    run(f"""
        import torch, radixkv
        torch.set_num_threads(1)
        engine = radixkv.Engine(num_layers=1, num_qo_heads=8, num_kv_heads=8, head_dim=64, num_pages=600,
                                dtype=torch.float32)
        engine.attention.num_threads = {threads}
        rows = torch.randn(600, 8, 64)

        def attend(tokens):
            with engine.acquire(tokens) as lease, engine.step([lease]) as step:
                n = len(step.input_ids)
                return step.attend(0, rows[:n], rows[:n], rows[:n])

        def use():
            # The parent's other thread has a step open, which nobody will leave here: another engine of the same core.
            other = radixkv.Engine(num_layers=1, num_qo_heads=8, num_kv_heads=8, head_dim=64, num_pages=600,
                                   dtype=torch.float32)
            other.attention.num_threads = {threads}
            with other.acquire(range(300)) as lease, other.step([lease]) as step:
                assert torch.equal(step.attend(0, rows[:300], rows[:300], rows[:300]), expected)
            engine.cache.check()
            with contextlib.suppress(radixkv.LeaseError):  # of a step that had ended when the process forked
                engine.attention.cascade
            engine.attention.num_threads = 1

        expected = attend(range(300))
        engine.cache.clear()
        end = busy(lambda: attend(range(1000, 1500)))
        forks(use, 10)
        end()
    """)


def test_forked_while_nothing_runs():
    pytest.importorskip("torch")
    run("""
        import torch, radixkv
        torch.set_num_threads(1)
        engine = radixkv.Engine(num_layers=1, num_qo_heads=2, num_kv_heads=2, head_dim=64, num_pages=64,
                                dtype=torch.float32)
        engine.attention.num_threads = 2
        rows = torch.randn(600, 2, 64)

        def attend():
            with engine.acquire(range(600)) as lease, engine.step([lease]) as step:
                n = len(step.input_ids)
                step.attend(0, rows[:n], rows[:n], rows[:n])

        attend()
        forks(lambda: (engine.cache.clear(), attend()), 3)
        attend()
    """)
