"""Runners compute the logits of an iteration: flat, all rows in one call of the model, or row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vattn.engine.choose import SamplingState, choose
from vattn.engine.kv_memory import KVMemory
from vattn.engine.request import Branch
from vattn.engine.row_memory import RowMemory
from vattn.engine.scheduler import Row
from vattn.errors import Error
from vattn.graphs.batch_graphs import BatchGraphs
from vattn.graphs.compilation import compiled_calls
from vattn.graphs.runner import rows_of_graph
from vattn.kernels.append import takes_idle
from vattn.memory.sequence import Sequence as KVSequence
from vattn.models import rope
from vattn.models.flat import Decodes, FlatContext, Mixture, Segment
from vattn.models.versions import cache_keyword
from vattn.transfer import upload

_LEAST_COMPILED = 2  # tokens of a compiled call: torch.compile would compile a single one apart
# The inputs of graphs: of positions of one each, and of sequences with several.
_DECODES = {"slots": torch.int64, "outputs": torch.int64}
_PROMPTS = {
    "prompts": torch.int64,
    "prompt slots": torch.int64,
    "prompt ends": torch.int32,
    "prompt counts": torch.int64,
}
_DECODES_BESIDE = 64  # decodes in an iteration with prompts that is captured are rounded up to a multiple of these
_MOST_CAPTURED = 2048  # tokens of an iteration with prompts that is captured: more take longer than their launch


@dataclass(frozen=True)
class DecodeBatch:
    """Outputs of which the position of the last token is computed.

    Args:
        branches: the outputs.
        outputs: their slots in the sampler, int64 ``[n]`` on the device.
        state: of all slots; the same object in all iterations.
    """

    branches: list[Branch]
    outputs: torch.Tensor
    state: SamplingState

    @property
    def longest(self) -> int:
        """Positions of the longest output, this one included."""
        return max(branch.launched for branch in self.branches)

    @property
    def tokens(self) -> torch.Tensor:
        """Their last tokens, int64 ``[n]``."""
        return self.state.last.tokens[self.outputs]

    @property
    def ends(self) -> torch.Tensor:
        """One past the positions of these, int32 ``[n]``."""
        return self.state.last.ends[self.outputs]


@dataclass(frozen=True)
class Computed:
    """What a runner has computed.

    Args:
        logits: ``[n, vocabulary]``: of the outputs in ``decodes``, then of each row's last positions.
        tokens: those that ``choose`` has chosen for these logits, and noted, int64 ``[n]``; None where it was not
            called.
    """

    logits: torch.Tensor
    tokens: torch.Tensor | None = None


class Runner(Protocol):
    """Computes the logits of an iteration."""

    @property
    def kernels(self) -> list[str]:
        """The names of vattn's attention kernels that compute the model."""

    @property
    def graphs(self) -> int:
        """How many CUDA graphs were captured."""

    @property
    def uncaptured(self) -> str | None:
        """Why no iteration is captured; None where they are."""

    def forget(self) -> None:
        """Drops what depends on where the model's weights are."""

    def rehearse(self, tokens: int, rows: int) -> torch.Tensor | None:
        """Computes positions of which nobody needs the result, so that torch has taken the memory for as many.

        Args:
            tokens: how many positions; fewer where there is no memory for K and V of so many.
            rows: of how many logits are computed.

        Returns:
            The logits, ``[rows, vocabulary]``; None where positions are not computed together.
        """

    def run(
        self, decodes: DecodeBatch | None, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]
    ) -> Computed:
        """Computes outputs and rows, whose memory is there.

        Args:
            decodes: the outputs of the iteration that only miss the position of their last token.
            rows: the others.
            tokens: the tokens of each row, int64 ``[count]`` on the device.
            keep: of how many last positions of each row logits are wanted, at least one.
        """


class FlatRunner:
    """Computes all rows in one call of the model, on the slots of a ``KVCache``.

    Iterations of one position each, and those with few other positions, are captured into CUDA graphs and replayed.

    Args:
        model: a model whose attention takes an attention function.
        memory: holds the rows.
        context: appends to them, and attends to them.
        most: outputs that run at the same time, at most.
        captures: whether iterations are captured, where the device can.
        compiled: the model with compiled layers, see ``graphs.compilation``; or None.
    """

    def __init__(
        self, model: Any, memory: KVMemory, context: FlatContext, most: int, *, captures: bool, compiled: Any = None
    ) -> None:
        self._model, self._memory, self._context, self._compiled = model, memory, context, compiled
        self._keyword = cache_keyword(model)
        self._placed: tuple[list[int], torch.Tensor, bool] = [], torch.empty(0, dtype=torch.int64), True
        self._state: SamplingState | None = None  # which graphs read and change
        self._most = rows_of_graph(max(most, _LEAST_COMPILED))
        self._graphs: dict[str, BatchGraphs] = {}
        if captures and takes_idle(memory.cache.device):
            device, sizes = memory.cache.device, self._decode_sizes
            self._graphs["decodes"] = BatchGraphs(
                self._decoded, _DECODES, sizes, ("slots",), device, changes=self._changed_by_decodes
            )
            if context.mixes:
                sizes, rows = self._mixture_sizes, ("slots", "prompt slots")
                inputs = _DECODES | _PROMPTS
                self._graphs["mixtures"] = BatchGraphs(self._mixed, inputs, sizes, rows, device)
        self._captures = captures
        self._no_decodes = {
            name: torch.empty(0, dtype=kind, device=memory.cache.device) for name, kind in _DECODES.items()
        }

    @property
    def kernels(self) -> list[str]:
        """See ``Runner.kernels``."""
        return self._context.kernels

    @property
    def graphs(self) -> int:
        """See ``Runner.graphs``."""
        return sum(map(len, self._graphs.values()))

    @property
    def uncaptured(self) -> str | None:
        """See ``Runner.uncaptured``."""
        if self._graphs:
            return self._graphs["decodes"].refused
        return "rows cannot be idle without Triton" if self._captures else "enforce_eager is set"

    def forget(self) -> None:
        """See ``Runner.forget``."""
        for graphs in self._graphs.values():
            graphs.clear()

    def run(
        self, decodes: DecodeBatch | None, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]
    ) -> Computed:
        """See ``Runner.run``."""
        segments = [Segment(self._memory.slot(row.branch), row.start, row.count) for row in rows]
        if (replayed := self._replayed(decodes, tokens, segments, keep)) is not None:
            return Computed(*replayed)
        places, ids, at = None, list(tokens), 0
        if decodes is not None:
            slots, adjacent = self._slots(decodes)
            places = Decodes(slots, decodes.ends, decodes.longest, adjacent)
            ids, at = [decodes.tokens, *tokens], len(decodes.branches)
        kept = list(range(at))
        for row, wanted in zip(rows, keep, strict=True):
            at += row.count
            kept += range(at - wanted, at)
        asked = upload(kept, self._memory.cache.device) if len(kept) < at else None
        return Computed(self._computed(torch.cat(ids), segments, places, asked))

    def rehearse(self, tokens: int, rows: int) -> torch.Tensor:
        """See ``Runner.rehearse``."""
        cache, behind = self._memory.cache, self._context.margins.more_behind_prompts
        sequences: list[KVSequence] = []
        segments, left = [], tokens
        try:
            count = min(left, self._context.max_model_len)
            while left and count and len(sequences) < cache.slots:
                sequences.append(cache.open())
                while count and not _grown(sequences[-1], count + behind):
                    count //= 2
                if count:
                    segments.append(Segment(sequences[-1].slot, 0, count))
                left -= count
                count = min(left, count)
            if not segments:
                raise ValueError("there is no memory for K and V of a single position")
            total = tokens - left
            ids = torch.zeros(total, dtype=torch.int64, device=cache.device)
            asked = upload([row % total for row in range(rows)], cache.device)
            return self._computed(ids, segments, None, asked)
        finally:
            for sequence in sequences:
                sequence.close()
            cache.trim()  # requests come in other lengths

    def _replayed(
        self,
        decodes: DecodeBatch | None,
        tokens: Sequence[torch.Tensor],
        segments: list[Segment],
        keep: Sequence[int],
    ) -> tuple[torch.Tensor, ...] | None:
        """What a graph computes: logits, and the tokens of decodes alone; None where none is captured."""
        if not self._graphs:
            return None
        given = self._no_decodes
        if decodes is not None:
            self._state = decodes.state
            given = {"slots": self._slots(decodes)[0], "outputs": decodes.outputs}
        if not segments:
            return self._graphs["decodes"].run(given)
        total = sum(segment.count for segment in segments)
        if "mixtures" not in self._graphs or total > _MOST_CAPTURED or max(keep) > 1:
            return None
        mixture = Mixture.of(segments, self._memory.cache.device)
        given = given | {"prompts": torch.cat(list(tokens)), "prompt slots": mixture.slots}
        return self._graphs["mixtures"].run(given | {"prompt ends": mixture.ends, "prompt counts": mixture.counts})

    def _computed(
        self,
        ids: torch.Tensor,
        segments: list[Segment],
        places: Decodes | None,
        kept: torch.Tensor | None,
        mixture: Mixture | None = None,
    ) -> torch.Tensor:
        """The logits of some tokens of a flat call, or of all."""
        given: dict[str, Any] = {"input_ids": ids[None]}
        if kept is not None:
            given["logits_to_keep"] = kept
        if self._compiled is None or len(ids) < _LEAST_COMPILED:
            output = self._context.call(self._model, self._keyword, segments, places, mixture, **given)
        else:
            with compiled_calls():
                output = self._context.call(self._compiled, self._keyword, segments, places, mixture, **given)
        logits: torch.Tensor = output.logits[0]
        if kept is not None and len(logits) != len(kept):  # some models give all logits
            return logits[kept]
        return logits

    def _decode_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """The sizes of the inputs of a graph, by those of a batch."""
        least = 1 if self._compiled is None else _LEAST_COMPILED
        return dict.fromkeys(sizes, rows_of_graph(max(sizes["slots"], least)))

    def _mixture_sizes(self, sizes: dict[str, int]) -> dict[str, int]:
        """The same of an iteration with prompts. There are few sizes for each input, since there are many of all."""
        prompts = sizes["prompts"]
        step = next(step for step in (32, 64, 128) if prompts <= 16 * step or step == 128)
        prompts = -(-prompts // step) * step
        if sizes["prompt slots"] >= prompts:
            prompts += step  # fewer sequences than tokens, so that logits of the last ones differ in number from all
        decodes = min(-(-sizes["slots"] // _DECODES_BESIDE) * _DECODES_BESIDE, self._most)
        sequences = min(self._most, 16 if sizes["prompt slots"] <= 16 else prompts - 1)
        found = dict.fromkeys(_DECODES, decodes) | dict.fromkeys(_PROMPTS, sequences)
        return found | {"prompts": prompts}

    def _decoded(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and the tokens of outputs that are computed one position each, which a graph is captured of."""
        assert self._state is not None
        ids, places = self._decodes_of(inputs)
        logits = self._computed(ids, [], places, None)
        return logits, choose(logits, self._state, inputs["outputs"])

    def _changed_by_decodes(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self._state is not None
        return self._state.last.tokens, self._state.last.ends

    def _mixed(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor]:
        """The logits of the last position of each sequence of an iteration, which a graph is captured of."""
        longest, decodes, total = self._memory.cache.layout.max_len, len(inputs["slots"]), len(inputs["prompts"])
        ids, places = self._decodes_of(inputs) if decodes else (inputs["outputs"], None)
        slots, ends, counts = (inputs[f"prompt {name}"] for name in ("slots", "ends", "counts"))
        mixture = Mixture(slots, ends, counts, total, longest, most=min(total, longest))
        last = decodes + (mixture.offsets[1:].long() - 1).clamp_min(0)
        kept = torch.cat([torch.arange(decodes, device=last.device), last])
        return (self._computed(torch.cat([ids, inputs["prompts"]]), [], places, kept, mixture),)

    def _decodes_of(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, Decodes]:
        """The last tokens of outputs, and where they are."""
        assert self._state is not None
        outputs, last = inputs["outputs"], self._state.last
        return last.tokens[outputs], Decodes(inputs["slots"], last.ends[outputs], self._memory.cache.layout.max_len)

    def _slots(self, decodes: DecodeBatch) -> tuple[torch.Tensor, bool]:
        """The slots of a batch, which stay on the device while they are the same; and whether they are 0, 1, 2 ..."""
        slots = self._memory.slots(decodes.branches)
        if slots != self._placed[0]:
            self._placed = slots, upload(slots, self._memory.cache.device), slots == list(range(len(slots)))
        return self._placed[1:]


def _grown(sequence: KVSequence, positions: int) -> bool:
    try:
        sequence.grow(positions)
    except Error:
        return False
    return True


class RowRunner:
    """Computes each row by a call of its own, with a cache of transformers' own.

    Args:
        model: any causal language model.
        memory: holds the caches.
        recurrent: whether layers keep states. Models with such layers take several tokens at once only at the start of
            a sequence, so later tokens are computed one by one.
        as_generate: whether the model has to be called as ``generate`` calls it, see ``models.rope``: with the prompt
            at once, and with one token after the other.
    """

    def __init__(self, model: Any, memory: RowMemory, *, recurrent: bool, as_generate: bool = False) -> None:
        self._model, self._memory, self._recurrent, self._as_generate = model, memory, recurrent, as_generate
        self._keyword = cache_keyword(model)
        self.kernels: list[str] = []  # the attention is the model's own
        self.graphs = 0
        self.uncaptured: str | None = "rows are computed one by one"

    def forget(self) -> None:
        """See ``Runner.forget``."""

    def rehearse(self, tokens: int, rows: int) -> None:
        """See ``Runner.rehearse``."""

    def run(
        self, decodes: DecodeBatch | None, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]
    ) -> Computed:
        """See ``Runner.run``."""
        found = []
        if decodes is not None:
            rows = [*(Row(branch, branch.launched - 1, 1, ()) for branch in decodes.branches), *rows]
            tokens = [*torch.split(decodes.tokens, 1), *tokens]
            keep = [*[1] * len(decodes.branches), *keep]
        for row, ids, wanted in zip(rows, tokens, keep, strict=True):
            end, logits = row.start, []
            for part in self._parts(row, ids):
                end, count = end + len(part), len(part)
                if self._as_generate:
                    part = self._from_the_start(row, ids, part, end)
                mask = torch.ones(1, end, dtype=torch.int64, device=ids.device)
                given = {self._keyword: self._memory.caches[row.branch], "use_cache": True}
                output = self._model(input_ids=part[None], attention_mask=mask, **given)
                logits.append(output.logits[0, -min(wanted, count) :])
            found.append(torch.cat(logits)[-wanted:])
        return Computed(torch.cat(found))

    def _parts(self, row: Row, ids: torch.Tensor) -> Sequence[torch.Tensor]:
        """The tokens of a row, as the model takes them."""
        if self._as_generate and not row.start:
            first = len(row.branch.request.prompt)
            return [ids[:first], *torch.split(ids[first:], 1)] if len(ids) > first else [ids]
        return torch.split(ids, 1) if (self._recurrent or self._as_generate) and row.start else [ids]

    def _from_the_start(self, row: Row, ids: torch.Tensor, part: torch.Tensor, end: int) -> torch.Tensor:
        """The tokens that a model is called with for ``part``: all before them, too, where it wants to begin anew."""
        rope.reset(self._model)
        if end == len(part):
            return part
        before = torch.tensor(row.branch.tokens(0, row.start), dtype=torch.int64, device=ids.device)
        everything = torch.cat([before, ids[: end - row.start]])
        cache = self._memory.caches[row.branch]
        if not rope.begins_anew(self._model, self._keyword, everything[None], cache):
            return part
        self._memory.empty(row.branch)
        return everything
