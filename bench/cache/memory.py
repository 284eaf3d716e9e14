"""The time of memcmp over the tokens of a prompt: the floor of a match."""

from __future__ import annotations

import ctypes
import statistics
import time

from bench.cache.workload import Tokens


def memcmp_us(tokens: Tokens, repeats: int = 300, inner: int = 10) -> float:
    """µs to compare the tokens with a copy; the cost of the call through ctypes is taken off."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    same = tokens.copy()
    one, other = tokens.ctypes.data, same.ctypes.data

    def median(size: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter_ns()
            for _ in range(inner):
                memcmp(one, other, size)
            times.append((time.perf_counter_ns() - start) / inner / 1e3)
        return statistics.median(times)

    return median(tokens.nbytes) - median(0)
