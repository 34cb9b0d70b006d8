"""``RowMemory``: a transformers cache for each branch, for models whose layers keep more than K and V in rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from vattn.engine.request import Branch, Request


class RowMemory:
    """The memory of models that are computed row by row, as the engine asks for it; see ``Memory``.

    Each branch has a cache of transformers' own. Nothing is shared or swapped: a preempted request is computed again.

    Args:
        make: makes an empty cache.
        bytes_per_position: that a cache takes, as far as it grows with the sequence.
        bytes_per_sequence: that it takes besides.
        max_model_len: positions of the longest sequence.
        budget: bytes that all caches may take.
    """

    keeps_prompts = False

    def __init__(
        self,
        make: Callable[[], Any],
        bytes_per_position: int,
        bytes_per_sequence: int,
        max_model_len: int,
        budget: int,
    ) -> None:
        self._make = make
        self._bytes, self._fixed = max(bytes_per_position, 1), bytes_per_sequence
        self._most, self._budget = max_model_len, budget
        self.caches: dict[Branch, Any] = {}
        self._positions: dict[Branch, int] = {}

    @property
    def used(self) -> int:
        """Bytes that all caches take."""
        return sum(self._positions.values()) * self._bytes + len(self._positions) * self._fixed

    @property
    def _free(self) -> int:
        """Positions that there is memory for."""
        return (self._budget - self.used) // self._bytes

    def shortage(self, request: Request) -> str | None:
        """See ``Memory.shortage``."""
        if request.most_tokens > self._most:
            return (
                f"the request needs {request.most_tokens} positions ({len(request.prompt)} of its prompt and "
                f"max_tokens={request.max_tokens}), and max_model_len is {self._most}"
            )
        needs = request.n * (request.most_tokens * self._bytes + self._fixed)
        if needs <= self._budget:
            return None
        return f"the request may need {needs / 2**20:.1f} MiB, and the budget is {self._budget / 2**20:.1f} MiB"

    def cached_positions(self, request: Request) -> int:
        """See ``Memory.cached_positions``."""
        return 0

    def room_for(self, positions: int) -> bool:
        """See ``Memory.room_for``."""
        return positions + -(-self._fixed // self._bytes) <= self._free

    def open(self, request: Request, expected: int) -> int | None:
        """See ``Memory.open``."""
        if self._free * self._bytes < self._fixed:
            return None
        self.caches[request.trunk], self._positions[request.trunk] = self._make(), 0
        return 0

    def side_by_side(self, branches: list[Branch]) -> list[Branch]:
        """See ``Memory.side_by_side``."""
        return branches

    def empty(self, branch: Branch) -> None:
        """Gives a branch an empty cache; its positions stay its own."""
        self.caches[branch] = self._make()

    def grow(self, decodes: list[Branch], branches: Sequence[Branch], positions: Sequence[int]) -> Branch | None:
        """See ``Memory.grow``."""
        wanted = {branch: branch.launched + 1 for branch in decodes} | dict(zip(branches, positions, strict=True))
        free = self._free
        for branch, most in wanted.items():
            free -= max(most - self._positions[branch], 0)
            if free < 0:
                return branch
        for branch, most in wanted.items():
            self._positions[branch] = max(most, self._positions[branch])
        return None

    def fork(self, request: Request) -> bool:
        """See ``Memory.fork``."""
        targets = [branch for branch in request.live if branch not in self.caches]
        if len(targets) * (len(request.prompt) * self._bytes + self._fixed) > self._budget - self.used:
            return False
        for branch in targets:
            self.caches[branch] = copy.deepcopy(self.caches[request.trunk])
            self._positions[branch] = len(request.prompt)
        return True

    def remember(self, branch: Branch, positions: int) -> None:
        """See ``Memory.remember``: a cache serves one branch."""

    def close(self, branch: Branch, positions: int) -> None:
        """See ``Memory.close``."""
        del self.caches[branch], self._positions[branch]

    def prefers_swap(self, request: Request) -> bool:
        """See ``Memory.prefers_swap``."""
        return False

    def swap_out(self, request: Request) -> bool:
        """See ``Memory.swap_out``."""
        return False

    def swap_in(self, request: Request) -> bool:
        """See ``Memory.swap_in``."""
        return False

    def resize(self, budget: int) -> bool:
        """See ``Memory.resize``."""
        if self.used > budget:
            return False
        self._budget = budget
        return True

    def reset_prefixes(self) -> None:
        """See ``Memory.reset_prefixes``."""
