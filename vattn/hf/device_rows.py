"""``DeviceRows``: the rows of a batch in one ``KVCache``."""

from __future__ import annotations

import weakref

import torch

from vattn.hf.layer_views import LayerGroupViews
from vattn.memory.kv_cache import KVCache
from vattn.memory.sequence import Sequence

DeviceKey = tuple[torch.device, int]
"""Names one ``KVCache`` of a model: its device, and -1, or the index of the only layer that it holds."""


class DeviceRows:
    """The rows of a batch in one ``KVCache``: row ``i`` is the sequence in slot ``base + i``.

    A copy of a ``VirtualCache`` puts its rows behind those of the original, so one ``KVCache`` may hold the rows of
    several batches.

    Args:
        cache: holds the rows.
        base: the slot of row 0.
        sharers: all ``DeviceRows`` with rows in ``cache``. The new object adds itself.

    Attributes:
        sequences: the sequence of each row.
        views: for each layer in ``cache`` the tensors of its group.
        copied_from: for layers whose rows were copied, the first position that was copied. The rows before it were
            given back by a sliding window, and do not exist in the copy.
    """

    def __init__(self, cache: KVCache, base: int, sharers: weakref.WeakSet[DeviceRows]) -> None:
        self.cache, self.base, self.sharers = cache, base, sharers
        self.sequences: list[Sequence] = []
        self.copied_from: dict[int, int] = {}
        self.views: dict[int, LayerGroupViews] = {}
        for number, group in enumerate(cache.layout.groups):
            self.views.update(dict.fromkeys(group.layers, LayerGroupViews(cache, number, group, base)))
        sharers.add(self)

    def filled(self, lengths: list[int]) -> list[int]:
        """Returns the layers in this ``KVCache`` that hold positions, given the length of every layer of the model."""
        return [layer for layer in self.views if lengths[layer] > 0]

    @property
    def room(self) -> int:
        """How many rows fit from ``base`` on before the next slot that another batch uses."""
        have = len(self.sequences)
        return have + self.cache.free_slots_from(self.base + have)

    def open(self, batch: int, length: int | None = None) -> None:
        """Opens rows until there are ``batch``.

        Args:
            batch: rows.
            length: positions that each new row gets memory for; None takes the length of row 0.

        Raises:
            ValueError: there are not enough free slots behind the rows.
            BudgetExceeded, OutOfDeviceMemory: there is no memory. After an error no row was opened.
        """
        rows = self.sequences
        if length is None:
            length = rows[0].length if rows else 0
        before = len(rows)
        if batch > self.room:
            max_len = self.cache.layout.max_len
            raise ValueError(f"{batch} rows of max_len {max_len} need too many addresses: lower max_len")
        try:
            for slot in range(before, batch):
                rows.append(self.cache.open_unwatched(self.base + slot))
            if length and batch > before:
                self.cache.grow_all(rows[before:], length, min_truncate_length=0)
        except BaseException:
            self.close(before)
            raise

    def close(self, batch: int) -> None:
        """Ends the rows from row ``batch`` on."""
        if surplus := self.sequences[batch:]:
            self.cache.close_all(surplus)
            del self.sequences[batch:]

    def replace(self) -> None:
        """Gives the rows up after another ``DeviceRows`` took their place.

        A ``KVCache`` in which no other batch has rows is not closed: the model may still hold views of it, and its
        memory is freed with the last of them.
        """
        self.sharers.discard(self)
        if self.sharers:
            self.cache.close_all(self.sequences)

    def leave(self, *, keep_cache: bool) -> bool:
        """Gives the rows up, and closes the ``KVCache`` unless another batch has rows in it or ``keep_cache`` is set.

        Returns:
            Whether another batch has rows in the ``KVCache``.
        """
        self.sharers.discard(self)
        if self.sharers:
            self.close(0)
        elif not keep_cache:
            self.cache.close()
        self.sequences.clear()
        return bool(self.sharers)

    def copy_from(self, other: DeviceRows, lengths: list[int]) -> None:
        """Opens as many rows as another ``DeviceRows`` has, and copies its rows of the layers that both have.

        Args:
            other: the rows to copy.
            lengths: of all layers of the model.
        """
        layers = [layer for layer in other.filled(lengths) if layer in self.views]
        if not layers:
            return
        batch = len(other.sequences)
        self.open(batch, max(lengths[layer] for layer in layers))
        first = other.first_positions()
        for layer in layers:
            self.copied_from[layer] = first[layer]
            span = layer, batch, first[layer], lengths[layer]
            for theirs, mine in zip(other.views[layer].rows(*span), self.views[layer].rows(*span), strict=True):
                mine.copy_(theirs)

    def move(self, chosen: list[int], changed: list[int], held: int, alike: int, lengths: list[int]) -> None:
        """Copies row ``chosen[i]`` to row ``i``, from position ``alike`` on, for each ``i`` in ``changed``.

        Args:
            chosen: for each row the one that it becomes.
            changed: the rows, all below ``held``, that become another one.
            held: how many rows held something before.
            alike: first positions that each changed row already has in common with the row that it becomes.
            lengths: of all layers of the model.
        """
        first = self.first_positions()
        sources, targets = torch.tensor([[chosen[i] for i in changed], changed], device=self.cache.device)
        for views in {id(views): views for views in map(self.views.get, self.filled(lengths)) if views}.values():
            start = max(alike, first[views.layers[0]])
            views.move(sources, targets, held, start, self.sequences[0].length)
            self.copied_from.update(dict.fromkeys(views.layers, first[views.layers[0]]))

    def first_of_rows(self, layer: int) -> list[int]:
        """Returns for each row the first position of a layer that is still in its slot."""
        group = next(group for group in self.cache.layout.groups if layer in group.layers)
        at, planes = group.layers.index(layer), self._first_of_planes()
        everything = [0] * len(self.sequences)
        k, v = (planes.get(plane, everything) for plane in (group.k_planes[at], group.v_planes[at]))
        return list(map(max, k, v))

    def first_positions(self) -> dict[int, int]:
        """Returns for each layer the first position that every row still has; windows give earlier ones back."""
        firsts = {number: max(rows, default=0) for number, rows in self._first_of_planes().items()}
        return {
            layer: max(firsts.get(k, 0), firsts.get(v, 0), self.copied_from.get(layer, 0))
            for group in self.cache.layout.groups
            for layer, k, v in zip(group.layers, group.k_planes, group.v_planes, strict=True)
        }

    def _first_of_planes(self) -> dict[int, list[int]]:
        """Returns for each plane with a window, and for each row, the first position that is still in its slot."""
        return {
            number: [self.cache.first_row(row.slot, number) for row in self.sequences]
            for number, plane in enumerate(self.cache.layout.planes)
            if plane.window
        }
