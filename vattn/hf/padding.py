"""``Padding``: how many positions on the left of a batch's rows are padding, and how rows are stored without it.

Positions count from the left of the batch, padding included, as transformers counts them. Row ``i`` stores position
``p`` at row ``p - padding[i]`` of its slot.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def hidden(mask: torch.Tensor) -> list[int] | None:
    """Returns how many positions on the left an attention mask hides in each row.

    Args:
        mask: ``[batch, length]``, 0 or False where a position is hidden.

    Returns:
        The number for each row. None where a row hides other positions or all of its positions, or there are no rows.
    """
    seen = mask != 0
    count = mask.shape[1] - seen.sum(1)
    left = torch.arange(mask.shape[1], device=mask.device) >= count[:, None]
    rows: list[int] = count.tolist()
    return rows if rows and max(rows) < mask.shape[1] and torch.equal(seen, left) else None


class Padding:
    """How many positions on the left of each row are padding.

    Args:
        rows: the number for each row.
    """

    def __init__(self, rows: list[int]) -> None:
        self.rows = rows

    @classmethod
    def of(cls, mask: torch.Tensor) -> Padding | None:
        """Returns the padding that an attention mask ``[batch, length]`` hides.

        None where it hides nothing, hides other positions than some on the left, or hides all of a row.
        """
        rows = hidden(mask)
        return cls(rows) if rows and any(rows) else None

    def __len__(self) -> int:
        return len(self.rows)

    def stored(self, length: int) -> list[int]:
        """Returns how many of the first ``length`` positions each row stores."""
        return [max(0, length - pad) for pad in self.rows]

    def write(self, new: torch.Tensor, states: torch.Tensor, start: int) -> None:
        """Writes states to the rows of a batch, without those of padding.

        Args:
            new: ``[batch, heads, max_len, dim]``, the rows.
            states: ``[batch, heads, n, dim]``, of positions from ``start`` on.
            start: the first of these positions.
        """
        for row, state, at, end in self._spans(new, states, start, start + states.shape[2]):
            row[:, at:end] = state[:, state.shape[1] - (end - at) :]

    def padded(self, rows: torch.Tensor, first: int, end: int) -> torch.Tensor:
        """Returns a copy of positions [first, end), ``[batch, heads, end - first, dim]``, with zeros for padding."""
        copied = rows.new_zeros(*rows.shape[:2], end - first, rows.shape[3])
        for row, copy, at, stop in self._spans(rows, copied, first, end):
            copy[:, copy.shape[1] - (stop - at) :] = row[:, at:stop]
        return copied

    def _spans(
        self, rows: torch.Tensor, others: torch.Tensor, first: int, end: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, int, int]]:
        """Yields each row of both tensors, and the range of its slot that holds its positions [first, end)."""
        return zip(rows, others, self.stored(first), self.stored(end), strict=True)

    def restore(self, rows: torch.Tensor, firsts: list[int], length: int, block: torch.Tensor) -> None:
        """Moves rows in place to where they are when their padding is stored, and stores zeros for the padding.

        Args:
            rows: ``[batch, heads, max_len, dim]``.
            firsts: for each row, the first position of its slot that is still there. A sliding window may have given
                back those before.
            length: positions of every row, padding included.
            block: ``[heads, n, dim]``, scratch memory. ``n`` positions are moved at a time.
        """
        for row, pad, first in zip(rows, self.rows, firsts, strict=True):
            if not pad:
                continue
            # From the last position to the first, so that no position is overwritten before it is moved.
            for end in range(length - pad, first, -block.shape[1]):
                begin = max(first, end - block.shape[1])
                held = block[:, : end - begin].copy_(row[:, begin:end])
                row[:, begin + pad : end + pad] = held
            row[:, first : first + pad] = 0

    def chosen(self, rows: list[int]) -> Padding | None:
        """Returns the padding of a batch that is made of these rows; None where none of them is padded."""
        left = [self.rows[row] for row in rows]
        return Padding(left) if any(left) else None

    def cropped(self, length: int) -> Padding | None:
        """Returns the padding among the first ``length`` positions; None where there is none."""
        rows = [min(pad, length) for pad in self.rows]
        return Padding(rows) if any(rows) else None

    def shown(self, mask: torch.Tensor | None) -> bool:
        """Returns whether an attention mask ``[batch, length]`` shows a position that is padding. None shows all."""
        if mask is None:
            return True
        hidden_by = torch.tensor(self.rows, device=mask.device)[:, None]
        return bool(((torch.arange(mask.shape[1], device=mask.device) < hidden_by) & (mask != 0)).any())
