"""``PrefixCache``: which slots hold the rows of which tokens, with a lock of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator
from typing import NamedTuple

from vattn.memory.prefix_tree import PrefixTree


class Match(NamedTuple):
    """Who holds the rows of the first tokens.

    Attributes:
        slot: the slot.
        generation: of the sequence that wrote them there.
        length: how many of the tokens.
    """

    slot: int
    generation: int
    length: int


class PrefixCache:
    """Which slots hold the rows of which tokens, as far as is known here: the arena alone knows for sure.

    Several threads may call its methods. The lock is never held around a call of the driver. What an interrupt leaves
    half changed is forgotten.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._index = _Index()

    def insert(self, ids: tuple[int, ...], slot: int, namespace: Hashable, generation: int) -> None:
        """Notes that a slot holds the rows of some tokens, whatever it held before."""
        with self._locked() as index:
            index.insert(ids, slot, namespace, generation)

    def match(self, ids: tuple[int, ...], namespace: Hashable) -> Match | None:
        """Who holds the most of the first tokens; None where nobody holds any."""
        with self._locked() as index:
            found = index.match(ids, namespace)
        if not found:
            return None
        holder, length = found
        assert isinstance(holder, tuple)
        slot, generation = holder
        return Match(slot, generation, length)

    def shorten(self, match: Match, namespace: Hashable, length: int) -> None:
        """Notes that who was found has its first ``length`` rows only."""
        with self._locked() as index:
            index.shorten(namespace, (match.slot, match.generation), length)

    def note_fork(self, slot: int) -> int:
        """Notes that what a slot holds was forked; returns how often it was."""
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
    """Which slots hold the rows of which tokens."""

    def __init__(self) -> None:
        self.trees: dict[Hashable, PrefixTree] = {}  # by namespace, of slots with their generations
        self.generations: dict[int, tuple[Hashable, int]] = {}  # of the slots in them, with their namespaces
        self.forks: dict[int, int] = {}  # how often those were forked

    def insert(self, ids: tuple[int, ...], slot: int, namespace: Hashable, generation: int) -> None:
        """Notes that a slot holds the rows of some tokens, whatever it held before."""
        before = self.generations.get(slot)
        if before != (namespace, generation):
            if before is not None:
                self.shorten(before[0], (slot, before[1]), 0)
            self.generations[slot], self.forks[slot] = (namespace, generation), 0
        self.trees.setdefault(namespace, PrefixTree()).insert(ids, (slot, generation))

    def match(self, ids: tuple[int, ...], namespace: Hashable) -> tuple[Hashable, int] | None:
        """Who holds the most of the first tokens, and how many of them."""
        tree = self.trees.get(namespace)
        return tree.match(ids) if tree is not None else None

    def shorten(self, namespace: Hashable, holder: Hashable, length: int) -> None:
        """Notes that a holder has its first ``length`` rows only."""
        tree = self.trees.get(namespace)
        if tree is not None:
            tree.shorten(holder, length)
            if not len(tree):
                del self.trees[namespace]
