"""FlashAttention-2, which torch includes, and FlashAttention-3."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import torch

from vattn.kernels.base import (
    HALVES,
    AttentionParams,
    AttentionSpec,
    Kernel,
    SequenceRanges,
    offsets_of,
    one_each,
    refused_by_flash,
    several_each,
    slots_as_rows,
    with_sinks,
)

_FEW_QUERIES = 1024
# An upper bound on the queries of each sequence in a decode step, which have one. Where it is 1, FlashAttention-3 takes
# larger tiles of K, as for attention that is not causal, and loads more rows that nobody sees.
_MOST_QUERIES = 2


class Flash2(Kernel):
    """FlashAttention-2 of torch, in the form that takes sequences of different lengths in one call."""

    name = "fa2"
    source = "torch (aten::_flash_attention_forward)"

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        return None if torch.backends.cuda.is_flash_attention_available() else "torch was built without it"

    def refuses(self, task: AttentionSpec) -> str | None:
        if reason := refused_by_flash(task, HALVES):
            return reason
        if task.softcap:
            return "it has no soft cap"
        if task.sinks and task.queries != "one":
            return "it has sinks in decoding only"
        return None

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        offsets, lengths = offsets_of(k, spans)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, slots_as_rows(k), slots_as_rows(v), one_each(spans), offsets, 1, spans.longest, 0.0, False, False,
            scale=scores.scale, seqused_k=lengths,
        )  # fmt: skip
        return with_sinks(out, lse.reshape(-1, len(spans)).t(), scores.sinks) if scores.sinks is not None else out

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: SequenceRanges,
        counts: list[int],
        scores: AttentionParams,
    ) -> torch.Tensor:
        offsets, lengths = offsets_of(k, spans)
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q, slots_as_rows(k), slots_as_rows(v), several_each(spans, counts), offsets,
            max(counts), spans.longest, 0.0, True, False, scale=scores.scale, seqused_k=lengths,
            window_size_left=None if scores.window is None else scores.window - 1,
            window_size_right=None if scores.window is None else 0,
        )[0]  # fmt: skip
        return out


class Flash3(Kernel):
    """FlashAttention-3, for Hopper, from the package ``fa3-fwd`` (``pip install vattn[fa3]``)."""

    name = "fa3"
    source = "fa3-fwd"
    # Rows of K in a tile of causal attention, by the largest head dim that has such tiles. The last tile of a range may
    # reach beyond it.
    _TILES: ClassVar[dict[int, int]] = {64: 128, 96: 144, 128: 128, 192: 128, 256: 80}
    tail_rows = max(_TILES.values()) - 1
    mixes = True

    def tail(self, head_dim: int, kv_dtype: torch.dtype | None = None) -> int:
        return next((rows for dim, rows in self._TILES.items() if head_dim <= dim), self.tail_rows + 1) - 1

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        if torch.cuda.get_device_capability()[0] != 9:
            return "it needs a Hopper device"
        return None if _flash3() else "fa3-fwd is not installed: pip install vattn[fa3]"

    def refuses(self, task: AttentionSpec) -> str | None:
        if reason := refused_by_flash(task, (torch.bfloat16,)):  # the 16-bit dtype that fa3-fwd is built for
            return reason
        if task.queries != "one" and task.window:
            return "it has windows in decoding only"
        return None

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        offsets, lengths = offsets_of(k, spans)
        heads, capped = (q.shape[1], *k.shape[2:]), bool(scores.softcap)
        # The schedule, by which the kernel splits the ranges into parts, is the same for all layers.
        schedule = spans.once(("fa3", heads, capped), lambda: _flash3().get_scheduler_metadata(
            len(spans), _MOST_QUERIES, spans.longest, *heads, lengths, cu_seqlens_q=one_each(spans), causal=True,
            has_softcap=capped,
        ))  # fmt: skip
        out, lse, *_ = _flash3_forward()(
            q, slots_as_rows(k), slots_as_rows(v), cu_seqlens_q=one_each(spans), cu_seqlens_k=offsets,
            seqused_k=lengths, max_seqlen_q=_MOST_QUERIES, max_seqlen_k=spans.longest, softmax_scale=scores.scale,
            causal=True, softcap=scores.softcap or 0.0, scheduler_metadata=schedule, num_splits=0,
        )  # fmt: skip
        return with_sinks(out, lse.t(), scores.sinks) if scores.sinks is not None else out

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: SequenceRanges,
        counts: list[int],
        scores: AttentionParams,
    ) -> torch.Tensor:
        if len(counts) > 1:
            return self.mixed(q, k, v, spans, several_each(spans, counts), max(counts), scores)
        # On slices of just the range the kernel is faster, and loads no rows behind it.
        [(slot, start, end)] = spans.tolist()
        out, lse, *_ = _flash3_forward()(
            q[None], k[slot, None, start:end], v[slot, None, start:end], softmax_scale=scores.scale, causal=True,
            softcap=scores.softcap or 0.0,
        )  # fmt: skip
        return with_sinks(out[0], lse[0].t(), scores.sinks) if scores.sinks is not None else out[0]

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
        starts, lengths = offsets_of(k, spans)
        # Ranges are split into parts where there are too few queries to keep the device busy.
        splits = 0 if len(q) <= _FEW_QUERIES else 1
        made, lse, *_ = _flash3_forward()(
            q, slots_as_rows(k), slots_as_rows(v), out_=out, cu_seqlens_q=offsets, cu_seqlens_k=starts,
            seqused_k=lengths, max_seqlen_q=most, max_seqlen_k=spans.longest, softmax_scale=scores.scale, causal=True,
            softcap=scores.softcap or 0.0, num_splits=splits,
        )  # fmt: skip
        if scores.sinks is not None:
            return with_sinks(made, lse.t(), scores.sinks)
        return made if out is None else out


@functools.cache
def _flash3() -> Any:
    try:
        import fa3_fwd_interface
    except (ImportError, OSError):
        return None
    return fa3_fwd_interface


@functools.cache
def _flash3_forward() -> Any:
    """The function behind the operator that fa3-fwd registers, whose call takes some 0.1 ms of the host's time."""
    forward = _flash3()._flash_attn_forward
    return getattr(forward, "_init_fn", forward)
