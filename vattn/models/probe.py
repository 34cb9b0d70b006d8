"""What a model's layers keep of a token, found by calling the model on two tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from vattn.memory.shape import LayerShape
from vattn.models.versions import cache_keyword


@dataclass(frozen=True)
class Probe:
    """What a model is like.

    Args:
        layers: what each layer keeps of a token; None for a layer that keeps something else than K and V of it.
        others: the classes of cache layers that do, by name.
        state_bytes: what these layers take for a sequence.
        vocabulary: tokens that logits are given for.
        device: that logits are on.
    """

    layers: list[LayerShape | None]
    others: frozenset[str]
    state_bytes: int
    vocabulary: int
    device: torch.device


@torch.no_grad()
def probed(model: Any) -> Probe:
    """Calls a model on two tokens with a ``DynamicCache``.

    Raises:
        ValueError: the model takes no cache, or is no causal language model.
    """
    config = model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} has an encoder: the engine serves decoders alone")
    device = next(model.parameters()).device
    cache = DynamicCache(config=config)
    ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
    output = model(input_ids=ids, **{cache_keyword(model): cache}, use_cache=True)
    if getattr(output, "logits", None) is None:
        raise ValueError(f"{type(model).__name__} gives no logits: the engine serves causal language models")
    shapes: list[LayerShape | None] = []
    others, state_bytes = set(), 0
    for layer in cache.layers:
        held = list(tensors_in(vars(layer)))
        if not held:
            shapes.append(None)  # it attends to the K and V of another layer, or not at all
        elif type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            others.add(type(layer).__name__)
            state_bytes += sum(tensor.nbytes for tensor in held)
            shapes.append(None)
        else:
            shapes.append(
                LayerShape(
                    kv_heads=layer.keys.shape[1],
                    head_dim=layer.keys.shape[3],
                    v_head_dim=layer.values.shape[3],
                    dtype=str(layer.keys.dtype).removeprefix("torch."),
                    window=getattr(layer, "sliding_window", None),
                )
            )
    return Probe(shapes, frozenset(others), state_bytes, output.logits.shape[-1], output.logits.device)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value, its lists and its dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
