"""A trace of requests served against the memory of a cache, without a model: what it costs and what it wastes.

The server is the simplest that batches continuously: each step it admits what waits, every running sequence grows by a
token, and what is done is closed.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vattn.bench.trace import Request
from vattn.errors import BudgetExceeded
from vattn.memory.stats import CacheStats

# Calls that make, map, open, unmap and release memory.
MEMORY_CALLS = ("create", "map", "set_access", "unmap", "release")


class ServedSequence(Protocol):
    """What a server needs of a sequence; see ``vattn.Sequence``."""

    @property
    def capacity(self) -> int: ...
    def grow(self, n: int = 1) -> int: ...
    def prefetch(self, length: int) -> bool: ...
    def close(self) -> None: ...


class Served(Protocol):
    """What a server needs of a cache; see ``KVCache``."""

    def open(self, *, expected: int = 0) -> ServedSequence: ...
    def stats(self) -> CacheStats: ...
    def wait_idle(self) -> None: ...


@dataclass(frozen=True)
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

    steps: int
    seconds: float
    tokens: int
    finished: int
    preempted: int
    calls: dict[str, int]
    caller_calls: dict[str, int]
    waited_seconds: float
    waste_mean: float
    unused_mean: float
    rows_peak: int
    needed_peak: int
    physical_peak: int
    running_mean: float

    @property
    def calls_per_1000_tokens(self) -> float:
        """``MEMORY_CALLS``; fences and zeroing are in ``calls`` only."""
        return 1000 * sum(self.calls.get(name, 0) for name in MEMORY_CALLS) / max(1, self.tokens)

    @property
    def wait_fraction(self) -> float:
        """Part of the time that the server waited for memory."""
        return self.waited_seconds / self.seconds if self.seconds else 0.0


@dataclass(eq=False)
class _Running:
    request: Request
    sequence: ServedSequence
    made: int = 0  # tokens of the output


class _Server:
    """Sequences that run, requests that wait for one of so many places or for memory, and what has become of others."""

    def __init__(self, cache: Served, requests: Sequence[Request], concurrency: int, output_guess: int) -> None:
        self.cache = cache
        self.waiting = deque(requests)
        self.coming: list[_Running] = []  # memory is asked for; they run when it is there
        self.running: list[_Running] = []
        self.concurrency = concurrency
        self.output_guess = output_guess
        self.tokens = self.finished = self.preempted = 0

    def admit(self, now: float) -> None:
        """Starts what has arrived, as far as there are places and memory."""
        while self.waiting and self.waiting[0].arrival <= now:
            if len(self.running) + len(self.coming) >= self.concurrency:
                break
            if self.coming and not self._ready(self.coming[-1]):
                break  # one after the other, so that none takes the memory another waits for
            request = self.waiting.popleft()
            sequence = self.cache.open(expected=request.prompt + self.output_guess)
            self.coming.append(_Running(request, sequence))
            self._ask(self.coming[-1])
        still = []
        for one in self.coming:
            if self._ready(one) or not self.running:  # where nothing else is to be done, it is waited for
                one.sequence.grow(one.request.prompt)
                self.tokens += one.request.prompt
                self.running.append(one)
            else:
                self._ask(one)
                still.append(one)
        self.coming = still

    def step(self) -> None:
        """A token for each that runs; where there is no memory for it, the last that came waits again."""
        position = 0
        while position < len(self.running):
            one = self.running[position]
            try:
                one.sequence.grow(1)
            except BudgetExceeded:
                if len(self.running) + len(self.coming) == 1:
                    raise
                if self.coming:
                    last = self.coming.pop()
                else:
                    last = self.running.pop()
                    self.tokens -= last.request.prompt + last.made  # they will be made again
                last.sequence.close()
                self.waiting.appendleft(last.request)
                self.preempted += 1
                continue
            one.made += 1
            self.tokens += 1
            position += 1

    def end(self) -> None:
        """Closes what is done."""
        for one in self.running:
            if one.made >= one.request.output:
                one.sequence.close()
                self.finished += 1
        self.running = [one for one in self.running if one.made < one.request.output]

    @staticmethod
    def _ask(one: _Running) -> None:
        with contextlib.suppress(BudgetExceeded):  # without a mapper it is said at once
            one.sequence.prefetch(one.request.prompt + 1)

    @staticmethod
    def _ready(one: _Running) -> bool:
        return one.sequence.capacity >= one.request.prompt


class _Measured:
    """A server from a moment on, looked at after each step."""

    def __init__(self, server: _Server) -> None:
        self.server = server
        self.before = server.cache.stats()
        self.tokens, self.finished, self.preempted = server.tokens, server.finished, server.preempted
        self.since = time.perf_counter()
        self.steps = self.rows_peak = self.needed_peak = self.physical_peak = 0
        self.waste = self.unused = self.running = 0.0  # sums over the steps

    def look(self) -> None:
        stats = self.server.cache.stats()
        unused = stats.mapped - stats.parked - stats.rows
        self.steps += 1
        self.waste += (unused - stats.spare) / max(1, stats.rows)
        self.unused += unused / max(1, stats.rows)
        self.running += len(self.server.running)
        self.rows_peak = max(self.rows_peak, stats.rows)
        self.needed_peak = max(self.needed_peak, stats.mapped - stats.parked - stats.spare)
        self.physical_peak = max(self.physical_peak, stats.physical)

    def result(self) -> Result:
        seconds = time.perf_counter() - self.since
        before, after = self.before, self.server.cache.stats()
        calls = {name: count - before.driver_calls[name] for name, count in after.driver_calls.items()}
        background = {name: count - before.background_calls[name] for name, count in after.background_calls.items()}
        steps = max(1, self.steps)
        return Result(
            steps=self.steps,
            seconds=seconds,
            tokens=self.server.tokens - self.tokens,
            finished=self.server.finished - self.finished,
            preempted=self.server.preempted - self.preempted,
            calls=calls,
            caller_calls={name: count - background[name] for name, count in calls.items()},
            waited_seconds=after.waited_seconds - before.waited_seconds,
            waste_mean=self.waste / steps,
            unused_mean=self.unused / steps,
            rows_peak=self.rows_peak,
            needed_peak=self.needed_peak,
            physical_peak=self.physical_peak,
            running_mean=self.running / steps,
        )


def replay(
    cache: Served,
    requests: Sequence[Request],
    *,
    concurrency: int,
    warm_up: int = 0,
    settling: int = 0,
    steps_per_second: float | None = None,
    output_guess: int = 0,
    max_steps: int | None = None,
) -> Result:
    """Serves requests until the last is admitted, and measures from the end of the warm-up on.

    A request that waits for memory to be admitted is not waited for by those that run: it shows in ``running_mean``.

    Args:
        cache: whose slots and budget are those of the server.
        requests: by arrival.
        concurrency: the most sequences at once.
        warm_up: requests that finish at first; they are served without a pause.
        settling: requests that finish then, at the server's pace, before measuring begins.
        steps_per_second: the server's pace, by which arrivals are kept once it is warm; None: as fast as it goes,
            arrivals do not matter, and each step waits for the mapper.
        output_guess: tokens of output that a request is expected to have, see ``KVCache.open``.
        max_steps: steps to measure at most.

    Raises:
        ValueError: the requests end before the warm-up does.
        BudgetExceeded: the budget does not hold a request that runs alone.
    """
    server = _Server(cache, requests, concurrency, output_guess)
    measured: _Measured | None = None
    began = 0.0
    clock: float | None = None  # when the next step begins, once there is a pace
    while server.waiting:  # to the last admission: what drains after it is not a steady state
        if steps_per_second and clock is None and server.finished >= warm_up:
            clock = time.perf_counter()
            began = clock - server.waiting[0].arrival
        if measured is None and server.finished >= warm_up + settling:
            measured = _Measured(server)
        server.admit(math.inf if clock is None else time.perf_counter() - began)
        server.step()
        if measured:
            measured.look()
        server.end()
        if steps_per_second and clock is not None:
            clock += 1 / steps_per_second
            time.sleep(max(0.0, clock - time.perf_counter()))
        else:
            cache.wait_idle()
        if measured and measured.steps == max_steps:
            break
    if measured is None:
        raise ValueError(
            f"the requests end before {warm_up + settling} have finished: take more, or a lower warm_up or settling"
        )
    result = measured.result()
    for one in [*server.running, *server.coming]:
        one.sequence.close()
    return result
