"""``RequestTable``: where each request is, from its arrival to its end. No torch."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from vattn.engine.memory import Memory
from vattn.engine.request import Branch, FinishReason, Request, Status


@dataclass
class Counters:
    """How many requests came and ended; with those that wait, run or are swapped they add up (invariant E8)."""

    submitted: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    preemptions: int = 0


class RequestTable:
    """Where each request is, and its way from one place to the next. It gives back what a request holds.

    A request with an iteration in flight stays where it is: what shall happen to it is noted, and happens once the
    tokens of the iteration were read.

    Args:
        memory: holds K and V.

    Attributes:
        waiting, running, swapped: requests by id; the running ones in the order in which they began.
        starting: those of the running requests of which more is missing than the last token of each output.
        decoding: the outputs of the other running requests, as the keys of a dict.
        ended: requests that have ended since the caller last emptied the list.
        counters: how many came and ended.
        leaving: what happens to requests once no iteration of theirs is in flight.
        interrupted: ids of the requests that ran when ``Scheduler.recover`` was last called.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.waiting: dict[str, Request] = {}
        self.running: dict[str, Request] = {}
        self.swapped: dict[str, Request] = {}
        self.starting: dict[str, Request] = {}
        self.decoding: dict[Branch, None] = {}
        self.ended: list[Request] = []
        self.counters = Counters()
        self.leaving: dict[str, Callable[[Request], None]] = {}
        self.interrupted: list[str] = []
        self._deadlines: list[tuple[float, str]] = []

    def __iter__(self) -> Iterator[Request]:
        """The requests that have not ended."""
        for where in (self.waiting, self.running, self.swapped):
            yield from where.values()

    def find(self, request_id: str) -> Request | None:
        """The request of an id, unless it has ended."""
        found = (where.get(request_id) for where in (self.waiting, self.running, self.swapped))
        return next((request for request in found if request is not None), None)

    @property
    def sequences(self) -> int:
        """Outputs that run."""
        return sum(len(request.live) for request in self.starting.values()) + len(self.decoding)

    def add(self, request: Request) -> None:
        """Lets a new request wait."""
        if request.deadline is not None:
            heapq.heappush(self._deadlines, (request.deadline, request.id))
        self.counters.submitted += 1
        self.wait(request)

    def end_overdue(self, now: float) -> None:
        """Aborts the requests whose deadline is over."""
        while self._deadlines and self._deadlines[0][0] <= now:
            deadline, request_id = heapq.heappop(self._deadlines)
            request = self.find(request_id)
            if request is not None and request.deadline == deadline:  # else another one has the id by now
                self.end(request, FinishReason.ABORT, "the deadline is over")

    def run(self, request: Request) -> None:
        """Lets a request run, which has memory."""
        self._move(request, Status.RUNNING, self.running)
        self.starting[request.id] = request

    def started(self, request: Request) -> None:
        """Moves a running request to ``decoding``, if its outputs only miss the position of a token in flight.

        A token that was read is on the device only as long as its output goes on from iteration to iteration.
        """
        live = request.live
        if all(branch.opened and branch.missing <= 1 and branch.pending for branch in live):
            self.starting.pop(request.id, None)
            self.decoding.update(dict.fromkeys(live))

    def wait(self, request: Request) -> None:
        """Takes the memory of a request and lets it wait, to be computed from the start."""
        for branch in request.branches:
            self._close(branch)
            branch.launched = 0
        request.prompt_known = False
        self._move(request, Status.WAITING, self.waiting)

    def preempt(self, request: Request) -> None:
        """Takes the memory of a running request, to be brought back from host memory or computed again."""

        def preempt(request: Request) -> None:
            request.preemptions += 1
            self.counters.preemptions += 1
            if self._memory.prefers_swap(request) and self._memory.swap_out(request):
                self._move(request, Status.SWAPPED, self.swapped)
            else:
                self.wait(request)

        self._when_idle(request, preempt)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """Ends all outputs of a request that go on; nothing where all have ended."""
        if not request.live:
            return
        request.error = error
        for branch in request.live:
            branch.finish_reason = reason
            self.decoding.pop(branch, None)
        self._when_idle(request, self._finish)

    def after_read(self, request: Request) -> None:
        """Does what was put off while iterations of a request were in flight."""
        for branch in request.branches:
            ended = branch.finish_reason is not None and not branch.in_flight
            if ended and not (request.shared and branch is request.trunk):  # others still need its rows
                self._close(branch)
        if request.status is Status.RUNNING and not request.in_flight:
            action = self.leaving.pop(request.id, None)
            if not request.live:
                self._finish(request)
            elif action is not None:
                action(request)

    def _when_idle(self, request: Request, action: Callable[[Request], None]) -> None:
        """Does something to a request now, or once the tokens of its iterations in flight were read."""
        if request.in_flight:
            self.leaving[request.id] = action
        else:
            self.leaving.pop(request.id, None)
            action(request)

    def _finish(self, request: Request) -> None:
        """Gives back all that a request holds, and counts it."""
        for branch in request.branches:
            self._close(branch)
        if request not in self.ended:  # else an interrupt came in between, as below
            self.ended.append(request)
        self._move(request, Status.FINISHED, None)
        reasons = {branch.finish_reason for branch in request.branches}
        if FinishReason.ERROR in reasons:
            self.counters.failed += 1
        elif FinishReason.ABORT in reasons:
            self.counters.aborted += 1
        else:
            self.counters.finished += 1

    def _close(self, branch: Branch) -> None:
        self.decoding.pop(branch, None)
        if branch.opened:
            branch.opened = False
            trusted = branch.finish_reason is not FinishReason.ERROR  # else others must not go on from its rows
            self._memory.close(branch, branch.confirmed if trusted else 0)

    def _move(self, request: Request, status: Status, to: dict[str, Request] | None) -> None:
        # It is in its new place before it leaves the others, so that no interrupt loses it.
        if to is not None:
            to[request.id] = request
        request.status = status
        for where in (self.waiting, self.running, self.swapped, self.starting):
            if where is not to:
                where.pop(request.id, None)
        for branch in request.branches:
            self.decoding.pop(branch, None)
