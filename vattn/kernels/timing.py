"""``median_seconds``: how long the kernels of a call take between others."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

BETTER = 0.97
"""A kernel is chosen before an earlier one where it takes less than this part of its time."""

_WARM_UPS = 3


def median_seconds(
    call: Callable[[], object], *, written: int, repeats: int = 9, launched_in: int = 2_000_000
) -> float:
    """Measures how long the kernels of a call take where they find nothing of their own in the caches of the device.

    That is how they find it between other kernels of a model: not even their instructions are there.

    Args:
        call: launches kernels on the current stream.
        written: bytes of other memory that are written before each call, more than caches hold.
        repeats: how often it is measured, after a few calls that are not.
        launched_in: cycles of the device in which the host launches them.

    Returns:
        The median, in seconds.

    Raises:
        torch.OutOfMemoryError: there is no memory for the bytes that are written.
    """
    others = torch.empty(written, dtype=torch.uint8, device="cuda")
    for _ in range(_WARM_UPS):
        call()
    took = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        # Work before the first event, so that launches are no part of what is measured.
        torch.cuda._sleep(launched_in)  # type: ignore[no-untyped-call]
        others.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1e3)
    median: float = statistics.median(took)
    return median
