"""``Relief``: what an engine does when torch finds no memory for an iteration."""

from __future__ import annotations

from collections.abc import Callable

from vattn.engine.scheduler import Iteration, Scheduler

_CALM = 256  # iterations without a failure after which failures are forgotten, and twice as much is computed at once


class Relief:
    """What an engine does when torch finds no memory for an iteration.

    At first memory is given back that nobody needs. Where that does not suffice, iterations compute half as many
    positions, again and again, and then half as many outputs. A request that finds no memory even alone is ended.

    Args:
        scheduler: decides what iterations compute.
        give_back: gives memory back to the device that no request needs.
    """

    def __init__(self, scheduler: Scheduler, give_back: Callable[[], None]) -> None:
        self._scheduler, self._give_back = scheduler, give_back
        self._failures = 0  # until there were none for a while
        self._calm = 0  # iterations since the last one

    def note_success(self) -> None:
        """Notes that an iteration was computed. What comes after a failure may be what came before it."""
        self._calm += 1
        if self._calm >= _CALM:
            self._calm = self._failures = 0
            self._scheduler.limits.widen()

    def note_failure(self, iteration: Iteration, reason: str) -> None:
        """Notes that there was no memory for an iteration. Its requests wait to be computed again."""
        self._calm = 0
        self._failures += 1
        self._give_back()
        if self._failures == 1 or self._scheduler.limits.narrow():
            return
        branches = [*iteration.decodes, *(row.branch for row in iteration.rows)]
        for request_id in dict.fromkeys(branch.request.id for branch in branches):
            self._scheduler.fail(request_id, f"the device has no memory to compute it: {reason}")
