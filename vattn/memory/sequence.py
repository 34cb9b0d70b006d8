"""``Sequence``: one sequence of a ``KVCache``."""

from __future__ import annotations

import os
import socket
import sys
import warnings
from collections.abc import Hashable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from vattn import _core
from vattn.arguments import MOST, choice, integer, optional_integer, seconds, shown, token_ids
from vattn.memory import ipc
from vattn.memory.slots import SHARES, Share, Slots
from vattn.ranges import register_range

if TYPE_CHECKING:
    from vattn.memory.kv_cache import KVCache

_PACKAGE = str(Path(__file__).parent)


class Sequence:
    """One sequence of a ``KVCache``: a slot and a length. Close it, or use it in a ``with`` statement.

    A sequence that is garbage-collected before it is closed gives its slot back too, with a ``ResourceWarning`` that
    says where it was opened. Several threads may call its methods: each call of ``grow`` gets different positions. Rows
    that one thread writes may be read by another thread once the kernels that write them are done.

    Attributes:
        cache: the cache of the sequence.
        namespace: the namespace it was opened with; tokens passed to ``remember`` serve sequences with an equal one.
        handle: the core's object, which has the state of the sequence.
    """

    def __init__(self, cache: KVCache, slots: Slots, handle: _core.Sequence, namespace: Hashable = None) -> None:
        self.cache = cache
        self.namespace = namespace
        self.handle = handle
        self._slots = slots
        self._opened_at: str | None = None

    @property
    def slot(self) -> int:
        """Index of the sequence's slot, the first dimension of ``cache.k(layer)``; -1 while it is swapped out."""
        slot = self.handle.slot
        return -1 if slot is None else slot

    @property
    def length(self) -> int:
        """Number of positions; they are mapped and may be read and written unless the sequence is swapped out."""
        return self.handle.length

    def grow(self, n: int = 1) -> int:
        """Makes room for ``n`` more positions and returns the new length.

        Memory of rows that no query at the length before the call sees, because of sliding windows, is given back.

        Raises:
            SequenceTooLong: the new length would exceed ``max_len``.
            BudgetExceeded: the budget is spent.
            OutOfDeviceMemory: the device is full.
            ValueError: the sequence is closed or swapped out, or ``n`` is negative.

        After an error the length is unchanged.
        """
        if type(n) is not int or not 0 <= n <= MOST:
            n = integer("n", n)
        slots = self._slots
        return slots.taking(self.handle.grow, n, slots.stream())

    @property
    def capacity(self) -> int:
        """The length to which ``grow`` can bring the sequence without waiting for memory."""
        return self._slots.arena.capacity(self.handle.name)

    def prefetch(self, length: int) -> bool:
        """Asks for memory for ``length`` positions without waiting for it, and returns whether it is mapped already.

        With a mapper the memory is mapped in the background, as far as the budget and the device allow that without
        taking what other running sequences need; call this again, or read ``capacity``, to find out. Without a mapper
        it is mapped before this returns. The sequence keeps the memory until it is truncated or closed.

        Raises:
            SequenceTooLong: ``length`` exceeds ``max_len``.
            ValueError: the sequence is closed or swapped out, or ``length`` is negative.
            BudgetExceeded, OutOfDeviceMemory: as in ``grow``, without a mapper only.
        """
        return self._slots.arena.prefetch(self.handle.name, integer("length", length))

    def expect(self, positions: int, *, prompt: int = 0) -> None:
        """Notes how many positions the sequence will probably need, as ``KVCache.open(expected=)`` does.

        Args:
            positions: how many these are.
            prompt: so many first positions are mapped in few large extents all the same, which are cheap to share.

        Raises:
            ValueError: the sequence is closed or swapped out, or a number is negative.
        """
        self._slots.arena.expect(self.handle.name, integer("positions", positions), integer("prompt", prompt))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Declares that work on the sequence is queued on ``stream``, beside the streams that were current at ``grow``.

        The memory of the sequence is neither unmapped nor used on another stream before that work is done.

        Raises:
            TypeError, ValueError: ``stream`` is no stream or one of another device, or the sequence is closed.
        """
        name, device = self.handle.name, self.cache.device
        if not isinstance(stream, torch.Stream):
            raise TypeError(f"stream must be a torch.cuda.Stream, not {shown(stream)}")
        if device.type != "cuda":
            return
        if not isinstance(stream, torch.cuda.Stream) or stream.device != device:
            raise ValueError(f"stream must be one of {device}, not {shown(stream)}")
        self._slots.arena.use(name, stream.cuda_stream)

    def truncate(self, length: int) -> None:
        """Shortens the sequence to its first ``length`` positions.

        The memory behind them stays mapped until this or another sequence needs it.

        Raises:
            ValueError: the sequence is closed or shorter than that, or a sliding window has moved past ``length``.
        """
        self.cache.truncate_all([self], length)

    def fork(self, length: int | None = None, n: int = 1, *, share: Share = "auto") -> list[Sequence]:
        """Makes ``n`` sequences that start with the first ``length`` positions of this one, by default with all.

        Extents that lie wholly within these positions are shared; the rows behind the last of them are copied on the
        device. The sequences are independent: one that is truncated into shared memory gets a copy before it grows.

        Args:
            length: positions to take over, at most ``self.length``.
            n: sequences to make.
            share: ``"alias"`` shares, ``"copy"`` copies everything, ``"auto"`` does what costs less time and memory.
                Beyond the cache's ``alias_limit``, forks copy in any case.

        Raises:
            ValueError: the sequence is closed or shorter than that, a sliding window has moved past ``length``, or
                fewer than ``n`` slots are free.
            BudgetExceeded, OutOfDeviceMemory: as in ``grow``; no sequence is made then.
        """
        self.handle.name  # noqa: B018, which raises where it is closed
        n, length = integer("n", n, 1), optional_integer("length", length)
        choice("share", share, SHARES)
        length = self.length if length is None else length
        made: list[Sequence] = []
        try:
            for _ in range(n):
                handle = self._slots.open_empty(self.slot, positions=length)
                made.append(Sequence(self.cache, self._slots, handle, self.namespace))
            self.cache.fork_all(self, made, length, share=share)
        except BaseException:
            self.cache.close_all(made)
            raise
        return [sequence.handed_out() for sequence in made]

    def remember(self, tokens: Iterable[int]) -> None:
        """Commits the first rows as those of some tokens, so that sequences that begin with these tokens reuse them.

        The kernels that write the rows must already be queued on the sequence's streams. The rows stay cached when the
        sequence is closed, until their memory is needed: the least recently used slot loses it first, from the end on.

        Args:
            tokens: ids of the first tokens of the sequence, ``[n]`` or ``[1, n]``, at most ``length`` of them.

        Raises:
            ValueError: the sequence is closed or shorter than that, or the model has recurrent layers.
        """
        name, ids = self.handle.name, token_ids("tokens", tokens)
        self._slots.require_rows_only()
        if len(ids) > self.length:
            raise ValueError(f"tokens are {len(ids)}, and the sequence has {self.length} positions")
        self._slots.remember(name, self.slot, ids, self.namespace)

    def export(self, to: socket.socket, *, timeout: float = 30.0) -> None:
        """Passes the rows to another process on the same device, which calls ``KVCache.import_sequence``.

        Only rows behind the last whole extent are copied. The call waits for the work that is queued on the sequence's
        streams. The sequence can be used as before; neither process writes to the memory that they share.

        Args:
            to: a connected Unix socket, to a process of the same user.
            timeout: seconds that the whole transfer may take.

        Raises:
            Error: the other process has gone, took too long, refused, or belongs to another user.
            ValueError: the cache was not made ``exportable``, the layouts differ, or every slot is in use.
            BudgetExceeded: as in ``fork``.
        """
        self.handle.name  # noqa: B018, which raises where it is closed
        ipc.require_socket("to", to)
        timeout = seconds("timeout", timeout)
        if not self._slots.arena.driver.exportable:
            raise ValueError("the cache cannot export: make it with exportable=True")
        with ipc.telling(to, timeout) as peer:
            [copy] = self.fork(share="alias")
            runs: ipc.ExportedRuns = []
            try:
                runs = self._slots.arena.export_rows(copy.handle.name, self._slots.stream())
                ipc.send(peer, self._slots.exported_layout(), copy.length, runs)
            finally:
                for _, extents in runs:
                    for _, descriptor in extents:
                        os.close(descriptor)
                copy.close()

    def swap_out(self) -> None:
        """Moves the sequence to page-locked host memory and gives its slot up, without waiting for the copy.

        The copy runs after the work that is queued on the sequence's streams; then the device memory is free for other
        sequences. Shared rows stay with the other sequences that have them. They are copied to host memory once for all
        sequences that share them, and after ``swap_in`` they are shared again. The host copy is freed with the last
        swapped-out sequence that needs it. Rows committed by ``remember`` are no longer cached.

        Raises:
            BudgetExceeded: ``host_budget`` is spent; nothing has changed.
            ValueError: the sequence is closed or swapped out.
        """
        self.handle.swap_out(self._slots.stream())

    def swap_in(self, *, slot: int | None = None) -> None:
        """Brings the sequence back to the device, to ``slot`` or any free slot, without waiting for the copy.

        Work that is queued on the current stream afterwards runs after the copy.

        Raises:
            BudgetExceeded, OutOfDeviceMemory: as in ``grow``; the sequence is still swapped out.
            ValueError: the sequence is not swapped out, or the slot, or every slot, is in use.
        """
        self._slots.taking(self.handle.swap_in, optional_integer("slot", slot), self._slots.stream())

    @property
    def swapped(self) -> bool:
        """Whether the sequence is in host memory."""
        return self.handle.swapped is not None

    def compact(self, length: int | None = None, *, forks: int = 0) -> None:
        """Moves the first ``length`` positions, by default all, into one extent per plane, which a fork maps at once.

        Rows behind the last whole granule stay where they are. The addresses do not change: the rows are copied on the
        device, after the work on the sequence's streams, for which this call waits. Earlier forks keep what they share.
        Layers with a sliding window are left as they are. Until it is done, the memory is taken twice.

        Args:
            length: positions to move, at most ``self.length``.
            forks: number of free slots in which the positions are mapped in advance. Later forks of them take these
                slots without mapping them again, as long as no other sequence has needed the slots or their memory.

        Raises:
            BudgetExceeded, OutOfDeviceMemory: there is too little memory; no row has changed, and no fork is prepared.
            ValueError: the sequence is closed or shorter than that, or fewer than ``forks`` slots are free.
        """
        name = self.handle.name
        length, forks = optional_integer("length", length), integer("forks", forks)
        length = self.length if length is None else length
        arena = self._slots.arena
        arena.compact(name, length)
        if not forks:
            return
        made = self.fork(length, forks, share="alias")  # parked, their slots keep the shared extents mapped
        try:
            for ready in made:
                arena.commit(ready.handle.name, min(arena.rows_in_shared(ready.handle.name), length))
        finally:
            self.cache.close_all(made)

    def k(self, layer: int) -> torch.Tensor:
        """This sequence's K of one layer, ``[length, kv_heads, head_dim]``: a view whose storage ends with its rows.

        Where a sliding window has given back the first rows, it is a slice of ``KVCache.k``, partly without memory.
        """
        return self.cache.rows(self, layer, of_v=False)

    def v(self, layer: int) -> torch.Tensor:
        """This sequence's V of one layer, ``[length, kv_heads, v_head_dim]``; see ``k``."""
        return self.cache.rows(self, layer, of_v=True)

    def close(self, *, tokens: Iterable[int] | None = None) -> None:
        """Ends the sequence and parks its slot. Closing twice is allowed.

        Args:
            tokens: ids to pass to ``remember`` first; ignored if the sequence is swapped out, since it has no rows.
        """
        ids = None if tokens is None else token_ids("tokens", tokens)
        if self.handle.closed:
            return
        if ids is not None and not self.swapped:
            self.remember(ids)
        _core.close([self.handle], self._slots.stream())

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.handle.closed else f"length {self.length}"
        if self.swapped:
            state += ", swapped out"
        return f"Sequence(slot {self.slot}, {state})"

    def __copy__(self) -> NoReturn:
        raise TypeError("a Sequence cannot be copied: fork() makes another one with the same rows")

    def __deepcopy__(self, memo: Any) -> NoReturn:
        self.__copy__()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("a Sequence cannot be pickled: save clones of k() and v(), or export() it to another process")

    def __del__(self) -> None:
        opened_at = getattr(self, "_opened_at", None)
        if opened_at is None or sys.is_finalizing() or self._slots.arena.driver.in_forked_child:
            return
        if self.handle.closed:
            return
        closed = self.cache.closed
        _core.close([self.handle], 0 if closed else self._slots.stream())
        if not closed:
            what = f"a sequence opened at {opened_at} was never closed"
            warnings.warn(what, ResourceWarning, source=self, stacklevel=2)

    def handed_out(self) -> Sequence:
        """Records the line outside of this package that opened the sequence, for the warning; returns the sequence."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        self._opened_at = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return self


register_range("vattn::grow", Sequence, "grow")
register_range("vattn::fork", Sequence, "fork")
register_range("vattn::swap_out", Sequence, "swap_out")
register_range("vattn::swap_in", Sequence, "swap_in")
