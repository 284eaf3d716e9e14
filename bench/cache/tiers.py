"""Tiers: the disk beside a plain O_DIRECT loop, the first token after a restart, and steps while another request loads.

    python -m bench.cache.tiers [--json] [--quick] [--dir DIR] [--dtype float32]

The loop writes and reads as many bytes in the same sizes on the same file system: batches of 64 records with
fdatasync, and 8 records a read in 4 threads. It makes no checksums, keeps no index and copies nothing. The RAM of both
has been touched before. The model is SmolLM2-135M on one thread. "After a restart" is a new engine over the directory
of a closed one, in this process.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import radixkv
from bench.common.machine import conditions
from bench.common.table import OURS, Row, rows_of, text
from radixkv.demo.model import find_model, load_model
from radixkv.hf import Generator, engine_for
from radixkv.tiers import TierOptions, Tiers

PAGE_BYTES, STRIDE = 368640, 372736  # of SmolLM2 in bf16, 16 tokens: what the pool has, what a record takes
BATCH, CHUNK, THREADS = 64, 8, 4
PROMPT, LOADS = 1000, 4
PLAIN = "O_DIRECT loop"


class Pages:
    """A pool of bytes."""

    page_bytes = PAGE_BYTES

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.memory = torch.empty((num_pages, PAGE_BYTES), dtype=torch.uint8).numpy()  # as `KVPool` does: aligned
        radixkv._core.prefer_huge_pages(self.memory.ctypes.data, self.memory.nbytes)
        self.memory[:] = np.random.default_rng(0).integers(0, 256, PAGE_BYTES, dtype=np.uint8)

    def read_pages(self, pages: np.ndarray, out: Sequence[np.ndarray]) -> None:
        for page, row in zip(pages.tolist(), out, strict=True):
            row[:] = self.memory[page]

    def write_pages(self, pages: np.ndarray, data: Sequence[np.ndarray]) -> None:
        for page, row in zip(pages.tolist(), data, strict=True):
            self.memory[page] = row


def slots(count: int) -> np.ndarray:
    """Memory for records, such as the hub's."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = np.frombuffer(mmap.mmap(-1, count * STRIDE, flags=private), np.uint8).reshape(count, STRIDE)
    radixkv._core.prefer_huge_pages(memory.ctypes.data, memory.nbytes)
    memory[:] = 7
    return memory


def plain(folder: Path, count: int) -> tuple[float, float]:
    """Seconds that `count` records take to be written, and to be read."""
    memory = slots(BATCH)
    buffers = queue.SimpleQueue[np.ndarray]()
    for _ in range(THREADS):
        buffers.put(slots(CHUNK))
    file = os.open(folder / "plain", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    os.posix_fallocate(file, 0, count * STRIDE)
    start = time.perf_counter()
    for i in range(0, count, BATCH):
        os.pwritev(file, [row.data for row in memory[: min(BATCH, count - i)]], i * STRIDE)
        os.fdatasync(file)
    wrote = time.perf_counter() - start
    jobs: queue.SimpleQueue[int] = queue.SimpleQueue()
    for i in np.random.default_rng(0).permutation(range(0, count, CHUNK)).tolist():
        jobs.put(i)

    def read() -> None:
        own = buffers.get()
        while not jobs.empty():
            os.preadv(file, [row.data for row in own], jobs.get() * STRIDE)

    threads = [threading.Thread(target=read) for _ in range(THREADS)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    os.close(file)
    (folder / "plain").unlink()
    return wrote, taken


def ours(folder: Path, count: int) -> dict[str, float]:
    """The same through the tiers: from the pool to the disk, and in a new one from the disk into leases."""
    per_prompt = 64
    prompts = [np.random.default_rng(i).integers(0, 32000, per_prompt * 16 + 1) for i in range(count // per_prompt)]
    options = TierOptions(disk=folder, disk_capacity=2 * count * STRIDE)
    found = {}
    cache = radixkv.PrefixCache(count + per_prompt, 16)
    with Tiers(cache, Pages(count + per_prompt), {"bench": 1}, options) as tiers:
        tiers.hub.memory[:] = 7  # as the loop's: what the first touch of memory takes is the machine's
        start, cpu = time.perf_counter(), time.process_time()
        for prompt in prompts:
            with cache.acquire(prompt) as lease:
                lease.advance()
        assert tiers.disk is not None
        while len(tiers.disk) < per_prompt * len(prompts):
            time.sleep(0.001)
        found["put"] = time.perf_counter() - start
        found["put_cpu"] = time.process_time() - cpu
    cache = radixkv.PrefixCache(2 * per_prompt, 16)
    with Tiers(cache, Pages(2 * per_prompt), {"bench": 1}, options) as tiers:
        tiers.hub.memory[:] = 7
        gained, start, cpu = 0, time.perf_counter(), time.process_time()
        fetch = tiers.prefetch(prompts[0])
        for prompt, after in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
            fetch.wait()
            ready, fetch = (
                fetch,
                tiers.prefetch(after),
            )  # the next loads while this one is filled, as a scheduler does it
            with cache.acquire(prompt) as lease:
                gained += tiers.fill(lease, ready)
        found["get"] = time.perf_counter() - start
        found["get_cpu"] = time.process_time() - cpu
        assert gained == per_prompt * 16 * len(prompts)
    return found


def disk_rows(folder: Path, count: int, repeats: int) -> list[Row]:
    best: dict[str, float] = {}
    loop = [1e9, 1e9]
    for i in range(repeats):
        loop = [min(pair) for pair in zip(loop, plain(folder, count), strict=True)]
        for name, seconds in ours(folder / str(i), count).items():
            best[name] = min(best.get(name, 1e9), seconds)
    mb = count * STRIDE / 1e6
    rows = []
    for name, other in zip(("put", "get"), loop, strict=True):
        ratio = other / best[name]
        what = "pool to disk" if name == "put" else "disk to pool, cold"
        rows.append(Row(what, "MB/s", {OURS: mb / best[name], PLAIN: mb / other}, ratio, ">= 0.6x", ratio >= 0.6))
        cpu = 1000 * best[f"{name}_cpu"] / mb
        rows.append(Row(f"{what}: CPU", "s/GB", {OURS: cpu}, None, "<= 0.5", cpu <= 0.5))
    return rows


def first_token(model: Any, prompt: list[int], tiers: TierOptions | None) -> tuple[float, dict[str, int]]:
    """Seconds to the first token in a new engine; what came from the tiers."""
    with engine_for(model, num_pages=160, tiers=tiers) as engine, Generator(model, engine) as generator:
        request = generator.submit(prompt, max_new_tokens=1)
        generator.run()
        assert request.stats.time_to_first_token is not None
        return request.stats.time_to_first_token, request.stats.restored_tokens


def restart_rows(folder: Path, model: Any, repeats: int) -> list[Row]:
    rng = np.random.default_rng(0)
    system = rng.integers(1000, 20000, PROMPT).tolist()
    questions = [system + rng.integers(1000, 20000, 8).tolist() for _ in range(repeats + 1)]
    options = TierOptions(weights="bench", disk=folder, disk_capacity="256MiB")
    first_token(model, questions[0], options)
    without, restored = [], []
    for question in questions[1:]:
        without.append(first_token(model, question, None)[0])
        seconds, sources = first_token(model, question, options)
        assert sources == {"disk": PROMPT // 16 * 16}, sources
        restored.append(seconds)
    figures = {OURS: statistics.median(restored), "computed": statistics.median(without)}
    ratio = figures["computed"] / figures[OURS]
    return [Row("first token after a restart, 1,000-token prompt", "s", figures, ratio, ">= 5x", ratio >= 5)]


def loading_rows(folder: Path, model: Any, steps: int) -> list[Row]:
    """Decode steps of four requests a second, alone, and while prompts of 1,000 tokens load one after the other."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1000, 20000, PROMPT).tolist() for _ in range(LOADS)]
    options = TierOptions(
        weights="bench", disk=folder, disk_capacity="512MiB", ram="64MiB"
    )  # each load is from the disk
    with engine_for(model, num_pages=160, tiers=options) as engine, Generator(model, engine) as generator:
        assert engine.tiers is not None
        assert engine.tiers.disk is not None
        for i, prompt in enumerate(prompts):
            with engine.acquire(prompt) as lease:
                lease.advance()  # with whatever lies there: nobody attends to it
            while len(engine.tiers.disk) < (i + 1) * (PROMPT // 16):
                time.sleep(0.01)
        engine.cache.evict(160)
        for _ in range(4):
            generator.submit(rng.integers(1000, 20000, 32).tolist(), max_new_tokens=6 * steps + 16)
        speeds: dict[bool, list[float]] = {False: [], True: []}
        loaded = 0
        for part in range(6):  # in turn: the machine's other load changes
            start, fetch = time.perf_counter(), None
            for _ in range(steps):
                if part % 2 and (fetch is None or fetch.ready):
                    fetch = engine.prefetch(prompts[loaded % LOADS])
                    loaded += 1
                generator.step()
            speeds[part % 2 == 1].append(steps / (time.perf_counter() - start))
            del fetch
        read = engine.tiers.stats()["stores"]["disk"]["read"]
    figures = {OURS: statistics.median(speeds[True]), "alone": statistics.median(speeds[False])}
    ratio = figures[OURS] / figures["alone"]
    what = f"decode steps while {read:,} pages load"
    return [Row(what, "1/s", figures, ratio, ">= 0.95x", ratio >= 0.95)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="fewer repeats and pages")
    parser.add_argument("--dir", type=Path, help="where the files are made and removed (default: the temporary folder)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    show = sys.stderr if options.json else sys.stdout
    model, _ = load_model(find_model(None), getattr(torch, options.dtype), lambda line: None)
    count, repeats = (512, 2) if options.quick else (2048, 5)
    with tempfile.TemporaryDirectory(dir=options.dir) as name, torch.inference_mode():
        folder = Path(name)
        rows: list[Row] = []
        for part in (
            lambda: disk_rows(folder, count, repeats),
            lambda: restart_rows(folder / "restart", model, 1 if options.quick else repeats),
            lambda: loading_rows(folder / "loading", model, 20 if options.quick else 60),
        ):
            found = part()
            print(text(found), file=show, flush=True)
            rows += found
    if options.json:
        print(json.dumps(conditions("bench.cache.tiers") | rows_of(rows)))


if __name__ == "__main__":
    main()
