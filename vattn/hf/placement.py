"""``Placement``: on which device, in what shape and in which ``KVCache`` each layer of a model keeps its rows."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vattn.hf.device_rows import DeviceKey, DeviceRows
from vattn.hf.layer_views import LayerGroupViews
from vattn.hf.options import Options
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import GRANULARITY, KVLayout
from vattn.memory.shape import LayerShape

_SPARE_SLOTS = 64  # slots that are reserved beyond ``slots`` or twice the batch: addresses cost nothing
_SPARE_ADDRESSES = 1 << 45  # bytes of addresses; more are reserved only where ``slots`` asks for it

Place = tuple[DeviceKey, LayerShape]
"""Where a layer keeps its rows: which ``KVCache`` holds them, and their shape."""
Rebuild = Callable[[dict[DeviceKey, int]], None]
"""Makes the ``KVCache`` of each key anew, with the number of slots given for it, and copies what it holds."""


class Placement:
    """On which device, in what shape and in which ``KVCache`` each layer of a model keeps its rows.

    The shape, dtype and device of a layer are known from its first update. Until then the layer is expected to be like
    the last one seen. When that proves wrong, the ``KVCache`` that was made for it is rebuilt.

    Args:
        windows: the sliding window of each layer, or None. An empty list makes the placement open-ended: layers are
            added at their first update, and each gets a ``KVCache`` of its own.
        cached: for each layer whether it keeps rows here; other layers stay transformers' own.
        options: of the cache.

    Attributes:
        seen: the place of each layer that has been updated.
        expected: the place of each layer, known or expected; empty until the first layer is known.
        rows: the rows of the batch in each ``KVCache``.
    """

    granularity = GRANULARITY  # bytes; tests on the host make it smaller

    def __init__(self, windows: list[int | None], cached: list[bool], options: Options) -> None:
        self.windows, self.cached = windows, cached
        self.open_ended = not windows
        self.options = options
        self._require_divisible(options.budget)
        self.seen: dict[int, Place] = {}
        self.expected: dict[int, Place] = {}
        self.rows: dict[DeviceKey, DeviceRows] = {}
        self._signatures: dict[int, tuple[Any, ...]] = {}  # of each layer seen, compared with that of each update

    def set_budget(self, budget: int | float | None) -> None:
        """Sets the budget of every ``KVCache``, also of those that are made later."""
        self._require_divisible(budget)
        options = replace(self.options, budget=budget)
        for rows in self.rows.values():
            rows.cache.set_budget(budget)
        self.options = options

    def _require_divisible(self, budget: int | float | None) -> None:
        if self.open_ended and budget is not None:
            raise ValueError("budget needs a cache that is made with the model's config: else each layer has its own")

    def add_layer(self) -> None:
        """Adds a layer to an open-ended cache."""
        self.windows.append(None)
        self.cached.append(True)

    def rows_of(self, layer: int) -> DeviceRows:
        """Returns the rows of the batch in the ``KVCache`` of a layer."""
        return self.rows[self.expected[layer][0]]

    def views_of(self, layer: int) -> LayerGroupViews | None:
        """Returns the tensors of a layer's group; None before its ``KVCache`` was made."""
        rows = self.rows.get(self.expected[layer][0]) if layer in self.expected else None
        return None if rows is None else rows.views.get(layer)

    def dtypes_of(self, layer: int) -> tuple[torch.dtype, torch.dtype] | None:
        """Returns the dtypes in which the model computes K and V of a layer; None before its first update."""
        signature = self._signatures.get(layer)
        return None if signature is None else signature[3:5]

    def is_as_seen(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> bool:
        """Returns whether K and V have heads, dims, dtypes and devices of the layer's earlier updates."""
        return _signature(k, v) == self._signatures.get(layer)

    def require_slots(self, batch: int) -> None:
        """Raises ValueError where a batch has more rows than ``slots`` allows."""
        if (slots := self.options.slots) is not None and batch > slots:
            raise ValueError(f"a batch of {batch} rows does not fit {slots} slots: make it with slots={batch}")

    def learn(self, layer: int, k: torch.Tensor, v: torch.Tensor, rebuild: Rebuild) -> None:
        """Checks K and V of an update, and at a layer's first update notes its device, shape and dtype.

        Args:
            layer: its index.
            k: ``[batch, kv_heads, n, head_dim]``.
            v: ``[batch, kv_heads, n, v_head_dim]``.
            rebuild: is called for each ``KVCache`` whose layers turn out to be others than were expected.

        Raises:
            ValueError: K and V do not fit each other, the options or what the layer holds. Nothing has changed.
        """
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"key_states and value_states must be [batch, kv_heads, tokens, head_dim] with equal batch, heads "
                f"and tokens, not {tuple(k.shape)} and {tuple(v.shape)}"
            )
        self.require_slots(k.shape[0])
        signature = _signature(k, v)
        if signature == self._signatures.get(layer):
            return
        found = self._checked(layer, k, v)
        if self.expected.get(layer) == found:
            self.seen[layer], self._signatures[layer] = found, signature
            return
        self.seen[layer] = found
        before = dict(self.expected)
        self._expect_like_seen(found)
        self.expected[layer] = found
        slots = self._slots_for(k.shape[0])
        keys = {key for key, _ in [*before.values(), *self.expected.values()]}
        try:
            rebuild({key: slots for key in keys if _at(before, key) != _at(self.expected, key)})
        except BaseException:
            self.expected = before
            self.forget(layer)
            raise
        self._signatures[layer] = signature

    def _checked(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Place:
        """Returns the place of a layer according to its K and V; raises as ``learn`` does."""
        # Under autocast the dtypes of K and V may differ. The wider one holds both.
        dtype = torch.promote_types(k.dtype, v.dtype)
        if (scales := self.options.scales) is not None:
            scales.check(layer, None if self.open_ended else len(self.windows), k.shape[1])
        shape = LayerShape(
            kv_heads=k.shape[1],
            head_dim=k.shape[3],
            v_head_dim=v.shape[3],
            dtype=str(dtype if scales is None else scales.dtype).removeprefix("torch."),
            window=self.windows[layer],
        )
        found = ((k.device, layer if self.open_ended else -1), shape)
        if layer in self.seen:
            raise ValueError(
                f"layer {layer} holds {_described(self.seen[layer])} and was given {_described(found)}: use one "
                "VirtualCache for each model"
            )
        for name, want, got in (("dtype", self.options.dtype, dtype), ("device", self.options.device, k.device)):
            if want is not None and want != got:
                raise ValueError(f"the cache was made with {name}={want} and layer {layer} computes in {got}")
        if v.device != k.device:
            raise ValueError(f"keys are on {k.device} but values are on {v.device}")
        return found

    def _expect_like_seen(self, last: Place) -> None:
        """Expects each unseen layer to be like the last one seen of the same window, or like the last of all."""
        if self.open_ended:
            return
        like = {self.windows[layer]: self.seen[layer] for layer in sorted(self.seen)}
        for layer, window in enumerate(self.windows):
            if self.cached[layer] and layer not in self.seen:
                (device, _), shape = like.get(window, last)
                self.expected[layer] = ((device, -1), replace(shape, window=window))

    def expect(self, batch: int, layers: dict[int, tuple[torch.device, LayerShape]], rebuild: Rebuild) -> bool:
        """Makes the ``KVCache``s for layers of which none has been seen.

        Args:
            batch: rows of the batch that comes.
            layers: device and shape of each layer, as the model's configuration tells them.
            rebuild: makes the ``KVCache``s.

        Returns:
            Whether a ``KVCache`` was made. None is made where ``layers`` is empty or has other dtypes than ``options``.
        """
        if not layers:
            return False
        scales, dtype = self.options.scales, self.options.dtype
        stored = None if scales is None else str(scales.dtype).removeprefix("torch.")
        self.expected = {
            layer: ((device, -1), shape if stored is None else replace(shape, dtype=stored))
            for layer, (device, shape) in layers.items()
            if dtype is None or str(dtype) == f"torch.{shape.dtype}"
        }
        try:
            rebuild({key: self._slots_for(batch) for key, _ in self.expected.values()})
        except BaseException:
            self.expected = {}
            raise
        return bool(self.expected)

    def forget(self, layer: int) -> None:
        """Forgets the place of a layer, so that its next update may be of another shape."""
        self.seen.pop(layer, None)
        self._signatures.pop(layer, None)

    def _slots_for(self, batch: int) -> int:
        return max(self.options.slots or 0, 2 * batch) + _SPARE_SLOTS

    def build(self, key: DeviceKey, slots: int, budget: int | float | None) -> DeviceRows:
        """Makes the ``KVCache`` for the layers that are expected at ``key``, without rows."""
        layers = _at(self.expected, key)
        layout = KVLayout(
            [layers.get(layer) for layer in range(len(self.windows))],
            max_len=self.options.max_len,
            kind=self.options.layout,
            granularity=self.granularity,
        )
        slots = max(self.options.slots or 1, min(slots, _SPARE_ADDRESSES // layout.slot_bytes))
        stored = None if self.options.scales is None else self.options.scales.dtype
        tails = (kernel.tail(shape.head_dim, stored) for kernel in self.options.kernels for shape in layers.values())
        cache = KVCache(
            layout,
            slots=slots,
            device=key[0],
            budget=budget,
            tail_rows=0 if key[0].type == "cpu" else max(tails, default=0),
            lookahead=self.options.lookahead,
            mapper=self.options.mapper,
        )
        self.rows[key] = rows = DeviceRows(cache, 0, weakref.WeakSet())
        return rows

    def join(self, key: DeviceKey, other: DeviceRows, base: int) -> DeviceRows:
        """Makes rows from slot ``base`` on, in the ``KVCache`` of the rows of another batch."""
        self.rows[key] = rows = DeviceRows(other.cache, base, other.sharers)
        return rows

    def rebuild(self, slots: dict[DeviceKey, int], lengths: list[int]) -> None:
        """Makes the ``KVCache`` of each key anew, and copies what the old one holds.

        After an error nothing has changed.

        Args:
            slots: the number of slots for each key.
            lengths: of all layers of the model.
        """
        old = dict(self.rows)
        try:
            for key, count in slots.items():
                before = self.rows.pop(key, None)
                if not _at(self.expected, key):
                    continue
                # A budget that is a part of the free memory refers to what was free when the first one was made.
                new = self.build(key, count, self.options.budget if before is None else before.cache.stats().budget)
                if before is not None:
                    new.copy_from(before, lengths)
        except BaseException:
            self.rows = old
            raise
        for key in slots:
            if key in old:
                old[key].replace()

    @contextlib.contextmanager
    def taking_slots(self) -> Iterator[None]:
        """Within this context no other thread takes neighbouring slots in the ``KVCache``s."""
        with contextlib.ExitStack() as each:
            # Every thread takes the locks in the same order, so that no two of them wait for each other.
            for cache in sorted((rows.cache for rows in self.rows.values()), key=id):
                each.enter_context(cache.slots_lock)
            yield

    def clone(self) -> Placement:
        """Returns a placement of the same layers without rows."""
        other = Placement(list(self.windows), list(self.cached), self.options)
        other.open_ended = self.open_ended
        other.seen, other.expected = dict(self.seen), dict(self.expected)
        other._signatures = dict(self._signatures)
        return other


def _at(places: dict[int, Place], key: DeviceKey) -> dict[int, LayerShape]:
    """Returns the shapes of the layers that are at ``key``, by layer."""
    return {layer: shape for layer, (where, shape) in places.items() if where == key}


def _described(place: Place) -> str:
    (device, _), shape = place
    dims = str(shape.head_dim) if shape.v_head_dim == shape.head_dim else f"{shape.head_dim}/{shape.v_head_dim}"
    return f"{shape.kv_heads} heads of {dims} in {shape.dtype} on {device}"


def _signature(k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
    return k.shape[1], k.shape[3], v.shape[3], k.dtype, v.dtype, k.device, v.device
