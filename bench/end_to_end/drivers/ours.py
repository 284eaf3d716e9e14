"""radixkv: `Generator` over a model that `radixkv.hf.optimize` has rewritten."""

from __future__ import annotations

from typing import Any

from bench.end_to_end.drivers.load import hf_model
from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload
from radixkv.hf import Generator, engine_for, optimize

PAGES = 256  # of 16 tokens: twice what the workload needs


class Ours:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.engine = engine_for(model, num_pages=PAGES, page_size=16)

    def begin(self, system: list[int]) -> None:
        self.engine.cache.clear()

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        with Generator(self.model, self.engine) as generator:
            request = generator.submit(prompt, max_new_tokens=new, stop_tokens=())
            stream = generator.stream(request)
            answer = [next(stream)]
            mark()
            return answer + list(stream)

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        with Generator(self.model, self.engine) as generator:
            requests = [generator.submit(prompt, max_new_tokens=new, stop_tokens=()) for prompt in prompts]
            generator.run()
        return [request.tokens for request in requests]


def make(work: Workload) -> Ours:
    model = hf_model(work)
    optimize(model)
    return Ours(model)
