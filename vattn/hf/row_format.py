"""``RowFormat``: how rows store K and V: without padding, in fewer bits, or as the model computes them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from vattn.hf.device_rows import DeviceRows
from vattn.hf.layer_views import MOVED_AT_ONCE, LayerGroupViews
from vattn.hf.padding import Padding
from vattn.kernels.quantize import Scales

Blocks = dict[Any, torch.Tensor]
"""Scratch tensors ``[kv_heads, positions, dim]``, by the shape, dtype and device of the rows that they are for."""


class RowFormat:
    """How the rows of a batch store K and V.

    Args:
        scales: what K and V are divided by before they are rounded to fewer bits; None stores them as they are.

    Attributes:
        padding: the padding on the left that rows are stored without; None where they are stored whole.
        blank: the positions on the left that hold nothing that the model computed: those of ``padding``, and padding
            that is stored as zeros; None where there are none.
        coming: the padding without which the current call stores a prompt; None stores it whole.
    """

    def __init__(self, scales: Scales | None) -> None:
        self.scales = scales
        self.padding: Padding | None = None
        self.blank: Padding | None = None
        self.coming: Padding | None = None

    @property
    def plain(self) -> bool:
        """Whether rows are stored as the model computes them."""
        return self.padding is None and self.scales is None

    def stored(self, length: int, batch: int) -> list[int]:
        """Returns how many of the first ``length`` positions each row of a batch stores."""
        return [length] * batch if self.padding is None else self.padding.stored(length)

    def begin(self) -> None:
        """Begins a prompt, which is stored without the padding ``coming``."""
        self.padding = self.blank = self.coming

    def forget(self) -> None:
        """Notes that rows are stored whole, and that no position is blank."""
        self.padding = self.blank = None

    @contextlib.contextmanager
    def hiding(self, padding: Padding | None) -> Iterator[None]:
        """Within this context a prompt is stored without ``padding``; None stores it whole."""
        before, self.coming = self.coming, padding
        try:
            yield
        finally:
            self.coming = before

    def require_hidden(self, mask: torch.Tensor | None) -> None:
        """Raises ValueError where an attention mask shows blank positions.

        Args:
            mask: ``[batch, length]``, or None, which shows all positions.
        """
        if self.blank is not None and self.blank.shown(mask):
            raise ValueError("attention_mask shows padding that the prompt's has hidden: it is not stored")

    def write(
        self, views: LayerGroupViews, layer: int, start: int, max_len: int, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        """Writes K and V of one layer.

        Args:
            views: of the layer's group.
            layer: its index.
            start: the first position that is written.
            max_len: positions of a slot.
            k: ``[batch, kv_heads, n, head_dim]``.
            v: ``[batch, kv_heads, n, v_head_dim]``.
        """
        batch, n = k.shape[0], k.shape[2]
        states = (k, v)
        if self.scales is not None:
            scales = self.scales.at(layer, k.device)
            states = self.scales.rounded(k, scales[0]), self.scales.rounded(v, scales[1])
        for rows, new in zip(views.rows(layer, batch, 0, max_len), states, strict=True):
            if self.padding is None:
                rows[:, :, start : start + n] = new
            else:
                self.padding.write(rows, new, start)

    def read(
        self, views: LayerGroupViews, layer: int, first: int, end: int, batch: int, dtypes: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns K and V of one layer at positions [first, end), padding included, as the model computes with them.

        Args:
            views: of the layer's group.
            layer: its index.
            first: the first position.
            end: one past the last position.
            batch: rows.
            dtypes: in which the model computes K and V, or None where that is not known.

        Returns:
            ``[batch, kv_heads, end - first, dim]`` each: copies, or views where rows are stored as the model computes
            them.
        """
        if self.padding is None:
            k, v = views.rows(layer, batch, first, end)
        else:
            k, v = (self.padding.padded(t, first, end) for t in views.rows(layer, batch, 0, end))
        if self.scales is None or dtypes is None:
            return k, v
        k_scale, v_scale = self.scales.at(layer, k.device)
        return self.scales.read(k, k_scale, dtypes[0]), self.scales.read(v, v_scale, dtypes[1])

    def allocate_blocks(self, rows: DeviceRows, lengths: list[int], blocks: Blocks) -> None:
        """Adds to ``blocks`` the scratch tensors that ``restore`` needs, so that ``restore`` allocates nothing."""
        for layer in rows.filled(lengths):
            for some in rows.views[layer].rows(layer, 1, 0, MOVED_AT_ONCE):
                key = some.shape, some.dtype, some.device
                if key not in blocks:
                    blocks[key] = torch.empty_like(some[0])

    def restore(self, padding: Padding, rows: DeviceRows, lengths: list[int], blocks: Blocks) -> None:
        """Moves the rows of all layers to where they are when ``padding`` is stored, and stores zeros for it."""
        for layer in rows.filled(lengths):
            firsts, batch, views = rows.first_of_rows(layer), len(rows.sequences), rows.views[layer]
            some = views.rows(layer, 1, 0, MOVED_AT_ONCE)
            whole = views.rows(layer, batch, 0, rows.cache.layout.max_len)
            with torch.no_grad():
                for part, each in zip(some, whole, strict=True):
                    padding.restore(each, firsts, lengths[layer], blocks[part.shape, part.dtype, part.device])
            moved = [first + pad for first, pad in zip(firsts, padding.rows, strict=True) if first]
            if moved:
                rows.copied_from[layer] = max(moved)

    def crop(self, length: int) -> None:
        """Notes that rows were cut to ``length`` positions, and are stored whole."""
        self.padding = None
        self.blank = self.blank and self.blank.cropped(length)

    def select(self, chosen: list[int]) -> None:
        """Notes that row ``i`` became what row ``chosen[i]`` was."""
        self.blank = self.blank and self.blank.chosen(chosen)

    def clone(self) -> RowFormat:
        """Returns the format for a copy of the rows."""
        other = RowFormat(self.scales)
        other.padding, other.blank = self.padding, self.blank
        return other
