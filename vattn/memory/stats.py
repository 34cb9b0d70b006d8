"""``CacheStats``: a cache's statistics of its memory and of the driver calls."""

from __future__ import annotations

from dataclasses import dataclass

from vattn.aliases import Renamed


@dataclass(frozen=True)
class CacheStats:
    """A snapshot of a cache's memory; sizes in bytes.

    Attributes:
        budget: the limit on physical memory; None when there is none.
        reserved: reserved virtual addresses, which take no memory.
        physical: memory taken from the driver, which is mapped + pooled + deferred.
        peak: the largest value that ``physical`` has had.
        mapped: memory mapped under slots, where shared memory counts once.
        parked: the part of ``mapped`` that is under no running sequence.
        shared: memory that would be mapped in addition to ``mapped`` if sequences did not share any.
        pooled: memory kept for the next growth, or just being mapped or unmapped.
        deferred: memory that is unmapped once kernels that may read it have finished.
        running_slots: slots with a sequence.
        parked_slots: slots without a sequence whose memory is still mapped.
        rows: bytes of the rows of running sequences.
        spare: memory mapped under running slots past what their sequences need; it is taken when others need memory.
        adopted: how often a new sequence took over a parked slot.
        aliases: extents that were mapped again, by forks and by sequences that are swapped in.
        copied: bytes copied by forks, by ``compact``, and by copy on write.
        hits: how often a sequence grew into memory that was mapped ahead.
        misses: how often a growth had to wait for memory.
        waited_seconds: time that callers waited: for memory, for kernels on other streams, or for locked slots.
        background_failures: work of the mapper that the driver refused; a caller that needs the memory tries again and
            gets the error.
        lookahead: positions past its length up to which the mapper keeps a sequence mapped; the most of all sequences.
        host: host memory of sequences that are swapped out.
        host_pooled: host memory kept for sequences that will be swapped out.
        driver_calls: number of calls so far, by name.
        background_calls: the part of ``driver_calls`` that the mapper made.
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
