"""Traces of requests: read, record and generate them; replay them through a cache; the hit rate at every capacity."""

from radixkv.traces.curve import capacity_curve
from radixkv.traces.curve.points import CapacityCurve
from radixkv.traces.formats import read_trace
from radixkv.traces.recorder import Recorder
from radixkv.traces.replay import ReplayResult, replay
from radixkv.traces.request import Request
from radixkv.traces.workload import WORKLOADS, generate

__all__ = [
    "WORKLOADS",
    "CapacityCurve",
    "Recorder",
    "ReplayResult",
    "Request",
    "capacity_curve",
    "generate",
    "read_trace",
    "replay",
]
