"""FlashInfer: its XQA kernel for decode steps, and its prefill kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from vattn.kernels.base import (
    HALVES,
    AttentionParams,
    AttentionSpec,
    Kernel,
    SequenceRanges,
    multiples_of,
    offsets_of,
    refused_by_flash,
)


class FlashInfer(Kernel):
    """FlashInfer's XQA for decode steps, and its prefill kernel for prompts (``pip install vattn[flashinfer]``).

    The prefill kernel is FlashAttention-3 on Hopper. XQA reads K and V by a table of pages. Here a page may begin at
    any row, so the table is computed from the first rows of the ranges, and no cache has to maintain it. Both kernels
    are compiled at their first use.
    """

    name = "flashinfer"
    source = "flashinfer-python, compiled"
    kv_dtypes = (torch.float8_e4m3fn,)
    narrows = True  # as XQA does on Hopper
    _PAGE = 64
    tail_rows = _PAGE - 1

    def tail(self, head_dim: int, kv_dtype: torch.dtype | None = None) -> int:
        # XQA loads whole pages of fp8, and of other dtypes only the rows of the range.
        return 0 if kv_dtype is None or kv_dtype.itemsize > 1 else self.tail_rows

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        if torch.cuda.get_device_capability()[0] not in (9, 10, 12):
            return "it needs a Hopper or Blackwell device"
        return None if _flashinfer() else "flashinfer-python is not installed: pip install vattn[flashinfer]"

    def refuses(self, task: AttentionSpec) -> str | None:
        if reason := refused_by_flash(task, HALVES):
            return reason
        if task.queries != "one":
            fits = task.head_dim in (64, 128, 256)
            return (None if fits else "it takes head dims 64, 128 and 256") if not task.sinks else "it has no sinks"
        if task.softcap:
            return "it has no soft cap in decoding"
        if task.reach >= task.head_dim * 2**32:
            return "it reaches 2**32 heads only"
        if task.kv_dtype is not None and task.head_dim not in (64, 128, 256):
            return "it takes head dims 64, 128 and 256 of fp8"
        return None if task.head_dim % 16 == 0 else "it takes head dims that are multiples of 16"

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        offsets, lengths = offsets_of(k, spans)
        table = spans.once(("pages", k.stride(0) // k.stride(1)), lambda: self._table(offsets[:-1], spans.longest))
        # Page i is the _PAGE rows that begin at row i of all slots. Pages overlap, and the table's indices exceed the
        # first dimension of these views.
        k, v = (t.as_strided((t.shape[0], self._PAGE, *t.shape[2:]), (t.stride(1), *t.stride()[1:])) for t in (k, v))
        return self._paged(q, k, v, table, lengths, spans, scores)

    def _table(self, firsts: torch.Tensor, longest: int) -> torch.Tensor:
        """The pages of each range, int32 ``[batch, pages]``, by its first row ``[batch]``."""
        return firsts[:, None] + multiples_of(self._PAGE, -(-longest // self._PAGE), firsts.device)

    def _paged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        spans: SequenceRanges,
        scores: AttentionParams,
    ) -> torch.Tensor:
        batch, heads, dim = q.shape
        kv_heads, device = k.shape[2], q.device
        count = torch.cuda.get_device_properties(device).multi_processor_count
        # Room for the partial results of two blocks for each multiprocessor or, where that is more, of one for each KV
        # head of each sequence.
        size = 4 * max(2 * count, batch * kv_heads) * max(32, heads // kv_heads) * (dim + 64)
        scratch = spans.once(("scratch", size), lambda: torch.empty(size, dtype=torch.uint8, device=device))
        count = 4 * batch * kv_heads
        signals = spans.once(("signals", count), lambda: torch.zeros(count, dtype=torch.uint32, device=device))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        _flashinfer().xqa(
            q.contiguous()[:, None], k, v, table, lengths[:, None].view(torch.uint32), out[:, None], scratch, signals,
            kv_heads, self._PAGE, q_scale=scores.scale * dim**0.5,
            sinks=None if scores.sinks is None else scores.sinks.float().reshape(kv_heads, -1),
        )  # fmt: skip
        return out

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
            _flashinfer().single_prefill_with_kv_cache(
                queries, k[slot, start:end], v[slot, start:end], causal=True, sm_scale=scores.scale,
                logits_soft_cap=scores.softcap, window_left=-1 if scores.window is None else scores.window - 1,
            )
            for queries, (slot, start, end) in zip(torch.split(q, counts), spans.tolist(), strict=True)
        ]  # fmt: skip
        return torch.cat(parts)

    def paged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: list[torch.Tensor],
        lengths: list[int],
        counts: list[int],
        scores: AttentionParams,
    ) -> Callable[[], torch.Tensor]:
        """Plans causal attention on pages of K and V, for benchmarks that compare it with attention on slot tensors.

        Args:
            q: as in ``prefill``, or as in ``decode`` where ``counts`` are all 1.
            k: pages of K, ``[pages, rows, kv_heads, head_dim]``. Pages have 64 rows where ``counts`` are all 1.
            v: pages of V, of the same shape.
            tables: int32 indices of the pages of each sequence.
            lengths: the number of rows of each sequence.
            counts: the number of queries of each sequence.
            scores: how scores are computed.

        Returns:
            A function that computes the attention and returns its output, of the shape of ``q``.
        """
        size, device = k.shape[1], q.device
        if max(counts) == 1:
            longest = max(len(table) for table in tables)
            table = torch.stack([functional.pad(table, (0, longest - len(table))) for table in tables])
            spans = SequenceRanges.of([(slot, 0, length) for slot, length in enumerate(lengths)], device)
            return lambda: self._paged(q, k, v, table, spans.ends, spans, scores)
        planned = _flashinfer().BatchPrefillWithPagedKVCacheWrapper(
            torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD"
        )
        firsts, pages = torch.zeros(2, len(counts) + 1, dtype=torch.int32)
        firsts[1:], pages[1:] = torch.tensor(counts).cumsum(0), torch.tensor([len(t) for t in tables]).cumsum(0)
        planned.plan(
            firsts, pages, torch.cat(tables), torch.tensor([(n - 1) % size + 1 for n in lengths], dtype=torch.int32),
            q.shape[1], k.shape[2], q.shape[2], size, causal=True, sm_scale=scores.scale, q_data_type=q.dtype,
        )  # fmt: skip
        return lambda: planned.run(q, (k, v))


@functools.cache
def _flashinfer() -> Any:
    try:
        import flashinfer
    except (ImportError, OSError):
        return None
    return flashinfer
