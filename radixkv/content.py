"""Tokens that stand for what has none: pictures, sound, anything that a model is given as embeddings."""

from __future__ import annotations

import hashlib
import operator
from typing import TYPE_CHECKING

from radixkv.errors import InvalidArgument, InvalidTokens

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["FIRST_CONTENT_TOKEN", "content_tokens"]

FIRST_CONTENT_TOKEN = 2**30
"""Ids from here to 2**31 - 1 are of content; no vocabulary reaches so far."""


def content_tokens(digest: bytes, count: int) -> npt.NDArray[np.int32]:
    """`count` ids for a content with this digest, int32: use them as its tokens in `acquire`, `match`, `pin`.

    The same digest gives the same ids, in every process; another gives others, so that a cached prefix with one picture
    is never continued by a prompt with another. `digest`: 16 bytes or more of a cryptographic hash of all that its
    embeddings follow from, as ``hashlib.sha256(pixels).digest()``; keyed, ``hashlib.blake2b(pixels, key=...)``, where
    those who send contents are not trusted. An id has 30 bits: of two contents one in 2**30 pairs agrees in its first
    id, and one in 2**60 in the first two.

    Raises InvalidArgument for a digest that is no bytes or too short, InvalidTokens for a count below 1.
    """
    if not isinstance(digest, bytes) or len(digest) < 16:
        given = f"{len(digest)} bytes" if isinstance(digest, bytes) else type(digest).__name__
        raise InvalidArgument(f"digest is {given}: give at least 16 bytes of a cryptographic hash of the content")
    if isinstance(count, bool) or not hasattr(count, "__index__") or operator.index(count) < 1:
        raise InvalidTokens(f"count is {count!r}: a content stands for 1 token or more")
    import numpy as np  # not with the package, whose import is light

    drawn = hashlib.shake_128(b"radixkv content" + digest).digest(4 * operator.index(count))
    ids = np.frombuffer(drawn, "<u4") % FIRST_CONTENT_TOKEN + FIRST_CONTENT_TOKEN
    return ids.astype(np.int32)
