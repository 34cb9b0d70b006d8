"""``KVCache``: torch views of K and V at constant addresses, under which memory is mapped as sequences grow."""

from __future__ import annotations

import socket
import threading
from collections.abc import Hashable, Iterable
from operator import attrgetter
from types import TracebackType
from typing import Any, NoReturn

import torch

from vattn import _core
from vattn.aliases import Renamed
from vattn.arguments import choice, flag, hashable, integer, integers, optional_integer, seconds, shown, token_ids
from vattn.errors import BudgetExceeded
from vattn.memory import ipc
from vattn.memory.device import (
    UNLIMITED,
    TrimOnOOM,
    budget_bytes,
    checked_budget,
    driver_of,
    mapper_of,
    resolve_device,
)
from vattn.memory.layout import GRANULARITY, KINDS, Kind, KVLayout
from vattn.memory.row_views import RowViews
from vattn.memory.sequence import Sequence
from vattn.memory.shape import dtype_name
from vattn.memory.slot_map import drawn
from vattn.memory.slots import SHARES, Share, Slots
from vattn.memory.stats import CacheStats
from vattn.ranges import register_range


class KVCache:
    """The K and V tensors of every layer, with one slot for each sequence.

    Several threads may call its methods. Rows that one thread writes may be read by another thread once the kernels
    that write them are done.

    Args:
        layout: where the rows lie, see ``KVLayout``.
        slots: the most sequences that may run at once. A slot costs addresses only.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or a ``torch.device``.
        budget: limit on physical memory: bytes (int), a fraction of what is free now (float in (0, 1]), or None for
            no limit but the device's.
        growth_divisor: a growing sequence takes new memory in extents of up to 1/growth_divisor of what it has, so
            that at most this fraction of it is unused.
        tail_rows: positions past its length that kernels may load, kept mapped and finite: see ``vattn.kernels``.
        lookahead: positions past its length up to which the mapper, a background thread, keeps a running sequence
            mapped. None: computed from the time to map and the rate of growth, at least a granule (or 64 positions).
        mapper: False makes every driver call in the thread that needs the memory, and maps nothing ahead.
        alias_limit: mappings of this cache beyond which forks copy rows instead of sharing memory; by default three
            quarters of the mappings that the device allows.
        host_budget: limit, in bytes, on the page-locked host memory for swapped-out sequences; None for no limit.
        exportable: allocates memory that ``Sequence.export`` can pass to other processes.
        protect_shared: maps shared memory read-only, so that a write to it faults; for debugging.
        empties_torch: whether, when the device is full, torch has to release the memory that it has cached, which waits
            for the device.
        capacity: bytes of a simulated device (host only), for tests; 0 uses the memory of the machine.

    Raises:
        BackendUnavailable: this machine cannot use the device.
        TypeError, ValueError: an argument has the wrong type or is out of range; the message names it.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        slots: int,
        device: str | torch.device = "cpu",
        budget: int | float | None = None,
        growth_divisor: int = 32,
        tail_rows: int = 0,
        lookahead: int | None = None,
        mapper: bool = True,
        alias_limit: int | None = None,
        host_budget: int | None = None,
        exportable: bool = False,
        protect_shared: bool = False,
        empties_torch: bool = True,
        capacity: int = 0,
    ) -> None:
        if not isinstance(layout, KVLayout):
            raise TypeError(f"layout must be a KVLayout, not {shown(layout)}")
        slots = integer("slots", slots, 1)
        lookahead = optional_integer("lookahead", lookahead)
        capacity = integer("capacity", capacity)
        self.layout = layout
        self.slots = slots
        self.device = resolve_device(device)
        self.tail_rows = integer("tail_rows", tail_rows)
        driver = driver_of(self.device, layout.granularity, capacity, flag("exportable", exportable))
        self._mapper = mapper_of(self.device) if flag("mapper", mapper) else None
        self._arena = _core.Arena(
            driver,
            [(plane.row_bytes, plane.window or 0) for plane in layout.planes],
            slots=slots,
            max_len=layout.max_len,
            budget=budget_bytes(budget, driver),
            growth_divisor=integer("growth_divisor", growth_divisor, 1),
            tail_rows=self.tail_rows,
            lookahead=lookahead,
            mapper=self._mapper,
            alias_limit=optional_integer("alias_limit", alias_limit),
            host_budget=optional_integer("host_budget", host_budget),
            protect_shared=flag("protect_shared", protect_shared),
        )
        self._slots = Slots(self._arena, layout, self.device, empties_torch=flag("empties_torch", empties_torch))
        self.slots_lock = threading.RLock()  # held while a thread looks for adjacent free slots and opens them
        self._views = RowViews(self._arena, layout, slots)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        max_len: int,
        slots: int,
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype | None = None,
        budget: int | float | None = None,
        layout: Kind = "interleaved",
        granularity: int = GRANULARITY,
        lookahead: int | None = None,
        mapper: bool = True,
    ) -> KVCache:
        """Makes the cache of a model: ``KVLayout.from_config`` with ``layout`` as the kind, then ``KVCache``."""
        choice("layout", layout, KINDS)
        name = None if dtype is None else dtype_name("dtype", dtype)
        described = KVLayout.from_config(config, max_len=max_len, dtype=name, kind=layout, granularity=granularity)
        return cls(described, slots=slots, device=device, budget=budget, lookahead=lookahead, mapper=mapper)

    def k(self, layer: int) -> torch.Tensor:
        """K of one layer, ``[slots, max_len, kv_heads, head_dim]``: the whole virtual tensor.

        Its address never changes. Rows at and past a sequence's length may be unmapped, and a kernel that reads them
        faults: slice before computing, e.g. ``cache.k(0)[slot, :length]``. Printing, saving or copying unmapped rows
        raises RuntimeError, see ``vattn.memory.guard.VirtualTensor``.
        """
        return self._views.k(layer)

    def v(self, layer: int) -> torch.Tensor:
        """V of one layer, ``[slots, max_len, kv_heads, v_head_dim]``; see ``k``."""
        return self._views.v(layer)

    def slot_tensors(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``k`` and ``v`` of one layer as plain tensors, for kernels that check the type of their arguments."""
        return self._views.plain(layer)

    def rows(self, sequence: Sequence, layer: int, *, of_v: bool) -> torch.Tensor:
        """K or V of one layer of a sequence, ``[length, kv_heads, dim]``; see ``Sequence.k``."""
        self._names_of("sequence", [sequence])
        return self._views.of_slot(sequence.slot, sequence.length, layer, of_v=of_v)

    def grouped(self, group: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """K and V of all layers of a ``layout.groups`` entry, ``[slots, max_len, layers, kv_heads, head_dim]``.

        The third item is one tensor with the heads of K and then of V, ``[slots, max_len, layers, 2 * kv_heads,
        head_dim]``, if the group is ``fused``, and None otherwise.
        """
        return self._views.grouped(group)

    def guarded(self, view: torch.Tensor) -> torch.Tensor:
        """Returns a view of the cache's addresses as a ``vattn.memory.guard.VirtualTensor``."""
        return self._views.guarded(view)

    def open(
        self,
        *,
        slot: int | None = None,
        expected: int = 0,
        tokens: Iterable[int] | None = None,
        namespace: Hashable = None,
    ) -> Sequence:
        """Starts a sequence: an empty one, or one that begins with the longest cached prefix of its tokens.

        This waits for work on other streams that last used the memory of the slot.

        Args:
            slot: the slot to take; by default the one whose memory best fits ``expected``, those with cached rows last.
            expected: positions that the sequence will probably need. Until its first ``grow``, its slot loses memory
                for them to other sequences only as a last resort.
            tokens: ids of the sequence's tokens, ``[n]`` or ``[1, n]``, e.g. of the prompt. The sequence begins with
                the rows of their longest prefix that was committed with ``remember``, without the last token, which
                the model must compute; its ``length`` says how many rows these are. If a parked slot ends there or
                less than a granule later, or is the last free one, the sequence takes it over; otherwise it is a fork.
            namespace: what the rows also depend on, e.g. the adapter, the tenant or the images of a prompt: rows are
                used only from sequences with an equal one (1, 1.0 and True are equal). The sequence keeps it.

        Raises:
            ValueError: the slot, or every slot, is in use; a slot is given with tokens; or tokens are given for a model
                with recurrent layers, whose state is not in rows.
            OutOfDeviceMemory: the device is full, and the cached rows cannot be forked.
        """
        slot = optional_integer("slot", slot)
        expected = integer("expected", expected)
        hashable("namespace", namespace)
        if tokens is not None:
            ids = token_ids("tokens", tokens)
            if slot is not None:
                raise ValueError("slot cannot be chosen where tokens are given: they choose it")
            self._slots.require_rows_only()
            if known := self._open_cached(ids[:-1], namespace, expected):
                if expected > known.length:
                    self._arena.expect(known.handle.name, expected)
                return known.handed_out()
        handle = self._arena.open(slot, expected=expected, stream=self._slots.stream())
        return Sequence(self, self._slots, handle, namespace).handed_out()

    def cached_positions(self, tokens: Iterable[int], *, namespace: Hashable = None) -> int:
        """Returns how many positions ``open(tokens=)`` would most likely begin with; another thread may change it."""
        match = self._slots.prefixes.match(token_ids("tokens", tokens)[:-1], namespace)
        return 0 if match is None else match.length

    def open_unwatched(self, slot: int) -> Sequence:
        """Starts an empty sequence in a slot, which gives no ResourceWarning if it is dropped without ``close``."""
        return Sequence(self, self._slots, self._arena.open(integer("slot", slot), stream=self._slots.stream()))

    def pin(self, tokens: Iterable[int], *, namespace: Hashable = None) -> Sequence:
        """Keeps the cached rows of tokens, e.g. of a system prompt, as long as the sequence that it returns is open.

        Do not write to that sequence; ``compact`` makes forks of it cheap.

        Raises:
            ValueError: not all tokens have cached rows, see ``Sequence.remember``; or no slot or no budget is left.
            OutOfDeviceMemory: as in ``Sequence.fork``.
        """
        ids = token_ids("tokens", tokens)
        hashable("namespace", namespace)
        self._slots.require_rows_only()
        pinned = self._open_cached(ids, namespace, whole=True)
        if pinned is None:
            raise ValueError(
                f"the rows of these {len(ids)} tokens are not known, or no slot is left: remember them, or close others"
            )
        pinned.remember(ids)
        return pinned.handed_out()

    def _open_cached(
        self, ids: tuple[int, ...], namespace: Hashable, expected: int = 0, *, whole: bool = False
    ) -> Sequence | None:
        """Opens a sequence with the longest cached prefix, or None; with ``whole``, a fork of all the rows or None."""
        while ids:
            match = self._slots.prefixes.match(ids, namespace)
            if match is None:
                return None
            slot, generation, length = match
            # The index is a hint: only the arena knows what the slot holds, and other threads may change it any time.
            now, known, parked = self._arena.cached_prefix(slot)
            if now != generation or known < length:
                self._slots.prefixes.shorten(match, namespace, known if now == generation else 0)
                continue
            if whole and length < len(ids):
                return None
            # Taking the slot over loses its cached rows past `length`: only if they are few or no other slot is free.
            beyond, last = known - length, self._arena.running_slots + 1 >= self.slots
            if parked and not whole and (last or beyond < max(1, self.layout.tokens_per_granule)):
                if handle := self._arena.reopen(slot, generation, length, self._slots.stream()):
                    sequence = Sequence(self, self._slots, handle, namespace)
                    self._slots.prefixes.shorten(match, namespace, length)
                    return sequence
            elif self._arena.running_slots + parked >= self.slots:
                return None  # no slot is free beside the one that holds the rows
            elif (forked := self._fork_cached(slot, generation, length, namespace, expected)) is not None:
                self._slots.note_fork(slot, generation, length)
                return forked
            if self._arena.cached_prefix(slot) == (now, known, parked):
                return None  # a sliding window has given back rows, or there is no memory for a fork
        return None

    def _fork_cached(
        self, slot: int, generation: int, length: int, namespace: Hashable, expected: int
    ) -> Sequence | None:
        # With an expected length, the memory of a parked slot can serve the growth behind the forked rows.
        sequence = Sequence(self, self._slots, self._slots.open_empty(slot, expected, length), namespace)
        try:
            into = sequence.handle.name
            if sequence.slot != slot and self._slots.fork(slot, length, [into], generation=generation, share="auto"):
                return sequence
        except BudgetExceeded:
            pass
        except BaseException:
            sequence.close()
            raise
        sequence.close()
        return None

    def import_sequence(self, of: socket.socket, *, timeout: float = 30.0, namespace: Hashable = None) -> Sequence:
        """Receives a sequence that another process exports over a connected Unix socket, without copying its rows.

        The memory is mapped read-only and counts in both processes' budgets. The sequence can be forked and can grow
        like any other, into memory of this process. It stays complete if the exporter exits.

        Args:
            of: connected to the process that calls ``Sequence.export``, of the same user and on the same device.
            timeout: seconds that the whole transfer may take.
            namespace: the namespace of the sequence in this cache, as in ``open``.

        Raises:
            Error: the exporter has gone, took too long, refused (e.g. another layout or device), or is another user's.
            ValueError: every slot is in use.
            BudgetExceeded: the budget does not suffice. After any of these errors nothing has changed here.
        """
        ipc.require_socket("of", of)
        hashable("namespace", namespace)
        with ipc.received(of, self._slots.exported_layout(), timeout=seconds("timeout", timeout)) as (length, runs):
            sequence = Sequence(self, self._slots, self._slots.open_empty(None), namespace)
            try:
                self._arena.import_rows(sequence.handle.name, length, runs)
            except BaseException:
                sequence.close()
                raise
        return sequence.handed_out()

    def fork_all(self, source: Sequence, targets: list[Sequence], length: int, *, share: Share = "auto") -> None:
        """Gives empty sequences the first ``length`` positions of another one: all of them, or none if it raises.

        See ``Sequence.fork``, which also opens the targets.
        """
        names = self._names_of("targets", targets)
        [name] = self._names_of("source", [source])
        choice("share", share, SHARES)
        self._slots.fork(name, integer("length", length), names, share=share)

    def grow_all(
        self, sequences: list[Sequence], length: int | list[int], *, min_truncate_length: int | list[int]
    ) -> None:
        """Grows several sequences to ``length`` positions at once: all of them, or none if it raises.

        Args:
            sequences: running sequences of this cache.
            length: positions that each sequence has at least afterwards, one number for all or one for each.
            min_truncate_length: the shortest length that they may still be truncated to, one number for all or one for
                each. Sliding windows give back the rows that no query at this length sees.
        """
        names = self._names_of("sequences", sequences)
        lengths = integers("length", length, len(names))
        shortest = integers("min_truncate_length", min_truncate_length, len(names))
        self._slots.taking(self._arena.grow, names, lengths, shortest, self._slots.stream())

    def side_by_side(self, sequences: list[Sequence]) -> list[int]:
        """Returns an order of sequences, as indexes, in which those that share their first rows stand side by side.

        Attention then finds these rows in the caches of the GPU. The other sequences keep their order.
        """
        return self._arena.side_by_side(self._names_of("sequences", sequences))

    def truncate_all(self, sequences: list[Sequence], length: int) -> None:
        """Truncates several sequences to their first ``length`` positions: all of them, or none if it raises."""
        names = self._names_of("sequences", sequences)
        self._arena.truncate(names, integer("length", length), self._slots.stream())

    def close_all(self, sequences: list[Sequence]) -> None:
        """Ends several running sequences and parks their slots: all of them, or none if it raises."""
        self._names_of("sequences", sequences)
        _core.close([sequence.handle for sequence in sequences], self._slots.stream())

    def free_slots(self, n: int) -> int | None:
        """Returns the first of ``n`` adjacent slots without a sequence, with the highest possible index, or None."""
        return self._arena.free_slots(integer("n", n, 1))

    def free_slots_from(self, slot: int) -> int:
        """Returns how many adjacent slots, from ``slot`` on, have no sequence."""
        return self._arena.free_slots_from(integer("slot", slot))

    def copy_on_write(self, sequences: list[Sequence], length: int) -> None:
        """Copies the memory that is shared behind the first ``length`` positions, so that rows there may be written.

        Raises:
            BudgetExceeded, OutOfDeviceMemory: there is no memory for the copies; no row has changed.
        """
        names = self._names_of("sequences", sequences)
        self._slots.taking(self._arena.copy_on_write, names, integer("length", length), self._slots.stream())

    def shares(self, sequences: list[Sequence], length: int) -> bool:
        """Whether any memory behind the first ``length`` positions of these sequences is shared with others."""
        return self._arena.shares(self._names_of("sequences", sequences), integer("length", length))

    def first_row(self, slot: int, plane: int) -> int:
        """Returns the first position whose row in a plane no sliding window has given back, not even in part."""
        slot = integer("slot", slot, 0, self.slots - 1)
        plane = integer("plane", plane, 0, len(self.layout.planes) - 1)
        return -(-self._arena.head(slot, plane) // self.layout.planes[plane].row_bytes)

    def trim(self) -> None:
        """Gives all memory back to the driver that no running sequence needs; waits for kernels that may use it."""
        self._arena.trim()

    def set_budget(self, budget: int | float | None) -> None:
        """Sets the limit on physical memory; memory beyond it goes back to the driver before this returns.

        Args:
            budget: bytes (int), a fraction of the free memory plus the cache's own (float in (0, 1]), or None.

        Raises:
            BudgetExceeded: running sequences need more; the budget is unchanged.
        """
        budget = checked_budget(budget)
        held = self.stats().physical if isinstance(budget, float) else 0
        self._arena.set_budget(budget_bytes(budget, self._arena.driver, held))

    def trim_on_oom(self) -> TrimOnOOM:
        """Returns a context in which a torch operation of this thread that runs out of memory is retried after a trim.

        The trim frees all memory that no running sequence needs. Every operation in the context takes some microseconds
        longer, since it makes a detour through Python: use it for prefills that fill the device.
        """
        return TrimOnOOM(self.trim)

    def wait_idle(self) -> None:
        """Waits until the mapper has no work left for this cache except to wait for kernels."""
        self._arena.wait_idle()

    settle = Renamed("wait_idle")
    own_all = Renamed("copy_on_write")

    def close(self) -> None:
        """Unmaps all memory. Views of K and V must not be read afterwards; their addresses stay reserved."""
        self._arena.close()

    @property
    def driver(self) -> _core.Driver:
        """The core's driver of the device, which counts calls; for measurements and tests."""
        return self._arena.driver

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return self._arena.closed

    def stats(self) -> CacheStats:
        """Returns a snapshot of the memory and of the number of driver calls so far."""
        driver = self._arena.driver
        stats: dict[str, Any] = {
            **self._arena.stats(),
            "driver_calls": driver.counts(),
            "background_calls": driver.counts(background=True),
        }
        if stats["budget"] == UNLIMITED:
            stats["budget"] = None
        return CacheStats(**stats)

    def map(self) -> list[_core.SlotInfo]:
        """Returns each slot's state, length and runs; sizes in bytes, offsets from the start of the reservation."""
        return self._arena.map()

    def show(self) -> str:
        """Returns the map of the slots with a sequence or memory as text; extents are granules joined by ``+``."""
        return drawn(self.map(), self.layout.granularity)

    def check(self) -> None:
        """Recounts all extents, addresses and states; raises ``vattn.Error`` if an invariant is broken."""
        self._arena.check()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a KVCache cannot be copied or pickled: fork its sequences, export them to another process, or save clones "
            "of their k() and v()"
        )

    def __enter__(self) -> KVCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"KVCache({len(self.layout.layers)} layers, {self.slots} slots of {self.layout.max_len}, "
            f"{self.layout.kind}, {self.device})"
        )

    def _names_of(self, argument: str, sequences: Iterable[Sequence]) -> list[int]:
        """Returns the numbers by which the arena names the sequences of an argument, after checking them."""
        if not isinstance(sequences, (list, tuple)):
            raise TypeError(f"{argument} must be a list of sequences, not {shown(sequences)}")
        if set(map(type, sequences)) - {Sequence} or set(map(_CACHE, sequences)) - {self}:
            for sequence in sequences:
                if not isinstance(sequence, Sequence):
                    raise TypeError(f"{argument} must be of sequences, not {shown(sequence)}")
                if sequence.cache is not self:
                    raise ValueError(f"{argument} holds a sequence of another cache")
        names = list(map(_NAME, sequences))
        if len(set(names)) < len(names):
            raise ValueError(f"{argument} holds a sequence twice")
        return names


_CACHE, _NAME = attrgetter("cache"), attrgetter("handle.name")


register_range("vattn::grow", KVCache, "grow_all")
register_range("vattn::fork", KVCache, "fork_all")
