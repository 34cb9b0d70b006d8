"""``LayerGroupViews``: layers of a ``KVCache`` that share shape and window, as tensors to write and read."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from typing import Any

import torch

from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import Group

MOVED_AT_ONCE = 256  # positions; more are moved in parts, so that the copy in between stays small

# ``Ready`` is what one layer needs for one update: the tensor that the new K and V are written to, which has the heads
# of both where the group is fused and is a pair of tensors otherwise; the views of K and V to return; and ``Shapes``,
# which all layers of the group share: the shape of the new K, the number of elements of the new V, and the length after
# the update.
Shapes = tuple[torch.Size, int, int]
Ready = tuple[torch.Tensor | tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor, Shapes]


class LayerGroupViews:
    """The layers of one group of a ``KVCache``, as tensors ``[layers, slots, kv_heads, max_len, dim]``.

    Args:
        cache: holds the rows.
        index: of the group in ``cache.layout.groups``.
        group: the group.
        base: the slot of row 0 of the batch.

    Attributes:
        layers: the indices of the group's layers in the model.
        window: the sliding window of these layers, or None.
        device: of the cache.
    """

    def __init__(self, cache: KVCache, index: int, group: Group, base: int) -> None:
        k, v, heads = cache.grouped(index)
        # Where the group is fused, one tensor with the heads of K and V is written. Else K and V are.
        written = (k, v) if heads is None else (heads,)
        self._k, self._v, *self._written = (t[base:].permute(2, 0, 3, 1, 4) for t in (k, v, *written))
        self._batch = -1
        self.layers = group.layers
        self.window = group.shape.window
        self.device = cache.device

    def prepare(self, batch: int, start: int, n: int, shapes: Shapes) -> Iterator[Ready]:
        """Prepares an update of all layers of the group.

        Args:
            batch: rows.
            start: positions before the update.
            n: positions to append.
            shapes: of the update, see ``Ready``.

        Returns:
            An iterator with what each layer needs, in the order of ``layers``.
        """
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        seen = start + n - first
        # Views that are made in inference mode cannot be written outside of it.
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
        """Returns the tensors for an update of one layer in which rows that share a prompt are stored once.

        Args:
            layer: its index in the model.
            batch: rows.
            twins: how many neighbouring rows share a prompt; only the first of them is written.
            start: positions before the update.
            n: positions to append.

        Returns:
            What ``write`` takes as ``new``, with ``batch / twins`` rows.
        """
        position = self.layers.index(layer)
        with torch.inference_mode(False):
            written = [t[position, :batch:twins].narrow(2, start, n) for t in self._written]
        return written[0] if len(written) == 1 else tuple(written)

    def move(self, sources: torch.Tensor, targets: torch.Tensor, batch: int, first: int, end: int) -> None:
        """Copies positions [first, end) of some rows to others, in all layers of the group.

        Args:
            sources: int64 ``[n]``, the rows that are read. All are read before any is written.
            targets: int64 ``[n]``, the rows that are written.
            batch: rows.
            first: the first position.
            end: one past the last position.
        """
        for written in self._written:
            rows = written[:, :batch, :, first:end]
            if rows.dtype.itemsize == 1:  # torch cannot index fp8
                rows = rows.view(torch.uint8)
            # The copy that ``index_select`` makes of many positions is kept small by moving layer by layer.
            for part in rows.unbind(0) if end - first > MOVED_AT_ONCE else (rows,):
                part.index_copy_(-4, targets, part.index_select(-4, sources))

    def rows(self, layer: int, batch: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns views of K and V of one layer at positions [first, end), ``[batch, kv_heads, end - first, dim]``."""
        position = self.layers.index(layer)
        return self._k[position, :batch, :, first:end], self._v[position, :batch, :, first:end]


def write(new: Any, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
    """Writes the new K and V of one layer.

    Args:
        new: the tensor to write to, or a pair of tensors for K and V, see ``Ready``.
        key_states: ``[batch, kv_heads, n, head_dim]``.
        value_states: ``[batch, kv_heads, n, v_head_dim]``.
    """
    if type(new) is tuple:
        torch._foreach_copy_(new, (key_states, value_states))
    else:
        torch.cat((key_states, value_states), 1, out=new)
