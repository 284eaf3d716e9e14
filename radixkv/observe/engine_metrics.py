"""What an engine tells beside its cache, for prometheus_client: what its formats stored, what its tiers did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

__all__ = ["EngineFigures", "engine_families"]


class EngineFigures(Protocol):
    """An `Engine`, or what says the same of a host's own."""

    @property
    def layers(self) -> Sequence[Any]: ...
    @property
    def attention(self) -> Any: ...
    @property
    def tiers(self) -> Any: ...


def engine_families(core: Any, engine: EngineFigures) -> Iterator[Any]:
    """``core`` is prometheus_client's. Of formats nothing where the backend does not count them, as on CUDA."""
    stored = getattr(engine.attention, "stored", None)
    if stored is not None:
        yield from _of_formats(core, [stored(i) for i in range(len(engine.layers))])
    if engine.tiers is not None:
        yield from _of_tiers(core, engine.tiers.stats())


def _of_formats(core: Any, layers: Sequence[tuple[Any, Any]]) -> Iterator[Any]:
    counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
    counted = (
        ("rows", "stored_rows", "Rows, each of one head, that were stored in 8 or 4 bits, of all layers."),
        ("not_finite", "stored_not_finite_rows", "Of these, rows with NaN or an infinity: who sees them gets NaN."),
        ("unusual", "stored_unusual_rows", "Of these, rows beyond what kv-check saw, or too large for their format."),
        ("sampled", "stored_sampled_rows", "Of these, rows whose error was measured."),
    )
    for field, name, help_ in counted:
        family = counter(f"radixkv_{name}", help_, labels=["tensor"])
        for tensor, rows in zip(("k", "v"), zip(*layers, strict=True), strict=True):
            family.add_metric([tensor], sum(getattr(each, field) for each in rows))
        yield family
    mean = gauge("radixkv_stored_mean_error_ratio", "Error of the sampled rows over their length.", labels=["tensor"])
    largest = gauge("radixkv_stored_largest_error_ratio", "The largest of these errors.", labels=["tensor"])
    for tensor, rows in zip(("k", "v"), zip(*layers, strict=True), strict=True):
        sampled = sum(each.sampled for each in rows)
        mean.add_metric([tensor], sum(each.mean_error * each.sampled for each in rows) / max(1, sampled))
        largest.add_metric([tensor], max(each.largest_error for each in rows))
    yield mean
    yield largest


def _of_tiers(core: Any, stats: dict[str, Any]) -> Iterator[Any]:
    counter, gauge = core.CounterMetricFamily, core.GaugeMetricFamily
    fetches = counter("radixkv_tier_fetches", "Fetches from the tiers, by what came of them.", labels=["result"])
    for result in ("ready", "late", "declined"):
        fetches.add_metric([result], stats[result])
    yield fetches
    yield counter("radixkv_tier_filled_tokens", "Tokens that leases got from the tiers.", value=stats["filled_tokens"])
    yield counter("radixkv_tier_skipped_writes", "Pages that were not stored.", value=stats["skipped_writes"])
    slots = gauge("radixkv_tier_hub_slots", "Slots of the hub in RAM.", labels=["state"])
    slots.add_metric(["used"], stats["hub"]["used"])
    slots.add_metric(["free"], stats["hub"]["slots"] - stats["hub"]["used"])
    yield slots
    events = counter(
        "radixkv_tier_store_events",
        "Pages read, written, refused for want of room and found corrupt; calls that failed.",
        labels=["store", "event"],
    )
    up = gauge("radixkv_tier_store_up", "1 while a store is asked, 0 while it is left alone.", labels=["store"])
    for name, store in stats["stores"].items():
        for event in ("read", "written", "refused", "corrupt", "failed"):
            events.add_metric([name, event], store[event])
        up.add_metric([name], store["breaker"] == "closed")
    yield events
    yield up
