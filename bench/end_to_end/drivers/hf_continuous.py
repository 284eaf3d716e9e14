"""transformers' continuous batching: paged attention ("paged|sdpa"), prefix sharing by whole pages of 16 tokens."""

from __future__ import annotations

from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from bench.end_to_end.drivers.load import hf_model
from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload


class Continuous:
    """A manager for each run, so that it starts with nothing cached. Starting and stopping it is part of the time."""

    def __init__(self, model: Any) -> None:
        self.model, self.manager = model, None

    def begin(self, system: list[int]) -> None:
        if self.manager is not None:
            self.manager.stop(block=True)
            self.model.destroy_cached_continuous_batching_manager()
        self.manager = self.model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=2),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=16, num_blocks=1024, max_batch_tokens=2048, max_requests_per_batch=16
            ),
        )
        self.manager.start()

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        name = self.manager.add_request(prompt, max_new_tokens=new, streaming=True)
        answer: list[int] = []
        for output in self.manager.request_id_iter(name):
            if output.error:
                raise RuntimeError(output.error)
            if not answer and output.generated_tokens:
                mark()
            answer = list(output.generated_tokens)
            if output.is_finished():
                break
        return answer

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        names = [self.manager.add_request(prompt, max_new_tokens=new) for prompt in prompts]
        done: dict[str, list[int]] = {}
        while len(done) < len(names):
            output = self.manager.get_result(timeout=120)
            if output is None or output.error:
                raise RuntimeError(f"no answer: {output and output.error}")
            if output.is_finished():
                done[output.request_id] = list(output.generated_tokens)
        return [done[name] for name in names]


def make(work: Workload) -> Continuous:
    return Continuous(hf_model(work))
