"""Memory for all that a call of a model will append, before the call runs."""

from __future__ import annotations

from typing import Any

import torch

from vattn.hf.model_facts import expected_layers, layer_devices
from vattn.hf.store import Store


def reserve_for_call(store: Store, model: Any, given: dict[str, Any], half: str) -> None:
    """Gets memory for all that a call will append, where a later layer could find none after others have run.

    That can happen where layers of other kinds keep states, where layers lie in several ``KVCache``s, and for the
    two halves of an encoder-decoder's cache. Otherwise the first update gets memory for all layers.

    Args:
        store: of the cache.
        model: the model that is called.
        given: the arguments of the call by name.
        half: ``"whole"``, ``"self"`` or ``"cross"``, see ``VirtualCache.in_call``.

    Raises:
        BudgetExceeded, OutOfDeviceMemory, SequenceTooLong: there is not so much; nothing has changed.
    """
    if half == "whole" and all(store.placement.cached):
        several = len(store.placement.rows) if store.placement.expected else len(set(layer_devices(model).values()))
        if several < 2:
            return  # the first update gets memory for all layers
    names = ["decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"]
    if half == "cross":
        if any(store.lengths):
            return
        names = names[2:]
    found = [given.get(name) for name in names]
    if half == "cross" and (encoded := given.get("encoder_outputs")) is not None:
        found.insert(0, encoded[0])
    tokens = next((t for t in found if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
    if tokens is not None:
        batch, n = tokens.shape[:2]
        store.reserve(batch, n, lambda: expected_layers(model, store.placement))
