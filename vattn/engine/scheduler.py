"""``Scheduler``: which tokens of which requests each iteration computes. No torch.

There are no phases. Each request has a number of positions that are computed, and a number of tokens that it has. An
iteration gives every running request up to what is missing, under one budget of tokens, and lets waiting requests begin
with what is left of it. A prompt longer than the budget is computed in chunks, beside the next tokens of others.

The engine launches an iteration before it has read the tokens of the last one. A request with an iteration in flight is
not moved or ended: it is left out of the next iteration, and what shall happen to it happens once its tokens were read.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vattn.engine.limits import Limits
from vattn.engine.memory import Memory
from vattn.engine.policy import Policy
from vattn.engine.prompts_underway import PromptsUnderway
from vattn.engine.request import Branch, FinishReason, Request, Status
from vattn.engine.table import RequestTable

_PATIENCE = 1000  # iterations after which a request is served first under every policy
_MOST_WAITED = 20  # iterations after which a request begins whatever ``waiting_served_ratio`` says
_MOST_REFUSALS = 200  # iterations in which a request that runs alone may find no memory
_SOON = 16  # tokens that an output is always expected to sample yet


@dataclass(frozen=True)
class Row:
    """What an iteration computes of a branch.

    Args:
        branch: the branch.
        start: the first position that is computed.
        count: positions that are computed.
        into: the branches that get a token which is sampled behind the last position: none, the branch itself, or all
            branches of a request whose prompt ends here.
    """

    branch: Branch
    start: int
    count: int
    into: tuple[Branch, ...]


@dataclass(frozen=True)
class Iteration:
    """What one call of the model computes.

    Args:
        number: counts iterations.
        decodes: outputs of which the position of the last token is computed, which are sampled a token each.
        rows: what is computed of others.

    Attributes:
        into: the branches that get a token: those of ``decodes``, then those of ``rows``.
    """

    number: int
    decodes: list[Branch]
    rows: list[Row]
    into: list[Branch] = field(init=False)

    def __post_init__(self) -> None:
        into = [*self.decodes, *(branch for row in self.rows for branch in row.into)]
        object.__setattr__(self, "into", into)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return not self.decodes and not self.rows


class OutputEstimate:
    """How many tokens outputs sample, as a part of ``max_tokens``, learned from those that ended by themselves."""

    def __init__(self) -> None:
        self._part = 1.0

    def note(self, branch: Branch) -> None:
        """Learns from an output that has ended."""
        self._part += 0.05 * (len(branch.output) / branch.request.max_tokens - self._part)

    def remaining(self, branch: Branch) -> int:
        """Tokens that an output will most likely still sample."""
        sampled, most = branch.sampled, branch.request.max_tokens
        return max(int(self._part * most) - sampled, min(_SOON, most - sampled))

    def growth(self, running: list[Request], joining: Request) -> int:
        """Positions by which what runs will grow at most, with a request beside it whose prompt is there already.

        Outputs that end give their memory back while others still grow.
        """
        ends = []
        for request in (*running, joining):
            shared = len(request.prompt) if request.n > 1 else request.cached  # as far as is known
            ends += [(self.remaining(branch), max(branch.length - shared, 0)) for branch in request.live]
        ends.sort()
        most = given_back = 0
        for place, (remaining, own) in enumerate(ends):
            most = max(most, (len(ends) - place) * remaining - given_back)
            given_back += own
        return most + sum(max(len(request.prompt) - request.trunk.launched, 0) for request in running)


class Scheduler:
    """Decides which tokens of which requests each iteration computes.

    Args:
        memory: holds K and V.
        policy: which request is served first.
        clock: the time in seconds.
        stops: why an output ends behind its last token, or None where it goes on.
        max_num_seqs: outputs that run at the same time, at most.
        max_num_batched_tokens: positions that an iteration computes, at most.
        waiting_served_ratio: with r, waiting requests begin once there are r of them for each request that runs, or
            once the first has waited for 20 iterations. 0 lets them begin at once.
        whole_prompts: whether all that is missing of an output is computed at once, and not in chunks. An iteration
            then computes more than ``max_num_batched_tokens`` where one output alone misses more.

    Attributes:
        requests: where each request is.
        limits: the outputs and positions of an iteration.
    """

    def __init__(
        self,
        memory: Memory,
        policy: Policy,
        *,
        clock: Callable[[], float],
        stops: Callable[[Branch], FinishReason | None],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        waiting_served_ratio: float = 0.0,
        whole_prompts: bool = False,
    ) -> None:
        self._memory, self._policy, self._clock, self._stops = memory, policy, clock, stops
        self.limits = Limits(max_num_seqs, max_num_batched_tokens)
        self._waiting_served_ratio, self._whole_prompts = waiting_served_ratio, whole_prompts
        self.requests = RequestTable(memory)
        self._estimate = OutputEstimate()
        self._number = 0
        self._policy_counts = type(policy).served is not Policy.served

    # An iteration.

    def schedule(self) -> Iteration:
        """What the next iteration computes. It counts as launched from now on; ``read`` takes what it has sampled."""
        self._number += 1
        self.requests.end_overdue(self._clock())
        if not self.requests.leaving:
            self._resume()
        self._fork()
        decodes = self._decodes()
        rows = self._next_of_starting(self.limits.tokens - len(decodes))
        if self._whole_prompts and decodes and not rows:
            # What does not fit beside the decodes is computed alone, or it might wait for ever.
            rows = self._next_of_starting(self.limits.tokens)
            decodes = [] if rows else decodes
        while (decodes or rows) and (short := self._grow(decodes, rows)) is not None:
            left_out = self._make_room(short.request)
            decodes = [branch for branch in decodes if branch.request not in left_out]
            rows = [row for row in rows if row.branch.request not in left_out]
        if self.requests.waiting and not self.requests.leaving and not self.requests.swapped:
            self._begin(rows, self.limits.tokens - len(decodes) - sum(row.count for row in rows))
        if decodes:
            decodes = self._memory.side_by_side(decodes)
        self._launch(decodes, rows)
        return Iteration(self._number, decodes, rows)

    def read(self, iteration: Iteration, tokens: list[int]) -> list[Branch]:
        """Takes the tokens that an iteration has sampled.

        Args:
            iteration: the oldest one that was not read.
            tokens: one for each branch in ``iteration.into``.

        Returns:
            The branches that got a token.
        """
        progressed = into = iteration.into
        done = {row.branch.request: None for row in iteration.rows}
        for row in iteration.rows:
            if row.branch not in row.into:
                row.branch.in_flight -= 1
        if ended := [branch for branch in into if branch.finish_reason is not None]:
            done |= dict.fromkeys(branch.request for branch in ended)
            for branch in ended:
                branch.in_flight -= 1
            # Their tokens lie behind their ends.
            tokens = [token for branch, token in zip(into, tokens, strict=True) if branch.finish_reason is None]
            progressed = [branch for branch in into if branch.finish_reason is None]
        for branch, token in zip(progressed, tokens, strict=True):
            branch.in_flight -= 1
            output = branch.output
            output.append(token)
            stops = branch.stop_tokens
            if len(output) >= branch.max_tokens or stops is None or token in stops:
                self._end_where_it_stops(branch)
                if branch.finish_reason is not None:
                    done[branch.request] = None
        for row in iteration.rows:
            self._remember_prompt(row)
        if self.requests.leaving:
            done |= dict.fromkeys(branch.request for branch in iteration.decodes)
        for request in done:
            self.requests.after_read(request)
        return progressed

    def recover(self, *, everything: bool = False) -> None:
        """Forgets all iterations in flight after an error, wherever it was raised.

        The requests that run are computed again from the start, with the tokens that they have.

        Args:
            everything: whether requests in host memory are, too.
        """
        self.requests.interrupted = list(self.requests.running)
        for request in list(self.requests):
            for branch in request.branches:
                if branch.in_flight:  # which of its rows were computed is not known: they are nobody's prefix
                    branch.launched = 0
                branch.sampled, branch.in_flight = len(branch.output), 0
                if branch.finish_reason is None and branch.output:
                    self._end_where_it_stops(branch)  # the error may have come in between
        for request in list(self.requests.running.values()):
            if request.live:  # whatever was to happen to it
                self.requests.leaving.pop(request.id, None)
                self.requests.wait(request)
            else:
                self.requests.after_read(request)
        for request in list(self.requests.swapped.values()) if everything else ():
            self.requests.wait(request)

    def _remember_prompt(self, row: Row) -> None:
        """Lets other requests begin behind a prompt as soon as it is computed."""
        branch, length = row.branch, len(row.branch.request.prompt)
        branch.request.prompt_known = branch.request.prompt_known or row.start + row.count >= length
        ends_here = row.start < length <= row.start + row.count and row.into  # whose logits were numbers
        if ends_here and branch.opened and branch.finish_reason is not FinishReason.ERROR:
            self._memory.remember(branch, length)

    def _end_where_it_stops(self, branch: Branch) -> None:
        branch.finish_reason = self._stops(branch)
        if branch.finish_reason is None and len(branch.output) >= branch.request.max_tokens:
            branch.finish_reason = FinishReason.LENGTH
        if branch.finish_reason is not None:
            self.requests.decoding.pop(branch, None)
            self._estimate.note(branch)

    # Running requests.

    def _fork(self) -> None:
        """Gives each output of a request memory of its own once the prompt is computed, where there is memory."""
        for request in list(self.requests.starting.values()):
            stays = request.id in self.requests.starting and request.id not in self.requests.leaving
            if not stays or not request.shared or request.trunk.launched < len(request.prompt):
                continue
            if not self._memory.fork(request):
                self._make_room(request)
                continue
            for branch in request.live:
                branch.opened, branch.launched = True, len(request.prompt)
            self.requests.after_read(request)
            self.requests.started(request)

    def _decodes(self) -> list[Branch]:
        """The outputs of which only the position of the last token is missing, as far as the budget of tokens goes."""
        found = [branch for branch in self.requests.decoding if branch.sampled < branch.max_tokens]
        if leaving := self.requests.leaving:
            found = [branch for branch in found if branch.request.id not in leaving]
        return found[: self.limits.tokens]

    def _next_of_starting(self, budget: int) -> list[Row]:
        """What is missing of the other running requests, as far as a budget of tokens goes."""
        rows: list[Row] = []
        for request in self.requests.starting.values():
            if request.id in self.requests.leaving:
                continue
            for branch in [request.trunk] if request.shared else request.live:
                if (row := self._row(branch, budget)) is not None:
                    rows.append(row)
                    budget -= row.count
        return rows

    def _row(self, branch: Branch, budget: int) -> Row | None:
        """The next positions of a branch, at most ``budget``; None where there are none.

        Branches that share the memory of one prompt compute no more than the prompt.
        """
        request = branch.request
        shared = request.shared
        missing = min(branch.missing, len(request.prompt) - branch.launched) if shared else branch.missing
        if self._whole_prompts and (missing <= budget or budget == self.limits.tokens):
            budget = missing  # as many as there are, which are too many where nothing else is computed
        elif self._whole_prompts:
            return None
        if (count := min(missing, budget)) <= 0:
            return None
        ends = branch.launched + count == branch.length
        return Row(branch, branch.launched, count, () if not ends else tuple(request.live) if shared else (branch,))

    def _grow(self, decodes: list[Branch], rows: list[Row]) -> Branch | None:
        """Brings all branches to the positions that are computed; None, or a branch that had no memory."""
        return self._memory.grow(decodes, [row.branch for row in rows], [row.start + row.count for row in rows])

    def _launch(self, decodes: list[Branch], rows: list[Row]) -> None:
        for branch in decodes:
            branch.in_flight += 1  # first, for ``recover`` after an interrupt
            branch.launched += 1
            branch.sampled += 1
        if self._policy_counts:
            for branch in decodes:
                self._policy.served(branch.request, 0, 1)
        for row in rows:
            for branch in {row.branch, *row.into}:
                branch.in_flight += 1
            row.branch.launched += row.count
            for branch in row.into:
                branch.sampled += 1
            self._policy.served(row.branch.request, row.count - bool(row.into), len(row.into))
        for request in dict.fromkeys(row.branch.request for row in rows if row.into):
            self.requests.started(request)

    def _make_room(self, request: Request) -> list[Request]:
        """Takes the memory of the running request that is served last, since another one needs it.

        Returns:
            The requests that the iteration at hand must leave out.
        """
        if self.requests.leaving:  # what they hold is free in a moment
            return [request]
        if len(self.requests.running) == 1:
            self._require_possible(request)
            return [request]
        victim = self._served_last()
        left_out = [victim, request] if victim.in_flight else [victim]
        self.requests.preempt(victim)
        return left_out

    def _served_last(self) -> Request:
        return max(self.requests.running.values(), key=self._key)

    def preempt_one(self) -> bool:
        """Takes the memory of the running request that is served last; False where none runs or one leaves already."""
        if self.requests.leaving or not self.requests.running:
            return False
        self.requests.preempt(self._served_last())
        return True

    # Requests that begin, and those that come back.

    def _resume(self) -> None:
        """Brings swapped requests back, ahead of all that wait."""
        for request in sorted(self.requests.swapped.values(), key=self._key):
            soon = request.held_positions + self._estimate.growth(list(self.requests.running.values()), request)
            if self.requests.running and self.requests.sequences + len(request.live) > self.limits.seqs:
                return
            if self.requests.running and not self._memory.room_for(soon):
                return
            if not self._memory.swap_in(request):
                if not self.requests.running:  # nothing will be free by waiting
                    self.requests.wait(request)
                return
            self.requests.run(request)

    def _begin(self, rows: list[Row], budget: int) -> None:
        """Lets waiting requests begin with what is left of a budget of tokens, and adds what is computed of them."""
        if budget <= 0 or self.requests.sequences >= self.limits.seqs:
            return
        underway = PromptsUnderway(self.requests.running.values(), self._memory)
        order = [(self._key(each), place, each) for place, each in enumerate(self.requests.waiting.values())]
        heapq.heapify(order)
        kept, positions = 0, 0  # outputs and positions of requests that wait for a prompt, which keep their places
        while order and budget > 0 and (room := self.limits.seqs - self.requests.sequences - kept) > 0:
            *_, request = heapq.heappop(order)
            if underway.worth_waiting(request):
                kept, positions = kept + len(request.live), positions + request.held_positions
                continue
            if (len(request.live) > room and self.requests.running) or not self._admits(request, positions):
                return
            trunk = request.trunk
            expected = trunk.length + self._estimate.remaining(trunk)
            if (cached := self._memory.open(request, expected)) is None:
                self._require_possible(request)
                return
            trunk.opened, trunk.launched = True, cached
            if not request.preemptions:
                request.cached = cached
            row = self._row(trunk, budget)
            if row is None:  # all of it has to fit
                self.requests.wait(request)
                return
            if self._grow([], [row]) is not None:
                self.requests.wait(request)
                self._require_possible(request)
                return
            self.requests.run(request)
            underway.add(request)
            rows.append(row)
            budget -= row.count

    def _admits(self, request: Request, kept: int) -> bool:
        """Whether a request may begin: not before enough wait, nor when memory would soon be short.

        Args:
            request: the request.
            kept: positions that others will need which come before it.
        """
        running = list(self.requests.running.values())
        if not running:
            return True
        enough = len(self.requests.waiting) >= self._waiting_served_ratio * len(running)
        if not enough and self._number - request.enqueued < _MOST_WAITED:
            return False
        begins = request.held_positions - self._memory.cached_positions(request)
        return self._memory.room_for(begins + kept + self._estimate.growth(running, request))

    def _require_possible(self, request: Request) -> None:
        """Ends a request for which there will never be memory, so that it does not wait for ever."""
        if any(each is not request for each in self.requests.running.values()):
            return
        request.refusals = request.refusals + 1 if request.refused >= self._number - 1 else 1
        request.refused = self._number
        reason = self._memory.shortage(request)
        if reason is None and request.refusals > _MOST_REFUSALS:
            reason = f"no memory was found for it in {_MOST_REFUSALS} iterations, though no other request ran"
        if reason is not None:
            self.requests.end(request, FinishReason.ERROR, reason)

    def _key(self, request: Request) -> Any:
        """What requests are ordered by: one that has waited for very long comes first, whatever the policy."""
        waits = request.status is not Status.RUNNING
        request.overdue = request.overdue or (waits and self._number - request.enqueued > _PATIENCE)
        return (0, request.enqueued) if request.overdue else (1, self._policy.key(request))

    # Requests that come and end.

    def add(self, request: Request) -> None:
        """Lets a request wait for its turn.

        Raises:
            ValueError: it has no prompt, its id is taken, or it could never be served; the message says what it needs
                and what there is.
        """
        if not request.prompt:
            raise ValueError("prompt must have at least one token")
        if self.requests.find(request.id) is not None:
            raise ValueError(f"there is a request {request.id!r} already")
        if request.n > (most := self.limits.most_seqs):
            raise ValueError(f"n is {request.n}, and at most max_num_seqs={most} outputs run at a time")
        if (reason := self._memory.shortage(request)) is not None:
            raise ValueError(reason)
        self._policy.arrived(request, self.requests)
        request.enqueued = self._number
        self.requests.add(request)

    def abort(self, request_id: str) -> bool:
        """Ends a request; False where there is none of that id, or it has ended."""
        return self._end(request_id, FinishReason.ABORT, None)

    def fail(self, request_id: str, error: str) -> bool:
        """Ends a request in which something went wrong; False where there is none of that id."""
        return self._end(request_id, FinishReason.ERROR, error)

    def _end(self, request_id: str, reason: FinishReason, error: str | None) -> bool:
        if (request := self.requests.find(request_id)) is None or not request.live:
            return False
        self.requests.end(request, reason, error)
        return True
