"""Which requests run next, and on which pages: continuous batching without a model and without torch."""

from radixkv.scheduling.batch import Batch
from radixkv.scheduling.policy import Policy
from radixkv.scheduling.request import Request, RequestStats, Status
from radixkv.scheduling.scheduler import Scheduler
from radixkv.scheduling.space import Pages

__all__ = ["Batch", "Pages", "Policy", "Request", "RequestStats", "Scheduler", "Status"]
