"""llama.cpp over its C API (bindings and build of llama-cpp-python), the weights in bf16, K and V in its default f16.

The system prompt is sequence 0 of its cache; a request is a copy of that sequence (`llama_memory_seq_cp` shares the
cells) and the tokens after it. That is what its own examples do for a shared prompt.
"""

from __future__ import annotations

import ctypes

import llama_cpp as lib
import numpy as np

from bench.end_to_end.measure import Mark
from bench.end_to_end.workload import Workload

CELLS = 4096
BATCH = 2048


class LlamaCpp:
    def __init__(self, work: Workload) -> None:
        self.log = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self.log, ctypes.c_void_p(0))
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(work.gguf.encode(), lib.llama_model_default_params())
        if not model:
            raise RuntimeError(f"llama.cpp cannot load {work.gguf}")
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = CELLS, BATCH, 512
        options.n_seq_max, options.kv_unified = len(work.prompts) + 1, True
        options.n_threads = options.n_threads_batch = work.threads
        self.context = lib.llama_init_from_model(model, options)
        self.memory = lib.llama_get_memory(self.context)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def begin(self, system: list[int]) -> None:
        lib.llama_memory_clear(self.memory, False)
        self.system = len(system)
        self.decode([(token, i, 0, False) for i, token in enumerate(system)])

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute rows of token, position, sequence and whether its logits are wanted; the greedy tokens of these."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wanted
        if lib.llama_decode(self.context, batch):
            raise RuntimeError("llama_decode failed")
        return [self.argmax(i) for i, row in enumerate(rows) if row[3]]

    def argmax(self, row: int) -> int:
        logits = lib.llama_get_logits_ith(self.context, row)
        return int(np.ctypeslib.as_array(logits, (self.vocabulary,)).argmax())

    def fork(self, sequence: int) -> None:
        lib.llama_memory_seq_rm(self.memory, sequence, -1, -1)
        lib.llama_memory_seq_cp(self.memory, 0, sequence, -1, -1)

    def rest(self, prompt: list[int], sequence: int) -> list[tuple[int, int, int, bool]]:
        last = len(prompt) - 1
        return [(prompt[i], i, sequence, i == last) for i in range(self.system, len(prompt))]

    def serve(self, prompt: list[int], new: int, mark: Mark) -> list[int]:
        self.fork(1)
        answer = self.decode(self.rest(prompt, 1))
        mark()
        while len(answer) < new:
            answer += self.decode([(answer[-1], len(prompt) + len(answer) - 1, 1, True)])
        return answer

    def serve_all(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        rows = []
        for sequence, prompt in enumerate(prompts, 1):
            self.fork(sequence)
            rows += self.rest(prompt, sequence)
        answers = [[token] for token in self.decode(rows)]
        while len(answers[0]) < new:
            rows = [
                (answer[-1], len(prompt) + len(answer) - 1, sequence, True)
                for sequence, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1)
            ]
            for answer, token in zip(answers, self.decode(rows), strict=True):
                answer.append(token)
        return answers


def make(work: Workload) -> LlamaCpp:
    return LlamaCpp(work)
