"""Tiers below the page pool: RAM, and a disk that survives restarts and kill -9. See docs/tiers.md."""

from radixkv.tiers.fetch import Fetch
from radixkv.tiers.store import PageStore, Store
from radixkv.tiers.tiers import TierOptions, Tiers

__all__ = ["Fetch", "PageStore", "Store", "TierOptions", "Tiers"]
