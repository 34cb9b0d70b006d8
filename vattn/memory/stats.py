"""``CacheStats``: what a cache says of its memory and of the driver's calls."""

from __future__ import annotations

from dataclasses import dataclass

from vattn.aliases import Renamed


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache's memory; sizes in bytes.

    Attributes:
        budget: the limit on physical memory; None when there is none.
        reserved: addresses, which cost nothing.
        physical: memory taken from the driver, which is mapped + pooled + deferred.
        peak: the most that ``physical`` has been.
        mapped: memory under slots; ``parked`` is the part that is under no sequence's.
        parked: see ``mapped``.
        shared: what would be mapped beside it if sequences did not share.
        pooled: memory kept for the next growth.
        deferred: memory that is unmapped once kernels that may read it have finished.
        running_slots: slots with a sequence.
        parked_slots: slots without one, whose memory is still mapped.
        rows: bytes of the rows of running sequences.
        spare: mapped under running slots past what their sequences need; given to others when asked for.
        adopted: how often a new sequence took over a parked slot.
        aliases: extents that forks have mapped again.
        copied: bytes copied by forks, by ``compact``, and before a sequence wrote behind rows that it shares.
        hits: how often a sequence grew into memory that was mapped ahead.
        misses: how often it had to wait for memory.
        waited_seconds: time that callers waited for memory, for kernels on other streams, or for the mapper.
        background_failures: work ahead that the driver refused; who needs the memory tries again and is told.
        lookahead: positions past its length that the sequence mapped furthest ahead is kept mapped.
        host: host memory under sequences that are swapped out.
        host_pooled: host memory kept for the next ones.
        driver_calls: calls made so far, by name.
        background_calls: of those, the ones that the mapper made.
    """

    budget: int | None
    reserved: int
    physical: int
    peak: int
    mapped: int
    parked: int
    shared: int
    pooled: int
    deferred: int
    running_slots: int
    parked_slots: int
    rows: int
    spare: int
    adopted: int
    aliases: int
    copied: int
    hits: int
    misses: int
    waited_seconds: float
    background_failures: int
    lookahead: int
    host: int
    host_pooled: int
    driver_calls: dict[str, int]
    background_calls: dict[str, int]

    retired = Renamed("deferred")
