"""Which requests run next, and on which pages: continuous batching without a model and without torch."""

from radixkv.scheduling.request import Request, RequestStats, Status
from radixkv.scheduling.scheduler import Batch, Pages, Scheduler, arrival

__all__ = ["Batch", "Pages", "Request", "RequestStats", "Scheduler", "Status", "arrival"]
