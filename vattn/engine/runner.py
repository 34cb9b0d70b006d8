"""Runners compute the logits of an iteration: flat, all rows in one call of the model, or row by row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from vattn.engine.kv_memory import KVMemory
from vattn.engine.row_memory import RowMemory
from vattn.engine.scheduler import Row
from vattn.models import rope
from vattn.models.flat import FlatContext, Segment
from vattn.models.versions import cache_keyword


class Runner(Protocol):
    """Computes the logits of an iteration."""

    @property
    def kernels(self) -> list[str]:
        """The names of vattn's attention kernels that compute the model."""

    def run(self, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]) -> list[torch.Tensor]:
        """Computes rows, whose memory is there.

        Args:
            rows: of the iteration.
            tokens: the tokens of each row, int64 ``[count]`` on the device.
            keep: of how many last positions of each row logits are wanted, at least one.

        Returns:
            For each row logits ``[keep, vocabulary]``.
        """


class FlatRunner:
    """Computes all rows in one call of the model, on the slots of a ``KVCache``.

    Args:
        model: a model whose attention takes an attention function.
        memory: holds the rows.
        context: appends to them, and attends to them.
    """

    def __init__(self, model: Any, memory: KVMemory, context: FlatContext) -> None:
        self._model, self._memory, self._context = model, memory, context
        self._keyword = cache_keyword(model)

    @property
    def kernels(self) -> list[str]:
        """See ``Runner.kernels``."""
        return self._context.kernels

    @torch.no_grad()
    def run(self, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]) -> list[torch.Tensor]:
        """See ``Runner.run``."""
        segments = [Segment(self._memory.slot(row.branch), row.start, row.count) for row in rows]
        ids = torch.cat(list(tokens))
        ends = itertools.accumulate(segment.count for segment in segments)
        kept = torch.tensor([end - k + at for end, k in zip(ends, keep, strict=True) for at in range(k)]).to(ids.device)
        output = self._context.call(self._model, self._keyword, segments, input_ids=ids[None], logits_to_keep=kept)
        logits = output.logits[0]
        if len(logits) != len(kept):  # some models give all logits
            logits = logits[kept]
        return list(torch.split(logits, list(keep)))


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

    @torch.no_grad()
    def run(self, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]) -> list[torch.Tensor]:
        """See ``Runner.run``."""
        found = []
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
        return found

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
