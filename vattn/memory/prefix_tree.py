"""``PrefixTree``: a radix tree from token ids to the holders of their rows, independent of memory, device and torch."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence


class _Node:
    """The tokens between two branching points, and the holders whose tokens end with them."""

    __slots__ = ("children", "holders", "parent", "tokens", "used")

    def __init__(self, tokens: tuple[int, ...], parent: _Node | None) -> None:
        self.tokens = tokens
        self.parent = parent
        self.children: dict[int, _Node] = {}  # by their first token
        self.holders: dict[Hashable, None] = {}  # a set in order of insertion
        self.used = 0  # the clock of the tree at the last use of this node or of one below it


class PrefixTree:
    """A radix tree over token ids.

    A holder is any hashable value that names a place where the rows of some tokens are, in the order of the tokens.
    """

    def __init__(self) -> None:
        self._root = _Node((), None)
        self._nodes: dict[Hashable, _Node] = {}
        self._clock = 0

    def __len__(self) -> int:
        return len(self._nodes)

    def __contains__(self, holder: Hashable) -> bool:
        return holder in self._nodes

    def insert(self, tokens: Sequence[int], holder: Hashable) -> None:
        """Records that a holder holds the rows of these tokens, in place of what it held before.

        Without tokens the holder is removed.
        """
        self.remove(holder)
        if not tokens:
            return
        node, rest = self._root, tuple(tokens)
        while rest:
            child = node.children.get(rest[0])
            if child is None:
                child = node.children[rest[0]] = _Node(rest, node)
            elif (shared := _common(child.tokens, rest)) < len(child.tokens):
                child = self._split(child, shared)
            node, rest = child, rest[len(child.tokens) :]
        node.holders[holder] = None
        self._nodes[holder] = node
        self._touch(node)

    def remove(self, holder: Hashable) -> None:
        """Removes a holder, if it is in the tree."""
        node = self._nodes.pop(holder, None)
        if node is None:
            return
        del node.holders[holder]
        while node.parent is not None and not node.holders and len(node.children) < 2:
            parent = node.parent
            if node.children:  # a node with a single child and no holder is merged into that child
                [child] = node.children.values()
                child.tokens, child.parent = node.tokens + child.tokens, parent
                parent.children[node.tokens[0]] = child
                return
            del parent.children[node.tokens[0]]
            node = parent

    def shorten(self, holder: Hashable, length: int) -> None:
        """Records that a holder holds its first ``length`` rows only."""
        if holder in self._nodes:
            self.insert(self.tokens(holder)[:length], holder)

    def tokens(self, holder: Hashable) -> tuple[int, ...]:
        """Returns the tokens whose rows a holder holds.

        Raises:
            KeyError: the holder is not in the tree.
        """
        parts: list[tuple[int, ...]] = []
        node: _Node | None = self._nodes[holder]
        while node is not None:
            parts.append(node.tokens)
            node = node.parent
        return tuple(itertools.chain.from_iterable(reversed(parts)))

    def match(self, tokens: Sequence[int]) -> tuple[Hashable, int] | None:
        """Finds the holder of the longest prefix of the tokens.

        Of several holders, one whose tokens end in the matching node comes first, then one in the branch that was used
        last; within a node, the one that was inserted last.

        Returns:
            The holder and the length of the prefix, or None where no holder has the first token.
        """
        node, rest, length = self._root, tuple(tokens), 0
        while rest and (child := node.children.get(rest[0])):
            shared = _common(child.tokens, rest)
            node, rest, length = child, rest[shared:], length + shared
            if shared < len(child.tokens):
                break
        if length == 0:
            return None
        found = node
        while not found.holders:  # the holders below this node hold the prefix too
            found = max(found.children.values(), key=lambda child: child.used)
        self._touch(found)
        return next(reversed(found.holders)), length

    def _split(self, node: _Node, at: int) -> _Node:
        """Splits a node in two; returns the upper one, which has the first ``at`` tokens."""
        assert node.parent is not None
        upper = _Node(node.tokens[:at], node.parent)
        upper.used = node.used
        node.parent.children[node.tokens[0]] = upper
        node.tokens, node.parent = node.tokens[at:], upper
        upper.children[node.tokens[0]] = node
        return upper

    def _touch(self, node: _Node | None) -> None:
        self._clock += 1
        while node is not None:
            node.used = self._clock
            node = node.parent


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Returns the length of the longest common prefix of two sequences of tokens."""
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while low + 1 < high:  # the sequences are equal up to low, but not up to high
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
