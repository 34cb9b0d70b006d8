"""``LayerGroupViews``: layers of a ``KVCache`` that share shape and window, as tensors to write and read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch

from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import Group

MOVED_AT_ONCE = 256  # positions: more are moved part by part

# What one layer needs for one update: the place for its new K and V, as one tensor of all heads where the group is
# fused; the views to return; for the whole step the shape of the new K, the elements of the new V, the length left.
Shapes = tuple[torch.Size, int, int]
Ready = tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, Shapes]


class LayerGroupViews:
    """The layers of one group of one ``KVCache``, as ``[layers, slots, kv_heads, max_len, dim]`` tensors."""

    def __init__(self, cache: KVCache, index: int, group: Group, base: int) -> None:
        k, v, heads = cache.grouped(index)
        # Where the group is not fused, what is written are K and V themselves.
        written = (k, v) if heads is None else (heads,)
        self._k, self._v, *self._written = (t[base:].permute(2, 0, 3, 1, 4) for t in (k, v, *written))
        self._batch = -1
        self.layers = group.layers
        self.window = group.shape.window
        self.device = cache.device

    def prepare(self, batch: int, start: int, n: int, shapes: Shapes) -> Iterator[Ready]:
        """What each layer needs to append ``n`` positions behind ``start``."""
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        seen = start + n - first
        # Views made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            if batch != self._batch:
                self._batch = batch
                self._rows = [t[:, :batch] for t in (self._k, self._v, *self._written)]
            k, v, *written = self._rows
            new: list[Any] = [t.narrow(3, start, n).unbind(0) for t in written]
            places = new[0] if len(new) == 1 else zip(*new, strict=True)
            k, v = k.narrow(3, first, seen), v.narrow(3, first, seen)
            return zip(places, k.unbind(0), v.unbind(0), repeat(shapes, len(self.layers)), strict=True)

    def lead(self, layer: int, batch: int, twins: int, start: int, n: int) -> Any:
        """The place of ``n`` new positions of one layer behind ``start`` in every so many-th row; see ``write``."""
        position = self.layers.index(layer)
        with torch.inference_mode(False):
            written = [t[position, :batch:twins].narrow(2, start, n) for t in self._written]
        return written[0] if len(written) == 1 else tuple(written)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, batch: int, first: int, end: int) -> None:
        """Makes positions [first, end) of some rows, in all layers, what they are in others."""
        for written in self._written:
            rows = written[:, :batch, :, first:end]
            if rows.dtype.itemsize == 1:  # which torch does not index
                rows = rows.view(torch.uint8)
            # Many positions layer by layer: what is read is held until it is written.
            for part in rows.unbind(0) if end - first > MOVED_AT_ONCE else (rows,):
                part.index_copy_(-4, targets, part.index_select(-4, sources))

    def rows(self, layer: int, batch: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of one layer at positions [first, end), ``[batch, kv_heads, end - first, dim]``."""
        position = self.layers.index(layer)
        return self._k[position, :batch, :, first:end], self._v[position, :batch, :, first:end]


def write(new: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Writes one layer's new K and V to their place, see ``Ready``."""
    if type(new) is tuple:
        torch._foreach_copy_(new, (key_states, value_states))
    else:
        torch.cat((key_states, value_states), 1, out=new)
