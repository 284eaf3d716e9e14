"""Amounts of memory: read, checked and shown."""

from __future__ import annotations

import re

from radixkv.errors import InvalidArgument

__all__ = ["bytes_of", "format_bytes", "parse_bytes"]

_UNITS = {
    "": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes in "4GiB", "512 MiB", "2.5GB" (GB is 10**9, GiB 2**30) or "1048576".

    Raises:
        InvalidArgument: not a positive amount in a known unit.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) == 0:
        raise InvalidArgument(f"cannot read {text!r} as an amount of memory: write it like '4GiB' or '512MiB'")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def bytes_of(name: str, amount: str | int) -> int:
    """Bytes in an argument of this name that is text, as for `parse_bytes`, or a number of bytes.

    Raises:
        InvalidArgument: neither, or nothing.
    """
    if isinstance(amount, str):
        return parse_bytes(amount)
    if isinstance(amount, bool) or not isinstance(amount, int) or amount < 1:
        raise InvalidArgument(f"{name} must be like '4GiB' or a number of bytes; got {amount!r}")
    return amount


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1, in four digits: 128 KiB, 3.125 GiB."""
    power = 0
    while num_bytes >= 1024 and power < 4:
        num_bytes /= 1024
        power += 1
    number = f"{num_bytes:,.0f}" if num_bytes >= 1000 else f"{num_bytes:.4g}"
    return f"{number} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
