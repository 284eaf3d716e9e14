"""Every error that radixkv raises: one hierarchy, each class with a standard second base.

A message gives the numbers and a remedy. Anything that fails leaves the cache as it was.
"""

__all__ = [
    "BackendUnavailable",
    "InvalidArgument",
    "InvalidLogits",
    "InvalidTokens",
    "LeaseError",
    "ModelNotFound",
    "NotCached",
    "PoolExhausted",
    "QueueFull",
    "RadixKVError",
    "TraceError",
]


class RadixKVError(Exception):
    """Base of every error of this package."""


class PoolExhausted(RadixKVError, MemoryError):
    """The pool has too few free and evictable pages for what was asked.

    Attributes:
        needed: pages that it takes, besides those of its prompt that are cached.
        free, evictable: pages that there were; those of the cached prompt are not among them.
        cached: tokens of the prompt that are cached.
    """

    def __init__(self, message: str, *, needed: int = 0, free: int = 0, evictable: int = 0, cached: int = 0) -> None:
        super().__init__(message)
        self.needed, self.free, self.evictable, self.cached = needed, free, evictable, cached


class LeaseError(RadixKVError, RuntimeError):
    """A lease or a pin was used against its contract: after release, twice, or by two threads at once."""


class InvalidTokens(RadixKVError, ValueError):
    """Tokens of a wrong type, shape or value."""


class InvalidArgument(RadixKVError, ValueError):
    """A size, dtype, shape or option that cannot work."""


class InvalidLogits(RadixKVError, ArithmeticError):
    """Logits that no token can be chosen by: the model computed NaN or infinity, or a processor left no token."""


class QueueFull(RadixKVError, RuntimeError):
    """As many requests wait as may wait: submit again later."""


class NotCached(RadixKVError, LookupError):
    """A prefix that must be cached is not, or not wholly."""


class TraceError(RadixKVError, ValueError):
    """A trace file that is truncated, foreign or inconsistent."""


class BackendUnavailable(RadixKVError, RuntimeError):
    """An optional package or a device feature that was asked for is missing."""


class ModelNotFound(RadixKVError, FileNotFoundError):
    """A model path that holds no model this package can load."""
