"""Serves a trace of requests with the memory of a cache, without a model, and measures driver calls and waste.

The server does the simplest form of continuous batching: in each step it admits waiting requests, grows every running
sequence by a token, and closes the finished ones.
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

# The driver calls that create, map, make accessible, unmap and release memory.
MEMORY_CALLS = ("create", "map", "set_access", "unmap", "release")


class ServedSequence(Protocol):
    """The part of ``vattn.Sequence`` that the server needs."""

    @property
    def capacity(self) -> int: ...
    def grow(self, n: int = 1) -> int: ...
    def prefetch(self, length: int) -> bool: ...
    def close(self) -> None: ...


class Served(Protocol):
    """The part of ``KVCache`` that the server needs."""

    def open(self, *, expected: int = 0) -> ServedSequence: ...
    def stats(self) -> CacheStats: ...
    def wait_idle(self) -> None: ...


@dataclass(frozen=True)
class Result:
    """The measurements of a replay, from the end of its warm-up and its settling on.

    Attributes:
        steps: number of steps of the server.
        seconds: duration of these steps.
        tokens: prompt tokens admitted and output tokens generated.
        finished: number of requests that ended.
        preempted: number of sequences put back into the queue because a growth found no memory.
        calls: number of driver calls, by name.
        caller_calls: the part of ``calls`` that was made in the server's thread.
        waited_seconds: time that the server waited for memory.
        waste_mean: bytes mapped under running sequences that are neither rows nor free for others to take, divided by
            the bytes of the rows; mean over the steps.
        unused_mean: the same, including memory that is free for others to take.
        rows_peak: the most bytes of rows at once.
        needed_peak: the most bytes at once that are mapped under running sequences and not free for others to take.
        physical_peak: the most bytes of physical memory.
        running_mean: number of running sequences, mean over the steps.
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
        """The calls of ``MEMORY_CALLS`` per 1000 tokens; calls for fences and zeroing are in ``calls`` only."""
        return 1000 * sum(self.calls.get(name, 0) for name in MEMORY_CALLS) / max(1, self.tokens)

    @property
    def wait_fraction(self) -> float:
        """The fraction of the time in which the server waited for memory."""
        return self.waited_seconds / self.seconds if self.seconds else 0.0


@dataclass(eq=False)
class _Running:
    request: Request
    sequence: ServedSequence
    made: int = 0  # output tokens so far


class _Server:
    """The running sequences, the requests that wait for a place or for memory, and counts of tokens and requests."""

    def __init__(self, cache: Served, requests: Sequence[Request], concurrency: int, output_guess: int) -> None:
        self.cache = cache
        self.waiting = deque(requests)
        self.coming: list[_Running] = []  # have asked for memory, and run once it is mapped
        self.running: list[_Running] = []
        self.concurrency = concurrency
        self.output_guess = output_guess
        self.tokens = self.finished = self.preempted = 0

    def admit(self, now: float) -> None:
        """Starts requests that have arrived, as far as ``concurrency`` and the memory allow."""
        while self.waiting and self.waiting[0].arrival <= now:
            if len(self.running) + len(self.coming) >= self.concurrency:
                break
            if self.coming and not self._ready(self.coming[-1]):
                break  # requests are admitted one by one, so that none takes the memory that another one waits for
            request = self.waiting.popleft()
            sequence = self.cache.open(expected=request.prompt + self.output_guess)
            self.coming.append(_Running(request, sequence))
            self._ask(self.coming[-1])
        still = []
        for one in self.coming:
            if self._ready(one) or not self.running:  # with no running sequence, the server waits for the memory
                one.sequence.grow(one.request.prompt)
                self.tokens += one.request.prompt
                self.running.append(one)
            else:
                self._ask(one)
                still.append(one)
        self.coming = still

    def step(self) -> None:
        """Grows each running sequence by a token; preempts the one admitted last where there is no memory for it."""
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
                    self.tokens -= last.request.prompt + last.made  # these tokens will be computed again
                last.sequence.close()
                self.waiting.appendleft(last.request)
                self.preempted += 1
                continue
            one.made += 1
            self.tokens += 1
            position += 1

    def end(self) -> None:
        """Closes the sequences whose output is complete."""
        for one in self.running:
            if one.made >= one.request.output:
                one.sequence.close()
                self.finished += 1
        self.running = [one for one in self.running if one.made < one.request.output]

    @staticmethod
    def _ask(one: _Running) -> None:
        with contextlib.suppress(BudgetExceeded):  # raised by a cache without a mapper
            one.sequence.prefetch(one.request.prompt + 1)

    @staticmethod
    def _ready(one: _Running) -> bool:
        return one.sequence.capacity >= one.request.prompt


class _Measured:
    """Measurements of a server from the creation of this object on, updated after each step."""

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
    """Serves requests until the last one is admitted, and measures after the warm-up and the settling.

    Running sequences do not wait for a request that waits for memory: such waiting shows in ``running_mean`` only.

    Args:
        cache: the cache, whose slots and budget the server uses.
        requests: the requests, in order of arrival.
        concurrency: the most sequences at once.
        warm_up: number of requests that finish in the warm-up, which runs without pauses.
        settling: number of requests that finish after that, at the pace of the server, before it is measured.
        steps_per_second: the pace of the server. It and the times of arrival count from the end of the warm-up on.
            None: the server runs as fast as it can, ignores times of arrival, and waits for the mapper in each step.
        output_guess: the expected output tokens of a request, see ``KVCache.open``.
        max_steps: the most steps to measure.

    Raises:
        ValueError: the requests end before the warm-up and the settling do.
        BudgetExceeded: the budget does not suffice for a request that runs alone.
    """
    server = _Server(cache, requests, concurrency, output_guess)
    measured: _Measured | None = None
    began = 0.0
    clock: float | None = None  # when the next step begins, once the server runs at its pace
    while server.waiting:  # ends with the last admission, since there is no steady state afterwards
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
