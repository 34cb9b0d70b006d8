"""Policies: which request is served first, and which one gives up its memory. No torch.

A policy gives each request a key. Of the waiting requests the one with the lowest key begins first; of the running ones
the one with the highest key is preempted first. To add a policy, write a class with a ``key`` and name it in
``POLICIES``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from vattn.arguments import choice
from vattn.engine.request import Request, Status


class Policy:
    """Decides which request is served first.

    Args:
        cached_positions: how many positions of a request's prompt are computed already.
    """

    def __init__(self, cached_positions: Callable[[Request], int]) -> None:
        self.cached_positions = cached_positions

    def key(self, request: Request) -> Any:
        """What requests are ordered by: the lowest is served first, the highest is preempted first."""
        raise NotImplementedError

    def arrived(self, request: Request, others: Iterable[Request]) -> None:
        """Is told of a request that begins to wait, and of the requests that wait or run already."""

    def served(self, request: Request, prompt_tokens: int, sampled_tokens: int) -> None:
        """Is told how many tokens of a request an iteration computes."""


class FirstComeFirstServed(Policy):
    """The request that came first is served first."""

    def key(self, request: Request) -> Any:
        return request.arrival


class ByPriority(Policy):
    """The request with the lowest ``priority`` is served first; of equal ones the one that came first."""

    def key(self, request: Request) -> Any:
        return request.priority, request.arrival


class LongestPrefix(Policy):
    """The request is served first of whose prompt most is computed already; of equal ones the one that came first."""

    def key(self, request: Request) -> Any:
        waits = request.status is Status.WAITING
        return -(self.cached_positions(request) if waits else request.cached), request.arrival


class Fair(Policy):
    """The request of the tenant that has had the least service is served first.

    This is the virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each
    tenant has a counter of the tokens that were computed for it, of which sampled tokens count twice. A tenant that
    comes back after it had no request is lifted to the lowest counter of the others, so that it gets no credit for
    its absence.
    """

    SAMPLED_WEIGHT = 2.0

    def __init__(self, cached_positions: Callable[[Request], int]) -> None:
        super().__init__(cached_positions)
        self._service: defaultdict[str, float] = defaultdict(float)

    def key(self, request: Request) -> Any:
        return self._service[request.tenant], request.arrival

    def arrived(self, request: Request, others: Iterable[Request]) -> None:
        tenants = {other.tenant for other in others}
        if request.tenant not in tenants and tenants:
            lowest = min(self._service[tenant] for tenant in tenants)
            self._service[request.tenant] = max(self._service[request.tenant], lowest)

    def served(self, request: Request, prompt_tokens: int, sampled_tokens: int) -> None:
        self._service[request.tenant] += prompt_tokens + self.SAMPLED_WEIGHT * sampled_tokens


POLICIES: dict[str, type[Policy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": ByPriority,
    "fair": Fair,
    "longest-prefix": LongestPrefix,
}


def policy_named(name: str, cached_positions: Callable[[Request], int]) -> Policy:
    """The policy of a name.

    Raises:
        TypeError, ValueError: there is none.
    """
    return POLICIES[choice("policy", name, POLICIES)](cached_positions)
