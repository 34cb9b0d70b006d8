"""``Store``: what the layers of a model share, over one ``KVCache`` for each device; no transformers in it.

Row ``i`` of the batch is slot ``base + i``: stores that were copied from each other share a ``KVCache``, where the base
of the first is 0. Rows that hold the same positions share memory: copies are forks.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from vattn.arguments import choice, flag, integer, optional_integer
from vattn.errors import Error
from vattn.hf.layer_views import MOVED_AT_ONCE, LayerGroupViews, Ready
from vattn.hf.padding import Padding
from vattn.kernels import Kernel
from vattn.kernels.quantize import Scales
from vattn.memory.device import checked_budget, resolve_device
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import GRANULARITY, KINDS, Kind, KVLayout
from vattn.memory.sequence import Sequence
from vattn.memory.shape import LayerShape, dtype_name
from vattn.memory.slots import Share

_SPARE_SLOTS = 64  # slots reserved when their number is left open: addresses cost nothing
_SPARE_ADDRESSES = 1 << 45  # but there is an end to them

_last = threading.local()  # the store that this thread last appended to

Place = tuple[torch.device, int]  # which KVCache: its device, and the layer it is for alone, or -1


@dataclass(frozen=True, kw_only=True)
class Options:
    """The arguments of ``VirtualCache``, checked, and as what they stand for."""

    max_len: int
    slots: int | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    budget: int | float | None = None
    layout: Kind = "interleaved"
    lookahead: int | None = None
    mapper: bool = True
    kernels: tuple[Kernel, ...] = ()  # that decode steps may use on devices
    scales: Scales | None = None

    def __post_init__(self) -> None:
        checked = {
            "max_len": integer("max_len", self.max_len, 1),
            "slots": optional_integer("slots", self.slots, 1),
            "lookahead": optional_integer("lookahead", self.lookahead),
            "budget": checked_budget(self.budget),
            "dtype": None if self.dtype is None else getattr(torch, dtype_name("dtype", self.dtype)),
            "device": None if self.device is None else resolve_device(self.device),
        }
        flag("mapper", self.mapper)
        choice("layout", self.layout, KINDS)
        for name, value in checked.items():
            object.__setattr__(self, name, value)


class Store:
    """What the layers of one cache share: the ``KVCache``s, the rows in use and the length of each layer.

    A layer's shape, dtype and device are known from its first update. Until then it is guessed to be like the last
    layer seen; when a guess proves wrong, the ``KVCache`` it was made for is rebuilt around what is known.
    """

    granularity = GRANULARITY  # bytes; tests on the host make it smaller

    def __init__(
        self, windows: list[int | None], cached: list[bool], options: Options, stateful: list[bool] | None = None
    ) -> None:
        self.windows = windows
        self.cached = cached
        self.stateful = stateful or [False] * len(windows)  # layers of other kinds, whose states cannot be taken back
        self.open_ended = not windows  # no configuration: layers come as they come, each with a KVCache of its own
        self._require_divisible(options.budget)
        self.options = options
        self.lengths = [0] * len(windows)
        self.seen: dict[int, tuple[Place, LayerShape]] = {}
        self.signatures: dict[int, tuple[Any, ...]] = {}  # of the seen layers, what is compared at each step
        self.placed: dict[int, tuple[Place, LayerShape]] = {}
        self.caches: dict[Place, KVCache] = {}
        self.rows: dict[Place, list[Sequence]] = {}
        self.lanes: dict[int, LayerGroupViews] = {}  # of each layer
        self.ready: dict[int, Ready] = {}  # the layers that the step at hand is prepared for
        self.bases: dict[Place, int] = {}
        self.sharers: dict[Place, weakref.WeakSet[Store]] = {}  # the stores with rows in each KVCache
        # How many positions, from the first on, two rows hold alike. Rows of one prompt, as beams, part late.
        self.common: list[list[int]] = []
        # While not 1: so many rows each hold the same, and only the first of them has memory; the others share it
        # once they go on by themselves.
        self.twins = 1
        self.moved: dict[int, int] = {}  # of layers whose rows were copied: the first position that came along
        self.recording = False
        self.floor = 0  # while recording: the length at the last crop, which must stay reachable
        self.padding: Padding | None = None  # while rows are stored without it
        self.blank: Padding | None = None  # what of the rows is not stored, or was not and is zeros now
        self._hidden: Padding | None = None  # of a prompt that is to come
        self.ahead: Callable[[], None] | None = None  # waits for a step that runs at the length so far, uncalled for
        self.closed = False
        self.torn: str | None = None  # why what it holds fits no model's layers any more
        self._copying = threading.Lock()
        self._claim = threading.RLock()  # of the thread whose call of a model it serves
        self._thread: int | None = None  # that appended last
        self._even = -1  # the length of all layers at which the last pass began

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """While it lasts the cache is this thread's.

        Raises:
            RuntimeError: it is another one's.
        """
        if not self._claim.acquire(blocking=False):
            raise RuntimeError("the cache is in use by another thread: give each thread a cache, or a copy of one")
        try:
            yield
        finally:
            self._claim.release()

    def tear(self, reason: str) -> None:
        """Lets what the layers hold not be used any more, since some are ahead of others."""
        self.torn = reason

    def require_usable(self) -> None:
        """Raises ValueError where the cache is closed, or a call of the model has ended halfway."""
        self._require_open()
        if self.torn is not None:
            raise ValueError(f"the cache does not hold the same of all layers: {self.torn}. Call reset() on it")

    def roll_back(self, lengths: list[int]) -> None:
        """Makes the layers as long as they were before a call that has failed; their windows are where they were."""
        self.ready.clear()
        self.torn = None
        lengths += [0] * (len(self.lengths) - len(lengths))
        if not any(lengths):
            self.twins, self.padding, self.blank = 1, None, None
            for layer in list(self.seen):
                self.unlearn(layer)
        self.lengths = lengths
        self._shorten()

    def reserve(self, batch: int, n: int, expected: Callable[[], dict[int, tuple[torch.device, LayerShape]]]) -> None:
        """Memory for ``n`` more positions of a batch, in all layers on all devices, or in none.

        Args:
            batch: rows.
            n: positions, padding included.
            expected: what layers will most likely append of which none has been seen.

        Raises:
            OutOfPages, OutOfDeviceMemory, SequenceTooLong: there is not so much; nothing has changed.
        """
        if self.open_ended or not n:
            return
        if not self.placed and not self._expect(batch, expected()):
            return
        self.land()
        try:
            for place, cache in self.caches.items():
                lengths = {self.lengths[layer] for layer in self._layers_of(place)}
                if len(lengths) != 1 or (any(lengths) and len(self.rows[place]) != batch):
                    continue  # which is no batch's next call
                [start] = lengths
                self._set_rows(place, batch)
                rows, length = self.rows[place], start + n
                if self.twins > 1:
                    rows = rows[:: self.twins]
                held = self._held(length, rows)
                if start == 0 and self._hidden is not None and self._hidden.rows:
                    held = self._hidden.stored(length)
                cache.grow_all(rows, held, keep=self._held(self._room_before(place, start), rows) if start else 0)
        except BaseException:
            self._shorten()
            raise

    def _expect(self, batch: int, layers: dict[int, tuple[torch.device, LayerShape]]) -> bool:
        """Makes the ``KVCache``s for layers that none has been seen of; whether there are some."""
        if not layers:
            return False
        scales, dtype = self.options.scales, self.options.dtype
        stored = None if scales is None else str(scales.dtype).removeprefix("torch.")
        self.placed = {
            index: ((device, -1), shape if stored is None else replace(shape, dtype=stored))
            for index, (device, shape) in layers.items()
            if dtype is None or str(dtype) == f"torch.{shape.dtype}"
        }
        try:
            self._rebuild({place: self._slots_for(batch) for place, _ in self.placed.values()})
        except BaseException:
            self.placed = {}
            raise
        return bool(self.placed)

    def _slots_for(self, batch: int) -> int:
        return max(self.options.slots or 0, 2 * batch) + _SPARE_SLOTS

    @contextlib.contextmanager
    def _placing(self) -> Iterator[None]:
        """While it lasts nobody else takes slots side by side in the ``KVCache``s, or changes a store over them."""
        with contextlib.ExitStack() as each:
            for cache in sorted(self.caches.values(), key=id):
                each.enter_context(cache.placing)
            yield

    def set_budget(self, budget: int | float | None) -> None:
        """Sets the budget of every ``KVCache``, also of those to come."""
        self._require_divisible(budget)
        options = replace(self.options, budget=budget)
        for cache in self.caches.values():
            cache.set_budget(budget)
        self.options = options

    def _require_divisible(self, budget: int | float | None) -> None:
        if self.open_ended and budget is not None:
            raise ValueError("budget needs a cache that is made with the model's config: else each layer has its own")

    def add_layer(self) -> int:
        """One more layer of an open-ended cache; returns its index."""
        self.windows.append(None)
        self.cached.append(True)
        self.stateful.append(False)
        self.lengths.append(0)
        return len(self.windows) - 1

    def take(self, index: int, key_states: torch.Tensor, value_states: torch.Tensor) -> Ready:
        """What an update of one layer needs, prepared for the whole group if it is not yet."""
        ready = self.ready.pop(index, None)
        if (
            ready
            and (key_states.shape, value_states.numel()) == ready[3][:2]
            and _signature(key_states, value_states) == self.signatures[index]
        ):
            return ready
        return self._prepare(index, key_states, value_states)

    def _prepare(self, index: int, k: torch.Tensor, v: torch.Tensor) -> Ready:
        """Checks an update, grows the rows for it, and makes the views that serve all layers of its group."""
        self._require_fit(index, k, v)
        batch, _, n, _ = k.shape
        place, start = self.placed[index][0], self.lengths[index]
        self._begin_pass(index, start, n)
        in_step = len(self.seen) == len(self.placed) and self.lengths.count(start) == len(self.lengths)
        with self._unlearning(index), self._tearing(index):
            self._set_rows(place, batch)
            self._find_twins(place, k, v, start)
            keep = self._room_before(place, start) if in_step and not self.recording else self._keep(place)
            self.caches[place].grow_all(self.rows[place][:: self.twins], start + n, keep=keep)

        lane, step = self.lanes[index], (k.shape, v.numel(), start + n)
        if self.twins > 1:
            new = lane.lead(index, batch, self.twins, start, n)
            if start == 0:
                return new, k, v, step
            seen = lane.rows(index, 1, 0 if lane.window is None else max(start - lane.window + 1, 0), start + n)
            k, v = (t.expand(batch, -1, -1, -1) for t in seen)
            return new, k, v, step
        ready = zip(lane.layers, lane.prepare(batch, start, n, step), strict=True)
        if in_step:
            self.ready.update(ready)
        else:  # the first pass, or a layer that skips steps
            self.ready.update((layer, r) for layer, r in ready if layer in self.seen and self.lengths[layer] == start)
        return self.ready.pop(index)

    def _begin_pass(self, index: int, start: int, n: int) -> None:
        """Notes where the layers were before a pass of a model, or a part of one, and refuses what fits no pass."""
        if self.torn is not None:
            self.require_usable()
        thread = threading.get_ident()
        if self.ready and self._thread != thread:
            raise RuntimeError("the cache is in use by another thread: give each thread a cache, or a copy of one")
        self._thread = thread
        lengths = [self.lengths[layer] for layer in self.seen]
        if lengths.count(start) == len(lengths):
            self._even = start if len(self.seen) == len(self.placed) else -1
        elif self._even >= 0 and start > self._even == min(lengths) and sum(n > self._even for n in lengths) > 1:
            self.tear(f"a call of the model ended halfway, they hold {min(lengths)} to {max(lengths)} positions")
            self.require_usable()

    @contextlib.contextmanager
    def unpadded(self, mask: torch.Tensor | None) -> Iterator[None]:
        """While it lasts a prompt is stored without the padding on the left that a mask hides, ``[batch, length]``."""
        empty = not any(self.lengths) and not self.recording and not self.open_ended and all(self.cached)
        before = self._hidden
        if mask is not None:
            self._hidden = Padding.of(mask) if empty else None
        try:
            yield
        finally:
            self._hidden = before

    def require_hidden(self, mask: torch.Tensor | None) -> None:
        """Raises ValueError where a mask, ``[batch, length]``, shows what is not stored; None shows all."""
        if self.blank is not None and any(self.lengths) and self.blank.shown(mask):
            raise ValueError("attention_mask shows padding that the prompt's has hidden: it is not stored")

    def append_apart(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Appends K and V of one layer to rows that are stored without their padding, or in fewer bits.

        Returns what a query may see, padding included: of a prompt what it is given, later copies. None where rows are
        stored as they are.
        """
        first = not any(self.lengths)
        if first:
            self._require_open()
            self.padding = self.blank = self._hidden
        scales = self.options.scales
        if self.padding is None and scales is None:
            return None
        self._require_fit(index, k, v)
        batch, _, n, _ = k.shape
        place, start = self.placed[index][0], self.lengths[index]
        self._begin_pass(index, start, n)
        if (padding := self.padding) is not None:
            fits = batch == len(padding) and not (first and n <= max(padding.rows))
            if not fits or k.requires_grad or v.requires_grad:
                self.restore_padding()
                if first:  # what is hidden is stored as any other
                    self.blank = None
        with self._unlearning(index), self._tearing(index):
            if first:
                self._set_rows(place, batch)
                self._find_twins(place, k, v, start)
            if self.twins > 1:  # which share memory as they are
                self.padding = self.blank = None
            if self.padding is None and scales is None:
                return None
            self._set_rows(place, batch)
            mine = self.rows[place]
            lengths = self._held(start + n, mine)
            if any(row.length < length for row, length in zip(mine, lengths, strict=True)):
                self.caches[place].grow_all(mine, lengths, keep=self._held(self._keep(place), mine))
        lane, padding = self.lanes[index], self.padding
        first_seen, end = 0 if lane.window is None else max(start - lane.window + 1, 0), start + n
        with torch.no_grad():
            every = lane.rows(index, batch, 0, self.options.max_len)
            for rows, states in zip(every, self._rounded(index, k, v), strict=True):
                if padding is None:
                    rows[:, :, start:end] = states
                else:
                    padding.write(rows, states, start)
            if start == 0:
                return k, v
            if padding is None:
                held = lane.rows(index, batch, first_seen, end)
            else:
                held = padding.padded(every[0], first_seen, end), padding.padded(every[1], first_seen, end)
            return self._read(index, *held)

    def _rounded(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a layer as they are stored."""
        if (scales := self.options.scales) is None:
            return k, v
        k_scale, v_scale = scales.at(index, k.device)
        return scales.rounded(k, k_scale), scales.rounded(v, v_scale)

    def _read(self, index: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is stored of a layer as the model computes with it."""
        if (scales := self.options.scales) is None or index not in self.signatures:  # there is nothing of it yet
            return k, v
        k_scale, v_scale = scales.at(index, k.device)
        k_dtype, v_dtype = self.signatures[index][3:5]
        return scales.read(k, k_scale, k_dtype), scales.read(v, v_scale, v_dtype)

    def restore_padding(self) -> None:
        """Stores rows as they are, with zeros where what was hidden has been.

        When it finds no memory nothing has changed; when it is interrupted while rows move the cache is empty.
        """
        padding = self.padding
        if padding is None or not any(self.lengths):
            self.padding = None
            return
        self.land()
        blocks: dict[Any, torch.Tensor] = {}
        try:
            for place, all_rows in self.rows.items():
                cache, length = self.caches[place], max(self.lengths[layer] for layer in self._layers_of(place))
                cache.grow_all(all_rows, length, keep=padding.stored(self._keep(place)))
                if cache.shares(all_rows, 0):
                    cache.own_all(all_rows, 0)
                for layer in self._filled(place):
                    for rows in self.lanes[layer].rows(layer, 1, 0, MOVED_AT_ONCE):
                        if (rows.shape, rows.dtype, place) not in blocks:
                            blocks[rows.shape, rows.dtype, place] = torch.empty_like(rows[0])
        except BaseException:
            self._shorten()
            raise
        self.padding = None
        try:
            for place in self.rows:
                for layer in self._filled(place):
                    self._restore_layer(place, layer, padding, blocks)
        except BaseException:
            self.reset()
            raise

    def _restore_layer(self, place: Place, layer: int, padding: Padding, blocks: dict[Any, torch.Tensor]) -> None:
        firsts, batch, lane = self._firsts(place, layer), len(self.rows[place]), self.lanes[layer]
        some = lane.rows(layer, 1, 0, MOVED_AT_ONCE)
        with torch.no_grad():
            for part, rows in zip(some, lane.rows(layer, batch, 0, self.options.max_len), strict=True):
                padding.restore(rows, firsts, self.lengths[layer], blocks[part.shape, part.dtype, place])
        moved = [first + pad for first, pad in zip(firsts, padding.rows, strict=True) if first]
        if moved:
            self.moved[layer] = max(moved)

    def _held(self, length: int, rows: list[Sequence]) -> list[int]:
        """What each row holds of so many positions."""
        return [length] * len(rows) if self.padding is None else self.padding.stored(length)

    def _shorten(self) -> None:
        """Takes back what rows were grown by for something that has failed: a fork would share it."""
        for place, rows in self.rows.items():
            length = max((self.lengths[layer] for layer in self._layers_of(place)), default=0)
            for row, held in zip(rows, self._held(length, rows), strict=True):
                if row.length > held:
                    row.truncate(held)

    @contextlib.contextmanager
    def _tearing(self, index: int) -> Iterator[None]:
        """Notes after an error what cannot be taken back: layers of other kinds, or of a decoder, that have gone on."""
        before = last_of_thread()
        _last.store = weakref.ref(self)
        try:
            yield
        except BaseException as error:
            reason = f"a call of the model ended halfway ({type(error).__name__})"
            if any(self.stateful[:index]):
                self.tear(reason)
            if before is not None and before is not self and before.is_ahead(index + 1, len(self.lengths)):
                before.tear(reason)
            raise

    def is_ahead(self, layers: int, of: int) -> bool:
        """Whether just the first layers are longer than all others, as in a decoder's turn with its other half."""
        lengths = self.lengths
        return len(lengths) == of > layers and min(lengths[:layers]) > max(lengths[layers:])

    @contextlib.contextmanager
    def _unlearning(self, index: int) -> Iterator[None]:
        """Forgets after an error what a layer looks like that has seen nothing yet: it may come in another shape."""
        try:
            yield
        except BaseException:
            if self.lengths[index] == 0:
                self.unlearn(index)
            raise

    def _require_fit(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Checks the K and V of an update."""
        self._require_open()
        if k.dim() != 4 or v.dim() != 4 or k.shape[:3] != v.shape[:3]:
            raise ValueError(
                f"key_states and value_states must be [batch, kv_heads, tokens, head_dim] with equal batch, heads "
                f"and tokens, not {tuple(k.shape)} and {tuple(v.shape)}"
            )
        self._require_slots(k.shape[0])
        self._learn(index, k, v)

    def grow_for_step(self, batch: int, device: torch.device) -> tuple[KVCache, int, int] | None:
        """Memory for one more position of every row, for who writes it in all layers by himself.

        Returns the ``KVCache``, the slot of the first row and the length so far; or None where rows or layers differ in
        what they hold.
        """
        if self.closed or len(self.caches) != 1 or not all(self.cached) or len(self.seen) != len(self.lengths):
            return None
        [(place, cache)] = self.caches.items()
        length = self.lengths[0]
        if place != (device, -1) or length == 0 or len(self.rows[place]) != batch or len(set(self.lengths)) != 1:
            return None
        self.settle()
        self.ready.clear()
        keep = self._room_before(place, self.floor if self.recording else length)
        rows = self.rows[place]
        cache.grow_all(rows, self._held(length + 1, rows), keep=self._held(keep, rows))
        return cache, self.bases[place], length

    def grow_ahead(self, length: int) -> bool:
        """Memory for a step at this length before it is called for; False where there is none."""
        [cache] = self.caches.values()
        [rows] = self.rows.values()
        try:
            cache.grow_all(rows, self._held(length + 1, rows), keep=0)
        except Error:
            return False
        return True

    def land(self) -> None:
        """Ends a step that runs though it was not called for, as if it had not begun."""
        if self.ahead is None:
            return
        wait, self.ahead = self.ahead, None
        wait()
        self._shorten()

    def _find_twins(self, place: Place, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Notes whether the rows of a prompt are the same in groups, as beams and return sequences begin."""
        batch, n = k.shape[0], k.shape[2]
        layout = self.caches[place].layout
        large = n * layout.bytes_per_token >= layout.granularity
        differ = k.requires_grad or v.requires_grad or batch == 1 or not large or self.options.scales is not None
        first = not any(self.lengths)  # layer of a new prompt
        if first:
            self.twins = 1
            self.common = [[0] * batch for _ in range(batch)]
        elif self.twins == 1:
            return
        if start and batch != self.twins:
            differ = True  # what a later chunk sees is no view of rows of several prompts
        if differ:
            self.settle()
            return
        same = ((k[1:] == k[:-1]).flatten(1).all(1) & (v[1:] == v[:-1]).flatten(1).all(1)).tolist()
        if first:
            groups = (size for size in range(batch, 0, -1) if batch % size == 0)
            self.twins = next(g for g in groups if all(same[i - 1] for i in range(1, batch) if i % g))
            # Those that follow the first of their group have no memory, also where it was reserved.
            followers = [row for rows in self.rows.values() for i, row in enumerate(rows) if i % self.twins]
            for row in followers:
                if row.length:
                    row.truncate(0)
        elif not all(same[i - 1] for i in range(1, batch) if i % self.twins):
            # Later layers of this step will write where all layers have their rows: nothing may be shared.
            self.settle(share="copy")

    def settle(self, share: Share = "auto") -> None:
        """Gives rows that were the same so far a memory, shared or their own."""
        if self.twins == 1:
            return
        self._shorten()
        if self._uneven():
            share = "copy"
        for place, rows in self.rows.items():
            for leader in range(0, len(rows), self.twins):
                missing = [row for row in rows[leader + 1 : leader + self.twins] if row.length < rows[leader].length]
                if missing:
                    self.caches[place].truncate_all([row for row in missing if row.length], 0)
                    self.caches[place].fork_all(rows[leader], missing, rows[leader].length, share=share)
        # Where they get their own, it is because they have parted, in a layer that is still to come.
        alike = 0 if share == "copy" else min((length for length in self.lengths if length), default=0)
        for leader in range(0, len(self.common), self.twins):
            for i in range(leader, leader + self.twins):
                self.common[i][leader : leader + self.twins] = [alike] * self.twins
        self.twins = 1

    def _uneven(self) -> bool:
        """Whether layers differ in length: then some will write where others have rows, and none may be shared."""
        return len({self.lengths[layer] for layer in self.placed}) > 1

    def leading(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Of the rows of new K or V those that have memory."""
        return states if self.twins == 1 else tuple(t[:: self.twins] for t in states)

    def _require_slots(self, batch: int) -> None:
        if (slots := self.options.slots) is not None and batch > slots:
            raise ValueError(f"a batch of {batch} rows does not fit {slots} slots: make it with slots={batch}")

    def _require_open(self) -> None:
        self.land()
        if self.closed:
            raise ValueError("the cache is closed: make a new VirtualCache")

    def _keep(self, place: Place) -> int:
        """The shortest length that a layer of a place has, or may be cropped to: its windows must stay."""
        shortest = min(self.lengths[layer] for layer in self._layers_of(place) if layer in self.seen)
        return self._room_before(place, self.floor if self.recording else shortest)

    def _room_before(self, place: Place, length: int) -> int:
        """The length that windows must stay for, so that kernels find the rows before the window of another one."""
        if place[0].type == "cpu":
            return length
        return max(0, length - max((kernel.head_rows for kernel in self.options.kernels), default=0))

    def view(self, index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What a layer holds, ``[batch, kv_heads, length, head_dim]``; of a window only what it still needs.

        In fewer bits it holds something else: then these are copies.
        """
        self.land()
        self.restore_padding()
        if index not in self.lanes or not self.rows[self.placed[index][0]]:
            return None
        batch = len(self.rows[self.placed[index][0]])
        alone = self.twins == batch  # one row has the memory of all
        if not alone:
            self.settle()
        lane, length = self.lanes[index], self.lengths[index]
        first = 0 if lane.window is None else max(length - lane.window + 1, 0)
        if self.options.scales is not None:
            return self._read(index, *lane.rows(index, batch, first, length))
        k, v = lane.rows(index, 1 if alone else batch, first, length)
        k, v = (t.expand(batch, -1, -1, -1) for t in (k, v))
        cache = self.caches[self.placed[index][0]]
        return cache.guarded(k), cache.guarded(v)

    def truncate(self, lengths: list[int]) -> None:
        """Shortens the layers to ``lengths``; what no layer needs any more may be given away."""
        self._require_open()
        if any(lengths):
            self.restore_padding()
        self.padding = None
        self._even = -1
        for layer, first in self.moved.items():
            window, length = self.windows[layer] or 0, lengths[layer]
            if length and max(length - window + 1, 0) < first:
                raise ValueError(
                    f"cannot truncate to {length} positions: the window of {window} has moved on and the rows before "
                    "it are given back"
                )
        if any(lengths):
            self.settle()
        self.twins = 1
        shortest = min((lengths[layer] for layer in self.seen), default=0)
        self.common = [[min(alike, shortest) for alike in row] for row in self.common]
        for place, rows in self.rows.items():
            longest = max(lengths[layer] for layer in self._layers_of(place))
            if rows and longest < rows[0].length:
                self.caches[place].truncate_all(rows, longest)
            shortest = min((lengths[layer] for layer in self._layers_of(place) if layer in self.seen), default=0)
            if rows and shortest < longest and self.caches[place].shares(rows, shortest):
                self.caches[place].own_all(rows, shortest)  # the shorter layers write where the longer have their rows
        self.lengths = lengths
        self.blank = self.blank and self.blank.cropped(max(lengths, default=0))
        self.moved = {layer: first for layer, first in self.moved.items() if lengths[layer]}
        self.floor = max(lengths, default=0)
        self.ready.clear()

    def reset(self) -> None:
        """Ends every row; their memory is parked for the next batch. What layers looked like is forgotten."""
        self._require_open()
        self.torn, self._even = None, -1
        self.twins = 1
        self.padding = self.blank = None
        self.ready.clear()
        self.seen.clear()
        self.signatures.clear()
        self.moved.clear()
        for place in self.rows:
            self._close_rows(place, 0)
        self.lengths = [0] * len(self.lengths)
        self.floor = 0

    def gather(self, indices: torch.Tensor) -> None:
        """Makes row ``i`` what row ``indices[i]`` was, for every layer."""
        self._require_open()
        before = max((len(rows) for place, rows in self.rows.items() if self._filled(place)), default=0)
        if before == 0:
            return
        everyone = torch.arange(before)
        indices = everyone[torch.as_tensor(indices).cpu()]
        if torch.equal(indices, everyone):
            return
        batch = len(indices)
        if batch == 0:
            self.reset()
            return
        self._require_slots(batch)
        self.settle()
        self.restore_padding()
        self._shorten()
        self.ready.clear()
        with self._placing():
            self._gather(indices, before, batch)

    def _gather(self, indices: torch.Tensor, before: int, batch: int) -> None:
        self._rebuild({place: 2 * batch for place in self.caches if self._room(place) < batch})
        chosen = indices.tolist()
        places = [place for place in self.caches if self._filled(place)]
        changed = [i for i, source in enumerate(chosen[:before]) if source != i]
        alike = min((self.common[i][chosen[i]] for i in changed), default=0)
        share: Share = "copy" if self._uneven() else "auto"
        try:
            for place in places:
                cache, rows = self.caches[place], self.rows[place]
                self._open_rows(place, batch, 0)
                for source in set(chosen[before:]):
                    new = [rows[i] for i in range(before, batch) if chosen[i] == source]
                    cache.fork_all(rows[source], new, rows[source].length, share=share)
                targets = [rows[i] for i in changed]
                if changed and cache.shares(targets, alike):
                    cache.own_all(targets, alike)
        except BaseException:
            for place in places:
                self._close_rows(place, before)
            raise
        # From here on nothing needs memory of the caches. What rows have in common stays where it is.
        for place in places if changed else ():
            first = self._first_rows(place)
            index = torch.tensor([[chosen[i] for i in changed], changed], device=place[0])
            for lane in {id(lane): lane for layer in self._filled(place) if (lane := self.lanes[layer])}.values():
                start = max(alike, first[lane.layers[0]])
                lane.move(index[0], index[1], before, start, self.rows[place][0].length)
                self.moved.update(dict.fromkeys(lane.layers, first[lane.layers[0]]))
        for place in places:
            self._close_rows(place, batch)
        self.blank = self.blank and self.blank.chosen(chosen)
        shortest = min(self.lengths[layer] for layer in self.placed)
        self.common = [[shortest if a == b else min(shortest, self.common[a][b]) for b in chosen] for a in chosen]

    def clone(self) -> Store:
        """A copy with memory of its own."""
        with self._copying, self._placing(), self.claimed():  # those who copy wait for each other
            self.require_usable()
            return self._clone()

    def _clone(self) -> Store:
        bases = {place: cache.free_slots(len(self.rows[place])) for place, cache in self.caches.items()}
        self._shorten()
        if None in bases.values():
            self.restore_padding()
        other = Store(list(self.windows), list(self.cached), self.options, list(self.stateful))
        other.padding, other.blank = self.padding, self.blank
        other.open_ended = self.open_ended
        other.seen, other.signatures, other.placed = dict(self.seen), dict(self.signatures), dict(self.placed)
        other.lengths, other.floor, other.recording = list(self.lengths), self.floor, self.recording
        self.settle()
        other.common = [list(row) for row in self.common]
        other.moved = dict(self.moved)
        for place, cache in self.caches.items():
            rows, base = self.rows[place], bases[place]
            if not rows or base is None:
                other._build(place, cache.slots, self.options.budget)
                other._copy_from(self, place)
                continue
            other._join(place, cache, base, self.sharers[place])
            other._open_rows(place, len(rows), 0)
            for mine, theirs in zip(rows, other.rows[place], strict=True):
                cache.fork_all(mine, [theirs], mine.length, share="copy" if self._uneven() else "auto")
        return other

    def close(self) -> None:
        self.land()
        self.closed = True
        self.ready.clear()
        self.lanes.clear()
        self._leave()
        self.lengths = [0] * len(self.lengths)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter anything may be gone
            self._leave(only_rows=True)

    def _leave(self, *, only_rows: bool = False) -> None:
        """Closes what is its alone: the ``KVCache``s, or its rows of those that others share."""
        self.land()
        for place, sharers in self.sharers.items():
            sharers.discard(self)
            cache, rows = self.caches[place], self.rows[place]
            if sharers and rows:
                cache.close_all(rows)
            elif not sharers and not only_rows:
                cache.close()
            rows.clear()
            if sharers and not only_rows:  # the others' alone from now on
                del self.caches[place]
        self.sharers = {}

    def _learn(self, index: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Checks that a layer is what it was, or takes note of what it is."""
        signature = _signature(k, v)
        if signature == self.signatures.get(index):
            return
        # Under autocast the two may differ; writing converts, and nothing is lost.
        dtype = torch.promote_types(k.dtype, v.dtype)
        if (scales := self.options.scales) is not None:
            scales.check(index, None if self.open_ended else len(self.windows), k.shape[1])
        shape = LayerShape(
            kv_heads=k.shape[1],
            head_dim=k.shape[3],
            v_head_dim=v.shape[3],
            dtype=str(dtype if scales is None else scales.dtype).removeprefix("torch."),
            window=self.windows[index],
        )
        found = ((k.device, index if self.open_ended else -1), shape)
        if index in self.seen:
            raise ValueError(
                f"layer {index} holds {_described(self.seen[index])} and was given {_described(found)}: use one "
                "VirtualCache for each model"
            )
        for name, want, got in (
            ("dtype", self.options.dtype, dtype),
            ("device", self.options.device, k.device),
        ):
            if want is not None and want != got:
                raise ValueError(f"the cache was made with {name}={want} and layer {index} computes in {got}")
        if v.device != k.device:
            raise ValueError(f"keys are on {k.device} but values are on {v.device}")
        if self.placed.get(index) == found:
            self.seen[index], self.signatures[index] = found, signature
            return
        self.seen[index] = found
        # The guess for what is still to come: as the last layer seen, of the same window where there is one.
        before = dict(self.placed)
        like = {self.windows[layer]: self.seen[layer] for layer in sorted(self.seen)}
        for layer, window in enumerate(self.windows):
            if self.cached[layer] and layer not in self.seen and not self.open_ended:
                (device, _), shape = like.get(window, found)
                self.placed[layer] = ((device, -1), replace(shape, window=window))
        self.placed[index] = found
        slots = self._slots_for(k.shape[0])
        places = {place for place, _ in [*before.values(), *self.placed.values()]}
        try:
            self._rebuild({p: slots for p in places if self._at(before, p) != self._at(self.placed, p)})
        except BaseException:
            self.placed = before
            self.unlearn(index)
            raise
        self.signatures[index] = signature

    def unlearn(self, index: int) -> None:
        self.seen.pop(index, None)
        self.signatures.pop(index, None)

    @staticmethod
    def _at(placed: dict[int, tuple[Place, LayerShape]], place: Place) -> dict[int, LayerShape]:
        return {layer: shape for layer, (where, shape) in placed.items() if where == place}

    def _layers_of(self, place: Place) -> list[int]:
        return [layer for layer, (where, _) in self.placed.items() if where == place]

    def _filled(self, place: Place) -> list[int]:
        return [layer for layer in self._layers_of(place) if self.lengths[layer] > 0 and layer in self.lanes]

    def _build(self, place: Place, slots: int, budget: int | float | None) -> None:
        layers = self._at(self.placed, place)
        layout = KVLayout(
            [layers.get(index) for index in range(len(self.windows))],
            max_len=self.options.max_len,
            kind=self.options.layout,
            granularity=self.granularity,
        )
        slots = max(self.options.slots or 1, min(slots, _SPARE_ADDRESSES // layout.slot_bytes))
        tails = (kernel.tail(shape.head_dim) for kernel in self.options.kernels for shape in layers.values())
        cache = KVCache(
            layout,
            slots=slots,
            device=place[0],
            budget=budget,
            tail_rows=0 if place[0].type == "cpu" else max(tails, default=0),
            lookahead=self.options.lookahead,
            mapper=self.options.mapper,
        )
        self._join(place, cache, 0, weakref.WeakSet())

    def _join(self, place: Place, cache: KVCache, base: int, sharers: weakref.WeakSet[Store]) -> None:
        self.caches[place], self.rows[place], self.bases[place], self.sharers[place] = cache, [], base, sharers
        sharers.add(self)
        for number, group in enumerate(cache.layout.groups):
            self.lanes.update(dict.fromkeys(group.layers, LayerGroupViews(cache, number, group, base)))

    def _room(self, place: Place) -> int:
        """Rows that the store can have in its part of a ``KVCache``."""
        base, have = self.bases[place], len(self.rows[place])
        return have + self.caches[place].free_slots_from(base + have)

    def _rebuild(self, slots: dict[Place, int]) -> None:
        """Makes the ``KVCache`` of each place anew with so many slots, and what it holds, after its layers changed."""
        if not slots:
            return
        # What is written next may be where others have their rows.
        self.settle(share="copy")
        if any(self.lengths):
            self.restore_padding()
        self.ready.clear()
        old = copy.copy(self)
        bases, sharers, old.sharers = self.bases, self.sharers, {}
        self.bases, self.sharers = dict(bases), dict(sharers)
        self.caches, self.rows, self.lanes = dict(old.caches), dict(old.rows), dict(old.lanes)
        try:
            for place, count in slots.items():
                for parts in (self.caches, self.rows, self.bases, self.sharers):
                    parts.pop(place, None)
                if not self._layers_of(place):
                    continue
                before = old.caches.get(place)
                # A part of what is free was meant of what was free at first.
                self._build(place, count, self.options.budget if before is None else before.stats().budget)
                if before is not None:
                    self._copy_from(old, place)
        except BaseException:
            self.caches, self.rows, self.lanes = old.caches, old.rows, old.lanes
            self.bases, self.sharers = bases, sharers
            raise
        for place in slots:
            if place in sharers:
                sharers[place].discard(self)
                if sharers[place]:
                    old.caches[place].close_all(old.rows[place])
        # What was replaced is not closed: the model may hold views of it, and its memory goes with the last of them.

    def _copy_from(self, other: Store, place: Place) -> None:
        layers = [layer for layer in other._filled(place) if layer in self._layers_of(place)]
        if not layers:
            return
        batch = len(other.rows[place])
        self._open_rows(place, batch, max(self.lengths[layer] for layer in layers))
        first = other._first_rows(place)
        for layer in layers:
            self.moved[layer] = first[layer]
            span = layer, batch, first[layer], self.lengths[layer]
            for old, new in zip(other.lanes[layer].rows(*span), self.lanes[layer].rows(*span), strict=True):
                new.copy_(old)

    def _set_rows(self, place: Place, batch: int) -> None:
        rows = self.rows[place]
        if len(rows) == batch:
            return
        if any(self.lengths[layer] for layer in self._layers_of(place)):
            raise ValueError(
                f"the cache holds {len(rows)} rows and was given a batch of {batch}: call reset(), "
                "batch_repeat_interleave() or batch_select_indices() first"
            )
        with self._placing():
            if batch > self._room(place):
                self._rebuild({place: 2 * batch})
            self._close_rows(place, batch)
            self._open_rows(place, batch)

    def _open_rows(self, place: Place, batch: int, length: int | None = None) -> None:
        """Opens rows up to ``batch`` and brings the new ones to the length of the others."""
        cache, rows = self.caches[place], self.rows[place]
        if length is None:
            length = rows[0].length if rows else 0
        before = len(rows)
        if batch > self._room(place):
            raise ValueError(f"{batch} rows of max_len {self.options.max_len} need too many addresses: lower max_len")
        try:
            for slot in range(before, batch):
                rows.append(cache.open_unwatched(self.bases[place] + slot))
            if length and batch > before:
                cache.grow_all(rows[before:], length, keep=0)
        except BaseException:
            self._close_rows(place, before)
            raise

    def _close_rows(self, place: Place, batch: int) -> None:
        """Ends the rows from ``batch`` on."""
        if surplus := self.rows[place][batch:]:
            self.caches[place].close_all(surplus)
            del self.rows[place][batch:]

    def _firsts(self, place: Place, layer: int) -> list[int]:
        """The first position of a layer that each row still has in its slot."""
        group = next(group for group in self.caches[place].layout.groups if layer in group.layers)
        at, planes = group.layers.index(layer), self._plane_firsts(place)
        everything = [0] * len(self.rows[place])
        k, v = (planes.get(plane, everything) for plane in (group.k_planes[at], group.v_planes[at]))
        return list(map(max, k, v))

    def _plane_firsts(self, place: Place) -> dict[int, list[int]]:
        """For each plane with a window, the first position that each row still has in its slot."""
        cache = self.caches[place]
        return {
            number: [cache.first_row(row.slot, number) for row in self.rows[place]]
            for number, plane in enumerate(cache.layout.planes)
            if plane.window
        }

    def _first_rows(self, place: Place) -> dict[int, int]:
        """For each layer of a place, the first position that every row still has: windows give back the others."""
        firsts = {number: max(rows, default=0) for number, rows in self._plane_firsts(place).items()}
        return {
            layer: max(firsts.get(k, 0), firsts.get(v, 0), self.moved.get(layer, 0))
            for group in self.caches[place].layout.groups
            for layer, k, v in zip(group.layers, group.k_planes, group.v_planes, strict=True)
        }


def _described(found: tuple[Place, LayerShape]) -> str:
    (device, _), shape = found
    dims = str(shape.head_dim) if shape.v_head_dim == shape.head_dim else f"{shape.head_dim}/{shape.v_head_dim}"
    return f"{shape.kv_heads} heads of {dims} in {shape.dtype} on {device}"


def _signature(k: torch.Tensor, v: torch.Tensor) -> tuple[Any, ...]:
    return k.shape[1], k.shape[3], v.shape[3], k.dtype, v.dtype, k.device, v.device


def last_of_thread() -> Store | None:
    """The store that this thread last appended to, while it is there."""
    store: Store | None = getattr(_last, "store", lambda: None)()
    return store
