"""Where the time of a decode step goes: `python -m bench.end_to_end.where`, one thread, CPU time.

The same step with one part after the other replaced by nothing (its output is a tensor made once); a part's time is
what the step gains. Variants take turns, so that a slow moment of the machine hits all alike. Medians.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from bench.end_to_end import prompts
from radixkv.attention.native import NativeAttention
from radixkv.demo.model import find_model, load_model
from radixkv.hf import Generator, engine_for, forward, optimize
from radixkv.hf.optimize import PackedLinear

STEPS, ROUNDS = 4, 12


def nothing(*_: Any, **__: Any) -> None:
    pass


def constant(original: Any) -> Any:
    """Answers each shape of arguments with a tensor made once."""
    made: dict[Any, torch.Tensor] = {}

    def answer(owner: Any, *arguments: Any) -> torch.Tensor:
        key = (id(owner) if isinstance(owner, torch.nn.Module) else owner.shape, arguments[0])
        key = (key[0], arguments[0].shape) if isinstance(arguments[0], torch.Tensor) else key
        if key not in made:
            made[key] = original(owner, *arguments).clone()
        return made[key]

    return answer


@contextmanager
def without(*parts: str) -> Iterator[None]:
    replacements = {
        "linears": lambda: mock.patch.object(PackedLinear, "forward", constant(PackedLinear.forward)),
        "norms": lambda: mock.patch.object(torch.nn.functional, "rms_norm", constant(torch.nn.functional.rms_norm)),
        "attention": lambda: mock.patch.object(NativeAttention, "run", nothing),
    }
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(replacements[part]())
        yield


def main() -> int:
    torch.set_num_threads(1)
    model, tokenizer = load_model(find_model(None), torch.bfloat16, lambda _: None)
    optimize(model)
    _, requests = prompts.tokens(tokenizer, 8)
    variants: dict[str, tuple[str, ...]] = {
        "whole": (),
        "linears": ("linears",),
        "norms": ("norms",),
        "attention": ("attention",),
        "all but the rest": ("linears", "norms", "attention"),
    }
    out: dict[str, dict[str, float]] = {}
    for rows in (1, 8):
        engine = engine_for(model, num_pages=256)
        with torch.inference_mode(), Generator(model, engine) as generator:
            times: dict[str, list[float]] = {name: [] for name in [*variants, "generator"]}
            leases = [engine.acquire(prompt) for prompt in requests[:1]]
            run(model, engine, leases)
            leases[0].commit()
            leases += [engine.acquire(prompt) for prompt in requests[1:rows]]
            run(model, engine, leases)
            for _ in range(ROUNDS):
                for name, parts in variants.items():
                    with without(*parts):
                        run(model, engine, leases)
                        start = time.process_time()
                        for _ in range(STEPS):
                            run(model, engine, leases)
                        times[name].append((time.process_time() - start) / STEPS)
            for lease in leases:
                lease.release()
            for _ in range(ROUNDS):
                for prompt in requests[:rows]:
                    generator.submit(prompt, max_new_tokens=STEPS + 2, stop_tokens=())
                generator.step()
                generator.step()
                start = time.process_time()
                generator.run()
                times["generator"].append((time.process_time() - start) / STEPS)
        ms = {name: 1e3 * statistics.median(figures) for name, figures in times.items()}
        whole = ms["whole"]
        out[f"{rows} row(s)"] = {
            "step_ms": whole,
            **{part: whole - ms[part] for part in ("linears", "norms", "attention")},
            "rest": ms["all but the rest"],
            "step_of_generator_ms": ms["generator"],
        }
    json.dump(out, sys.stdout, indent=1)
    print()
    return 0


def run(model: Any, engine: Any, leases: list[Any]) -> None:
    with engine.step(leases) as step:
        chosen = forward(model, step).argmax(-1).tolist()
    for lease, token in zip(leases, chosen, strict=True):
        lease.extend([token])


if __name__ == "__main__":
    sys.exit(main())
