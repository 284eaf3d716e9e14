"""A semantic twin of CUDA's streams: work is done as late, as early or as mixed as the calls so far permit."""

from __future__ import annotations

import contextlib
import random

import torch


class LazyStream:
    def __init__(self, cuda):
        self.cuda, self.work = cuda, []  # functions, and (stream, how much of it must be done first)
        self.done = 0

    def launch(self, work):
        self.work.append(work)
        self.cuda.do_some()

    def wait_stream(self, other):
        self.work.append((other, len(other.work)))

    def synchronize(self):
        self.run(len(self.work))

    def run(self, end):
        while self.done < end:
            work = self.work[self.done]
            if isinstance(work, tuple):
                work[0].run(work[1])
            else:
                work()
            self.done += 1


class LazyCuda:
    """As `radixkv.tiers.device.Cuda`. how: "late", "early", or "mixed" with a seed."""

    def __init__(self, how, seed=0):
        self.how, self.rng, self.streams, self.memory = how, random.Random(seed), [], []
        self._current = [self.stream()]
        self.pinned = []

    def do_some(self):
        for stream in self.streams:
            n = {"late": 0, "early": len(stream.work)}.get(self.how)
            stream.run(self.rng.randint(stream.done, len(stream.work)) if n is None else max(n, stream.done))

    def stream(self):
        self.streams.append(LazyStream(self))
        return self.streams[-1]

    def current(self):
        return self._current[-1]

    @contextlib.contextmanager
    def on(self, stream):
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def empty(self, num_rows, size):
        """Memory of the caching allocator: what one stream gave back, it gets again at once."""
        return torch.full((num_rows, size), 255, dtype=torch.uint8)

    def copy(self, target, source):
        self.current().launch(lambda: target.copy_(source))

    def mark(self):
        return Mark()

    def keep(self, memory, stream):
        self.memory.append((memory, stream))

    def pin(self, memory):
        self.pinned.append(memory)


class Mark:
    def query(self):
        return True

    def elapsed_time(self, later):
        return 250.0


class LazyPool:
    """A pool whose pages are read and written when the stream gets there."""

    def __init__(self, cuda, num_pages, page_bytes):
        self.cuda, self.num_pages, self.page_bytes = cuda, num_pages, page_bytes
        self.memory = torch.zeros((num_pages, page_bytes), dtype=torch.uint8)

    def gather(self, pages):
        index, out = torch.tensor(pages.tolist()), torch.empty((len(pages), self.page_bytes), dtype=torch.uint8)
        self.cuda.current().launch(lambda: out.copy_(self.memory[index]))
        return out

    def scatter(self, pages, data):
        index = torch.tensor(pages.tolist())
        self.cuda.current().launch(lambda: self.memory.index_copy_(0, index, data))

    def launch_write(self, page, content):
        """As a step's kernels write K and V."""
        self.cuda.current().launch(lambda: self.memory[page].copy_(content))

    def launch_read(self, page, seen):
        """As a step's kernels read them."""
        self.cuda.current().launch(lambda: seen.append(self.memory[page].clone()))
