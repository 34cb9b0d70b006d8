"""``FlatContext``: a call of a model that computes positions of several sequences, one after the other, on slots."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vattn import kernels
from vattn.kernels import AttentionParams, AttentionSpec, Kernel, SequenceRanges
from vattn.kernels.append import append
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import PassthroughCache, UnsupportedError, attending
from vattn.models.flat_watch import FlatWatch
from vattn.transfer import upload


@dataclass(frozen=True)
class Segment:
    """Positions of one sequence in a flat call.

    Args:
        slot: where its rows are.
        start: the first position that is computed; earlier ones are computed already.
        count: positions that are computed.
    """

    slot: int
    start: int
    count: int


@dataclass(frozen=True)
class Decodes:
    """One position of each of several sequences in a flat call, as tensors on the device.

    Args:
        slots: where the rows are, int64 ``[n]``.
        ends: one past the position that is computed, int32 ``[n]``; 0 of idle rows, which compute nothing of use.
        longest: an upper bound on the positions of every sequence.
        adjacent: whether the slots are known to be 0, 1, 2 and so on.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    longest: int
    adjacent: bool = False


@dataclass(frozen=True, eq=False)
class Part:
    """Segments of a flat call whose attention one kernel computes: those of one token each, or the others.

    Args:
        segments: in the order of the tokens; or positions as tensors.
        tokens: the indices of their tokens in the call, int64; a slice where these follow each other.
        decodes: whether each segment has one token.
    """

    segments: list[Segment] | Decodes
    tokens: torch.Tensor | slice
    decodes: bool


def parts_of(segments: list[Segment], first: int, device: torch.device) -> list[Part]:
    """Parts segments of a flat call by whether they have one token.

    Args:
        segments: at least one.
        first: the index of their first token in the call.
        device: of the call.
    """
    if len({segment.count == 1 for segment in segments}) == 1:
        total = sum(segment.count for segment in segments)
        return [Part(segments, slice(first, first + total), segments[0].count == 1)]
    parts, at = [], first
    places: list[tuple[Segment, range]] = []
    for segment in segments:
        places.append((segment, range(at, at + segment.count)))
        at += segment.count
    for decodes in (True, False):
        mine = [(segment, tokens) for segment, tokens in places if (segment.count == 1) == decodes]
        tokens = upload([each for _, tokens in mine for each in tokens], device)
        parts.append(Part([segment for segment, _ in mine], tokens, decodes))
    return parts


_Rows = tuple[torch.Tensor, torch.Tensor]  # slot tensors of K and V


@dataclass
class _Call:
    """What is known of a flat call.

    Args:
        slots: of each token, int64 ``[T]``.
        ends: one past the position of each token, int32 ``[T]``; 0 of idle rows.
        parts: of the call, in the order of the tokens.

    Attributes:
        returned: by ``id`` of the K that was appended to a layer: the layer, K and V.
        ranges: of rows that the queries of a part see, by part and window.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    parts: list[Part]
    returned: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    ranges: dict[tuple[Part, int | None], SequenceRanges] = field(default_factory=dict)


class FlatContext:
    """Appends K and V to the slots of a ``KVCache``, and attends to them, in a flat call of a model.

    A flat call has one row of tokens, ``[1, T]``, in which the segments of several sequences follow each other.

    Args:
        cache: holds the rows. Those of all segments must be mapped, and the ``margin`` rows behind them.
        configs: the configurations of the model.
        attention: the name of the kernel, or ``"auto"``.
        margin: rows behind those of a sequence that kernels may load.

    Attributes:
        watch: checks calls; None where these are not verified.
        shares_kv_across_layers: whether a layer was seen to attend to the K and V of another one.
    """

    own_attention = False  # the attention is vattn's, see ``models.attention``
    store = None  # no ``VirtualCache`` takes part

    def __init__(self, cache: KVCache, configs: list[Any], attention: str = "auto", margin: int = 0) -> None:
        self._cache, self._configs, self._attention, self._margin = cache, configs, attention, margin
        self.watch: FlatWatch | None = None
        self.shares_kv_across_layers = False
        self._windows = [None if shape is None else shape.window for shape in cache.layout.layers]
        self._kernels: dict[Any, Kernel] = {}
        self._call: _Call | None = None

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that were chosen so far."""
        return sorted({kernel.name for kernel in self._kernels.values()})

    def call(
        self, model: Any, keyword: str, segments: list[Segment], decodes: Decodes | None = None, **given: Any
    ) -> Any:
        """Calls a model on segments.

        Args:
            model: the model.
            keyword: the argument by which it takes a cache.
            segments: in the order of the tokens.
            decodes: further positions, whose tokens come before those of the segments.
            given: other arguments of the model.

        Raises:
            UnsupportedError: the model's attention cannot be computed so.
        """
        device = self._cache.device
        parts: list[Part] = []
        slots, ends = [], []
        if decodes is not None:
            parts.append(Part(decodes, slice(0, len(decodes.slots)), decodes=True))
            slots.append(decodes.slots)
            ends.append(decodes.ends)
        if segments:
            parts += parts_of(segments, 0 if decodes is None else len(decodes.slots), device)
            counts = torch.tensor([segment.count for segment in segments])
            starts = torch.tensor([segment.start for segment in segments]).repeat_interleave(counts)
            firsts = (counts.cumsum(0) - counts).repeat_interleave(counts)
            of_each = torch.tensor([segment.slot for segment in segments]).repeat_interleave(counts)
            slots.append(upload(of_each, device))
            ends.append(upload((starts + torch.arange(1, len(starts) + 1) - firsts).int(), device))
        self._call = _Call(torch.cat(slots), torch.cat(ends), parts)
        positions = (self._call.ends.long() - 1).clamp_min(0)
        try:
            with attending(self, self._configs):
                cache = _FlatCache(self, self._windows)
                return model(position_ids=positions[None], **{keyword: cache}, use_cache=True, **given)
        finally:
            self._call = None

    def _running(self) -> _Call:
        assert self._call is not None
        return self._call

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Writes K and V ``[1, kv_heads, T, dim]`` of a layer to their rows."""
        call = self._running()
        total = len(call.slots)
        if k.shape[0] != 1 or k.shape[2] != total:
            raise UnsupportedError(f"layer {layer} is given {tuple(k.shape)} for {total} tokens", of_model=True)
        k_new, v_new = (states[0].transpose(0, 1) for states in (k, v))
        append(k_new, v_new, *self._cache.slot_tensors(layer), call.ends, call.slots)
        call.returned[id(k)] = layer, k, v

    def attend(
        self, at: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams
    ) -> torch.Tensor:
        """Attention of q ``[1, query_heads, T, head_dim]`` on the layer that ``k`` and ``v`` were appended to.

        Returns:
            ``[1, T, query_heads, v_head_dim]``.
        """
        layer, keys, values = self._running().returned.get(id(k), (-1, None, None))
        if keys is not k or values is not v:
            raise UnsupportedError(
                "an attention function is given other K and V than the cache returned", of_model=True
            )
        if at != layer:
            self.shares_kv_across_layers = True
        return self.attend_to(layer, q, how, (k, v))

    def attend_to(
        self, layer: int, q: torch.Tensor, how: AttentionParams, new: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Attention on the rows of a layer.

        Args:
            layer: its index.
            q: ``[1, query_heads, T, head_dim]``.
            how: scale, softcap, sinks and window.
            new: what was appended to it, to be checked; or None.

        Returns:
            ``[1, T, query_heads, v_head_dim]``.
        """
        windows = [window for window in (self._windows[layer], how.window) if window is not None]
        how = replace(how, window=min(windows, default=None))
        rows, queries = self._cache.slot_tensors(layer), q[0].transpose(0, 1)
        out = queries.new_empty(*queries.shape[:2], rows[1].shape[3])
        for part in self._running().parts:
            got = (self._decoded if part.decodes else self._prefilled)(layer, queries[part.tokens], rows, part, how)
            if self.watch is not None and new is not None:
                self.watch.attended(layer, *got, part, queries, rows, new, how)
            out[part.tokens] = got[1]
        return out[None]

    def _decoded(
        self, layer: int, q: torch.Tensor, rows: _Rows, part: Part, how: AttentionParams
    ) -> tuple[Kernel, torch.Tensor]:
        """The kernel that computes one query for each segment, and what it computes."""
        kernel = self._kernel_for(layer, q, rows, how, "one")
        return kernel, kernel.decode(q, *rows, self._ranges_of(part, how.window), how)

    def _prefilled(
        self, layer: int, q: torch.Tensor, rows: _Rows, part: Part, how: AttentionParams
    ) -> tuple[Kernel, torch.Tensor]:
        """The same for several queries of each segment."""
        assert isinstance(part.segments, list)
        ranges = self._ranges_of(part, how.window)
        if rows[0].dtype.itemsize == 1:  # kernels read fp8 in decode steps only
            rows, ranges = self._widened(rows, ranges, q.dtype)
        kernel = self._kernel_for(layer, q, rows, how, "chunk")
        return kernel, kernel.prefill(q, *rows, ranges, [segment.count for segment in part.segments], how)

    def _widened(self, rows: _Rows, ranges: SequenceRanges, dtype: torch.dtype) -> tuple[_Rows, SequenceRanges]:
        """Copies of rows in another dtype, one range behind the other, and where they are in the copies."""
        spans = ranges.tolist()
        ends = list(itertools.accumulate(end - start for _, start, end in spans))
        made = []
        for each in rows:
            copies = torch.empty(1, ends[-1], *each.shape[2:], dtype=dtype, device=each.device)
            for last, (slot, start, end) in zip(ends, spans, strict=True):
                copies[0, last - (end - start) : last] = each[slot, start:end].to(dtype)
            made.append(copies)
        moved = [(0, last - (end - start), last) for last, (_, start, end) in zip(ends, spans, strict=True)]
        return (made[0], made[1]), SequenceRanges.of(moved, made[0].device)

    def _kernel_for(self, layer: int, q: torch.Tensor, rows: _Rows, how: AttentionParams, queries: str) -> Kernel:
        options: dict[str, Any] = {
            "window": how.window is not None,
            "softcap": how.softcap is not None,
            "sinks": how.sinks is not None,
        }
        key = layer, q.dtype, q.shape[1], queries, *options.values()
        if key not in self._kernels:
            spec = AttentionSpec.of(q, *rows, queries=queries, adjacent=False, **options)
            try:
                kernel = self._chosen(spec)
            except ValueError as error:
                raise UnsupportedError(str(error), of_model=True) from None
            if queries == "one" and (tail := kernel.tail(spec.head_dim, spec.kv_dtype)) > self._margin:
                raise UnsupportedError(f"{kernel.name} loads {tail} rows behind a sequence, of {self._margin} mapped")
            self._kernels[key] = kernel
        return self._kernels[key]

    def _chosen(self, spec: AttentionSpec) -> Kernel:
        """The kernel for some attention: where there is one for a decode step that can be captured, that one."""
        if spec.queries == "one":
            with contextlib.suppress(ValueError):
                return kernels.choose(spec, name=self._attention, capturable=True)
        return kernels.choose(spec, name=self._attention)

    def _ranges_of(self, part: Part, window: int | None) -> SequenceRanges:
        """The rows that the queries of each segment see; behind a sliding window earlier rows may not be mapped."""
        made = self._running().ranges
        if (part, window) not in made:
            made[part, window] = self._made_ranges(part.segments, window)
        return made[part, window]

    def _made_ranges(self, segments: list[Segment] | Decodes, window: int | None) -> SequenceRanges:
        if isinstance(segments, Decodes):
            ends = segments.ends
            starts = torch.zeros_like(ends) if window is None else (ends - window).clamp_min(0)
            longest = segments.longest if window is None else min(segments.longest, window)
            return SequenceRanges(segments.slots.int(), starts, ends, longest=longest, adjacent=segments.adjacent)
        ranges = []
        for segment in segments:
            first = 0 if window is None else max(0, segment.start - window + 1)
            ranges.append((segment.slot, first, segment.start + segment.count))
        return SequenceRanges.of(ranges, self._cache.device)


class _FlatCache(PassthroughCache):
    """The cache that a model sees in a flat call: K and V go to the context, and come back as they are."""

    def __init__(self, context: FlatContext, windows: list[int | None]) -> None:
        super().__init__(windows)
        self._context = context

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not torch.compiler.is_compiling():  # in compiled layers the attention function appends them
            self._context.append(layer_idx, key_states, value_states)
        return key_states, value_states
