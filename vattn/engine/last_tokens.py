"""``LastTokens``: the last token of each output, on the device."""

from __future__ import annotations

import torch


class LastTokens:
    """The last token of each output, on the device, where the sampler writes it and the next iteration reads it.

    Args:
        slots: outputs that there can be at a time, and one: the slot 0 is that of idle rows, and of no output.
        device: the device.

    Attributes:
        tokens: of the output in each slot, int64 ``[slots]``; 0 where its logits were no numbers.
        ends: one past the position of that token, int32 ``[slots]``; 0 of the slot 0.
    """

    def __init__(self, slots: int, device: torch.device) -> None:
        self.tokens = torch.zeros(slots, dtype=torch.int64, device=device)
        self.ends = torch.zeros(slots, dtype=torch.int32, device=device)
