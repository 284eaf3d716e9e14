"""What a request may be made of. Each check returns the value as a plain one, or says what to give."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Iterable
from reprlib import repr as shown
from typing import Any

import numpy as np

from radixkv.errors import InvalidArgument, InvalidTokens

__all__ = ["check_namespace", "check_token_set", "check_tokens", "integer", "number"]

TOKENS = 2**31
"""Token ids are below this."""


def integer(name: str, value: Any, least: int, most: int = 2**63 - 1) -> int:
    """`value` as an int in a range: an int of any library, but no bool and no float."""
    try:
        whole = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = None
    if whole is None:
        raise InvalidArgument(f"{name} is {shown(value)}: give a whole number, at least {least}")
    if not least <= whole <= most:
        bound = f"at least {least}" if whole < least else f"at most {most}"
        raise InvalidArgument(f"{name} is {whole}: give {bound}")
    return whole


def number(name: str, value: Any) -> float:
    """`value` as a float: a real number of any library, but no bool."""
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass
    raise InvalidArgument(f"{name} is {shown(value)}: give a number that a float can hold")


def check_tokens(tokens: Any, vocabulary: int = TOKENS) -> np.ndarray:
    """`tokens` as int32 `[n]`, a copy, each checked to be one of a `vocabulary`; raises InvalidTokens."""
    try:
        array = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidTokens(f"tokens are not a sequence of integers: {error}") from error
    if array.ndim != 1 or array.size == 0:
        raise InvalidTokens(f"tokens have shape {array.shape}: give a non-empty, one-dimensional sequence")
    if not np.issubdtype(array.dtype, np.integer):
        raise InvalidTokens(f"tokens are {array.dtype}: give integers")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocabulary:
        takes = "token ids are" if vocabulary == TOKENS else "the model's embedding takes"
        raise InvalidTokens(f"tokens range from {low} to {high}: {takes} 0 to {vocabulary - 1}")
    return array.astype(np.int32)


def check_token_set(name: str, tokens: Any, vocabulary: int = TOKENS) -> frozenset[int]:
    """A collection of token ids of a `vocabulary`, each an int."""
    if isinstance(tokens, str | bytes) or not isinstance(tokens, Iterable):
        example = f", such as [{tokens}]" if isinstance(tokens, int) else ""
        raise InvalidArgument(f"{name} is {shown(tokens)}: give a sequence of token ids{example}")
    return frozenset(integer(f"{name}[{i}]", token, 0, vocabulary - 1) for i, token in enumerate(tokens))


def check_namespace(namespace: Any) -> str:
    """A str that the cache can take: it keeps names as UTF-8."""
    if not isinstance(namespace, str):
        raise InvalidArgument(f"namespace is {shown(namespace)}: give a str, '' for the common one")
    try:
        namespace.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(f"namespace is {shown(namespace)}, which UTF-8 cannot encode: {error.reason}") from error
    return namespace
