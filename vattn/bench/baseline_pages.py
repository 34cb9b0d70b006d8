"""``Pages``: a baseline for ``KVCache`` that maps slots in pages of one size, in the thread that grows a sequence.

With one plane, a plane has interleaved rows. With a plane for each layer's K and one for each layer's V it maps as
vAttention does. Memory is not zeroed.
"""

from __future__ import annotations

import time

from vattn import _core
from vattn.errors import BudgetExceeded
from vattn.memory.stats import CacheStats


class Pages:
    """Slots over one reservation. A sequence that ends leaves its pages mapped, for the next sequence in its slot.

    When the budget is spent, pages are taken from the slot that has been parked longest; where none is parked, from the
    running slot with the most pages past its length.

    Args:
        driver: the driver; its granularity is the size of a page.
        planes: the number of separately mapped parts of a slot.
        row_bytes: bytes of a position in each plane.
        slots: the most sequences at once.
        max_len: positions of the longest sequence.
        budget: limit on physical memory, in bytes; the page of ``zero_page`` does not count.
        zero_page: maps one page, the same everywhere, at all addresses without memory, so that reading there does not
            fault.
    """

    def __init__(
        self,
        driver: _core.Driver,
        *,
        planes: int,
        row_bytes: int,
        slots: int,
        max_len: int,
        budget: int,
        zero_page: bool = False,
    ) -> None:
        self.driver = driver
        self.page = driver.granularity
        self.row_bytes = row_bytes
        self.planes = planes
        self.limit = budget // self.page
        self.stride = -(-max_len * row_bytes // self.page) * self.page
        self.reserved = planes * slots * self.stride
        self.base = driver.reserve(self.reserved)
        self.handles: list[list[list[int]]] = [[[] for _ in range(planes)] for _ in range(slots)]
        self.bare = list(range(slots))
        self.parked: list[int] = []  # the longest parked first
        self.running: list[PageSequence] = []
        self.pooled: list[int] = []
        self.created = self.peak = 0
        self.misses = 0
        self.waited = 0.0
        self.zero = driver.create(self.page) if zero_page else None
        if self.zero is not None:
            for at in range(self.base, self.base + self.reserved, self.page):
                self._map(at, self.zero)

    def open(self, *, expected: int = 0) -> PageSequence:
        """Starts a sequence, in the slot that was parked last if there is one; ``expected`` is ignored."""
        if not self.parked and not self.bare:
            raise ValueError("all slots are in use")
        sequence = PageSequence(self, self.parked.pop() if self.parked else self.bare.pop(0))
        self.running.append(sequence)
        return sequence

    def wait_idle(self) -> None:
        """Returns at once, since nothing runs in the background."""

    def stats(self) -> CacheStats:
        """Returns the statistics of ``KVCache.stats``; no unmap is ever deferred."""
        mapped = self.page * (self.created - len(self.pooled))
        counts = self.driver.counts()
        return CacheStats(
            budget=self.limit * self.page,
            reserved=self.reserved,
            physical=self.page * self.created,
            peak=self.page * self.peak,
            mapped=mapped,
            parked=self.page * sum(len(pages) for slot in self.parked for pages in self.handles[slot]),
            shared=0,
            pooled=self.page * len(self.pooled),
            deferred=0,
            running_slots=len(self.running),
            parked_slots=len(self.parked),
            rows=sum(one.length for one in self.running) * self.row_bytes * self.planes,
            spare=self.page * sum(self._surplus(one) for one in self.running),
            adopted=0,
            aliases=0,
            copied=0,
            hits=0,
            misses=self.misses,
            waited_seconds=self.waited,
            background_failures=0,
            lookahead=0,
            host=0,
            host_pooled=0,
            driver_calls=counts,
            background_calls=dict.fromkeys(counts, 0),
        )

    def close(self) -> None:
        """Unmaps and releases all memory, and gives the addresses back."""
        if self.zero is not None:
            for at in range(self.base, self.base + self.reserved, self.page):
                self.driver.unmap(at, self.page)
            self.driver.release(self.zero)
        for slot, planes in enumerate(self.handles):
            for plane, pages in enumerate(planes):
                for number in range(len(pages)) if self.zero is None else ():
                    self.driver.unmap(self._address(slot, plane, number), self.page)
        for handle in [*self.pooled, *(handle for planes in self.handles for pages in planes for handle in pages)]:
            self.driver.release(handle)
        self.driver.free_address(self.base, self.reserved)

    def _pages(self, length: int) -> int:
        return -(-length * self.row_bytes // self.page)

    def _address(self, slot: int, plane: int, number: int) -> int:
        return self.base + (plane * len(self.handles) + slot) * self.stride + number * self.page

    def _map(self, at: int, handle: int) -> None:
        self.driver.map(at, self.page, handle)
        self.driver.set_access(at, self.page)

    def _grow(self, slot: int, length: int) -> None:
        count = self._pages(length)
        planes = self.handles[slot]
        missing = sum(max(0, count - len(pages)) for pages in planes)
        if not missing:
            return
        self.misses += 1
        start = time.perf_counter()
        parked = sum(len(pages) for other in self.parked for pages in self.handles[other])
        surplus = sum(self._surplus(one) for one in self.running if one.slot != slot)
        available = len(self.pooled) + self.limit - self.created + parked + surplus
        if missing > available:
            error = BudgetExceeded(f"{missing} pages are needed and {available} available")
            error.needed, error.free = missing * self.page, available * self.page
            raise error
        for plane, pages in enumerate(planes):
            while len(pages) < count:
                at = self._address(slot, plane, len(pages))
                if self.zero is not None:
                    self.driver.unmap(at, self.page)
                pages.append(self._take(slot))
                self._map(at, pages[-1])
        self.waited += time.perf_counter() - start

    def _surplus(self, sequence: PageSequence) -> int:
        needed = self._pages(max(sequence.length, sequence.wanted))
        return sum(max(0, len(pages) - needed) for pages in self.handles[sequence.slot])

    def _take(self, slot: int) -> int:
        if not self.pooled and self.created < self.limit:
            self.created += 1
            self.peak = max(self.peak, self.created)
            return self.driver.create(self.page)
        if not self.pooled:
            others = (one for one in self.running if one.slot != slot)
            self._strip(self.parked[0] if self.parked else max(others, key=self._surplus).slot)
        return self.pooled.pop()

    def _strip(self, slot: int) -> None:
        planes = self.handles[slot]
        plane = max(range(self.planes), key=lambda plane: len(planes[plane]))
        handle = planes[plane].pop()
        at = self._address(slot, plane, len(planes[plane]))
        self.driver.unmap(at, self.page)
        if self.zero is not None:
            self._map(at, self.zero)
        self.pooled.append(handle)
        if not any(planes) and slot in self.parked:
            self.parked.remove(slot)
            self.bare.append(slot)


class PageSequence:
    """One sequence of ``Pages``, with the part of ``Sequence`` that a server needs."""

    def __init__(self, cache: Pages, slot: int) -> None:
        self.cache = cache
        self.slot = slot
        self.length = 0
        self.wanted = 0

    @property
    def capacity(self) -> int:
        """The number of positions that are mapped."""
        return min(len(pages) for pages in self.cache.handles[self.slot]) * self.cache.page // self.cache.row_bytes

    def grow(self, n: int = 1) -> int:
        """Makes room for ``n`` more positions and returns the new length.

        Raises:
            BudgetExceeded: the budget does not suffice; nothing has changed.
        """
        self.cache._grow(self.slot, self.length + n)
        self.length += n
        return self.length

    def prefetch(self, length: int) -> bool:
        """Maps ``length`` positions before it returns; returns True.

        Raises:
            BudgetExceeded: the budget does not suffice; nothing has changed.
        """
        self.cache._grow(self.slot, length)
        self.wanted = length
        return True

    def close(self) -> None:
        """Ends the sequence; the slot keeps its memory for the next sequence."""
        self.cache.running.remove(self)
        (self.cache.parked if any(self.cache.handles[self.slot]) else self.cache.bare).append(self.slot)
