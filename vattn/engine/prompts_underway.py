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
        self._by_head: dict[Any, Request] = {}
        for request in running if memory.reuses_prefixes else ():
            if not request.branches[0].output:  # most requests that run have one
                self.add(request)

    def add(self, request: Request) -> None:
        """Is told of a request that runs. Its prompt is known to others once its first token was read."""
        if self._memory.reuses_prefixes and not request.branches[0].output:
            self._by_head.setdefault(_head(request), request)

    def know_soon(self, request: Request) -> bool:
        """Whether a waiting request had better not begin, since more of its prompt is known once another is computed.

        That is so where it is at least half of what is missing of the other prompt, which the request waits for.
        """
        other = self._by_head.get(_head(request))
        if other is None or request.overdue or not request.reuse_prefix:
            return False
        worth = max(_LEAST, (len(other.prompt) - other.trunk.launched) // 2)
        if not _alike(request, other, worth):  # which is much cheaper to find out than what is known
            return False
        return _alike(request, other, worth + self._memory.cached_positions(request))


def _head(request: Request) -> Any:
    return request.namespace, request.prompt[:_LEAST]


def _alike(request: Request, other: Request, count: int) -> bool:
    """Whether the prompts of two requests have so many first tokens in common, and the first has more."""
    return len(request.prompt) > count and request.prompt[:count] == other.prompt[:count]
