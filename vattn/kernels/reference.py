"""The definition of attention, with which other kernels are compared."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from vattn.kernels.base import AttentionParams, AttentionSpec, Kernel, SequenceRanges


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams) -> torch.Tensor:
    """Computes the causal attention of the last n of m positions in float32 or wider.

    Args:
        q: ``[n, query_heads, head_dim]``.
        k: ``[m, kv_heads, head_dim]``.
        v: ``[m, kv_heads, v_head_dim]``.
        how: how scores are computed, and the window.

    Returns:
        ``[n, query_heads, v_head_dim]``.
    """
    n, m, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    kind = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(kind).repeat_interleave(groups, 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.to(kind), k) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.masked_fill(~visible(n, m, how.window, q.device), -math.inf)
    if how.sinks is not None:
        scores = torch.cat((scores, how.sinks.to(kind)[:, None, None].expand(-1, n, 1)), 2)
    weights = scores.softmax(2)[:, :, :m]
    return torch.einsum("hnm,mhd->nhd", weights, v)


def visible(n: int, m: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of m positions each of the last n of them sees, bool ``[n, m]``."""
    behind = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


class Reference(Kernel):
    """The definition of attention, computed in float32 or wider, one sequence after the other."""

    name = "reference"
    source = "torch operations"
    capturable = False
    mixes = True
    kv_dtypes = (torch.float8_e4m3fn, torch.float8_e5m2)

    def refuses(self, task: AttentionSpec) -> str | None:
        return None

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        return self.prefill(q, k, v, spans, [1] * len(spans), scores)

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: SequenceRanges,
        counts: list[int],
        scores: AttentionParams,
    ) -> torch.Tensor:
        parts = [
            plain_attention(queries, k[slot, start:end], v[slot, start:end], scores)
            for queries, (slot, start, end) in zip(torch.split(q, counts), spans.tolist(), strict=True)
        ]
        return torch.cat(parts).to(q.dtype)

    def mixed(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: SequenceRanges,
        offsets: torch.Tensor,
        most: int,
        scores: AttentionParams,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        end, counts = int(offsets[-1]), offsets.diff().tolist()
        return functional.pad(self.prefill(q[:end], k, v, spans, counts, scores), (0, 0, 0, 0, 0, len(q) - end))
