"""vLLM's CPU build: its engine in this process, prefix caching on, compiled (its default).

Blocks of 32 tokens: its default of 128 would leave 104 tokens of the system prompt to compute for every request.
"""

from __future__ import annotations

import itertools
import os

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # so that the CPU time of this process is all there is
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}

from vllm import LLM, SamplingParams

from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload


class Vllm:
    def __init__(self, llm: LLM) -> None:
        self.llm, self.engine, self.names = llm, llm.llm_engine, itertools.count()

    def begin(self, system: list[int]) -> None:
        self.llm.reset_prefix_cache()

    def submit(self, prompt: list[int], new: int) -> str:
        name = str(next(self.names))
        self.engine.add_request(
            name, {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        )
        return name

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        self.submit(prompt, new)
        answer: list[int] = []
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                if not answer:
                    mark()
                answer = list(output.outputs[0].token_ids)
        return answer

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        names = [self.submit(prompt, new) for prompt in prompts]
        answers: dict[str, list[int]] = {}
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                answers[output.request_id] = list(output.outputs[0].token_ids)
        return [answers[name] for name in names]


def make(work: Workload) -> Vllm:
    return Vllm(
        LLM(
            model=work.folder, dtype="bfloat16", enable_prefix_caching=True, max_model_len=2048, max_num_seqs=16,
            block_size=32, disable_log_stats=True,
        )
    )  # fmt: skip
