"""Tests whether a kernel attends to exactly the rows that it is given, on K and V that tell the rows apart."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vattn.kernels.base import AttentionParams, Kernel, SequenceRanges


def probe_decode(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: int, scores: AttentionParams
) -> str | None:
    """Decodes on small ranges whose scores are all equal, and looks for rows that are wrongly seen or left out.

    Each combination of a kernel, shapes and dtypes is tried once; its result is cached.

    Args:
        kernel: the kernel to test.
        q: as in ``Kernel.decode``. Of ``q``, ``k`` and ``v`` only shapes, dtypes and devices are used.
        k: slot tensor.
        v: slot tensor.
        live: how many rows of the batch are in use; the others are idle.
        scores: tell whether there are soft caps and sinks.

    Returns:
        A description of the fault, or None where there is none.
    """
    return _probed_decode(
        kernel, getattr(kernel.decode, "__func__", kernel.decode), q.device, q.dtype, k.dtype,
        *q.shape, k.shape[2], v.shape[3], live,
        scores.softcap is not None, scores.sinks is not None,
    )  # fmt: skip


# The lengths of the ranges that are tried: small, and around the sizes of kernels' tiles.
_TRIED = (1, 2, 3, 16, 17, 63, 64, 65, 80, 127, 128, 129, 130)


@functools.lru_cache(1024)
def _probed_decode(
    kernel: Kernel, function: Any, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype,
    batch: int, heads: int, dim: int, kv_heads: int, v_dim: int, live: int, softcap: bool, sinks: bool,
) -> str | None:  # fmt: skip
    """See ``probe_decode``. The kernel's method ``function`` is a part of the cache's key, in case it is replaced."""
    longest, before, behind = max(_TRIED), max(kernel.head_rows, 8), kernel.tail(dim, kv_dtype) + 8
    with torch.inference_mode(False), torch.no_grad():
        q = torch.ones(batch, heads, dim, dtype=dtype, device=device)
        rows = 64 * (-(-(before + longest + 8 + behind) // 64))
        k = torch.zeros(batch, rows, kv_heads, dim, dtype=kv_dtype, device=device)
        v = torch.zeros(batch, rows, kv_heads, v_dim, dtype=dtype, device=device)
        scores = AttentionParams(
            scale=dim**-0.5,
            softcap=30.0 if softcap else None,
            sinks=torch.zeros(heads, dtype=dtype, device=device) if sinks else None,
        )
        spans = []
        for row in range(batch):
            n = _TRIED[row % len(_TRIED)] if row else longest
            first = before + row % 8
            spans.append((row, first, first + n) if row < live else (row, 0, 0))
            # The row before the range, its first and its last row, and the row behind it.
            for place, at in enumerate((first - 1, first, first + n - 1, first + n)):
                v[row, at, :, place] += n
        stored = v.to(kv_dtype)
        out = kernel.decode(q, k, stored, SequenceRanges.of(spans, device), scores)
        for row, first, end in spans[:live]:
            right = stored[row, first:end].double().sum(0) / (end - first + sinks)
            right = right.repeat_interleave(heads // kv_heads, 0)
            if not bool(((out[row].double() - right).abs() <= 0.1 * right.abs().clamp_min(1)).all()):
                return f"{kernel.name} does not see just the {end - first} rows that it is given"
    return None


def probe_prefill(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    behind: bool,
    scores: AttentionParams,
) -> str | None:
    """Computes small prompts whose scores are all equal, and looks for positions that are wrongly seen or left out.

    Each combination of a kernel, shapes, dtypes and window is tried once; its result is cached.

    Args:
        kernel: the kernel to test.
        q: ``[batch, n, heads, dim]``. Of ``q``, ``k`` and ``v`` only shapes, dtypes and devices are used.
        k: K of a prompt, of the same layout.
        v: V of a prompt, of the same layout.
        window: how many positions a query sees, itself included, or None for all before it.
        behind: whether sequences have positions before their queries.
        scores: tell whether there are soft caps and sinks.

    Returns:
        A description of the fault, or None where there is none.
    """
    return _probed_prefill(
        kernel, getattr(kernel.prefill, "__func__", kernel.prefill), q.device, q.dtype,
        *q.shape[2:], k.shape[2], v.shape[3], window, behind,
        scores.softcap is not None, scores.sinks is not None,
    )  # fmt: skip


@functools.lru_cache(1024)
def _probed_prefill(
    kernel: Kernel, function: Any, device: torch.device, dtype: torch.dtype, heads: int, dim: int, kv_heads: int,
    v_dim: int, window: int | None, behind: bool, softcap: bool, sinks: bool,
) -> str | None:  # fmt: skip
    n = v_dim  # as many rows as a one-hot V tells apart
    if window is not None and window >= n:
        window = max(n // 2, 1)  # a window that hides some of these rows
    with torch.inference_mode(False), torch.no_grad():
        rows = n + kernel.tail(dim)
        k = torch.zeros(2, rows, kv_heads, dim, dtype=dtype, device=device)
        v = torch.eye(rows, v_dim, dtype=dtype, device=device)[None, :, None].repeat(2, 1, kv_heads, 1)
        counts = [n // 2, 1] if behind else [n, n // 2]
        spans = [(0, 0, n), (1, 0, n if behind else n // 2)]
        scores = AttentionParams(
            scale=dim**-0.5,
            softcap=30.0 if softcap else None,
            sinks=torch.zeros(heads, dtype=dtype, device=device) if sinks else None,
            window=window,
        )
        q = torch.ones(sum(counts), heads, dim, dtype=dtype, device=device)
        out = kernel.prefill(q, k, v, SequenceRanges.of(spans, device), counts, scores)
        at = torch.cat([torch.arange(end - count, end) for (_, _, end), count in zip(spans, counts, strict=True)])
        distance = (at[:, None] - torch.arange(n)).to(device)
        seen = (distance >= 0) & (distance < (n if window is None else window))
        right = (seen.double() / (seen.sum(1, keepdim=True) + sinks))[:, None]
        if not bool(((out.double() - right).abs() <= 0.1 * right.amax(-1, keepdim=True)).all()):
            return f"{kernel.name} does not see just the positions before a query of a prompt"
    return None
