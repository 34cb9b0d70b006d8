"""``Padding``: rows of a batch that are stored without what their attention mask hides on the left.

Positions count from the left of the batch, padding included, as transformers counts them; row ``i`` keeps position
``p`` at ``p - padding[i]`` of its slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def hidden(mask: torch.Tensor) -> list[int] | None:
    """Positions that an attention mask, ``[batch, length]``, hides in each row: all on the left, and not all there are.

    None where it hides others.
    """
    seen = mask != 0
    count = mask.shape[1] - seen.sum(1)
    left = torch.arange(mask.shape[1], device=mask.device) >= count[:, None]
    rows: list[int] = count.tolist()
    return rows if rows and max(rows) < mask.shape[1] and torch.equal(seen, left) else None


class Padding:
    """How many positions of each row are not stored."""

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, mask: torch.Tensor) -> Padding | None:
        """Of an attention mask, ``[batch, length]``; None where it hides nothing, or else than a part on the left."""
        rows = hidden(mask)
        return cls(rows) if rows and any(rows) else None

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, length: int) -> list[int]:
        """What each row holds of so many positions."""
        return [max(0, length - pad) for pad in self.rows]

    def write(self, new: torch.Tensor, states: torch.Tensor, start: int) -> None:
        """Writes positions from ``start`` on, ``[batch, heads, n, dim]``, to rows ``[batch, heads, max_len, dim]``."""
        for row, state, at, end in self._spans(new, states, start, start + states.shape[2]):
            row[:, at:end] = state[:, state.shape[1] - (end - at) :]

    def padded(self, rows: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """A copy of positions [first, end), ``[batch, heads, end - first, dim]``, with zeros for the padding."""
        copied = rows.new_zeros(*rows.shape[:2], end - first, rows.shape[3])
        for row, copy, at, stop in self._spans(rows, copied, first, end):
            copy[:, copy.shape[1] - (stop - at) :] = row[:, at:stop]
        return copied

    def _spans(
        self, rows: torch.Tensor, others: torch.Tensor, first: int, end: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
        return zip(rows, others, self.stored(first), self.stored(end), strict=True)

    def restore(self, rows: torch.Tensor, firsts: list[int], length: int, block: torch.Tensor) -> None:
        """Moves rows of so many positions to where they are with padding, which becomes zeros.

        Args:
            rows: ``[batch, heads, max_len, dim]``.
            firsts: what each row still holds begins there, in its slot.
            length: of all rows, padding included.
            block: ``[heads, n, dim]``, what so many positions are held in meanwhile.
        """
        for row, pad, first in zip(rows, self.rows, firsts, strict=True):
            if not pad:
                continue
            for end in range(length - pad, first, -block.shape[1]):
                begin = max(first, end - block.shape[1])
                held = block[:, : end - begin].copy_(row[:, begin:end])
                row[:, begin + pad : end + pad] = held
            row[:, first : first + pad] = 0

    def chosen(self, rows: list[int]) -> Padding | None:
        """Of a batch of some of the rows."""
        left = [self.rows[row] for row in rows]
        return Padding(left) if any(left) else None

    def cropped(self, length: int) -> Padding | None:
        """Of what is left of so many positions."""
        rows = [min(pad, length) for pad in self.rows]
        return Padding(rows) if any(rows) else None

    def shown(self, mask: torch.Tensor | None) -> bool:
        """Whether a mask, ``[batch, length]``, shows any of it."""
        if mask is None:
            return True
        hidden_by = torch.tensor(self.rows, device=mask.device)[:, None]
        return bool(((torch.arange(mask.shape[1], device=mask.device) < hidden_by) & (mask != 0)).any())
