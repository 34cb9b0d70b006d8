"""``SharedPrompts``: which rows of a batch hold the same prompt, as beams and return sequences do at first."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import torch

from vattn.hf.device_rows import DeviceRows
from vattn.memory.slots import Share

_T = TypeVar("_T")


class SharedPrompts:
    """Which rows of a batch hold the same positions.

    Attributes:
        size: how many neighbouring rows hold the same prompt. While it is not 1, only the first of them, the leader,
            has memory; ``separate`` gives the others theirs.
        common: rows ``i`` and ``j`` hold the same at their first ``common[i][j]`` positions.
    """

    def __init__(self) -> None:
        self.size = 1
        self.common: list[list[int]] = []

    def leaders(self, rows: _T) -> _T:
        """Returns the rows of a list, or of a tensor ``[batch, ...]``, that have memory."""
        return rows if self.size == 1 else rows[:: self.size]  # type: ignore[index]

    def begin(self, batch: int) -> None:
        """Starts a batch of rows that hold nothing and share nothing."""
        self.size = 1
        self.common = [[0] * batch for _ in range(batch)]

    def forget(self) -> None:
        """Forgets how many positions rows have in common."""
        self.common = [[0] * len(self.common) for _ in self.common]

    def find(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Sets ``size`` to the largest number of neighbouring rows that are the same in all of a prompt's K and V."""
        batch, same = len(k), _same_as_last(k, v)
        sizes = (size for size in range(batch, 0, -1) if batch % size == 0)
        self.size = next(size for size in sizes if all(same[i - 1] for i in range(1, batch) if i % size))

    def holds(self, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Returns whether rows that hold the same prompt so far are also the same in this K and V."""
        same = _same_as_last(k, v)
        return all(same[i - 1] for i in range(1, len(k)) if i % self.size)

    def separate(self, every: Iterable[DeviceRows], alike: int, share: Share) -> None:
        """Gives each row memory that holds what its leader holds.

        Args:
            every: the rows of the batch in each ``KVCache``.
            alike: how many first positions count as common to the rows of one prompt from now on.
            share: as in ``Sequence.fork``.
        """
        for rows in every:
            for first in range(0, len(rows.sequences), self.size):
                leader = rows.sequences[first]
                followers = rows.sequences[first + 1 : first + self.size]
                if missing := [row for row in followers if row.length < leader.length]:
                    rows.cache.truncate_all([row for row in missing if row.length], 0)
                    rows.cache.fork_all(leader, missing, leader.length, share=share)
        for first in range(0, len(self.common), self.size):
            for i in range(first, first + self.size):
                self.common[i][first : first + self.size] = [alike] * self.size
        self.size = 1

    def crop(self, length: int) -> None:
        """Notes that rows were cut to ``length`` positions, and that each of them has memory."""
        self.size = 1
        self.common = [[min(alike, length) for alike in row] for row in self.common]

    def select(self, chosen: list[int], length: int) -> None:
        """Notes that row ``i`` became what row ``chosen[i]`` was, where all rows hold ``length`` positions."""
        common = self.common
        self.common = [[length if a == b else min(length, common[a][b]) for b in chosen] for a in chosen]

    def clone(self) -> SharedPrompts:
        """Returns the state for a copy of the rows, in which each row has memory."""
        other = SharedPrompts()
        other.common = [list(row) for row in self.common]
        return other


def _same_as_last(k: torch.Tensor, v: torch.Tensor) -> list[bool]:
    """Returns for each row but the first whether its K and V are the same as those of the row before it."""
    same: list[bool] = ((k[1:] == k[:-1]).flatten(1).all(1) & (v[1:] == v[:-1]).flatten(1).all(1)).tolist()
    return same
