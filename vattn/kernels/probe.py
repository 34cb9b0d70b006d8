"""Whether a kernel sees just the rows that it is given, tried on K and V that tell the rows apart."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vattn.kernels.base import AttentionParams, Kernel, SequenceRanges


def probe_decode(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: int, scores: AttentionParams
) -> str | None:
    """A fault that shows where all scores are the same and V tells the rows apart; None where there is none.

    Args:
        kernel: to be tried.
        q: as in ``Kernel.decode``; this and the next two tell shapes and dtypes, and are not read.
        k: slot tensor.
        v: slot tensor.
        live: rows of the batch; the others are idle.
        scores: how they are made.
    """
    return _probed_decode(
        kernel, getattr(kernel.decode, "__func__", kernel.decode), q.device, q.dtype, k.dtype,
        *q.shape, k.shape[2], v.shape[3], live,
        scores.softcap is not None, scores.sinks is not None,
    )  # fmt: skip


# Rows of the spans that are tried: around the tiles of kernels, and few.
_TRIED = (1, 2, 3, 16, 17, 63, 64, 65, 80, 127, 128, 129, 130)


@functools.lru_cache(1024)
def _probed_decode(
    kernel: Kernel, function: Any, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype,
    batch: int, heads: int, dim: int, kv_heads: int, v_dim: int, live: int, softcap: bool, sinks: bool,
) -> str | None:  # fmt: skip
    """``function`` is the kernel's, so that another one in its place is tried anew."""
    longest, before, behind = max(_TRIED), max(kernel.head_rows, 8), kernel.tail(dim) + 8
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
            # The last row before what is seen, its first and its last one, and the first one behind.
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
    """The same of a prompt: ``[batch, n, heads, dim]`` each, of which only shapes and dtypes are looked at."""
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
    n = v_dim  # rows that a one-hot V tells apart
    if window is not None and window >= n:
        window = max(n // 2, 1)  # one that shows
    with torch.inference_mode(False), torch.no_grad():
        k = torch.zeros(2, n, kv_heads, dim, dtype=dtype, device=device)
        v = torch.eye(n, dtype=dtype, device=device)[None, :, None].expand(2, n, kv_heads, v_dim).contiguous()
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
