"""Stock attention kernels on slot tensors, each behind the same door.

K and V are slot tensors, ``[slots, max_len, kv_heads, head_dim]`` views with any strides but 1 for the last dimension,
as ``KVCache.k`` and ``KVCache.v`` give them. A sequence is a span of rows of a slot; a batch of them is
``SequenceRanges``. No kernel loads a row outside of the spans but up to ``head_rows`` before and ``tail_rows`` behind,
which then must be mapped and finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

HALVES = (torch.float16, torch.bfloat16)


class SequenceRanges:
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
    def of(cls, spans: list[tuple[int, int, int]], device: torch.device | str) -> SequenceRanges:
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
class AttentionSpec:
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
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> AttentionSpec:
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
class AttentionParams:
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

    def refuses(self, task: AttentionSpec) -> str | None:
        """Why it cannot do a task, or None."""
        raise NotImplementedError

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
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
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: SequenceRanges,
        counts: list[int],
        scores: AttentionParams,
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


def refused_dims(task: AttentionSpec) -> str | None:
    """Why kernels that take equal head dims of K and V cannot do a task, or None."""
    fits = task.head_dim == task.v_head_dim <= 256 and task.head_dim % 8 == 0
    return None if fits else "it takes equal head dims of K and V, multiples of 8 up to 256"


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """What a sink leaves of attention without one: out ``[..., heads, dim]``, lse ``[..., heads]`` of its softmax."""
    return (out * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None]).to(out.dtype)


def many_shapes() -> Any:
    """While it lasts torch compiles a function for as many shapes as come; else it gives up after eight."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)


def slots_as_rows(t: torch.Tensor) -> torch.Tensor:
    """The slots of a tensor as one row after the other, ``[rows, kv_heads, dim]``."""
    rows = (t.shape[0] - 1) * (t.stride(0) // t.stride(1)) + t.shape[1]
    return t.as_strided((rows, *t.shape[2:]), t.stride()[1:])


def offsets_of(k: torch.Tensor, spans: SequenceRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row of each span among those of all slots, and how many there are."""
    stride = k.stride(0) // k.stride(1)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        # One more than the sequences, which is not looked at.
        return functional.pad(spans.slots * stride + spans.starts, (0, 1)), spans.ends - spans.starts

    made: tuple[torch.Tensor, torch.Tensor] = spans.once(("offsets", stride), make)
    return made


def one_each(spans: SequenceRanges) -> torch.Tensor:
    """Where the queries of a decode step begin, and end."""
    device = spans.slots.device
    made: torch.Tensor = spans.once("one", lambda: torch.arange(len(spans) + 1, dtype=torch.int32, device=device))
    return made


def refused_by_flash(task: AttentionSpec, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why kernels that read all slots as one row after the other, in some dtypes, cannot do a task, or None."""
    if task.device != "cuda":
        return "it runs on cuda only"
    if task.dtype not in dtypes:
        return f"it computes in {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} only"
    if task.rows >= 2**31:
        return "it numbers 2**31 rows only: make the cache with fewer slots or a smaller max_len"
    return refused_dims(task) or (None if task.whole_slots else "a slot must be a whole number of rows")
