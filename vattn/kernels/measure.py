"""``fastest``: the kernel that decodes fastest on this device, found by measuring."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from dataclasses import replace

import torch

from vattn.kernels.base import AttentionParams, AttentionSpec, Kernel, SequenceRanges
from vattn.kernels.registry import choose, named, refused
from vattn.kernels.timing import BETTER, median_seconds

FEW = 16
"""Batches of at most so many sequences may have another kernel than larger ones."""

_LOG = logging.getLogger("vattn")
_BYTES = 256 << 20  # of K and V that many sequences have; no cache of a device holds as much
_MOST_SEQUENCES = 64


def fastest(task: AttentionSpec, *, name: str = "auto", few: bool = False) -> Kernel:
    """Chooses a kernel for decode steps that are captured: the named one, or the one that is measured to be fastest.

    Kernels are measured once in a process for each kind of attention, on a device only.

    Args:
        task: the attention that the kernel has to compute.
        name: a key of ``KERNELS``, or ``"auto"``.
        few: whether it is for at most ``FEW`` sequences, and not for more.

    Raises:
        ValueError: no kernel has this name, or none can be used.
    """
    usable = [kernel for kernel in named(name) if kernel.capturable and not refused(kernel, task)]
    if len(usable) == 1 or (usable and task.device == "cpu"):
        return usable[0]
    alike = replace(task, reach=0, rows=0)  # the size of a slot tensor makes no difference any more
    best, least = None, math.inf
    for kernel in usable:
        took: float | None = math.inf
        if kernel.measured:
            with contextlib.suppress(torch.OutOfMemoryError):  # another time there may be memory
                took = _seconds(kernel, alike, torch.cuda.current_device(), few)
        if took is not None and (best is None or took < BETTER * least):
            best, least = kernel, took
    if best is None:
        raise ValueError(f"no attention kernel can be captured for {task}")
    return best


def decode_kernel(spec: AttentionSpec, name: str, *, few: bool) -> Kernel:
    """The kernel for decode steps of few sequences, or of more: of those that can be captured, the fastest.

    Raises:
        ValueError: there is none.
    """
    with contextlib.suppress(ValueError):
        return fastest(spec, name=name, few=few)
    return choose(spec, name=name)


@functools.cache
def _seconds(kernel: Kernel, task: AttentionSpec, device: int, few: bool) -> float | None:
    """How long a decode step takes on sequences of mixed lengths; None where the kernel fails."""
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
            return _measured(kernel, task, FEW // 2 if few else _MOST_SEQUENCES)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # e.g. it is compiled at its first use, and there is no compiler
        _LOG.info("the kernel %s is not used: %s", kernel.name, str(error).partition("\n")[0])
        return None


def _measured(kernel: Kernel, task: AttentionSpec, most: int) -> float:
    dtype, tail = task.kv_dtype or task.dtype, kernel.tail(task.head_dim, task.kv_dtype)
    row_bytes = task.kv_heads * (task.head_dim + task.v_head_dim) * dtype.itemsize
    longest = min(1536, max(128, _BYTES // row_bytes // 8))
    sequences = max(1, min(most, _BYTES // (row_bytes * longest)))
    rows = 64 * -(-(kernel.head_rows + longest + tail) // 64)
    shape = sequences, rows, task.kv_heads
    k = torch.zeros(*shape, task.head_dim, dtype=dtype, device="cuda")
    v = torch.zeros(*shape, task.v_head_dim, dtype=dtype, device="cuda")
    q = torch.ones(sequences, task.query_heads, task.head_dim, dtype=task.dtype, device="cuda")
    sinks = torch.zeros(task.query_heads, dtype=task.dtype, device="cuda") if task.sinks else None
    how = AttentionParams(scale=task.head_dim**-0.5, softcap=30.0 if task.softcap else None, sinks=sinks)
    first = kernel.head_rows
    lengths = [max(1, longest - longest * (7 * number % sequences) // (2 * sequences)) for number in range(sequences)]
    spans = SequenceRanges.of([(slot, first, first + n) for slot, n in enumerate(lengths)], q.device)
    return median_seconds(lambda: kernel.decode(q, k, v, spans, how), written=_BYTES)
