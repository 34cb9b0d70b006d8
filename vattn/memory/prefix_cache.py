"""``PrefixCache``: an index, for several threads, from token ids to the slots that hold their rows."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from vattn.memory.prefix_tree import PrefixTree


class Match(NamedTuple):
    """A slot that holds the rows of the first of some tokens.

    Attributes:
        slot: the slot.
        generation: the generation of its rows, which identifies the sequence that wrote them.
        length: how many of the tokens it holds the rows of.
    """

    slot: int
    generation: int
    length: int


class PrefixCache:
    """An index from token ids to the slots that hold their rows.

    Its answers are hints: only the arena knows what a slot holds. Several threads may call its methods. The lock is
    never held during a driver call. When an exception, e.g. KeyboardInterrupt, leaves the index half changed, it is
    emptied.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index = _Index()

    def insert(self, ids: tuple[int, ...], slot: int, namespace: Hashable, generation: int) -> None:
        """Records that a slot holds the rows of some tokens, in place of what it held before."""
        with self._locked() as index:
            index.insert(ids, slot, namespace, generation)

    def match(self, ids: tuple[int, ...], namespace: Hashable) -> Match | None:
        """Returns the slot that holds the rows of the longest prefix of the tokens; None where no slot holds any."""
        with self._locked() as index:
            found = index.match(ids, namespace)
        if not found:
            return None
        holder, length = found
        assert isinstance(holder, tuple)
        slot, generation = holder
        return Match(slot, generation, length)

    def shorten(self, match: Match, namespace: Hashable, length: int) -> None:
        """Records that the slot of a match holds its first ``length`` rows only."""
        with self._locked() as index:
            index.shorten(namespace, (match.slot, match.generation), length)

    def note_fork(self, slot: int) -> int:
        """Counts a fork of the rows that a slot holds; returns how often they have been forked."""
        with self._locked() as index:
            index.forks[slot] = forks = index.forks.get(slot, 0) + 1
        return forks

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Index]:
        with self._lock:
            try:
                yield self._index
            except BaseException:
                self._index = _Index()
                raise


class _Index:
    """The index of a ``PrefixCache``, without the lock."""

    def __init__(self) -> None:
        self.trees: dict[Hashable, PrefixTree] = {}  # by namespace; a holder is a slot and its generation
        self.generations: dict[int, tuple[Hashable, int]] = {}  # by slot: its namespace and generation in the trees
        self.forks: dict[int, int] = {}  # by slot: how often its rows have been forked

    def insert(self, ids: tuple[int, ...], slot: int, namespace: Hashable, generation: int) -> None:
        """Records that a slot holds the rows of some tokens, in place of what it held before."""
        before = self.generations.get(slot)
        if before != (namespace, generation):
            if before is not None:
                self.shorten(before[0], (slot, before[1]), 0)
            self.generations[slot], self.forks[slot] = (namespace, generation), 0
        self.trees.setdefault(namespace, PrefixTree()).insert(ids, (slot, generation))

    def match(self, ids: tuple[int, ...], namespace: Hashable) -> tuple[Hashable, int] | None:
        """Returns the holder of the longest prefix of the tokens and the length of that prefix, or None."""
        tree = self.trees.get(namespace)
        return tree.match(ids) if tree is not None else None

    def shorten(self, namespace: Hashable, holder: Hashable, length: int) -> None:
        """Records that a holder holds its first ``length`` rows only."""
        tree = self.trees.get(namespace)
        if tree is not None:
            tree.shorten(holder, length)
            if not len(tree):
                del self.trees[namespace]
