"""Stock attention kernels on slot tensors, each behind the same door.

K and V are slot tensors, ``[slots, max_len, kv_heads, head_dim]`` views with any strides but 1 for the last dimension,
as ``KVCache.k`` and ``KVCache.v`` give them. A sequence is a span of rows of a slot; a batch of them is ``Spans``. No
kernel loads a row outside of the spans but up to ``head_rows`` before and ``tail_rows`` behind, which then must be
mapped and finite.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vattn.arguments import shown

_HALVES = (torch.float16, torch.bfloat16)


class Spans:
    """Where the sequences of a batch have their rows: ``[start, end)`` of a slot each.

    Args:
        slots: int32 ``[batch]``, indices of the slots.
        starts: int32 ``[batch]``, the first row that a query may see: behind padding, or before it lies no window.
        ends: int32 ``[batch]``, one past the last row.
        longest: the most rows that any of them may come to have, for who plans on the host. The tensors may change
            between replays of a captured graph, this may not.
        adjacent: whether ``slots`` are known to count up by one from 0 on.
    """

    def __init__(
        self,
        slots: torch.Tensor,
        starts: torch.Tensor,
        ends: torch.Tensor,
        *,
        longest: int,
        adjacent: bool = False,
    ) -> None:
        self.slots, self.starts, self.ends = slots, starts, ends
        self.longest = longest
        self.adjacent = adjacent
        self._made: dict[Any, Any] = {}

    @classmethod
    def of(cls, spans: list[tuple[int, int, int]], device: torch.device | str) -> Spans:
        """Of (slot, start, end) each."""
        table = torch.tensor(spans, dtype=torch.int32, device=device).t().contiguous()
        adjacent = [slot for slot, _, _ in spans] == list(range(len(spans)))
        return cls(*table, longest=max(end - start for _, start, end in spans), adjacent=adjacent)

    def __len__(self) -> int:
        return self.slots.shape[0]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What is the same for all layers that see these spans, e.g. a kernel's own way to describe them."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def tolist(self) -> list[tuple[int, int, int]]:
        """(slot, start, end) each; waits for a device."""
        rows: list[tuple[int, int, int]] = self.once(
            "list", lambda: [tuple(row) for row in torch.stack((self.slots, self.starts, self.ends), 1).tolist()]
        )
        return rows


@dataclass(frozen=True, kw_only=True)
class Task:
    """What a kernel is to do; its parts are what kernels differ in.

    ``queries`` is ``"one"`` for a decode step, ``"first"`` for a prompt that begins its sequence, ``"chunk"`` for
    several queries behind a past. ``whole_slots``: a slot is a whole number of rows, of K as of V, so that the slots of
    a tensor are one row after the other. ``window``: queries see only so many rows, themselves included.
    ``kv_dtype``: of K and V, where it is not that of queries. ``reach``: elements from the first to the last one of a
    slot tensor. ``rows``: rows of all slots, where slots are whole numbers of them.
    """

    device: str
    dtype: torch.dtype
    query_heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int
    kv_dtype: torch.dtype | None = None
    queries: str = "one"
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    whole_slots: bool = True
    reach: int = 0
    rows: int = 0

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> Task:
        """From q ``[..., query_heads, head_dim]`` and slot tensors."""
        return cls(
            device=q.device.type,
            dtype=q.dtype,
            query_heads=q.shape[-2],
            kv_heads=k.shape[-2],
            head_dim=k.shape[-1],
            v_head_dim=v.shape[-1],
            kv_dtype=None if k.dtype == q.dtype else k.dtype,
            whole_slots=all(t.stride(0) % t.stride(1) == 0 for t in (k, v)) and alike(k, v),
            reach=reach_of(k, v),
            rows=max((len(t) - 1) * (t.stride(0) // t.stride(1)) + t.shape[1] for t in (k, v)),
            **more,
        )


def alike(k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether slots are as many rows apart in K as in V."""
    return k.stride(0) * v.stride(1) == v.stride(0) * k.stride(1)


def reach_of(*tensors: torch.Tensor) -> int:
    """Elements from the first to the last one of a tensor, the most of some."""
    return max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)


@dataclass(frozen=True, kw_only=True)
class Scores:
    """How the scores of queries and keys are made, and which of them count.

    Args:
        scale: they are the products times this.
        softcap: scores s become ``softcap * tanh(s / softcap)``.
        sinks: ``[query_heads]``, a score for each head that takes part in the softmax and has no value.
        window: rows that a query of a prompt sees, itself included. In decoding the spans say it.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    window: int | None = None


class Kernel:
    """One attention kernel.

    ``source`` says where it comes from; ``head_rows`` and ``tail_rows`` are how many rows before and behind a span it
    may load at most, without using them, see ``tail``; ``capturable`` says whether a decode step can be captured into a
    CUDA graph, and replayed while the spans grow.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    head_rows: ClassVar[int] = 0
    tail_rows: ClassVar[int] = 0
    capturable: ClassVar[bool] = True
    kv_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()  # of K and V in decoding, beside that of queries
    narrows: ClassVar[bool] = False  # rounds queries and weights to such a dtype, too

    def tail(self, head_dim: int) -> int:
        """Rows behind a span that it may load at a head dim, at most ``tail_rows``."""
        return self.tail_rows

    def missing(self) -> str | None:
        """Why the kernel cannot run on this machine, or None."""
        return None

    def refuses(self, task: Task) -> str | None:
        """Why it cannot do a task, or None."""
        raise NotImplementedError

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        """Attention of one query for each span, which sees all of its rows; where there are none it gives anything.

        Args:
            q: ``[batch, query_heads, head_dim]``.
            k: slot tensor ``[slots, max_len, kv_heads, head_dim]``.
            v: slot tensor ``[slots, max_len, kv_heads, v_head_dim]``.
            spans: of ``batch`` sequences.
            scores: how they are made.

        Returns:
            ``[batch, query_heads, v_head_dim]``.
        """
        raise NotImplementedError

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, counts: list[int], scores: Scores
    ) -> torch.Tensor:
        """Causal attention of the last ``counts[i]`` positions of each span.

        Args:
            q: ``[sum(counts), query_heads, head_dim]``, one sequence after the other.
            k: as in ``decode``.
            v: as in ``decode``.
            spans: of ``len(counts)`` sequences, the new rows included.
            counts: queries of each.
            scores: how they are made.

        Returns:
            ``[sum(counts), query_heads, v_head_dim]``.
        """
        raise NotImplementedError


def _plainly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scores) -> torch.Tensor:
    """Causal attention of the last n of m positions: q ``[n, query_heads, dim]``, k and v ``[m, kv_heads, dim]``."""
    n, m, groups = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    kind = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(kind).repeat_interleave(groups, 1) for t in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.to(kind), k) * how.scale
    if how.softcap is not None:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    scores = scores.masked_fill(~_seen(n, m, how.window, q.device), -math.inf)
    if how.sinks is not None:
        scores = torch.cat((scores, how.sinks.to(kind)[:, None, None].expand(-1, n, 1)), 2)
    weights = scores.softmax(2)[:, :, :m]
    return torch.einsum("hnm,mhd->nhd", weights, v)


def _seen(n: int, m: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which of m positions the last n of them see, ``[n, m]``."""
    behind = torch.arange(m - n, m, device=device)[:, None] - torch.arange(m, device=device)
    return (behind >= 0) if window is None else (behind >= 0) & (behind < window)


class Reference(Kernel):
    """The definition, in float32 or wider, one sequence after the other."""

    name = "reference"
    source = "torch operations"
    capturable = False
    kv_dtypes = (torch.float8_e4m3fn, torch.float8_e5m2)

    def refuses(self, task: Task) -> str | None:
        return None

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        return self.prefill(q, k, v, spans, [1] * len(spans), scores)

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, counts: list[int], scores: Scores
    ) -> torch.Tensor:
        parts = [
            _plainly(queries, k[slot, start:end], v[slot, start:end], scores)
            for queries, (slot, start, end) in zip(torch.split(q, counts), spans.tolist(), strict=True)
        ]
        return torch.cat(parts).to(q.dtype)


def _refused_dims(task: Task) -> str | None:
    fits = task.head_dim == task.v_head_dim <= 256 and task.head_dim % 8 == 0
    return None if fits else "it takes equal head dims of K and V, multiples of 8 up to 256"


class Sdpa(Kernel):
    """``scaled_dot_product_attention`` on views that are sliced to the rows of a sequence, or of all of them."""

    source = "torch"
    capturable = False  # what is sliced is of one length

    def __init__(self, name: str, backend: SDPBackend | None, *, masks: bool, gqa: bool, on: tuple[str, ...]) -> None:
        self.name = name  # type: ignore[misc]
        self._backend = backend
        self._masks = masks  # whether it takes any
        self._gqa = gqa
        self._on = on

    def refuses(self, task: Task) -> str | None:
        if task.device not in self._on:
            return f"it runs on {' and '.join(self._on)} only"
        if task.softcap or task.sinks:
            return "it has no soft cap and no sinks"
        if self._backend is not None:
            if task.dtype not in _HALVES and self._backend is not SDPBackend.EFFICIENT_ATTENTION:
                return "it computes in float16 and bfloat16 only"
            if reason := _refused_dims(task):
                return reason
            if self._backend is SDPBackend.CUDNN_ATTENTION and task.head_dim > 128:
                return "it takes head dims up to 128"
        if not self._gqa and task.query_heads != task.kv_heads:
            return "it takes as many query heads as KV heads"
        if not self._masks and (task.queries == "chunk" or (task.window and task.queries == "first")):
            return "it takes no mask, and so no window and no several queries behind a past"
        return None

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if self._backend is None or k.shape[2] == 1:  # cuDNN takes no single row
            return functional.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(self._backend):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        places = spans.tolist()
        options: dict[str, Any] = {"scale": scores.scale, "enable_gqa": q.shape[1] != k.shape[2]}
        _, start, end = places[0]
        if spans.adjacent and all(place[1:] == (start, end) for place in places):
            seen = (t[: len(spans), start:end].transpose(1, 2) for t in (k, v))
            return self._attend(q[:, :, None], *seen, **options)[:, :, 0]
        parts = [
            self._attend(q[i, None, :, None], *(t[slot, None, start:end].transpose(1, 2) for t in (k, v)), **options)
            for i, (slot, start, end) in enumerate(places)
        ]
        return torch.cat(parts)[:, :, 0]

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, counts: list[int], scores: Scores
    ) -> torch.Tensor:
        parts = []
        for queries, n, (slot, start, end) in zip(torch.split(q, counts), counts, spans.tolist(), strict=True):
            m = end - start
            options: dict[str, Any] = {"scale": scores.scale, "enable_gqa": q.shape[1] != k.shape[2]}
            if n == m and (scores.window is None or scores.window >= m):
                options["is_causal"] = True
            elif n > 1 or scores.window is not None:
                options["attn_mask"] = _seen(n, m, scores.window, q.device)
            seen = (t[slot, None, start:end].transpose(1, 2) for t in (k, v))
            parts.append(self._attend(queries.transpose(0, 1)[None], *seen, **options)[0].transpose(0, 1))
        return torch.cat(parts)


def _with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What a sink leaves of attention without one: out ``[..., heads, dim]``, lse ``[..., heads]`` of its softmax."""
    return (out * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None]).to(out.dtype)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """The slots of a tensor as one row after the other, ``[rows, kv_heads, dim]``."""
    rows = (t.shape[0] - 1) * (t.stride(0) // t.stride(1)) + t.shape[1]
    return t.as_strided((rows, *t.shape[2:]), t.stride()[1:])


def _offsets(k: torch.Tensor, spans: Spans) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row of each span among those of all slots, and how many there are."""
    stride = k.stride(0) // k.stride(1)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        # One more than the sequences, which is not looked at.
        return functional.pad(spans.slots * stride + spans.starts, (0, 1)), spans.ends - spans.starts

    made: tuple[torch.Tensor, torch.Tensor] = spans.once(("offsets", stride), make)
    return made


def _one_each(spans: Spans) -> torch.Tensor:
    """Where the queries of a decode step begin, and end."""
    device = spans.slots.device
    made: torch.Tensor = spans.once("one", lambda: torch.arange(len(spans) + 1, dtype=torch.int32, device=device))
    return made


def _refused_by_flash(task: Task, dtypes: tuple[torch.dtype, ...]) -> str | None:
    if task.device != "cuda":
        return "it runs on cuda only"
    if task.dtype not in dtypes:
        return f"it computes in {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} only"
    if task.rows >= 2**31:
        return "it numbers 2**31 rows only: make the cache with fewer slots or a smaller max_len"
    return _refused_dims(task) or (None if task.whole_slots else "a slot must be a whole number of rows")


class Flash2(Kernel):
    """FlashAttention-2 as torch carries it, by sequences of different lengths in one call."""

    name = "fa2"
    source = "torch (aten::_flash_attention_forward)"

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        return None if torch.backends.cuda.is_flash_attention_available() else "torch was built without it"

    def refuses(self, task: Task) -> str | None:
        if reason := _refused_by_flash(task, _HALVES):
            return reason
        if task.softcap:
            return "it has no soft cap"
        if task.sinks and task.queries != "one":
            return "it has sinks in decoding only"
        return None

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        offsets, lengths = _offsets(k, spans)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, _rows(k), _rows(v), _one_each(spans), offsets, 1, spans.longest, 0.0, False, False,
            scale=scores.scale, seqused_k=lengths,
        )  # fmt: skip
        return _with_sinks(out, lse.reshape(-1, len(spans)).t(), scores.sinks) if scores.sinks is not None else out

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, counts: list[int], scores: Scores
    ) -> torch.Tensor:
        offsets, lengths = _offsets(k, spans)
        firsts = [0]
        for count in counts:
            firsts.append(firsts[-1] + count)
        out: torch.Tensor = torch.ops.aten._flash_attention_forward(
            q, _rows(k), _rows(v), torch.tensor(firsts, dtype=torch.int32, device=q.device), offsets,
            max(counts), spans.longest, 0.0, True, False, scale=scores.scale, seqused_k=lengths,
            window_size_left=None if scores.window is None else scores.window - 1,
            window_size_right=None if scores.window is None else 0,
        )[0]  # fmt: skip
        return out


class Flash3(Kernel):
    """FlashAttention-3, for Hopper, from the package ``fa3-fwd`` (``pip install vattn[fa3]``)."""

    name = "fa3"
    source = "fa3-fwd"
    _TILES: ClassVar[dict[int, int]] = {64: 192, 96: 144, 128: 176, 192: 128, 256: 80}  # rows of K, by head dims up to
    tail_rows = max(_TILES.values()) - 1

    def tail(self, head_dim: int) -> int:
        return next((rows for dim, rows in self._TILES.items() if head_dim <= dim), self.tail_rows + 1) - 1

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        if torch.cuda.get_device_capability()[0] != 9:
            return "it needs a Hopper device"
        return None if _flash3() else "fa3-fwd is not installed: pip install vattn[fa3]"

    def refuses(self, task: Task) -> str | None:
        if reason := _refused_by_flash(task, (torch.bfloat16,)):  # of the dtypes it is built for
            return reason
        if task.queries != "one" and (task.sinks or task.window):
            return "it has sinks and windows in decoding only"
        return None

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        offsets, lengths = _offsets(k, spans)
        heads, capped = (q.shape[1], *k.shape[2:]), bool(scores.softcap)
        # How it splits the spans is the same for all layers.
        schedule = spans.once(("fa3", heads, capped), lambda: _flash3().get_scheduler_metadata(
            len(spans), 1, spans.longest, *heads, lengths, cu_seqlens_q=_one_each(spans), has_softcap=capped,
        ))  # fmt: skip
        out, lse, *_ = _flash3()._flash_attn_forward(
            q, _rows(k), _rows(v), cu_seqlens_q=_one_each(spans), cu_seqlens_k=offsets, seqused_k=lengths,
            max_seqlen_q=1, max_seqlen_k=spans.longest, softmax_scale=scores.scale, softcap=scores.softcap or 0.0,
            scheduler_metadata=schedule, num_splits=0,
        )  # fmt: skip
        return _with_sinks(out, lse.t(), scores.sinks) if scores.sinks is not None else out

    def prefill(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, counts: list[int], scores: Scores
    ) -> torch.Tensor:
        parts = []
        for queries, (slot, start, end) in zip(torch.split(q, counts), spans.tolist(), strict=True):
            # Sliced to the span it loads no row behind it.
            seen = (t[slot, None, start:end] for t in (k, v))
            out = _flash3().flash_attn_func(
                queries[None], *seen, softmax_scale=scores.scale, causal=True, softcap=scores.softcap or 0.0
            )  # fmt: skip
            parts.append(out[0])
        return torch.cat(parts)


@functools.cache
def _flash3() -> Any:
    try:
        import fa3_fwd_interface
    except (ImportError, OSError):
        return None
    return fa3_fwd_interface


class FlashInfer(Kernel):
    """FlashInfer's XQA for decoding and its FlashAttention-3 for prompts (``pip install vattn[flashinfer]``).

    XQA reads pages by a table. Here a page may begin at any row, so that the table is made of where spans begin, and
    nobody keeps it. Both are compiled at their first use.
    """

    name = "flashinfer"
    source = "flashinfer-python, compiled"
    kv_dtypes = (torch.float8_e4m3fn,)
    narrows = True  # on Hopper
    _PAGE = 64

    def missing(self) -> str | None:
        if not torch.cuda.is_available():
            return "it needs a CUDA device"
        if torch.cuda.get_device_capability()[0] not in (9, 10, 12):
            return "it needs a Hopper or Blackwell device"
        return None if _flashinfer() else "flashinfer-python is not installed: pip install vattn[flashinfer]"

    def refuses(self, task: Task) -> str | None:
        if reason := _refused_by_flash(task, _HALVES):
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

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        offsets, lengths = _offsets(k, spans)
        table = spans.once(("pages", k.stride(0) // k.stride(1)), lambda: self._table(offsets[:-1], spans.longest))
        # A page begins at every row.
        k, v = (t.as_strided((t.shape[0], self._PAGE, *t.shape[2:]), (t.stride(1), *t.stride()[1:])) for t in (k, v))
        return self._paged(q, k, v, table, lengths, spans, scores)

    def _table(self, firsts: torch.Tensor, longest: int) -> torch.Tensor:
        steps = torch.arange(0, longest, self._PAGE, dtype=torch.int32, device=firsts.device)
        return firsts[:, None] + steps

    def _paged(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        table: torch.Tensor,
        lengths: torch.Tensor,
        spans: Spans,
        scores: Scores,
    ) -> torch.Tensor:
        batch, heads, dim = q.shape
        kv_heads, device = k.shape[2], q.device
        count = torch.cuda.get_device_properties(device).multi_processor_count
        # Partial results of as many blocks as the device has processors, or one for each head of a sequence.
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
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, counts: list[int], scores: Scores
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
        scores: Scores,
    ) -> Callable[[], torch.Tensor]:
        """Causal attention on pages ``[pages, rows, kv_heads, head_dim]``, planned; for comparison.

        Args:
            q: as in ``prefill``, or as in ``decode`` where ``counts`` are all 1.
            k: pages of K.
            v: pages of V.
            tables: of each sequence, int32 indices of its pages.
            lengths: rows of each.
            counts: queries of each.
            scores: how they are made.
        """
        size, device = k.shape[1], q.device
        if max(counts) == 1:
            longest = max(len(table) for table in tables)
            table = torch.stack([functional.pad(table, (0, longest - len(table))) for table in tables])
            spans = Spans.of([(slot, 0, length) for slot, length in enumerate(lengths)], device)
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


class Flex(Kernel):
    """``flex_attention``, compiled: soft caps, sinks, and K and V of different head dims."""

    name = "flex"
    source = "torch, compiled"
    head_rows = tail_rows = 127
    _BLOCK = 128

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "it needs a CUDA device"

    def refuses(self, task: Task) -> str | None:
        if task.device != "cuda":
            return "it runs on cuda only"
        if task.queries != "one":
            return "it is used for decoding only"
        if min(task.head_dim, task.v_head_dim) < 16:
            return "it takes head dims from 16 on"
        return None if task.reach < 2**31 else "it reaches 2**31 elements only"  # beyond it does not compile

    def decode(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: Spans, scores: Scores) -> torch.Tensor:
        if not spans.adjacent:
            raise NotImplementedError("flex reads slots side by side from the first on")
        batch, longest = len(spans), k.shape[1]
        mask = spans.once(("flex", longest), lambda: self._mask(spans, longest))
        k, v = (t[:batch].transpose(1, 2) for t in (k, v))
        with many_shapes():
            out, lse = _flex()(
                q[:, :, None], k, v, score_mod=_capped(scores.softcap) if scores.softcap else None, block_mask=mask,
                scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1], return_lse=True,
            )  # fmt: skip
        return _with_sinks(out[:, :, 0], lse[:, :, 0], scores.sinks) if scores.sinks is not None else out[:, :, 0]

    def _mask(self, spans: Spans, longest: int) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        first = spans.starts // self._BLOCK
        blocks = torch.arange(-(-longest // self._BLOCK), dtype=torch.int32, device=first.device)
        number = (spans.ends + self._BLOCK - 1) // self._BLOCK - first
        starts, ends = spans.starts, spans.ends

        def seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return (kv >= starts[b]) & (kv < ends[b])

        indices = torch.clamp_max(first[:, None] + blocks, blocks.shape[0] - 1)
        return BlockMask.from_kv_blocks(
            number[:, None, None].to(torch.int32),
            indices[:, None, None].to(torch.int32),
            BLOCK_SIZE=(self._BLOCK, self._BLOCK),
            mask_mod=seen,
            seq_lengths=(1, longest),
            compute_q_blocks=False,
        )


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _capped(softcap: float) -> Any:
    def capped(score: torch.Tensor, b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped


KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Flash3(),
        Flash2(),
        FlashInfer(),
        Flex(),
        Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, masks=False, gqa=True, on=("cuda",)),
        Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, masks=False, gqa=True, on=("cuda",)),
        Sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, masks=False, gqa=False, on=("cuda",)),
        Sdpa("sdpa", None, masks=True, gqa=True, on=("cpu", "cuda")),
        Reference(),
    )
}
"""The kernels by name, in the order in which ``choose`` tries them: see docs/benchmarks.md for their speed."""


def named(name: str) -> list[Kernel]:
    """The kernel of a name, or of ``"auto"`` all of them."""
    if not isinstance(name, str) or (name != "auto" and name not in KERNELS):
        raise ValueError(f"attention must be 'auto' or one of {', '.join(KERNELS)}, not {shown(name)}")
    return list(KERNELS.values()) if name == "auto" else [KERNELS[name]]


def many_shapes() -> Any:
    """While it lasts torch compiles a function for as many shapes as come; else it gives up after eight."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)


def _refused_kv(kernel: Kernel, task: Task) -> str | None:
    if task.kv_dtype is None or (task.kv_dtype in kernel.kv_dtypes and task.queries == "one"):
        return None
    return f"it takes no {str(task.kv_dtype).removeprefix('torch.')} K and V"


def choose(task: Task, *, name: str = "auto", capturable: bool = False) -> Kernel:
    """The kernel for a task: the one named, or the first that this machine has and that does it.

    Args:
        task: what it is to do.
        name: a key of ``KERNELS``, or ``"auto"``.
        capturable: leaves out those that cannot be captured.

    Raises:
        ValueError: there is none; says of each why.
    """
    reasons = []
    for kernel in named(name):
        reason = kernel.missing() or _refused_kv(kernel, task) or kernel.refuses(task)
        if not reason and capturable and not kernel.capturable:
            reason = "it cannot be captured"
        if not reason:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(f"no attention kernel for {task}: {'; '.join(reasons)}")
