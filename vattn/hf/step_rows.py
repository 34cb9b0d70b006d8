"""``StepRows``: which positions each row of a decode step sees, in device memory."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields

import torch

from vattn.hf.padding import Padding


@dataclass(frozen=True)
class _RowTensors:
    """Int32 tensors ``[batch]`` with what a step needs to know of each row of the batch.

    Args:
        starts: the first row of the slot that a query sees, without regard to sliding windows.
        ends: one past the row of the slot that the step appends; 0 for an idle row.
        hidden: how many positions on the left the attention mask hides, whether they are stored or not.
        shift: minus the number of positions on the left that are not stored.
        blank: how many positions on the left hold nothing that the model computed.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    hidden: torch.Tensor
    shift: torch.Tensor
    blank: torch.Tensor

    @classmethod
    def zeros(cls, batch: int, device: torch.device) -> _RowTensors:
        return cls(*(torch.zeros(batch, dtype=torch.int32, device=device) for _ in fields(cls)))

    def zeroed(self, live: int) -> _RowTensors:
        """Sets all rows to zero, and returns views of the first ``live``."""
        return _RowTensors(*(getattr(self, field.name).zero_()[:live] for field in fields(self)))


class StepRows:
    """Which positions each row of a decode step sees, in device memory, where captured steps read it.

    Row ``i`` of the batch is slot ``base + i``. Rows from ``live`` on are idle: the step neither reads nor writes their
    slots.

    Args:
        batch: rows, idle ones included.
        device: of the step.
        side: the stream on which masks are compared while a replay runs; None on a CPU.

    Attributes:
        slots: the numbers from 0 to ``batch - 1``, int32.
        indices: the same, int64.
        live: rows that are not idle.
    """

    def __init__(self, batch: int, device: torch.device, side: torch.cuda.Stream | None) -> None:
        with torch.inference_mode(False):
            self.slots = torch.arange(batch, dtype=torch.int32, device=device)
            self.indices = self.slots.long()
            self._every = _RowTensors.zeros(batch, device)
        self.set_live(batch)
        self._side = side
        if side is not None:
            self._before = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def starts(self) -> torch.Tensor:
        """The first row of each slot that a query sees, without regard to windows, int32 ``[batch]``."""
        return self._every.starts

    @property
    def ends(self) -> torch.Tensor:
        """One past the row of each slot that the step appends, int32 ``[batch]``; 0 for an idle row."""
        return self._every.ends

    @property
    def padded(self) -> bool:
        """Whether a row hides positions on the left."""
        return self._most_hidden > 0

    @property
    def stored_whole(self) -> bool:
        """Whether rows are stored with their padding."""
        return self._padding is None

    def set_live(self, live: int) -> None:
        """Makes the rows from ``live`` on idle, and hides nothing of any row."""
        self.live = live
        with torch.inference_mode(False):
            self._live = self._every.zeroed(live)
        self._padding: Padding | None = None
        self._blank: Padding | None = None
        self._most_hidden = 0

    def set_padding(self, padding: Padding | None, blank: Padding | None, length: int) -> bool:
        """Sets which positions are not stored, and which hold nothing that the model computed.

        Args:
            padding: as in ``RowFormat``.
            blank: as in ``RowFormat``.
            length: positions before the step.

        Returns:
            Whether something has changed.
        """
        if padding is self._padding and blank is self._blank and self._most_hidden <= length:
            return False
        self._most_hidden = sys.maxsize  # remains where an interrupt ends this early, so that it is done again
        for tensor, given in ((self._live.shift, padding), (self._live.blank, blank)):
            tensor.copy_(torch.tensor([0] * self.live if given is None else given.rows, dtype=torch.int32))
        self._live.shift.neg_()
        self._padding, self._blank = padding, blank
        self._hide_blank()
        return True

    def set_length(self, length: int) -> None:
        """Sets ``ends`` for a step that appends position ``length``."""
        torch.add(self._live.shift, length + 1, out=self._live.ends)

    def mark(self) -> None:
        """Records that ``mask_fits`` waits only for work that was queued before this call."""
        if self._side is not None:
            self._before.record()

    def mask_fits(self, mask: torch.Tensor | None, length: int) -> bool:
        """Returns whether an attention mask hides exactly the positions that are hidden now.

        Args:
            mask: ``[live, length + 1]``; None hides nothing.
            length: positions before the step.
        """
        if mask is None or mask.shape != (self.live, length + 1):
            return mask is None and not self.padded
        if self._side is None:
            return torch.equal(mask != 0, self._visible(length))
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._before)
            return torch.equal(mask.to(self.ends.device) != 0, self._visible(length))

    def take_mask(self, mask: torch.Tensor | None, length: int) -> bool:
        """Sets what is hidden to what an attention mask hides.

        Args:
            mask: ``[live, length + 1]``; None hides only what is blank.
            length: positions before the step.

        Returns:
            False where the mask is of another shape, hides other positions than some on the left, or hides all of a
            row. Then only what is blank is hidden.
        """
        self._hide_blank()
        if mask is not None:
            if mask.shape != (self.live, length + 1):
                return False
            visible = mask.to(self.ends.device) != 0
            self._live.hidden.copy_(length + 1 - visible.sum(1))
            most = int(self._live.hidden.max())
            if most > length or not torch.equal(visible, self._visible(length)):
                self._hide_blank()
                return False
            self._most_hidden = most
            torch.add(self._live.hidden, self._live.shift, out=self._live.starts)
        return True

    def _hide_blank(self) -> None:
        """Hides the positions that hold nothing that the model computed, and no other."""
        self._live.hidden.copy_(self._live.blank)
        torch.add(self._live.hidden, self._live.shift, out=self._live.starts)
        self._most_hidden = 0 if self._blank is None else max(self._blank.rows)

    def _visible(self, length: int) -> torch.Tensor:
        return torch.arange(length + 1, device=self.ends.device) >= self._live.hidden[:, None]
