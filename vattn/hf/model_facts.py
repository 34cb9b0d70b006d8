"""What a model tells before it is called: the devices and the shapes of its layers, and its longest sequence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vattn.hf.placement import Placement
from vattn.memory.layout import KVLayout
from vattn.memory.shape import LayerShape


def layer_devices(model: Any) -> dict[int, torch.device]:
    """Returns the device of each attention layer of a model, by the index of the layer.

    Attention layers are the modules with a ``layer_idx``; the device is that of a module's first parameter.
    """
    found: dict[int, torch.device] = {}
    for module in model.modules():
        index, parameter = getattr(module, "layer_idx", None), next(module.parameters(), None)
        if isinstance(index, int) and parameter is not None:
            found.setdefault(index, parameter.device)
    return found


def expected_layers(model: Any, placement: Placement) -> dict[int, tuple[torch.device, LayerShape]]:
    """Returns the device and shape that the K and V of each layer of a model will most likely have.

    Args:
        model: the model.
        placement: of the cache, which knows the windows and which layers it stores.

    Returns:
        Device and shape by the index of the layer; empty where the model's configuration does not tell them.
    """
    try:
        dtype = str(model.dtype).removeprefix("torch.")
        config = model.config.get_text_config(decoder=True)
        shapes = KVLayout.from_config(config, max_len=placement.options.max_len, dtype=dtype).layers
    except (AttributeError, ValueError):
        return {}
    known = next((shape for shape in shapes if shape is not None), None)
    if known is None:
        return {}
    devices = layer_devices(model)
    return {
        index: (devices.get(index, model.device), replace(shapes[index] or known, window=placement.windows[index]))
        for index, cached in enumerate(placement.cached)
        if cached and index < len(shapes)
    }


def longest(config: Any) -> int:
    """Returns ``max_position_embeddings``, the most positions that a model is made for.

    Args:
        config: the model's configuration, or None.

    Raises:
        ValueError: no configuration says it.
    """
    found = None if config is None else getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:  # some configurations say -1 where there is no limit
        raise ValueError("max_len must be given: no configuration says max_position_embeddings")
    return found
