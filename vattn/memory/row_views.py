"""``RowViews``: torch tensors over the addresses of a cache's K and V."""

from __future__ import annotations

import torch

from vattn import _core
from vattn.arguments import integer
from vattn.memory.guard import guarded
from vattn.memory.layout import Group, KVLayout


class RowViews:
    """K and V of every layer as tensors over the addresses of an arena.

    Args:
        arena: the arena whose addresses the tensors cover.
        layout: where the rows lie.
        slots: the number of slots of the arena.
    """

    def __init__(self, arena: _core.Arena, layout: KVLayout, slots: int) -> None:
        self._arena, self._layout, self._slots = arena, layout, slots
        self._k: dict[int, torch.Tensor] = {}
        self._v: dict[int, torch.Tensor] = {}
        self._planes_of: dict[int, tuple[int, int]] = {}  # by layer: the planes of its K and of its V
        self._grouped: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        for group in layout.groups:
            shape = group.shape
            if group.fused:
                heads = self._export(group, 2 * shape.kv_heads, shape.head_dim, group.k_planes, group.k_offsets)
                k, v = heads[..., : shape.kv_heads, :], heads[..., shape.kv_heads :, :]
            else:
                k = self._export(group, shape.kv_heads, shape.head_dim, group.k_planes, group.k_offsets)
                v = self._export(group, shape.kv_heads, shape.v_head_dim, group.v_planes, group.v_offsets)
                heads = None
            self._grouped.append((k, v, heads))
            for index, layer in enumerate(group.layers):
                self._k[layer], self._v[layer] = k[:, :, index], v[:, :, index]
                self._planes_of[layer] = group.k_planes[index], group.v_planes[index]
        self._guarded_k, self._guarded_v = (
            {layer: self.guarded(tensor) for layer, tensor in tensors.items()} for tensors in (self._k, self._v)
        )

    def k(self, layer: int) -> torch.Tensor:
        """See ``KVCache.k``."""
        return self._guarded_k[self._known(layer)]

    def v(self, layer: int) -> torch.Tensor:
        """See ``KVCache.v``."""
        return self._guarded_v[self._known(layer)]

    def plain(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``KVCache.slot_tensors``."""
        layer = self._known(layer)
        return self._k[layer], self._v[layer]

    def of_slot(self, slot: int, length: int, layer: int, *, of_v: bool) -> torch.Tensor:
        """K or V of one layer for the first rows of a slot, ``[length, kv_heads, dim]``; see ``KVCache.rows``."""
        slots = self.plain(layer)[of_v]
        rows = slots[slot]
        if self._arena.head(slot, self._planes_of[layer][of_v]):  # a sliding window has given back the first rows
            return self.guarded(rows[:length])
        shape, strides = [length, *rows.shape[1:]], list(rows.stride())
        offset = rows.data_ptr() - self._arena.base
        with torch.inference_mode(False):
            capsule = self._arena.dlpack(offset, shape, strides, slots.element_size())
            view: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
            return view.view(slots.dtype)

    def grouped(self, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """See ``KVCache.grouped``."""
        k, v, heads = self._grouped[integer("group", group, 0, len(self._grouped) - 1)]
        return self.guarded(k), self.guarded(v), heads if heads is None else self.guarded(heads)

    def guarded(self, view: torch.Tensor) -> torch.Tensor:
        """See ``KVCache.guarded``."""
        return guarded(view, self._arena)

    def _known(self, layer: int) -> int:
        layer = integer("layer", layer)
        if layer not in self._k:
            raise ValueError(f"layer {layer} has no cache: layers with one are {sorted(self._k)}")
        return layer

    def _export(
        self, group: Group, heads: int, head_dim: int, planes: tuple[int, ...], offsets: tuple[int, ...]
    ) -> torch.Tensor:
        arena, shape = self._arena, group.shape
        starts = [arena.plane_offset(plane) + offset for plane, offset in zip(planes, offsets, strict=True)]
        layer_stride = starts[1] - starts[0] if len(starts) > 1 else 0
        row_bytes = self._layout.planes[planes[0]].row_bytes
        strides = [
            arena.slot_stride(planes[0]),
            row_bytes,
            layer_stride,
            head_dim * shape.itemsize,
            shape.itemsize,
        ]
        capsule = arena.dlpack(
            starts[0],
            [self._slots, self._layout.max_len, len(starts), heads, head_dim],
            [stride // shape.itemsize for stride in strides],
            shape.itemsize,
        )
        # A tensor that is created in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            raw: torch.Tensor = torch.utils.dlpack.from_dlpack(capsule)
            return raw.view(getattr(torch, shape.dtype))
