"""``PromptsUnderway``: prompts that are being computed, which requests that begin alike had better wait for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vattn.engine.memory import Memory
from vattn.engine.request import Request

_LEAST = 64  # tokens of a prompt that are worth waiting for


class PromptsUnderway:
    """Prompts that are being computed while requests may begin.

    Args:
        running: the requests that run.
        memory: holds K and V.
    """

    def __init__(self, running: Iterable[Request], memory: Memory) -> None:
        self._memory = memory
        self._by_head: dict[Any, list[Request]] = {}
        for request in running:
            self.add(request)

    def add(self, request: Request) -> None:
        """Is told of a request that runs."""
        if self._memory.keeps_prompts and not request.prompt_known:
            self._by_head.setdefault(_head(request), []).append(request)

    def worth_waiting(self, request: Request) -> bool:
        """Whether a request had better begin later, behind what another one is computing.

        It had where that saves at least 64 tokens, and at least half as many as the other prompt still misses.
        """
        if not self._by_head or request.overdue or not request.reuse_prefix:
            return False
        known = None
        for other in self._by_head.get(_head(request), ()):
            least = max(_LEAST, (len(other.prompt) - other.trunk.launched) // 2)
            if _alike(request, other, least):  # which is much cheaper to find out than what is known
                known = self._memory.cached_positions(request) if known is None else known
                if _alike(request, other, known + least):
                    return True
        return False


def _head(request: Request) -> Any:
    return request.namespace, request.prompt[:_LEAST]


def _alike(request: Request, other: Request, count: int) -> bool:
    """Whether the prompts of two requests have so many first tokens in common, and the first has more."""
    mine, theirs = request.prompt, other.prompt
    there = len(theirs) >= count < len(mine)
    return there and mine[count - 1] == theirs[count - 1] and mine[:count] == theirs[:count]
