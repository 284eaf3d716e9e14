"""What a trace is made of: requests, of tokens or of block ids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from radixkv.errors import InvalidArgument, InvalidTokens

__all__ = [
    "MAX_REQUEST_BYTES",
    "MAX_REQUEST_TOKENS",
    "MAX_TOKEN",
    "MAX_UNIT",
    "MOONCAKE_BLOCK",
    "Blocks",
    "Tokens",
    "TraceRequest",
]

Tokens: TypeAlias = npt.NDArray[np.int32]

MOONCAKE_BLOCK = 512
"""Tokens per hash id in the published Mooncake traces."""

MAX_TOKEN = 2**31 - 1
"""The largest token id (int32)."""

# What a file may ask for, so that a few bytes never cost gigabytes. Real traces stay far inside: the longest input of
# Mooncake's conversation trace has 126,195 tokens, of recorded coding sessions 880,502; published ids stand for 16 to
# 512 tokens.
MAX_REQUEST_TOKENS = 2**24
"""The most tokens of one request in a trace file, input and output together."""

MAX_UNIT = 2**12
"""The most tokens that one block id of a trace file stands for."""

MAX_REQUEST_BYTES = 2**27
"""The most bytes of one request in a trace file: a line of JSON, or a msgpack object."""

_NO_TOKENS: Tokens = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class Blocks:
    """An input of ``length`` tokens given by prefix-chained block ids instead of tokens.

    ``ids`` [n] int32 covers the first ``n * unit`` tokens (fewer where the last block is partial). Tokens behind them,
    if any, all have the value ``tail``, which no other request uses.
    """

    ids: Tokens
    unit: int
    length: int
    tail: int = MAX_TOKEN

    def tokens(self) -> Tokens:
        """The input as tokens, [length] int32. O(length)."""
        tokens = np.repeat(self.ids, min(self.unit, self.length))[: self.length]
        if len(tokens) < self.length:
            tail = np.full(self.length - len(tokens), self.tail, dtype=np.int32)
            tokens = np.concatenate([tokens, tail])
        return tokens


class TraceRequest:
    """One request: its input tokens, the output tokens where the trace has them, and who asked when.

    Give either ``tokens_in`` ([n] int32) or ``blocks``; the tokens of blocks are expanded each time ``tokens_in`` is
    read and not kept. ``timestamp`` is in seconds; ``session`` and ``namespace`` are names, empty where unknown.
    Raises InvalidTokens for what is no token, InvalidArgument for a time that is not finite or a name that is no text.
    """

    __slots__ = ("_input", "namespace", "session", "timestamp", "tokens_out")

    def __init__(
        self,
        tokens_in: npt.ArrayLike | None = None,
        tokens_out: npt.ArrayLike | None = None,
        *,
        session: str = "",
        timestamp: float = 0.0,
        namespace: str = "",
        blocks: Blocks | None = None,
    ) -> None:
        if tokens_in is not None and blocks is None:
            self._input: Tokens | Blocks = _int32(tokens_in)
        elif blocks is not None and tokens_in is None:
            self._input = blocks
        else:
            raise InvalidArgument("a request has either tokens_in or blocks: give exactly one of them")
        self.tokens_out: Tokens = _NO_TOKENS if tokens_out is None else _int32(tokens_out)
        _check_time(timestamp)
        _check_name("session", session)
        _check_name("namespace", namespace)
        self.session = session
        self.timestamp = timestamp
        self.namespace = namespace

    @property
    def blocks(self) -> Blocks | None:
        """The input as block ids, or None for a request given as tokens."""
        return self._input if isinstance(self._input, Blocks) else None

    @property
    def tokens_in(self) -> Tokens:
        """The input tokens, [num_in] int32. O(num_in) for a request given as blocks, else O(1)."""
        return self._input.tokens() if isinstance(self._input, Blocks) else self._input

    @property
    def num_in(self) -> int:
        """The number of input tokens, known without expanding blocks."""
        return self._input.length if isinstance(self._input, Blocks) else len(self._input)

    @property
    def num_out(self) -> int:
        """The number of output tokens that the trace has ids for."""
        return len(self.tokens_out)

    def __repr__(self) -> str:
        lengths = f"{self.num_in} in, {self.num_out} out"
        return f"TraceRequest({lengths}, session={self.session!r}, timestamp={self.timestamp})"


def _check_time(timestamp: float) -> None:
    try:
        finite = math.isfinite(timestamp)
    except (TypeError, OverflowError):
        finite = False
    if not finite:
        raise InvalidArgument(f"timestamp must be a finite number of seconds, not {timestamp!r:.60}")


def _check_name(key: str, name: str) -> None:
    """Refuse a name that no trace and no cache could hold."""
    if not isinstance(name, str):
        raise InvalidArgument(f"{key} must be a string, not {type(name).__name__}")
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"{key} is no Unicode text: half a surrogate pair at character {error.start}; replace it"
        ) from None


def _int32(tokens: npt.ArrayLike) -> Tokens:
    array = np.asarray(tokens)
    if array.dtype == np.int32 and array.ndim == 1:
        return array
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidTokens(f"tokens are a list of whole numbers, not {array.ndim}-D {array.dtype}")
    if array.size and not (array.min() >= 0 and array.max() <= MAX_TOKEN):
        raise InvalidTokens(f"tokens from {array.min()} to {array.max()}: each must be from 0 to {MAX_TOKEN}")
    return array.astype(np.int32)
