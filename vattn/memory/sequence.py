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

    One that is forgotten without ``close`` gives its slot back too, with a ``ResourceWarning`` that says where it was
    opened. Several threads may call its methods: each ``grow`` gets positions of its own. What one thread writes to
    rows, another may read once the kernels that write them are done.

    Attributes:
        cache: the cache it is one of.
        namespace: what it was opened with; tokens that it is told to ``remember`` are known to others of the same.
        handle: the core's, which alone knows what the sequence is.
    """

    def __init__(self, cache: KVCache, slots: Slots, handle: _core.Sequence, namespace: Hashable = None) -> None:
        self.cache = cache
        self.namespace = namespace
        self.handle = handle
        self._slots = slots
        self._opened_at: str | None = None

    @property
    def slot(self) -> int:
        """The row of ``cache.k(layer)`` that is this sequence's; -1 while it has none."""
        slot = self.handle.slot
        return -1 if slot is None else slot

    @property
    def length(self) -> int:
        """Positions that are mapped and may be read and written, once it has a slot."""
        return self.handle.length

    def grow(self, n: int = 1) -> int:
        """Makes room for ``n`` more positions and returns the new length.

        Rows before a layer's sliding window, as seen from the length before the call, are given back.

        Raises:
            SequenceTooLong: beyond ``max_len``.
            BudgetExceeded: the budget is spent.
            OutOfDeviceMemory: the device is full.
            ValueError: the sequence is closed, or ``n`` is negative.

        After an error nothing has changed.
        """
        if type(n) is not int or not 0 <= n <= MOST:
            n = integer("n", n)
        slots = self._slots
        return slots.taking(self.handle.grow, n, slots.stream())

    @property
    def capacity(self) -> int:
        """Positions that ``grow`` can bring the sequence to without waiting for memory."""
        return self._slots.arena.capacity(self.handle.name)

    def prefetch(self, length: int) -> bool:
        """Asks for memory for ``length`` positions without waiting for it, and returns whether it is there.

        With a mapper it is mapped in the background, as far as the budget and what is free allow without taking from
        other sequences; ask again, or look at ``capacity``, to know. Without one it is mapped before this returns. The
        memory stays with the sequence until ``truncate``.

        Raises:
            SequenceTooLong: beyond ``max_len``.
            ValueError: the sequence is closed, or ``length`` is negative.
            BudgetExceeded, OutOfDeviceMemory: as in ``grow``, without a mapper only.
        """
        return self._slots.arena.prefetch(self.handle.name, integer("length", length))

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells that work on the sequence is queued on ``stream``, beside the streams current at ``grow``.

        Its memory is not unmapped, nor used on another stream, before that work is done.

        Raises:
            TypeError, ValueError: ``stream`` is no stream, or one of another device; or the sequence is closed.
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
        """Keeps the first ``length`` positions. Their memory stays mapped until somebody needs it.

        Raises:
            ValueError: the sequence is closed or shorter than that, or a sliding window has moved past ``length``.
        """
        self.cache.truncate_all([self], length)

    def fork(self, length: int | None = None, n: int = 1, *, share: Share = "auto") -> list[Sequence]:
        """Makes ``n`` sequences that start with the first ``length`` positions of this one; by default all of them.

        Whole extents of memory are shared, and what lies behind the last of them is copied on the device. Each sequence
        goes on by itself: who is truncated into what it shares gets its own before it grows.

        Args:
            length: positions to take over, at most ``self.length``.
            n: sequences to make.
            share: ``"alias"`` shares, ``"copy"`` copies everything, ``"auto"`` does what costs less time and memory.
                When the device has nearly as many mappings as it takes, all of them copy.

        Raises:
            ValueError: the sequence is closed or shorter than that, a sliding window has moved past ``length``, or
                there are not so many slots.
            BudgetExceeded, OutOfDeviceMemory: as in ``grow``; nothing has changed then.
        """
        self.handle.name  # noqa: B018, which raises where it is closed
        n, length = integer("n", n, 1), optional_integer("length", length)
        choice("share", share, SHARES)
        made: list[Sequence] = []
        try:
            for _ in range(n):
                handle = self._slots.open_empty(self.slot)
                made.append(Sequence(self.cache, self._slots, handle, self.namespace))
            self.cache.fork_all(self, made, self.length if length is None else length, share=share)
        except BaseException:
            self.cache.close_all(made)
            raise
        return [sequence.handed_out() for sequence in made]

    def remember(self, tokens: Iterable[int]) -> None:
        """Tells whose rows the first of this sequence are, so that others that begin alike start behind them.

        They are known from now on, as far as the work queued on the sequence's streams writes them, and stay known when
        the sequence is closed, until the memory is needed: who was of use least recently goes first, from the end on.

        Args:
            tokens: ids of the first tokens of the sequence, ``[n]`` or ``[1, n]``, at most ``length``.

        Raises:
            ValueError: the sequence is closed or shorter than that, or the model has recurrent layers.
        """
        name, ids = self.handle.name, token_ids("tokens", tokens)
        self._slots.require_rows_only()
        if len(ids) > self.length:
            raise ValueError(f"tokens are {len(ids)}, and the sequence has {self.length} positions")
        self._slots.remember(name, self.slot, ids, self.namespace)

    def export(self, to: socket.socket, *, timeout: float = 30.0) -> None:
        """Hands the rows to another process on the same device, which takes them by ``KVCache.import_sequence``.

        Nothing is copied but what does not fill an extent. What is queued on the sequence's streams is waited for. The
        sequence goes on as it was; what it has in common with the other process neither of them writes any more.

        Args:
            to: a connected Unix socket, to a process of the same user.
            timeout: seconds that the whole transfer may take.

        Raises:
            Error: the other process has gone, was silent for too long, refused, or belongs to another user.
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
                ipc.send(peer, self._slots.exported_layout(), self.length, runs)
            finally:
                for _, extents in runs:
                    for _, descriptor in extents:
                        os.close(descriptor)
                copy.close()

    def swap_out(self) -> None:
        """Moves the sequence to page-locked host memory and lets its slot go, without waiting for the copy.

        What was queued on the sequence's streams comes first. Its memory serves others when the copy is done. Rows that
        it shares stay with who else has them, go to host memory once for all who share them (which is given back with
        the last of them), and are shared again with those that are there, or come back. What ``remember`` was told is
        forgotten.

        Raises:
            BudgetExceeded: ``host_budget`` is spent; nothing has changed.
            ValueError: the sequence is closed or swapped out.
        """
        self.handle.swap_out(self._slots.stream())

    def swap_in(self, *, slot: int | None = None) -> None:
        """Brings the sequence back, to ``slot`` or any, without waiting for the copy.

        What is queued on the current stream from now on comes after it.

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
        """Moves the first ``length`` positions, by default all, into one extent that a fork shares in one driver call.

        What does not fill a granule stays where it is. The address stays what it is; the rows are copied on the device,
        and what is queued on the sequence's streams is waited for. Forks made before keep what they share. Layers with
        a sliding window are left as they are. Until it is done, the memory is taken twice.

        Args:
            length: positions to move, at most ``self.length``.
            forks: so many forks of these positions that come next find what they share mapped already, each in a slot
                that nobody uses now and that is theirs until somebody else needs it.

        Raises:
            BudgetExceeded, OutOfDeviceMemory: there is not so much memory; nothing has changed, or all but the forks.
            ValueError: the sequence is closed, or shorter than that; or there are not so many slots.
        """
        name = self.handle.name
        length, forks = optional_integer("length", length), integer("forks", forks)
        length = self.length if length is None else length
        arena = self._slots.arena
        arena.compact(name, length)
        if not forks:
            return
        made = self.fork(length, forks, share="alias")  # whose slots keep what they share mapped
        try:
            for ready in made:
                arena.commit(ready.handle.name, min(arena.rows_in_shared(ready.handle.name), length))
        finally:
            self.cache.close_all(made)

    def k(self, layer: int) -> torch.Tensor:
        """This sequence's K, ``[length, kv_heads, head_dim]``, a view whose storage ends with its rows.

        Of a layer with a window that has moved on the first rows have no memory, see ``KVCache.k``.
        """
        return self.cache.rows(self, layer, of_v=False)

    def v(self, layer: int) -> torch.Tensor:
        """This sequence's V, ``[length, kv_heads, v_head_dim]``; see ``k``."""
        return self.cache.rows(self, layer, of_v=True)

    def close(self, *, tokens: Iterable[int] | None = None) -> None:
        """Ends the sequence and parks its slot. Closing twice is allowed.

        Args:
            tokens: what to ``remember`` before. Of a sequence that is swapped out nothing is: it has no rows here.
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
        """Notes where it was opened: whoever called vattn is to close it. Returns the sequence."""
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
            frame = frame.f_back
        self._opened_at = f"{frame.f_code.co_filename}:{frame.f_lineno}"
        return self


register_range("vattn::grow", Sequence, "grow")
register_range("vattn::fork", Sequence, "fork")
register_range("vattn::swap_out", Sequence, "swap_out")
register_range("vattn::swap_in", Sequence, "swap_in")
