"""The time of memcmp over the tokens of a prompt, the floor of a match, in µs."""

from __future__ import annotations

import ctypes
import statistics
import time

from bench.cache.peers import workload


def memcmp_us(repeats: int = 300, inner: int = 10) -> dict[str, float]:
    """By the length of the prompt; the cost of the call through ctypes is taken off."""
    memcmp = ctypes.CDLL(None).memcmp
    memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

    def median(one: int, other: int, size: int) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter_ns()
            for _ in range(inner):
                memcmp(one, other, size)
            times.append((time.perf_counter_ns() - start) / inner / 1e3)
        return statistics.median(times)

    out = {}
    for length in workload.LENGTHS:
        tokens = workload.long_prompt(length)[:length]
        same = tokens.copy()
        one, other = tokens.ctypes.data, same.ctypes.data
        out[str(length)] = median(one, other, tokens.nbytes) - median(one, other, 0)
    return out
