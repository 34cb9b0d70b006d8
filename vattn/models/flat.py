"""``FlatContext``: a call of a model that computes positions of several sequences, one after the other, on slots."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch.nn import functional

from vattn import kernels
from vattn.kernels import AttentionParams, AttentionSpec, Kernel, SequenceRanges
from vattn.kernels.append import append
from vattn.kernels.base import multiples_of
from vattn.kernels.measure import FEW, decode_kernel
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
class Margins:
    """Rows around those that queries see, which kernels may load and which therefore are mapped.

    Args:
        before: before a sliding window.
        behind: behind a sequence.
        behind_prompts: the same of sequences of which several positions are computed, or that are computed beside such.
        behind_few: the same of at most ``FEW`` sequences that are computed a position each.
    """

    before: int = 0
    behind: int = 0
    behind_prompts: int = 0
    behind_few: int = 0

    @property
    def more_behind_prompts(self) -> int:
        """Rows behind prompts, also those of one position, that are not mapped behind every sequence."""
        return max(self.more_behind_few, self.behind_prompts - self.behind)

    @property
    def more_behind_few(self) -> int:
        """Rows behind few sequences that are not mapped behind every sequence."""
        return max(0, self.behind_few - self.behind)


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
class Mixture:
    """Any number of positions of each of several sequences in a flat call, as tensors on the device.

    Args:
        slots: where the rows of each sequence are, int64 ``[n]``.
        ends: one past the last position of each that is computed, int32 ``[n]``; 0 of idle sequences.
        counts: positions of each that are computed, int64 ``[n]``; 0 of idle sequences.
        total: tokens of the call. Those behind the last sequence compute nothing of use.
        longest: an upper bound on the positions of every sequence.
        most: an upper bound on the counts.

    Attributes:
        offsets: where the tokens of each sequence begin, and behind them the end of the last, int32 ``[n + 1]``.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    counts: torch.Tensor
    total: int
    longest: int
    most: int

    @classmethod
    def of(cls, segments: list[Segment], device: torch.device) -> Mixture:
        """That of segments."""
        given = [(each.slot, each.start + each.count, each.count) for each in segments]
        slots, ends, counts = upload(torch.tensor(given).t().contiguous(), device)
        total, longest, most = sum(n for _, _, n in given), max(end for _, end, _ in given), max(n for _, _, n in given)
        return cls(slots, ends.int(), counts, total, longest, most)

    @functools.cached_property
    def offsets(self) -> torch.Tensor:
        return functional.pad(self.counts.cumsum(0), (1, 0)).int()

    def of_tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The slot of each token, int64 ``[total]``, and one past its position, int32; 0 of those without use."""
        at = torch.arange(self.total, dtype=torch.int32, device=self.slots.device)
        sequence = torch.searchsorted(self.offsets[1:], at, right=True)
        there = sequence < len(self.slots)
        sequence = sequence.clamp_max(len(self.slots) - 1)
        ends = self.ends[sequence] - (self.offsets[1:][sequence] - 1 - at)
        return self.slots[sequence], ends.where(there, 0)


@dataclass(frozen=True, eq=False)
class Part:
    """Segments of a flat call whose attention one kernel computes: those of one token each, or the others.

    Args:
        segments: in the order of the tokens; or positions as tensors.
        tokens: the indices of their tokens in the call, int64; a slice where these follow each other.
        decodes: whether each segment has one token.
        mixture: the same for ``Kernel.mixed``; or None, where another method computes the part.
    """

    segments: list[Segment] | Decodes
    tokens: torch.Tensor | slice
    decodes: bool
    mixture: Mixture | None = None


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
        parts: of the call; None where it is known to the device only.
        mixtures: the parts for kernels that have ``Kernel.mixed``; None where the others serve these, too.

    Attributes:
        returned: by ``id`` of the K that was appended to a layer: the layer, K and V.
        ranges: of rows that the queries of a part see, by part and window.
    """

    slots: torch.Tensor
    ends: torch.Tensor
    parts: list[Part] | None
    mixtures: list[Part] | None = None
    returned: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    ranges: dict[tuple[Part, int | None], SequenceRanges] = field(default_factory=dict)


class FlatContext:
    """Appends K and V to the slots of a ``KVCache``, and attends to them, in a flat call of a model.

    A flat call has one row of tokens, ``[1, T]``, in which the segments of several sequences follow each other.

    Args:
        cache: holds the rows. Those of all segments must be mapped, and those of the margins.
        configs: the configurations of the model.
        attention: the name of the kernel, or ``"auto"``.
        margins: rows around these that kernels may load.
        max_model_len: positions of the longest sequence. The slots have room for it and the margins.

    Attributes:
        cache: the same.
        margins: the same.
        max_model_len: the same.
        needs_margins: whether a kernel was chosen that loads more.
        watch: checks calls; None where these are not verified.
        shares_kv_across_layers: whether a layer was seen to attend to the K and V of another one.
    """

    own_attention = False  # the attention is vattn's, see ``models.attention``
    store = None  # no ``VirtualCache`` takes part

    def __init__(
        self, cache: KVCache, configs: list[Any], attention: str, margins: Margins, max_model_len: int
    ) -> None:
        self.cache, self._configs, self._attention, self.margins = cache, configs, attention, margins
        self.max_model_len = max_model_len
        self.needs_margins = False
        self.watch: FlatWatch | None = None
        self.shares_kv_across_layers = False
        self._windows = [None if shape is None else shape.window for shape in cache.layout.layers]
        self._kernels: dict[Any, Kernel] = {}
        self._call: _Call | None = None

    @property
    def kernels(self) -> list[str]:
        """The names of the kernels that were chosen so far."""
        return sorted({kernel.name for kernel in self._kernels.values()})

    @property
    def mixes(self) -> bool:
        """Whether all kernels that were chosen for prompts compute mixtures of rows as they are stored."""
        if any(self._copied(layer) for layer, shape in enumerate(self.cache.layout.layers) if shape is not None):
            return False
        chosen = [kernel for (*_, queries), kernel in self._kernels.items() if queries == "chunk"]
        return bool(chosen) and all(kernel.mixes for kernel in chosen)

    def call(
        self,
        model: Any,
        keyword: str,
        segments: list[Segment],
        decodes: Decodes | None = None,
        mixture: Mixture | None = None,
        **given: Any,
    ) -> Any:
        """Calls a model on segments.

        Args:
            model: the model.
            keyword: the argument by which it takes a cache.
            segments: in the order of the tokens.
            decodes: further positions, whose tokens come before those of the segments.
            mixture: what is computed behind the decodes, in the place of segments.
            given: other arguments of the model.

        Raises:
            UnsupportedError: the model's attention cannot be computed so.
        """
        device, first = self.cache.device, 0 if decodes is None else len(decodes.slots)
        before = [] if decodes is None else [Part(decodes, slice(0, first), decodes=True)]
        places = [] if decodes is None else [(decodes.slots, decodes.ends)]
        parts: list[Part] | None = before
        mixtures = None
        if segments:
            parts = [*before, *parts_of(segments, first, device)]
            mixture = Mixture.of(segments, device)
        elif mixture is not None:
            parts = None
        if mixture is not None:
            places.append(mixture.of_tokens())
            if parts is None or (len(segments) > 1 and not all(part.decodes for part in parts)):
                mixtures = [*before, Part(segments, slice(first, None), decodes=False, mixture=mixture)]
        slots, ends = places[0] if len(places) == 1 else map(torch.cat, zip(*places, strict=True))
        self._call = _Call(slots, ends, parts, mixtures)
        positions = torch.sub(ends.clamp_min(1), 1, out=ends.new_empty(len(ends), dtype=torch.int64))  # idle: 0
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
        append(k_new, v_new, *self.cache.slot_tensors(layer), call.ends, call.slots)
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
        rows, queries = self.cache.slot_tensors(layer), q[0].transpose(0, 1)
        parts = self._parts(layer, queries, rows, how)
        out = queries.new_empty(*queries.shape[:2], rows[1].shape[3]) if len(parts) > 1 else None
        for part in parts:
            room = None if out is None or part.mixture is None else out[part.tokens]
            kernel, got = (
                self._decoded(layer, queries[part.tokens], rows, part, how)
                if part.decodes
                else self._prefilled(layer, queries[part.tokens], rows, part, how, room)
            )
            if self.watch is not None and new is not None:
                self.watch.attended(layer, kernel, got, part, queries, rows, new, how)
                if part.decodes:  # the kernel for more sequences is watched, too
                    other = self._kernel_for(layer, queries, rows, how, "one")
                    if other is not kernel:
                        also = other.decode(queries[part.tokens], *rows, self._ranges_of(part, how.window), how)
                        self.watch.attended(layer, other, also, part, queries, rows, new, how)
            if out is None:
                return got[None]
            if got is not room:
                out[part.tokens] = got
        assert out is not None
        return out[None]

    def _parts(self, layer: int, q: torch.Tensor, rows: _Rows, how: AttentionParams) -> list[Part]:
        """The parts of the call that are computed one after the other."""
        call = self._running()
        if (
            call.mixtures is not None
            and not self._copied(layer)
            and self._kernel_for(layer, q, rows, how, "chunk").mixes
        ):
            return call.mixtures
        if call.parts is None:
            raise UnsupportedError("its kernels cannot compute prompts from tensors alone")
        return call.parts

    def _decoded(
        self, layer: int, q: torch.Tensor, rows: _Rows, part: Part, how: AttentionParams
    ) -> tuple[Kernel, torch.Tensor]:
        """The kernel that computes one query for each segment, of few or of more, and what it computes."""
        kernel = self._kernel_for(layer, q, rows, how, "few" if len(q) <= FEW else "one")
        return kernel, kernel.decode(q, *rows, self._ranges_of(part, how.window), how)

    def _prefilled(
        self, layer: int, q: torch.Tensor, rows: _Rows, part: Part, how: AttentionParams, room: torch.Tensor | None
    ) -> tuple[Kernel, torch.Tensor]:
        """The same for several queries of each segment, which may be written to ``room``."""
        ranges = self._ranges_of(part, how.window)
        if (mixture := part.mixture) is not None:
            kernel = self._kernel_for(layer, q, rows, how, "chunk")
            return kernel, kernel.mixed(q, *rows, ranges, mixture.offsets, mixture.most, how, room)
        assert isinstance(part.segments, list)
        if self._copied(layer):
            rows, ranges = self._widened(rows, ranges, q.dtype)
        kernel = self._kernel_for(layer, q, rows, how, "chunk")
        return kernel, kernel.prefill(q, *rows, ranges, [segment.count for segment in part.segments], how)

    def _widened(self, rows: _Rows, ranges: SequenceRanges, dtype: torch.dtype) -> tuple[_Rows, SequenceRanges]:
        """Copies of rows in another dtype, one range behind the other, and where they are in the copies."""
        spans = ranges.tolist()
        ends = list(itertools.accumulate(end - start for _, start, end in spans))
        made = []
        for each in rows:
            behind = max(kernel.tail_rows for kernel in kernels.KERNELS.values())
            copies = torch.zeros(1, ends[-1] + behind, *each.shape[2:], dtype=dtype, device=each.device)
            for last, (slot, start, end) in zip(ends, spans, strict=True):
                copies[0, last - (end - start) : last] = each[slot, start:end].to(dtype)
            made.append(copies)
        moved = [(0, last - (end - start), last) for last, (_, start, end) in zip(ends, spans, strict=True)]
        return (made[0], made[1]), SequenceRanges.of(moved, made[0].device)

    def _kernel_for(
        self,
        layer: int,
        q: torch.Tensor,
        rows: _Rows,
        how: AttentionParams,
        queries: Literal["one", "few", "chunk"],
    ) -> Kernel:
        """The kernel for one query of each sequence, of few or of more sequences, or for several queries of each."""
        options: dict[str, Any] = {
            "window": how.window is not None,
            "softcap": how.softcap is not None,
            "sinks": how.sinks is not None,
        }
        key = layer, q.dtype, q.shape[1], *options.values(), queries
        if key not in self._kernels:
            spec = AttentionSpec.of(
                q, *rows, queries="chunk" if queries == "chunk" else "one", adjacent=False, **options
            )
            try:
                if queries == "chunk":
                    kernel = kernels.choose(spec, name=self._attention)
                else:
                    few, margins = queries == "few", self.margins
                    kernel = decode_kernel(spec, self._attention, few=few)
                    if few and kernel.tail(spec.head_dim, spec.kv_dtype) > max(margins.behind, margins.behind_few):
                        kernel = decode_kernel(spec, self._attention, few=False)  # there is no memory for its rows
            except ValueError as error:
                raise UnsupportedError(str(error), of_model=True) from None
            self._require_mapped(layer, kernel, spec, queries)
            self._kernels[key] = kernel
        return self._kernels[key]

    def _copied(self, layer: int) -> bool:
        """Whether prompts are computed on copies of a layer's rows: kernels read 8 bits in decode steps only."""
        shape = self.cache.layout.layers[layer]
        return shape is not None and shape.itemsize == 1

    def _require_mapped(self, layer: int, kernel: Kernel, spec: AttentionSpec, queries: str) -> None:
        """Raises an error where a kernel loads rows that are not mapped."""
        one = spec.queries == "one"
        if not one and self._copied(layer):
            return
        tail, margins = kernel.tail(spec.head_dim, spec.kv_dtype) if one or kernel.mixes else 0, self.margins
        more = {"one": 0, "few": margins.behind_few, "chunk": margins.behind_prompts}[queries]
        mapped = max(margins.behind, more)
        if tail > mapped or (one and kernel.head_rows > self.margins.before):
            self.needs_margins = True
            raise UnsupportedError(f"{kernel.name} loads {tail} rows behind a sequence, of {mapped} mapped")

    def _ranges_of(self, part: Part, window: int | None) -> SequenceRanges:
        """The rows that the queries of each segment see; behind a sliding window earlier rows may not be mapped."""
        made = self._running().ranges
        if (part, window) not in made:
            made[part, window] = self._made_ranges(part, window)
        return made[part, window]

    def _made_ranges(self, part: Part, window: int | None) -> SequenceRanges:
        if part.mixture is not None:
            slots, ends, counts = part.mixture.slots, part.mixture.ends, part.mixture.counts
            starts = _zeros(ends) if window is None else (ends - counts - window + 1).clamp_min(0).int()
            return SequenceRanges(slots.int(), starts, ends, longest=part.mixture.longest)
        if isinstance(part.segments, Decodes):
            ends, longest = part.segments.ends, part.segments.longest
            starts = _zeros(ends) if window is None else (ends - window).clamp_min(0)
            longest = longest if window is None else min(longest, window)
            slots, adjacent = part.segments.slots.int(), part.segments.adjacent
            return SequenceRanges(slots, starts, ends, longest=longest, adjacent=adjacent)
        ranges = []
        for segment in part.segments:
            first = 0 if window is None else max(0, segment.start - window + 1)
            ranges.append((segment.slot, first, segment.start + segment.count))
        return SequenceRanges.of(ranges, self.cache.device)


def _zeros(alike: torch.Tensor) -> torch.Tensor:
    """Zeros, int32 ``[len(alike)]``, which nobody may change."""
    return multiples_of(0, len(alike), alike.device)


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
