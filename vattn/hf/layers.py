"""The layers of a ``VirtualCache``, as transformers' models see them."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vattn.hf.layer_views import write
from vattn.hf.options import Options
from vattn.hf.placement import Placement
from vattn.hf.row_format import RowFormat
from vattn.hf.rows import Rows
from vattn.hf.store import Store
from vattn.models.versions import VERSION

_LOG = logging.getLogger("vattn")

# How the installed transformers reads the argument of ``crop``. A negative number is the number of tokens to remove. A
# positive number was the length to keep before 5.18, and so was 0 as long as the parameter was called ``max_length``.
CROP_POSITIVE_KEEPS = VERSION < (5, 18)
_CROP_ZERO_EMPTIES = "max_length" in inspect.signature(DynamicLayer.crop).parameters


def _guarded(view: torch.Tensor) -> torch.Tensor:
    """Returns the view as a tensor that requires a gradient, and raises an error when one is computed."""
    # ``detach()`` would share the version counter, so that autograd would report later appends as in-place changes
    # instead of the error of ``_refuse_gradient``.
    guarded = view.data.requires_grad_()
    guarded.register_hook(_refuse_gradient)  # type: ignore[no-untyped-call]
    return guarded


def _refuse_gradient(gradient: torch.Tensor) -> None:
    raise RuntimeError("VirtualCache keeps no gradients: pass use_cache=False to train, or run under torch.no_grad()")


class VirtualLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a ``VirtualCache``, with the interface of ``DynamicLayer``.

    Args:
        store: what all layers of the cache share.
        index: of the layer in the model.
    """

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
        """Appends K and V to the layer.

        Args:
            key_states: ``[batch, kv_heads, n, head_dim]``.
            value_states: ``[batch, kv_heads, n, v_head_dim]``.

        Returns:
            K and V of all positions that one of the new queries may see, as views, or as copies where rows are not
            stored as the model computes them.
        """
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
        """K ``[batch, kv_heads, length, head_dim]``; None before the first update. See ``Store.view``."""
        views = self._store.view(self.index)
        return views[0] if views else None

    @keys.setter
    def keys(self, value: None) -> None:
        _refuse_assignment(value)

    @property
    def values(self) -> torch.Tensor | None:
        """V ``[batch, kv_heads, length, v_head_dim]``; None before the first update. See ``Store.view``."""
        views = self._store.view(self.index)
        return views[1] if views else None

    @values.setter
    def values(self, value: None) -> None:
        _refuse_assignment(value)

    def get_seq_length(self, *args: Any) -> int:
        """Returns how many positions the layer holds."""
        return self._store.lengths[self.index]

    def get_max_length(self) -> int:
        """Returns ``max_len``, the most positions that the layer can hold."""
        return self._store.options.max_len

    get_max_cache_shape = get_max_length  # the name before transformers 5.13

    def cropped_length(self, argument: int) -> int:
        """Returns the length that ``crop(argument)`` leaves, as the installed transformers reads the argument."""
        length, argument = self._store.lengths[self.index], int(argument)  # transformers may pass a tensor
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
        """Returns a copy of the layer that belongs to another store."""
        other = copy.copy(self)
        other._store = store
        return other


class VirtualSlidingLayer(VirtualLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    """One sliding-window layer of a ``VirtualCache``.

    Rows keep their absolute positions in the slot. The memory of rows before the window is given back.

    Args:
        store: what all layers of the cache share.
        index: of the layer in the model.
        sliding_window: positions that a query sees, itself included.
    """

    def __init__(self, store: Store, index: int, sliding_window: int) -> None:
        self._store = store
        self.index = index
        DynamicSlidingWindowLayer.__init__(self, sliding_window)

    def get_max_length(self) -> int:
        """Returns the sliding window, as ``DynamicSlidingWindowLayer`` does."""
        return int(self.sliding_window)

    get_max_cache_shape = get_max_length

    @property
    def cumulative_length(self) -> int:
        """How many positions were appended, including those that the window has passed."""
        return self._store.lengths[self.index]

    @cumulative_length.setter
    def cumulative_length(self, value: int) -> None:
        if value != self.cumulative_length:
            raise AttributeError("the length of a VirtualCache layer changes by update, crop and reset only")

    def activate_past_recording(self) -> None:
        """Keeps the rows that the window would give back, so that ``crop`` can return to the present length.

        After each ``crop`` this holds for the length that it left. It concerns all sliding-window layers of the cache.
        """
        self.record_past = True
        rows = self._store.rows
        if rows.floor is None:
            rows.floor = max(rows.lengths)


def _refuse_assignment(value: object) -> None:
    # The constructor of a layer in transformers assigns None.
    if value is not None:
        raise AttributeError("keys and values of a VirtualCache are views: write through update()")


def _refuse_alone(name: str) -> None:
    raise NotImplementedError(f"{name} moves all layers of a VirtualCache at once: call it on the cache")


def foreign(layers: list[Any]) -> dict[str, list[int]]:
    """Returns the indices of attention layers that stay transformers' own, by the name of their class."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        if isinstance(layer, DynamicLayer) and not isinstance(layer, VirtualLayer):
            found.setdefault(type(layer).__name__, []).append(index)
    return found


@functools.cache
def tell_foreign(kind: str, count: int, of: int) -> None:
    """Logs a warning that layers stay transformers' own, once for the same arguments.

    Args:
        kind: the name of their class.
        count: how many layers there are of this class.
        of: how many layers the model has.
    """
    _LOG.warning(
        "%d of %d layers keep more than K and V (%s) and stay transformers' own: no option of the cache is of them",
        count,
        of,
        kind,
    )


def virtualize(cache: Any, options: Options) -> None:
    """Replaces the attention layers of a ``DynamicCache`` by layers of vattn, with what they hold.

    Layers of other kinds stay transformers' own.

    Args:
        cache: the cache, which gets a ``Store`` as its ``_store``.
        options: how its rows are stored.

    Raises:
        ValueError: a layer no longer holds all positions that it has seen, since its window has moved on.
    """
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
