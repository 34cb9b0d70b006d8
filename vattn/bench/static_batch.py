"""Measures ``model.generate`` on requests as one batch, for comparison with an engine."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import DynamicCache

from vattn.bench.mixes import Work
from vattn.hf import CACHE_KEYWORD
from vattn.hf.cache import VirtualCache

_WARM_UP = 16  # tokens that are sampled before


def static_batch(model: Any, works: list[Work], cache: str, temperature: float = 0.6) -> dict[str, Any]:
    """Measures the tokens per second of a batch that is padded on the left.

    The batch goes on until its longest output is complete; the tokens that requests ask for count.

    Args:
        model: the model; with ``"vattn"`` it is detached from the cache again.
        works: the requests of the batch.
        cache: ``"dynamic"``, transformers' own, or ``"vattn"``, a ``VirtualCache`` with captured decode steps.
        temperature: of all requests.

    Returns:
        A row.

    Raises:
        ValueError: there is no such cache.
    """
    if cache not in ("dynamic", "vattn"):
        raise ValueError(f"cache must be 'dynamic' or 'vattn', not {cache!r}")
    longest, most = max(len(work.prompt) for work in works), max(work.output for work in works)
    device = model.device
    ids = torch.tensor([[0] * (longest - len(work.prompt)) + work.prompt for work in works], device=device)
    mask = torch.tensor([[0] * (longest - len(work.prompt)) + [1] * len(work.prompt) for work in works], device=device)

    def sampled(count: int, of: Any) -> float:
        options: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, CACHE_KEYWORD: of}
        start = time.perf_counter()
        found = model.generate(ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, **options)
        found[:, -1].tolist()  # which waits for the device
        if found.shape[1] != longest + count:
            raise RuntimeError(f"generate sampled {found.shape[1] - longest} tokens for {count}")
        return time.perf_counter() - start

    warm_up = min(_WARM_UP, most)
    if cache == "dynamic":
        sampled(warm_up, DynamicCache(config=model.config))
        took = sampled(most, DynamicCache(config=model.config))
    else:
        with VirtualCache(model, max_len=longest + most, slots=len(works)) as ours:
            sampled(warm_up, ours)
            ours.reset()  # its graphs stay
            took = sampled(most, ours)
    tokens = sum(work.output for work in works)
    row = {"cache": cache, "requests": len(works), "prompt tokens": sum(len(work.prompt) for work in works)}
    return {**row, "sampled tokens": tokens, "seconds": took, "tokens/s": tokens / took}
