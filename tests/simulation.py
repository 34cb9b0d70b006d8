"""An engine without a model: a cache that only counts positions, and tokens that follow from who asks for them."""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Sequence
from typing import Any

from vattn.engine.policy import policy_named
from vattn.engine.request import Branch, FinishReason, Request, Status
from vattn.engine.scheduler import Iteration, Row, Scheduler


def token(request_id: str, index: int, position: int) -> int:
    """The token that an output samples for a position, whatever runs beside it."""
    return zlib.crc32(f"{request_id} {index} {position}".encode()) % 1000


def stops(branch: Branch) -> FinishReason | None:
    """Outputs end behind one token of fifty."""
    return FinishReason.STOP if branch.output[-1] % 50 == 0 else None


def expected(request: Request, index: int) -> list[int]:
    """The tokens of an output that nobody aborts."""
    tokens: list[int] = []
    while len(tokens) < request.max_tokens and (not tokens or tokens[-1] % 50):
        tokens.append(token(request.id, index, len(request.prompt) + len(tokens)))
    return tokens


class CountedMemory:
    """A cache that counts positions, and refuses what exceeds its capacity, or what a test tells it to.

    Attributes:
        rows: for each open branch, the tokens whose K and V are in its rows.
        positions: for each open branch, how many positions it has memory for.
    """

    keeps_prompts = True

    def __init__(self, capacity: int, *, swaps: bool = True, refuses: float = 0.0, seed: int = 0) -> None:
        self.capacity = capacity
        self.swaps = swaps
        self.rows: dict[Branch, list[int]] = {}
        self.positions: dict[Branch, int] = {}
        self.shared: dict[Branch, int] = {}  # positions that are another branch's
        self.host: dict[Branch, tuple[list[int], int, int]] = {}
        self.prefixes: deque[tuple[Any, tuple[int, ...]]] = deque(maxlen=8)
        self._refuses, self._random = refuses, random.Random(seed)

    @property
    def used(self) -> int:
        return sum(self.positions[branch] - self.shared.get(branch, 0) for branch in self.positions)

    def _refused(self) -> bool:
        return self._random.random() < self._refuses

    def shortage(self, request: Request) -> str | None:
        needs = len(request.prompt) + request.n * request.max_tokens
        return None if needs <= self.capacity else f"it needs {needs} positions, and there are {self.capacity}"

    def cached_positions(self, request: Request) -> int:
        if not request.reuse_prefix:
            return 0
        best = 0
        for namespace, tokens in self.prefixes:
            if namespace == request.namespace:
                pairs = zip(tokens, request.prompt, strict=False)
                alike = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(tokens), len(request.prompt)))
                best = max(best, alike)
        return min(best, len(request.prompt) - 1)

    def room_for(self, positions: int) -> bool:
        return self.used + positions <= self.capacity

    def open(self, request: Request, expected: int) -> int | None:
        cached = self.cached_positions(request)
        if self._refused() or self.used + cached > self.capacity:
            return None
        self.rows[request.trunk] = list(request.prompt[:cached])
        self.positions[request.trunk] = cached
        return cached

    def side_by_side(self, branches: list[Branch]) -> list[Branch]:
        return branches

    def grow(self, decodes: list[Branch], branches: Sequence[Branch], positions: Sequence[int]) -> Branch | None:
        wanted = {branch: branch.launched + 1 for branch in decodes} | dict(zip(branches, positions, strict=True))
        if self._refused():
            return self._random.choice(list(wanted))
        used = self.used
        for branch, most in wanted.items():
            used += max(most - self.positions[branch], 0)
            if used > self.capacity:
                return branch
        for branch, most in wanted.items():
            self.positions[branch] = max(self.positions[branch], most)
        return None

    def fork(self, request: Request) -> bool:
        trunk, length = request.trunk, len(request.prompt)
        if self._refused():
            return False
        for branch in request.live:
            if branch not in self.rows:
                self.rows[branch] = self.rows[trunk][:length]
                self.positions[branch] = self.shared[branch] = length
        return True

    def remember(self, branch: Branch, positions: int) -> None:
        rows = self.rows[branch]
        assert rows[:positions] == [*branch.request.prompt, *branch.output][:positions]
        assert len(rows) >= positions
        self.prefixes.append((branch.request.namespace, tuple(rows[:positions])))

    def close(self, branch: Branch, positions: int) -> None:
        if self.host.pop(branch, None) is not None:
            return
        rows = self.rows.pop(branch)
        assert positions <= len(rows)
        assert rows[:positions] == [*branch.request.prompt, *branch.output][:positions]
        self.prefixes.append((branch.request.namespace, tuple(rows[:positions])))
        del self.positions[branch]
        if branch not in self.shared:  # what others shared with it is theirs now
            heirs = [other for other in branch.request.branches if other in self.shared]
            for heir in heirs[:1]:
                del self.shared[heir]
        self.shared.pop(branch, None)

    def prefers_swap(self, request: Request) -> bool:
        return self.swaps and self._random.random() < 0.5

    def swap_out(self, request: Request) -> bool:
        if self._refused():
            return False
        for branch in request.branches:
            if branch in self.rows:
                state = self.rows.pop(branch), self.positions.pop(branch), self.shared.pop(branch, 0)
                self.host[branch] = state
        return True

    def swap_in(self, request: Request) -> bool:
        mine = [branch for branch in request.branches if branch in self.host]
        needs = sum(self.host[branch][1] - self.host[branch][2] for branch in mine)
        if self._refused() or self.used + needs > self.capacity:
            return False
        for branch in mine:
            self.rows[branch], self.positions[branch], shared = self.host.pop(branch)
            if shared:
                self.shared[branch] = shared
        return True

    def resize(self, budget: int) -> bool:
        if self.used > budget:
            return False
        self.capacity = budget
        return True


class Simulation:
    """Runs a scheduler on a simulated clock: each iteration takes 10 ms, and is read after the next is launched.

    Args:
        capacity: positions that there is memory for.
        depth: iterations that are in flight when the next one is scheduled.
        policy: by name.
        endless: whether outputs go on until they have ``max_tokens``.
        options: of the scheduler.
    """

    def __init__(
        self, capacity: int = 1000, *, depth: int = 1, policy: str = "fcfs", endless: bool = False, **options: Any
    ) -> None:
        given = {name: options.pop(name) for name in ("swaps", "refuses", "seed") if name in options}
        self.memory = CountedMemory(capacity, **given)
        self.now = 0.0
        limits = {"max_num_seqs": 16, "max_num_batched_tokens": 64, **options}
        self.scheduler = Scheduler(
            self.memory,
            policy_named(policy, self.memory.cached_positions),
            clock=lambda: self.now,
            stops=(lambda branch: None) if endless else stops,
            **limits,
        )
        self.limits = limits
        self.depth = depth
        self.flight: deque[tuple[Iteration, list[int]]] = deque()
        self.requests: dict[str, Request] = {}
        self.done: dict[str, Request] = {}
        self.computed = 0

    def add(self, request_id: str, prompt: int | tuple[int, ...], max_tokens: int, **options: Any) -> Request:
        tokens = tuple(range(prompt)) if isinstance(prompt, int) else prompt
        request = Request(request_id, tokens, max_tokens, arrival=self.now, **options)
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self) -> Iteration:
        iteration = self.scheduler.schedule()
        self._launch(iteration)
        self.now += 0.01
        while len(self.flight) > self.depth or (self.flight and iteration.empty):
            self.scheduler.read(*self.flight.popleft())
        self.check()
        return iteration

    def _launch(self, iteration: Iteration) -> None:
        """Computes an iteration, and checks that it may be computed (E3)."""
        rows = [Row(branch, branch.launched - 1, 1, (branch,)) for branch in iteration.decodes] + iteration.rows
        sampled = []
        for row in rows:
            branch, memory = row.branch, self.memory
            tokens = self._tokens(branch)
            assert memory.positions[branch] >= row.start + row.count
            assert len(memory.rows[branch]) == row.start
            memory.rows[branch] += tokens[row.start : row.start + row.count]
            assert len(memory.rows[branch]) == row.start + row.count
            at = row.start + row.count
            if self.limits.get("whole_prompts"):
                assert at in (len(branch.request.prompt), len(tokens) - len(row.into[:1]))
            sampled += [token(branch.request.id, each.index, at) for each in row.into]
        assert [branch for row in rows for branch in row.into] == iteration.into
        if rows:
            total, most = sum(row.count for row in rows), self.limits["max_num_batched_tokens"]
            self.computed += total
            if self.limits.get("whole_prompts"):
                assert total <= most or len(rows) == 1
            else:
                assert total <= most
            self.flight.append((iteration, sampled))

    def _tokens(self, branch: Branch) -> list[int]:
        """The tokens of a branch, also those of iterations in flight."""
        request = branch.request
        tokens = [*request.prompt, *branch.output]
        while len(tokens) < branch.length:
            tokens.append(token(request.id, branch.index, len(tokens)))
        return tokens

    def check(self) -> None:
        """E1, E4 and E8, and that no request is in two places."""
        scheduler, counters = self.scheduler, self.scheduler.requests.counters
        for request in scheduler.requests.ended:
            assert request.id not in self.done
            assert request.status is Status.FINISHED
            assert all(branch.finish_reason is not None for branch in request.branches)
            assert not {*self.memory.rows, *self.memory.host} & set(request.branches)
            self.done[request.id] = request
        scheduler.requests.ended.clear()
        assert self.memory.used <= self.memory.capacity
        where = (scheduler.requests.waiting, scheduler.requests.running, scheduler.requests.swapped)
        there = [request_id for each in where for request_id in each]
        assert len(there) == len(set(there))
        assert set(there) == set(self.requests) - set(self.done)
        assert counters.submitted == len(there) + counters.finished + counters.aborted + counters.failed
        assert sum(len(request.live) for request in scheduler.requests.running.values()) <= self.limits["max_num_seqs"]
        requests = scheduler.requests
        assert set(requests.starting) <= set(requests.running)
        decoding = [request for name, request in requests.running.items() if name not in requests.starting]
        assert set(requests.decoding) == {branch for request in decoding for branch in request.live}
        assert requests.sequences == sum(len(request.live) for request in requests.running.values())
        holders = {branch.request for branch in self.memory.rows}
        assert holders <= set(scheduler.requests.running.values())

    def run(self, most: int = 100_000) -> None:
        """Goes on until every request has ended."""
        for _ in range(most):
            if len(self.done) == len(self.requests):
                break
            self.step()
        assert len(self.done) == len(self.requests), "requests wait for ever (E7)"
        assert not self.memory.rows
        assert not self.memory.host
        assert self.memory.used == 0
