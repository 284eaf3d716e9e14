"""Pages that the tiers below the pool bring while their requests wait."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from radixkv.scheduling.request import Request
from radixkv.scheduling.space import Pages, Space

if TYPE_CHECKING:
    from radixkv.cache import Lease
    from radixkv.tiers import Fetch, Tiers

__all__ = ["Loading"]

_AHEAD = 16  # requests that are fetched for at once, at most: the next ones in line
_PATIENCE = 0.05


class Loading:
    """The fetches of a scheduler's waiting requests. Without tiers nothing is ever waited for.

    A request whose pages are on their way is passed over; a fetch has a deadline, so not for long. Fetches begin in
    order, as long as ready ones leave half of the hub to others: pages that are to be stored pass through it, too.
    """

    def __init__(self, engine: Pages, space: Space) -> None:
        self._tiers: Tiers | None = getattr(engine, "tiers", None)  # a host's own pages may have none
        self._space = space
        self._fetches: dict[Request, Fetch] = {}

    def look_ahead(self, waiting: Iterable[Request]) -> None:
        """Begin what can begin."""
        if self._tiers is None:
            return
        for request, _ in zip(waiting, range(_AHEAD), strict=False):
            if request not in self._fetches:
                end = self._space.findable(request)
                hub = self._tiers.hub
                if self._fetches and hub.num_used + end // self._tiers.page_size > hub.num_slots // 2:
                    break
                self._begin(self._tiers, request, end)
        self._tiers.pump()

    def _begin(self, tiers: Tiers, request: Request, end: int) -> None:
        self._fetches[request] = tiers.fetch(request.sequence(0, end), request.namespace)

    def waits(self, request: Request, cached: int) -> bool:
        """Whether pages of a request are still to come, of which the pool has so many tokens now."""
        if self._tiers is None:
            return False
        fetch = self._fetches.get(request)
        if fetch is None:
            return True  # not its turn yet
        if fetch.ready and fetch.tokens > cached and cached < fetch.first * self._tiers.page_size:
            fetch.cancel()  # the pool has lost what should come before its pages
            self._begin(self._tiers, request, len(fetch.prompt))
            self._tiers.pump()
            return not self._fetches[request].ready
        return not fetch.ready

    def wait(self) -> None:
        """Nothing else is to be done: wait a moment for the first fetch."""
        for fetch in self._fetches.values():
            fetch.wait(_PATIENCE)
            return

    def tokens(self, request: Request) -> int:
        """Tokens that the pool and the tiers have brought together, from the first one on."""
        fetch = self._fetches.get(request)
        return 0 if fetch is None else fetch.tokens

    def fill(self, request: Request, lease: Lease) -> None:
        """Give what has come to the lease that the request got."""
        if self._tiers is None or (fetch := self._fetches.pop(request, None)) is None:
            return
        self._tiers.fill(lease, fetch)
        stats = request.stats
        stats.fetch_seconds += fetch.seconds
        for source, tokens in fetch.restored.items():
            stats.restored_tokens[source] = stats.restored_tokens.get(source, 0) + tokens

    def forget(self, request: Request) -> None:
        """It does not wait any more."""
        if (fetch := self._fetches.pop(request, None)) is not None:
            fetch.cancel()
