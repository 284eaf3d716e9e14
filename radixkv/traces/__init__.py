"""Traces of requests: read, record and generate them; replay them through a cache; the hit rate at every capacity."""

from radixkv.traces.curve import CapacityCurve, capacity_curve
from radixkv.traces.formats import read_trace
from radixkv.traces.recorder import Recorder
from radixkv.traces.replay import ReplayResult, replay
from radixkv.traces.request import TraceRequest
from radixkv.traces.workload import WORKLOADS, generate

__all__ = [
    "WORKLOADS",
    "CapacityCurve",
    "Recorder",
    "ReplayResult",
    "TraceRequest",
    "capacity_curve",
    "generate",
    "read_trace",
    "replay",
]
