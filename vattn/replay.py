"""A trace of requests served against the memory of a cache, without a model: what it costs and what it wastes.

The server is the simplest that batches continuously: each step it admits what waits, every running sequence grows by a
token, and what is done is closed.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from vattn.cache import KVCache, Sequence
from vattn.errors import OutOfPages
from vattn.trace import Request

_MEMORY_CALLS = ("create", "map", "set_access", "unmap", "release")


@dataclass
class Result:
    """What a replay has measured, from the end of its warm-up on.

    Attributes:
        steps: steps of the server.
        seconds: their time.
        tokens: prompt tokens admitted and tokens made.
        finished: requests that ended.
        preempted: sequences thrown back into the queue because a growth found no memory.
        calls: driver calls by name.
        caller_calls: of those, the ones made in the server's own thread.
        waited_seconds: time the server waited for memory.
        waste_mean: bytes mapped under running sequences that are neither rows nor free for others to take, over the
            bytes of the rows; mean over the steps.
        unused_mean: the same with what is free for others to take.
        rows_peak: the most bytes of rows at once.
        needed_peak: the most bytes at once that are mapped under running sequences and not free for others to take.
        physical_peak: the most bytes of physical memory.
        running_mean: sequences running, mean over the steps.
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    finished: int = 0
    preempted: int = 0
    calls: dict[str, int] = field(default_factory=dict)
    caller_calls: dict[str, int] = field(default_factory=dict)
    waited_seconds: float = 0.0
    waste_mean: float = 0.0
    unused_mean: float = 0.0
    rows_peak: int = 0
    needed_peak: int = 0
    physical_peak: int = 0
    running_mean: float = 0.0

    @property
    def calls_per_1000_tokens(self) -> float:
        """Calls that make, map, open, unmap and release memory; fences and zeroing are in ``calls``."""
        return 1000 * sum(self.calls.get(name, 0) for name in _MEMORY_CALLS) / max(1, self.tokens)

    @property
    def wait_fraction(self) -> float:
        """Part of the time that the server waited for memory."""
        return self.waited_seconds / self.seconds if self.seconds else 0.0


@dataclass
class _Running:
    request: Request
    sequence: Sequence
    made: int = 0  # tokens of the output


def _ask(sequence: Sequence, request: Request) -> None:
    with contextlib.suppress(OutOfPages):  # without a mapper it is said at once
        sequence.prefetch(request.prompt + 1)


def replay(
    cache: KVCache,
    requests: SequenceOf[Request],
    *,
    concurrency: int,
    warm_up: int = 0,
    steps_per_second: float | None = None,
    output_guess: int = 0,
    max_steps: int | None = None,
) -> Result:
    """Serves requests until the last is admitted, and measures from the end of the warm-up on.

    Args:
        cache: whose slots and budget are those of the server.
        requests: by arrival.
        concurrency: the most sequences at once.
        warm_up: requests that finish before measuring begins; they are served without a pause.
        steps_per_second: the server's pace; None: as fast as it goes, and each step waits for the mapper.
        output_guess: tokens of output that a request is expected to have, see ``KVCache.open``.
        max_steps: steps to measure at most.

    Raises:
        ValueError: the requests end before the warm-up does.
    """
    running: list[_Running] = []
    waiting = deque(requests)
    coming: list[_Running] = []
    result = Result()
    finished = 0
    started: float | None = None
    before = None
    step = 0
    sums = [0.0, 0.0, 0.0]
    begin = time.perf_counter()
    clock = begin
    while waiting:  # to the last admission: what drains after it is not a steady state
        if started is not None and max_steps is not None and result.steps >= max_steps:
            break
        paced = steps_per_second is not None and started is not None
        now = time.perf_counter() - begin if paced else float("inf")
        if started is None and finished >= warm_up:
            before = cache.stats(), cache._arena.driver.counts(background=True), time.perf_counter()
            result = Result()
            started = begin = clock = before[2]
            sums = [0.0, 0.0, 0.0]
        # Admission: memory is asked for, and the request joins when it is there.
        while waiting and waiting[0].arrival <= now and len(running) + len(coming) < concurrency:
            if coming and coming[-1].sequence.capacity < coming[-1].request.prompt:
                break  # one after the other, so that none takes the memory another waits for
            request = waiting.popleft()
            sequence = cache.open(expected=request.prompt + output_guess)
            _ask(sequence, request)
            coming.append(_Running(request, sequence))
        still = []
        for one in coming:
            if one.sequence.capacity >= one.request.prompt:
                one.sequence.grow(one.request.prompt)
                result.tokens += one.request.prompt
                running.append(one)
            else:
                _ask(one.sequence, one.request)
                still.append(one)
        coming = still
        # A step.
        done = []
        for one in list(running):
            if one not in running:
                continue
            while True:
                try:
                    one.sequence.grow(1)
                    break
                except OutOfPages:
                    victim = running.pop()
                    result.preempted += 1
                    victim.sequence.close()
                    waiting.appendleft(victim.request)
                    if victim is one:
                        break
            if one.sequence._open:
                result.tokens += 1
                one.made += 1
                if one.made >= one.request.output:
                    done.append(one)
        result.steps += 1
        step += 1
        stats = cache.stats()
        if stats.rows:
            unused = stats.mapped - stats.parked - stats.rows
            sums[0] += (unused - stats.spare) / stats.rows
            sums[1] += unused / stats.rows
        sums[2] += len(running)
        result.rows_peak = max(result.rows_peak, stats.rows)
        result.needed_peak = max(result.needed_peak, stats.mapped - stats.parked - stats.spare)
        result.physical_peak = max(result.physical_peak, stats.physical)
        for one in done:
            one.sequence.close()
            running.remove(one)
            finished += 1
            result.finished += 1
        if steps_per_second and started is not None:
            clock += 1 / steps_per_second
            time.sleep(max(0.0, clock - time.perf_counter()))
        else:
            cache._arena.settle()
    if before is None:
        raise ValueError(f"the requests end before {warm_up} have finished: take more, or a lower warm_up")
    stats, background = cache.stats(), cache._arena.driver.counts(background=True)
    result.seconds = time.perf_counter() - before[2]
    result.calls = {n: c - before[0].driver_calls[n] for n, c in stats.driver_calls.items()}
    result.caller_calls = {n: c - (background[n] - before[1][n]) for n, c in result.calls.items()}
    result.waited_seconds = stats.waited_seconds - before[0].waited_seconds
    result.waste_mean, result.unused_mean, result.running_mean = (s / max(1, result.steps) for s in sums)
    for one in [*running, *coming]:
        one.sequence.close()
    return result
