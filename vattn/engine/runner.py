"""Runners compute the logits of an iteration: flat, all rows in one call of the model, or row by row."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from vattn.engine.kv_memory import KVMemory
from vattn.engine.row_memory import RowMemory
from vattn.engine.scheduler import Row
from vattn.models.flat import FlatContext, Segment
from vattn.models.versions import cache_keyword


class Runner(Protocol):
    """Computes the logits of an iteration."""

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
    """

    def __init__(self, model: Any, memory: RowMemory, *, recurrent: bool) -> None:
        self._model, self._memory, self._recurrent = model, memory, recurrent
        self._keyword = cache_keyword(model)

    @torch.no_grad()
    def run(self, rows: Sequence[Row], tokens: Sequence[torch.Tensor], keep: Sequence[int]) -> list[torch.Tensor]:
        """See ``Runner.run``."""
        found = []
        for row, ids, wanted in zip(rows, tokens, keep, strict=True):
            given = {self._keyword: self._memory.caches[row.branch], "use_cache": True}
            end, logits = row.start, []
            for part in torch.split(ids, 1) if self._recurrent and row.start else (ids,):
                end += len(part)
                mask = torch.ones(1, end, dtype=torch.int64, device=ids.device)
                output = self._model(input_ids=part[None], attention_mask=mask, **given)
                logits.append(output.logits[0, -wanted:])
            found.append(torch.cat(logits)[-wanted:])
        return found
