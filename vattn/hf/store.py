"""``Store``: what the layers of one ``VirtualCache`` share. It does not depend on transformers."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

from vattn.hf.device_rows import DeviceKey, DeviceRows
from vattn.hf.layer_views import Ready
from vattn.hf.options import Options
from vattn.hf.placement import Placement
from vattn.hf.rows import Rows
from vattn.memory.kv_cache import KVCache
from vattn.memory.shape import LayerShape

_last = threading.local()  # the store that this thread last appended to


class Store:
    """What the layers of one ``VirtualCache`` share: their rows, and the calls of a model that append to them.

    Args:
        rows: of the batch, empty.
        stateful: for each layer whether it keeps a state elsewhere that cannot be undone.

    Attributes:
        lengths: positions that each layer holds, padding included. The list object never changes.
        guard: checks that calls of the model are complete.
        ready: for each layer that the current call will update, what was prepared for it.
        speculative: waits for the speculative decode step that runs; None where none runs.
        closed: whether ``close`` was called.
    """

    def __init__(self, rows: Rows, stateful: list[bool]) -> None:
        self.rows = rows
        self.lengths = rows.lengths
        self.stateful = stateful
        self.guard = rows.guard
        self.ready: dict[int, Ready] = {}
        self.speculative: Callable[[], None] | None = None
        self.closed = False
        self._copying = threading.Lock()

    @property
    def placement(self) -> Placement:
        return self.rows.placement

    @property
    def options(self) -> Options:
        return self.rows.placement.options

    @property
    def windows(self) -> list[int | None]:
        return self.rows.placement.windows

    def add_layer(self) -> int:
        """Adds a layer to an open-ended cache, and returns its index."""
        self.placement.add_layer()
        self.stateful.append(False)
        self.lengths.append(0)
        self.rows.prompts.forget()  # what rows have in common in other layers they may not have in this one
        return len(self.lengths) - 1

    # Calls of a model.

    def require_usable(self) -> None:
        """Raises ValueError where the cache is closed, or a call of the model has ended halfway."""
        self._require_open()
        self.guard.require_whole()

    def _require_open(self) -> None:
        self.cancel_speculative()
        if self.closed:
            raise ValueError("the cache is closed: make a new VirtualCache")

    def roll_back(self, lengths: list[int]) -> None:
        """Sets the layers back to the lengths before a call that failed. What windows gave back is not restored."""
        self.ready.clear()
        self.guard.torn = None
        lengths += [0] * (len(self.lengths) - len(lengths))
        if not any(lengths):
            self.rows.prompts.size = 1
            self.rows.format.forget()
            for layer in list(self.placement.seen):
                self.placement.forget(layer)
        self.lengths[:] = lengths
        self.rows.shorten()

    def reserve(self, batch: int, n: int, expected: Callable[[], dict[int, tuple[torch.device, LayerShape]]]) -> None:
        """Gets memory for ``n`` more positions of a batch, in all layers on all devices, or in none.

        Args:
            batch: rows.
            n: positions, padding included.
            expected: returns device and shape that each layer will most likely have. It is called where no layer has
                been updated yet.

        Raises:
            BudgetExceeded, OutOfDeviceMemory, SequenceTooLong: the memory is not there, and none was taken.
        """
        placement = self.placement
        if placement.open_ended or not n:
            return
        if not placement.expected and not placement.expect(batch, expected(), self._rebuild):
            return
        self.cancel_speculative()
        try:
            for key, rows in list(placement.rows.items()):
                lengths = {self.lengths[layer] for layer in rows.views}
                if len(lengths) != 1 or (any(lengths) and len(rows.sequences) != batch):
                    continue  # the update will raise
                [start] = lengths
                rows = self._open_batch(key, batch)
                if start == 0 and self.rows.format.coming is not None:
                    rows.cache.grow_all(
                        self.rows.prompts.leaders(rows.sequences),
                        self.rows.format.coming.stored(n),
                        min_truncate_length=0,
                    )
                else:
                    shortest = self.rows.room_before(rows, start) if start else 0
                    self.rows.grow(rows, start + n, min_truncate_length=shortest)
        except BaseException:
            self.rows.shorten()
            raise

    def _rebuild(self, slots: dict[DeviceKey, int]) -> None:
        self.ready.clear()
        self.rows.rebuild(slots)

    def take(self, layer: int, key_states: torch.Tensor, value_states: torch.Tensor) -> Ready:
        """Returns what an update of one layer needs. It is prepared for all layers of the group at once.

        Args:
            layer: its index.
            key_states: ``[batch, kv_heads, n, head_dim]``.
            value_states: ``[batch, kv_heads, n, v_head_dim]``.
        """
        ready = self.ready.pop(layer, None)
        if (
            ready
            and (key_states.shape, value_states.numel()) == ready[3][:2]
            and self.placement.is_as_seen(layer, key_states, value_states)
        ):
            return ready
        return self._prepare(layer, key_states, value_states)

    def _prepare(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> Ready:
        """Checks an update, grows the rows for it, and makes the views that serve all layers of its group."""
        key, start = self._begin_layer(layer, k, v)
        batch, _, n, _ = k.shape
        seen = self.placement.seen
        in_step = len(seen) == len(self.placement.expected) and self.lengths.count(start) == len(self.lengths)
        with self._undoing(layer):
            rows = self._open_batch(key, batch)
            self.rows.find_shared_prompts(rows, k, v, start)
            if not in_step:
                self.rows.require_held(rows, layer)
            steady = in_step and self.rows.floor is None
            shortest = self.rows.room_before(rows, start) if steady else self.rows.min_truncate_length(rows)
            self.rows.grow(rows, start + n, min_truncate_length=shortest)

        views, step = rows.views[layer], (k.shape, v.numel(), start + n)
        if (size := self.rows.prompts.size) > 1:
            new = views.lead(layer, batch, size, start, n)
            if start == 0:
                return new, k, v, step
            held = views.rows(layer, 1, 0 if views.window is None else max(start - views.window + 1, 0), start + n)
            k, v = (t.expand(batch, -1, -1, -1) for t in held)
            return new, k, v, step
        ready = zip(views.layers, views.prepare(batch, start, n, step), strict=True)
        if in_step:
            self.ready.update(ready)
        else:  # the first call of the model, or a layer that is not updated in every call
            self.ready.update((each, r) for each, r in ready if each in seen and self.lengths[each] == start)
        return self.ready.pop(layer)

    def append_converted(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Appends K and V of one layer to rows that are stored without their padding, or in fewer bits.

        Args:
            layer: its index.
            k: ``[batch, kv_heads, n, head_dim]``.
            v: ``[batch, kv_heads, n, v_head_dim]``.

        Returns:
            K and V that a query may see, padding included: ``k`` and ``v`` themselves for the first prompt, copies
            later. None, with nothing appended, where rows are stored as the model computes them.
        """
        first, form = not any(self.lengths), self.rows.format
        if first:
            self._require_open()
            form.begin()
        if form.plain:
            return None
        key, start = self._begin_layer(layer, k, v)
        batch, _, n, _ = k.shape
        if (padding := form.padding) is not None:
            fits = batch == len(padding) and not (first and n <= max(padding.rows))
            if not fits or k.requires_grad or v.requires_grad:
                self.rows.restore_padding()
                if first:  # the prompt is stored whole, so its padding is what the model computed
                    form.blank = None
        with self._undoing(layer):
            if first:
                self.rows.find_shared_prompts(self._open_batch(key, batch), k, v, start)
            if self.rows.prompts.size > 1:  # rows that share memory are stored whole
                form.forget()
            if form.plain:
                return None
            rows = self._open_batch(key, batch)
            self.rows.require_held(rows, layer)
            stored = form.stored(start + n, batch)
            if any(row.length < length for row, length in zip(rows.sequences, stored, strict=True)):
                self.rows.grow(rows, start + n, min_truncate_length=self.rows.min_truncate_length(rows))
        views, max_len = rows.views[layer], self.options.max_len
        first_seen = 0 if views.window is None else max(start - views.window + 1, 0)
        with torch.no_grad():
            form.write(views, layer, start, max_len, k, v)
            if start == 0:
                return k, v
            return form.read(views, layer, first_seen, start + n, batch, self.placement.dtypes_of(layer))

    def _begin_layer(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[DeviceKey, int]:
        """Checks an update of a layer, and returns the key of its ``KVCache`` and the positions that it holds."""
        self._require_open()
        self.placement.learn(layer, k, v, self._rebuild)
        start, seen = self.lengths[layer], self.placement.seen
        lengths = [self.lengths[each] for each in seen]
        all_seen = len(seen) == len(self.placement.expected)
        self.guard.begin_layer(start, lengths, all_seen=all_seen, in_call=bool(self.ready))
        return self.placement.expected[layer][0], start

    def _open_batch(self, key: DeviceKey, batch: int) -> DeviceRows:
        before = self.placement.rows[key]
        rows = self.rows.set_batch(before, key, batch)
        if rows is not before:
            self.ready.clear()
        return rows

    @contextlib.contextmanager
    def _undoing(self, layer: int) -> Iterator[None]:
        """Within this context an error leaves no trace of the update of a layer.

        Where earlier layers of other kinds have changed their states, or the other half of an encoder-decoder's cache
        has been updated, that cannot be undone, and the cache concerned is torn.
        """
        before = last_of_thread()
        _last.store = weakref.ref(self)
        try:
            yield
        except BaseException as error:
            if self.lengths[layer] == 0:
                self.placement.forget(layer)
            reason = f"a call of the model ended halfway ({type(error).__name__})"
            if any(self.stateful[:layer]):
                self.guard.torn = reason
            if before is not None and before is not self and _is_ahead(before.lengths, layer + 1, len(self.lengths)):
                before.guard.torn = reason
            raise

    # Decode steps, which write the rows themselves.

    def grow_for_step(self, batch: int, device: torch.device) -> tuple[KVCache, int, int] | None:
        """Gets memory for one more position of every row, for a step that writes it in all layers.

        Args:
            batch: rows of the step.
            device: that the step runs on.

        Returns:
            The ``KVCache``, the slot of row 0 and the length before the step. None where the cache cannot take a step:
            it holds nothing or is closed, layers differ in length or are not all stored in one ``KVCache`` on
            ``device``, or the batch is another one.
        """
        placement, lengths = self.placement, self.lengths
        if self.closed or len(placement.rows) != 1 or not all(placement.cached) or len(placement.seen) != len(lengths):
            return None
        [(key, rows)] = placement.rows.items()
        length = lengths[0]
        if key != (device, -1) or length == 0 or len(rows.sequences) != batch or len(set(lengths)) != 1:
            return None
        self.rows.materialize()
        self.ready.clear()
        floor = self.rows.floor
        shortest = self.rows.room_before(rows, length if floor is None else floor)
        self.rows.grow(rows, length + 1, min_truncate_length=shortest)
        return rows.cache, rows.base, length

    def cancel_speculative(self) -> None:
        """Cancels the speculative step that runs, if any: waits for it, and gives its position back."""
        if self.speculative is None:
            return
        wait, self.speculative = self.speculative, None
        wait()
        self.rows.shorten()

    # Other operations of transformers on a cache.

    def view(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns K and V that a layer holds, or None before the first update.

        Each is ``[batch, kv_heads, length, dim]``; with a sliding window, only the last positions that the next query
        may see. They are views, or copies where rows are stored in fewer bits.
        """
        self.cancel_speculative()
        self.rows.restore_padding()
        views = None if self.closed else self.placement.views_of(layer)
        if views is None or not (rows := self.placement.rows_of(layer)).sequences:
            return None
        if self.guard.lost:
            self.guard.require_whole()
        batch = len(rows.sequences)
        alone = self.rows.prompts.size == batch  # all rows share a prompt, which row 0 holds
        if not alone:
            self.rows.materialize()
        length = self.lengths[layer]
        first = 0 if views.window is None else max(length - views.window + 1, 0)
        if self.options.scales is not None:
            return self.rows.format.read(views, layer, first, length, batch, self.placement.dtypes_of(layer))
        k, v = views.rows(layer, 1 if alone else batch, first, length)
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
        return rows.cache.guarded(k), rows.cache.guarded(v)

    def truncate(self, lengths: list[int]) -> None:
        """Shortens the layers to ``lengths``, see ``Rows.truncate``."""
        self._require_open()
        self.guard.forget_call()
        self.rows.truncate(lengths)
        self.ready.clear()

    def reset(self) -> None:
        """Closes every row, see ``Rows.reset``."""
        self._require_open()
        self.ready.clear()
        self.rows.reset()

    def gather(self, indices: torch.Tensor) -> None:
        """Makes row ``i`` what row ``indices[i]`` was, see ``Rows.gather``."""
        self._require_open()
        self.ready.clear()
        self.rows.gather(indices)

    def clone(self) -> Store:
        """Returns a copy, which shares the memory of the rows where possible. Threads that copy take turns."""
        with self._copying, self.placement.taking_slots(), self.guard.claimed():
            self.require_usable()
            return Store(self.rows.clone(), list(self.stateful))

    def close(self) -> None:
        """Closes the rows, and each ``KVCache`` that no other batch uses."""
        self.cancel_speculative()
        self.closed = True
        self.ready.clear()
        self.rows.leave(keep_caches=False)
        self.lengths[:] = [0] * len(self.lengths)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # when the interpreter exits, modules may be gone already
            self.cancel_speculative()
            self.rows.leave(keep_caches=True)


def last_of_thread() -> Store | None:
    """Returns the store that this thread last appended to, or None where it no longer exists."""
    store: Store | None = getattr(_last, "store", lambda: None)()
    return store


def _is_ahead(lengths: list[int], layers: int, of: int) -> bool:
    """Returns whether ``lengths`` are those of ``of`` layers in the middle of a call that has updated the first ones.

    Args:
        lengths: of all layers.
        layers: how many layers the call has updated.
        of: how many layers the model has.
    """
    return len(lengths) == of > layers and min(lengths[:layers]) > max(lengths[layers:])
