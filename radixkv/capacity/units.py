"""Bytes for people, always with their unit."""

from __future__ import annotations

__all__ = ["format_bytes"]


def format_bytes(num_bytes: float) -> str:
    """Bytes in the largest binary unit that leaves at least 1, in four digits: 128 KiB, 3.125 GiB."""
    power = 0
    while num_bytes >= 1024 and power < 4:
        num_bytes /= 1024
        power += 1
    number = f"{num_bytes:,.0f}" if num_bytes >= 1000 else f"{num_bytes:.4g}"
    return f"{number} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
