"""radixkv: `Generator` over the model as transformers loads it."""

from __future__ import annotations

from bench.end_to_end.drivers.load import hf_model
from bench.end_to_end.drivers.ours import Ours
from bench.end_to_end.workload import Workload


def make(work: Workload) -> Ours:
    return Ours(hf_model(work))
