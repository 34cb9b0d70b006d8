"""``Kernel``, the interface of all attention kernels, the descriptions that it takes, and helpers for its backends.

K and V are slot tensors: views ``[slots, max_len, kv_heads, head_dim]`` whose last dimension has stride 1 and whose
other strides are arbitrary, as ``KVCache.k`` and ``KVCache.v`` return them. A query sees a range of the rows of its
sequence's slot; ``SequenceRanges`` holds the ranges of a batch. A kernel loads no rows outside of these ranges, except
for up to ``head_rows`` before and ``tail_rows`` behind each range, which therefore must be mapped and finite.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from vattn.transfer import upload

HALVES = (torch.float16, torch.bfloat16)


class SequenceRanges:
    """The rows that the queries of each sequence of a batch see: the range ``[start, end)`` of a slot.

    Args:
        slots: int32 ``[batch]``, the slot of each sequence.
        starts: int32 ``[batch]``, the first row that a query may see. The rows before it are padding, or outside of the
            sliding window.
        ends: int32 ``[batch]``, one past the last row.
        longest: an upper bound on the rows of every range, for kernels that plan on the host. The tensors may change
            between replays of a captured graph, but this bound stays what it was at the capture.
        adjacent: whether ``slots`` are known to be 0, 1, 2 and so on.
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
        """Makes the ranges from ``(slot, start, end)`` of each sequence."""
        table = upload(torch.tensor(spans, dtype=torch.int32).t().contiguous(), torch.device(device))
        adjacent = [slot for slot, _, _ in spans] == list(range(len(spans)))
        made = cls(*table, longest=max(end - start for _, start, end in spans), adjacent=adjacent)
        made.once("list", lambda: [tuple(span) for span in spans])  # which need not be asked of the device
        return made

    def __len__(self) -> int:
        return self.slots.shape[0]

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of ``make``, which is called only once for all layers that see these ranges.

        Args:
            key: identifies the result, e.g. a kernel's own tables for these ranges.
            make: computes it.
        """
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def tolist(self) -> list[tuple[int, int, int]]:
        """``(slot, start, end)`` of each sequence. On a GPU the first call waits for the device; later ones do not."""
        rows: list[tuple[int, int, int]] = self.once(
            "list", lambda: [tuple(row) for row in torch.stack((self.slots, self.starts, self.ends), 1).tolist()]
        )
        return rows


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The attention that a kernel is asked to compute, by the properties that kernels support or refuse.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of the queries.
        query_heads: heads of the queries.
        kv_heads: heads of K and V.
        head_dim: of queries and K.
        v_head_dim: of V.
        kv_dtype: of K and V, or None where it is that of the queries.
        queries: ``"one"`` for a decode step, ``"first"`` for a prompt that begins its sequence, ``"chunk"`` for several
            queries of a sequence that has earlier positions.
        window: whether each query sees a limited number of rows, itself included.
        softcap: whether scores are capped, see ``AttentionParams``.
        sinks: whether heads have sinks, see ``AttentionParams``.
        whole_slots: whether slots are a whole number of rows apart, and the same number in K and V. All slots of a
            tensor can then be addressed as one sequence of rows.
        reach: elements from the first to the last one of a slot tensor, the larger number of K and V.
        rows: rows from the first to the last one of all slots, where ``whole_slots`` holds.
        adjacent: whether the sequences of a batch are in the slots 0, 1, 2 and so on.
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
    adjacent: bool = True

    @classmethod
    def of(cls, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **more: Any) -> AttentionSpec:
        """Describes the attention of queries on slot tensors.

        Args:
            q: ``[..., query_heads, head_dim]``.
            k: slot tensor.
            v: slot tensor.
            more: the attributes that the tensors do not tell, e.g. ``queries``.
        """
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
    """Whether the slots of K are as many rows apart as those of V."""
    return k.stride(0) * v.stride(1) == v.stride(0) * k.stride(1)


def reach_of(*tensors: torch.Tensor) -> int:
    """Elements from the first to the last one of a strided tensor; of several tensors the largest number."""
    return max(sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) for t in tensors)


@dataclass(frozen=True, kw_only=True)
class AttentionParams:
    """How the scores of queries and keys are computed, and which of them count.

    Args:
        scale: scores are the products of queries and keys, times this.
        softcap: a score s becomes ``softcap * tanh(s / softcap)``; None leaves it as it is.
        sinks: ``[query_heads]``, for each head a score that takes part in the softmax and has no value; or None.
        window: how many rows a query of a prompt sees, itself included; None for all before it. ``Kernel.decode`` does
            not need it, since the ranges already begin at the window.
    """

    scale: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    window: int | None = None


class Kernel:
    """One attention kernel.

    Attributes:
        name: the name by which ``choose`` finds it.
        source: the library that it comes from.
        head_rows: how many rows before a range the kernel loads at most, without using them.
        tail_rows: the same behind a range, for any head dim and dtype; see ``tail``.
        capturable: whether a decode step can be captured into a CUDA graph and replayed while the ranges grow.
        kv_dtypes: dtypes of K and V that ``decode`` takes besides that of the queries.
        narrows: whether the kernel rounds queries and attention weights to such a dtype, too.
        mixes: whether there is ``mixed``.
        measured: whether its speed is compared with that of others: for some, being set up takes longer than it saves.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    head_rows: ClassVar[int] = 0
    tail_rows: ClassVar[int] = 0
    capturable: ClassVar[bool] = True
    kv_dtypes: ClassVar[tuple[torch.dtype, ...]] = ()
    narrows: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    measured: ClassVar[bool] = True

    def tail(self, head_dim: int, kv_dtype: torch.dtype | None = None) -> int:
        """How many rows behind a range the kernel loads at most; never more than ``tail_rows``.

        Args:
            head_dim: of K.
            kv_dtype: of K and V, or None where it is that of the queries.
        """
        return self.tail_rows

    def missing(self) -> str | None:
        """Why the kernel cannot run on this machine, or None where it can."""
        return None

    def refuses(self, task: AttentionSpec) -> str | None:
        """Why the kernel cannot compute the attention ``task``, or None where it can."""
        raise NotImplementedError

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        """Computes the attention of one query for each sequence, which sees all rows of its range.

        Args:
            q: ``[batch, query_heads, head_dim]``.
            k: slot tensor ``[slots, max_len, kv_heads, head_dim]``.
            v: slot tensor ``[slots, max_len, kv_heads, v_head_dim]``.
            spans: the ranges of ``batch`` sequences.
            scores: how scores are computed.

        Returns:
            ``[batch, query_heads, v_head_dim]``. The values for an empty range are undefined.
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
        """Computes the causal attention of the last ``counts[i]`` positions of range i.

        Args:
            q: ``[sum(counts), query_heads, head_dim]``, one sequence after the other.
            k: as in ``decode``.
            v: as in ``decode``.
            spans: the ranges of ``len(counts)`` sequences, the rows of the queries included.
            counts: the number of queries of each sequence.
            scores: how scores are computed.

        Returns:
            ``[sum(counts), query_heads, v_head_dim]``.
        """
        raise NotImplementedError

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
        """Computes prompts and single queries at once, as ``prefill`` does. A call can be captured where decodes can.

        Args:
            q: ``[n, query_heads, head_dim]``, one sequence after the other.
            k: as in ``decode``.
            v: as in ``decode``.
            spans: the ranges of ``batch`` sequences, the rows of the queries included.
            offsets: where the queries of each sequence begin, and behind them the end of the last, int32
                ``[batch + 1]``. A sequence may have no queries.
            most: an upper bound on the queries of every sequence.
            scores: how scores are computed.
            out: contiguous memory that the result may be written to, of its shape and dtype; or None.

        Returns:
            ``[n, query_heads, v_head_dim]``, which may be ``out``. Its values are undefined behind the queries of the
            last sequence.
        """
        raise NotImplementedError


def refused_dims(task: AttentionSpec) -> str | None:
    """Why kernels that need equal head dims of K and V cannot compute the attention ``task``, or None if they can."""
    fits = task.head_dim == task.v_head_dim <= 256 and task.head_dim % 8 == 0
    return None if fits else "it takes equal head dims of K and V, multiples of 8 up to 256"


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Corrects the output of attention that was computed without sinks, as if they had been part of its softmax.

    Args:
        out: the output, ``[..., heads, dim]``.
        lse: the logarithm of the softmax's denominator, ``[..., heads]``.
        sinks: the score of each head's sink, ``[heads]``.
    """
    return (out * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None]).to(out.dtype)


def many_shapes() -> Any:
    """A context in which torch compiles a function for up to 1024 shapes; outside of it, torch gives up after eight."""
    return torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024)


def slots_as_rows(t: torch.Tensor) -> torch.Tensor:
    """All slots of a tensor as one sequence of rows, ``[rows, kv_heads, dim]``. Requires ``whole_slots``."""
    rows = (t.shape[0] - 1) * (t.stride(0) // t.stride(1)) + t.shape[1]
    return t.as_strided((rows, *t.shape[2:]), t.stride()[1:])


def offsets_of(k: torch.Tensor, spans: SequenceRanges) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each range begins in ``slots_as_rows``, int32 ``[batch + 1]``, and how many rows it has, ``[batch]``."""
    stride = k.stride(0) // k.stride(1)

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        # Kernels take one offset more than there are sequences, whose value they do not use.
        offsets = spans.slots.new_empty(len(spans) + 1)
        torch.add(spans.starts, spans.slots, alpha=stride, out=offsets[:-1])
        return offsets, spans.ends - spans.starts

    made: tuple[torch.Tensor, torch.Tensor] = spans.once(("offsets", stride), make)
    return made


def one_each(spans: SequenceRanges) -> torch.Tensor:
    """Offsets of the queries of a decode step, one query for each sequence: int32 ``[batch + 1]`` from 0 to batch."""
    return multiples_of(1, len(spans) + 1, spans.slots.device)


_multiples: dict[tuple[int, int, torch.device], torch.Tensor] = {}


def multiples_of(step: int, count: int, device: torch.device) -> torch.Tensor:
    """0, step, 2 * step and so on, int32 ``[count]``, which nobody may change: the memory is kept for later calls."""
    key = step, 1 << max(0, count - 1).bit_length(), device
    if (kept := _multiples.get(key)) is None:
        with torch.inference_mode(False):
            kept = torch.arange(key[1], dtype=torch.int32, device=device) * step
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return kept[:count]  # it belongs to the graph
            torch.cuda.current_stream(device).synchronize()  # other streams will read it
        _multiples[key] = kept
    return kept[:count]


def several_each(spans: SequenceRanges, counts: list[int]) -> torch.Tensor:
    """Offsets of the queries of a prompt, ``counts`` for each sequence: int32 ``[batch + 1]``."""
    offsets = list(itertools.accumulate(counts, initial=0))
    made: torch.Tensor = spans.once(("several", *counts), lambda: upload(offsets, spans.slots.device, torch.int32))
    return made


def refused_by_flash(task: AttentionSpec, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why kernels that read all slots as one sequence of rows cannot compute an attention, or None where they can.

    Args:
        task: the attention.
        dtypes: dtypes of queries that the kernels take.
    """
    if task.device != "cuda":
        return "it runs on cuda only"
    if task.dtype not in dtypes:
        return f"it computes in {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} only"
    if task.rows >= 2**31:
        return "it numbers 2**31 rows only: make the cache with fewer slots or a smaller max_len"
    return refused_dims(task) or (None if task.whole_slots else "a slot must be a whole number of rows")
