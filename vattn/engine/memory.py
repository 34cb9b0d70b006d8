"""``Memory``: what the engine asks of the memory for K and V. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from vattn.engine.request import Branch, Request


class Memory(Protocol):
    """What the engine asks of the memory for K and V. After a refusal nothing has changed."""

    @property
    def keeps_prompts(self) -> bool:
        """Whether requests may begin behind any part of a prompt that another one has computed."""

    def shortage(self, request: Request) -> str | None:
        """Why a request could not be served even if it were alone: what it needs and what there is; or None."""

    def cached_positions(self, request: Request) -> int:
        """How many positions of a waiting request's prompt are computed already, at most all but the last."""

    def room_for(self, positions: int) -> bool:
        """Whether so many positions more would most likely find memory, without taking it from running requests."""

    def open(self, request: Request, expected: int) -> int | None:
        """Opens the trunk of a request, behind a computed prefix where there is one.

        Args:
            request: the request.
            expected: positions that the trunk will most likely come to have.

        Returns:
            The positions of the prefix; None where there is no memory.
        """

    def side_by_side(self, branches: list[Branch]) -> list[Branch]:
        """The same outputs, those that share rows side by side: what attention reads once is faster to read again."""

    def grow(self, decodes: list[Branch], branches: Sequence[Branch], positions: Sequence[int]) -> Branch | None:
        """Brings branches to the positions that are computed, or further: all of them, or none.

        Args:
            decodes: outputs that get one position more than were launched.
            branches: others.
            positions: of each of the others.

        Returns:
            None, or a branch that had no memory.
        """

    def fork(self, request: Request) -> bool:
        """Lets the other branches of a request go on behind the prompt that its trunk has computed."""

    def remember(self, branch: Branch, positions: int) -> None:
        """Lets others go on from the first positions of a branch, which goes on itself."""

    def close(self, branch: Branch, positions: int) -> None:
        """Ends a branch, on the device or in host memory, whose first positions others may go on from."""

    def prefers_swap(self, request: Request) -> bool:
        """Whether to bring a request back from host memory would be faster than to compute it again."""

    def swap_out(self, request: Request) -> bool:
        """Moves all rows of a request to host memory."""

    def swap_in(self, request: Request) -> bool:
        """Moves them back."""

    def resize(self, budget: int) -> bool:
        """Sets how many bytes there are; False where running requests need more."""

    def reset_prefixes(self) -> None:
        """Lets no request begin behind what was computed so far, and gives back what requests have left that ended."""
