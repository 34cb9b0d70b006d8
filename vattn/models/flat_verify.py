"""Whether flat calls of a model compute what the model computes: see ``verified``."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from vattn.errors import BudgetExceeded, Error
from vattn.kernels.quantize import rounded
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import UnsupportedError
from vattn.models.expected import Expected
from vattn.models.flat import FlatContext, Segment
from vattn.models.flat_watch import FlatWatch
from vattn.models.state import configs_of
from vattn.models.versions import cache_keyword

# Of two sequences, the positions that each of three calls computes: two prompts, a token each, and a mixture of both.
_CALLS = ((9, 5), (1, 1), (4, 1))


@torch.no_grad()
def verified(model: Any, context: FlatContext, vocabulary: int, *, compiled: Any = None) -> str | None:
    """Computes two short sequences by flat calls of a model, and compares them with the model's own calls.

    The attention of each layer is compared with its definition, and the logits with those of the model.

    Args:
        model: the model.
        context: computes its attention. Its cache has two free slots.
        vocabulary: how many tokens there are.
        compiled: the model with compiled layers, whose logits are compared instead; or None.

    Returns:
        Why the model cannot be computed by flat calls, or None where it can.

    Raises:
        ValueError: the cache has no memory for two short sequences.
    """
    chance = torch.Generator().manual_seed(0)
    cache = context.cache
    behind = context.margins.more_behind_prompts
    totals = [min(sum(counts), context.max_model_len) for counts in zip(*_CALLS, strict=True)]
    ids = [torch.randint(0, vocabulary, (n,), generator=chance).to(cache.device) for n in totals]
    context.watch = watch = FlatWatch()
    sequences = [cache.open() for _ in ids]
    try:
        for sequence, each in zip(sequences, ids, strict=True):
            sequence.grow(len(each) + behind)
        slots = [sequence.slot for sequence in sequences]
        got = _computed(compiled or model, context, slots, ids)
    except BudgetExceeded as error:
        raise ValueError(f"kv_budget is too small for two short sequences: {error}") from error
    except UnsupportedError as reason:
        return str(reason)
    except (Error, torch.OutOfMemoryError):  # which says nothing of the model
        raise
    except Exception as error:  # whatever the model does that a flat call does not fit
        return f"a flat call fails: {type(error).__name__}: {error}"
    finally:
        context.watch = None
        for sequence in sequences:
            sequence.close()

    def compute() -> tuple[torch.Tensor]:
        logits = [model(input_ids=each[None], **_own_cache(model, cache)).logits[0] for each in ids]
        return (torch.cat(logits)[:, None],)

    fewer = _fewer_bits(cache) is not None
    expected = Expected(compute, configs_of(model), watch.spread, rounded=fewer, compiled=compiled is not None)
    if not expected.tells():
        return "its logits are no numbers"
    if watch.fault:
        return watch.fault
    difference = expected.difference(got[:, None])
    return None if difference is None else f"computed flat its logits differ {difference}"


def _fewer_bits(cache: KVCache) -> torch.dtype | None:
    """The dtype in which K and V are stored where it has 8 bits, or None."""
    dtypes = {getattr(torch, shape.dtype) for shape in cache.layout.layers if shape is not None}
    return next((dtype for dtype in dtypes if dtype.itemsize == 1), None)


def _own_cache(model: Any, cache: KVCache) -> dict[str, Any]:
    """Arguments with which a model rounds K and V as ``cache`` does."""
    if (dtype := _fewer_bits(cache)) is None:
        return {}
    return {cache_keyword(model): RoundingCache(model.config, dtype), "use_cache": True}


class RoundingCache(DynamicCache):  # type: ignore[misc]
    """A cache of transformers' own that rounds K and V.

    Args:
        config: of the model.
        dtype: to which they are rounded.
    """

    def __init__(self, config: Any, dtype: torch.dtype) -> None:
        super().__init__(config=config)
        self._dtype = dtype

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Rounds K and V, and appends them."""
        k, v = (rounded(states, None, self._dtype).to(states.dtype) for states in (key_states, value_states))
        return super().update(k, v, *args, **kwargs)


def _computed(model: Any, context: FlatContext, slots: list[int], ids: list[torch.Tensor]) -> torch.Tensor:
    """The logits ``[T, vocabulary]`` of two sequences, one behind the other, by the calls of ``_CALLS``."""
    parts: list[list[torch.Tensor]] = [[] for _ in ids]
    done = [0] * len(ids)
    for counts in _CALLS:
        segments = [
            Segment(slot, at, min(n, len(each) - at))
            for slot, at, n, each in zip(slots, done, counts, ids, strict=True)
        ]
        segments = [segment for segment in segments if segment.count]
        if not segments:
            continue
        at = [slots.index(segment.slot) for segment in segments]
        tokens = torch.cat(
            [ids[row][part.start : part.start + part.count] for row, part in zip(at, segments, strict=True)]
        )
        every = torch.arange(len(tokens), device=tokens.device)
        given: dict[str, Any] = {"input_ids": tokens[None], "logits_to_keep": every}
        output = context.call(model, cache_keyword(model), segments, **given)
        split = torch.split(output.logits[0], [segment.count for segment in segments])
        for row, segment, logits in zip(at, segments, split, strict=True):
            parts[row].append(logits)
            done[row] += segment.count
    return torch.cat([torch.cat(part) for part in parts])
