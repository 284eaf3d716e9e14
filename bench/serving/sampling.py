"""Choosing the tokens of a step of many requests: all at once, and for greedy ones also row by row.

    python -m bench.serving.sampling [--batch 256] [--vocabulary 49152] [--dtype bfloat16] [--repeats 15]

Medians of CPU time on one thread, over random logits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from radixkv.hf.sampling import Draw, Sampler, Sampling, sample

KINDS = {
    "greedy": Sampling(),
    "temperature 0.8": Sampling(temperature=0.8),
    "temperature 0.8, top-k 50, top-p 0.95": Sampling(temperature=0.8, top_k=50, top_p=0.95),
    "temperature 0.8, top-p 0.95": Sampling(temperature=0.8, top_p=0.95),
}


def median_ms(run: Callable[[int], object], repeats: int) -> float:
    times = []
    for number in range(repeats):
        start = time.thread_time_ns()
        run(number)
        times.append(time.thread_time_ns() - start)
    return statistics.median(times) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = (options.batch, options.vocabulary)
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(4).to(getattr(torch, options.dtype))
    print(f"{options.batch} rows of {options.vocabulary} in {options.dtype}, ms a step")
    by_row = median_ms(lambda number: [int(row.argmax()) for row in logits], options.repeats)
    print(f"  {'greedy, row by row':40} {by_row:8.2f}", flush=True)
    for name, sampling in KINDS.items():
        samplers = [Sampler(Sampling(**{**vars(sampling), "seed": row})) for row in range(options.batch)]

        def step(number: int, samplers: list[Sampler] = samplers) -> object:
            return sample(logits, [Draw(row, sampler, number) for row, sampler in enumerate(samplers)])

        print(f"  {name:40} {median_ms(step, options.repeats):8.2f}", flush=True)


if __name__ == "__main__":
    main()
