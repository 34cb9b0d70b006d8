"""The layers of a ``VirtualCache``, as transformers' models see them."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vattn.hf.attach import VERSION
from vattn.hf.layer_views import write
from vattn.hf.options import Options
from vattn.hf.placement import Placement
from vattn.hf.row_format import RowFormat
from vattn.hf.rows import Rows
from vattn.hf.store import Store

_LOG = logging.getLogger("vattn")

# What crop's argument means, by the installed version: how many tokens to remove, as a negative number; but a positive
# one was the length to keep until 5.18, and so was 0 as long as the parameter said so.
CROP_POSITIVE_KEEPS = VERSION < (5, 18)
_CROP_ZERO_EMPTIES = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def _guarded(view: torch.Tensor) -> torch.Tensor:
    """The view as a tensor that takes part in autograd's graph and refuses to be differentiated."""
    # .data, since detach() would share the version counter, and autograd complain of later appends in its own words.
    guarded = view.data.requires_grad_()
    guarded.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
    return guarded


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise RuntimeError("VirtualCache keeps no gradients: pass use_cache=False to train, or run under torch.no_grad()")


class VirtualLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a ``VirtualCache``; its members are those of ``DynamicLayer``."""

    def __init__(self, store: Store, index: int) -> None:
        self._store = store
        self.index = index
        super().__init__()

    def lazy_initialization(self, key_states: torch.Tensor, *args: Any) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[batch, kv_heads, n, head_dim]`` and returns views of all that a query may see."""
        store, index = self._store, self.index
        if (converted := store.append_converted(index, key_states, value_states)) is not None:
            k, v = converted
            store.lengths[index] += key_states.shape[2]
        else:
            new, k, v, (_, _, end) = store.take(index, key_states, value_states)
            with torch.no_grad():
                write(new, *map(store.rows.prompts.leaders, (key_states, value_states)))
            store.lengths[index] = end
        if not self.is_initialized:
            self.lazy_initialization(key_states)
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            return _guarded(k), _guarded(v)
        return k, v

    @property
    def keys(self) -> torch.Tensor | None:
        """K ``[batch, kv_heads, length, head_dim]``, a view; None before the first update."""
        views = self._store.view(self.index)
        return views[0] if views else None

    @keys.setter
    def keys(self, value: None) -> None:
        _refuse_assignment(value)

    @property
    def values(self) -> torch.Tensor | None:
        """V ``[batch, kv_heads, length, v_head_dim]``, a view; None before the first update."""
        views = self._store.view(self.index)
        return views[1] if views else None

    @values.setter
    def values(self, value: None) -> None:
        _refuse_assignment(value)

    def get_seq_length(self, *args: Any) -> int:
        """Positions appended so far."""
        return self._store.lengths[self.index]

    def get_max_length(self) -> int:
        """Positions that there may be, ``max_len``."""
        return self._store.options.max_len

    get_max_cache_shape = get_max_length  # as it was called before transformers 5.13

    def cropped_length(self, argument: int) -> int:
        """The length that ``crop(argument)`` leaves, in the terms of the installed transformers."""
        length, argument = self._store.lengths[self.index], int(argument)  # which transformers may give as a tensor
        if argument < 0:
            return max(length + argument, 0)
        if argument > 0 and not CROP_POSITIVE_KEEPS:
            raise ValueError(f"crop takes the number of tokens to remove as a negative integer, not {argument}")
        return min(argument, length) if argument > 0 or _CROP_ZERO_EMPTIES else length

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens of this layer alone; see ``VirtualCache.crop``."""
        lengths = list(self._store.lengths)
        lengths[self.index] = self.cropped_length(tokens_to_remove)
        self._store.truncate(lengths)

    def reset(self) -> None:
        """Empties this layer alone; see ``VirtualCache.reset``."""
        lengths = list(self._store.lengths)
        lengths[self.index] = 0
        self._store.truncate(lengths)
        self._store.placement.forget(self.index)
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        _refuse_alone("reorder_cache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        _refuse_alone("batch_repeat_interleave")

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        _refuse_alone("batch_select_indices")

    def offload(self) -> None:
        _refuse_alone("offload")

    def prefetch(self) -> None:
        _refuse_alone("prefetch")

    def clone(self, store: Store) -> VirtualLayer:
        """The same layer over another store."""
        other = copy.copy(self)
        other._store = store
        return other


class VirtualSlidingLayer(VirtualLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """One sliding-window layer. Rows keep their absolute positions; what lies before the window is given back."""

    def __init__(self, store: Store, index: int, sliding_window: int) -> None:
        self._store = store
        self.index = index
        DynamicSlidingWindowLayer.__init__(self, sliding_window)

    def get_max_length(self) -> int:
        """Positions that a query sees, as of the layers that this one stands for."""
        return int(self.sliding_window)

    get_max_cache_shape = get_max_length

    @property
    def cumulative_length(self) -> int:
        return self._store.lengths[self.index]

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        if value != self.cumulative_length:
            raise AttributeError("the length of a VirtualCache layer changes by update, crop and reset only")

    def activate_past_recording(self) -> None:
        """Keeps what later lengths would give back, until ``crop`` says which length holds."""
        self.record_past = True
        rows = self._store.rows
        if rows.floor is None:
            rows.floor = max(rows.lengths)


def _refuse_assignment(value: object) -> None:
    # transformers assigns None in the layer's constructor.
    if value is not None:
        raise AttributeError("keys and values of a VirtualCache are views: write through update()")


def _refuse_alone(name: str) -> None:
    raise NotImplementedError(f"{name} moves all layers of a VirtualCache at once: call it on the cache")


def foreign(layers: list[Any]) -> dict[str, list[int]]:
    """The layers that stay transformers' own, by the name of their class."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicLayer) and not isinstance(layer, VirtualLayer):
            found.setdefault(type(layer).__name__, []).append(index)
    return found


@functools.cache
def tell_foreign(kind: str, count: int, of: int) -> None:
    """Warns once of layers of a kind that stay transformers' own."""
    _LOG.warning(
        "%d of %d layers keep more than K and V (%s) and stay transformers' own: no option of the cache is of them",
        count,
        of,
        kind,
    )


def virtualize(cache: Any, options: Options) -> None:
    """Replaces the attention layers of a DynamicCache by ours; layers of other kinds stay transformers' own."""
    layers = cache.layers
    placement = Placement(
        [getattr(layer, "sliding_window", None) for layer in layers],
        [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers],
        options,
    )
    store = cache._store = Store(
        Rows(placement, RowFormat(options.scales)),
        [hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states") for layer in layers],
    )
    cache.layer_class_to_replicate = None
    for index, layer in enumerate(layers):
        if type(layer) is DynamicSlidingWindowLayer:
            layers[index] = VirtualSlidingLayer(store, index, layer.sliding_window)
        elif type(layer) is DynamicLayer:
            layers[index] = VirtualLayer(store, index)
        else:
            continue
        if layer.is_initialized and layer.keys is not None:
            if layer.get_seq_length() > layer.keys.shape[-2]:
                raise ValueError(
                    f"layer {index} has seen {layer.get_seq_length()} positions and keeps {layer.keys.shape[-2]} of "
                    "them: make the cache empty, and update it"
                )
            cache.update(layer.keys, layer.values, index)
    for kind, indices in foreign(layers).items():
        tell_foreign(kind, len(indices), len(layers))
