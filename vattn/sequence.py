"""``Sequence``: one sequence of a ``KVCache``."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import torch

from vattn import _core, export

if TYPE_CHECKING:
    from vattn.cache import KVCache

Share = Literal["auto", "alias", "copy"]


class Sequence:
    """One sequence of a ``KVCache``: a slot and a length. Close it, or use it in a ``with`` statement.

    Attributes:
        slot: the row of ``cache.k(layer)`` that is this sequence's; -1 while it has none.
        length: positions that are mapped and may be read and written, once it has a slot.
    """

    def __init__(self, cache: KVCache, slot: int, length: int = 0) -> None:
        self.cache = cache
        self.slot = slot
        self.length = length
        self._slots: tuple[int, ...] = (slot,)
        self._open = True
        self._swapped: _core.Swapped | None = None

    def grow(self, n: int = 1) -> int:
        """Makes room for ``n`` more positions and returns the new length.

        Rows before a layer's sliding window, as seen from the length before the call, are given back.

        Raises:
            SequenceTooLong: beyond ``max_len``.
            OutOfPages: the budget is spent.
            OutOfDeviceMemory: the device is full.
            ValueError: the sequence is closed, or ``n`` is negative.

        After an error nothing has changed.
        """
        if n < 0:
            raise ValueError(f"n must not be negative, not {n}: use truncate to shorten a sequence")
        self._require_open()
        length = self.length + n
        self.cache._grow(self._slots, length, self.length)
        self.length = length
        return length

    @property
    def capacity(self) -> int:
        """Positions that ``grow`` can bring the sequence to without waiting for memory."""
        self._require_open()
        return self.cache._arena.capacity(self.slot)

    def prefetch(self, length: int) -> bool:
        """Asks for memory for ``length`` positions without waiting for it, and returns whether it is there.

        With a mapper it is mapped in the background, as far as the budget and what is free allow without taking from
        other sequences; ask again, or look at ``capacity``, to know. Without one it is mapped before this returns. The
        memory stays with the sequence until ``truncate``.

        Raises:
            SequenceTooLong: beyond ``max_len``.
            ValueError: the sequence is closed, or ``length`` is negative.
            OutOfPages, OutOfDeviceMemory: as in ``grow``, without a mapper only.
        """
        self._require_open()
        require_at_least("length", length, 0)
        return self.cache._arena.prefetch(self.slot, length)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Tells that work on the sequence is queued on ``stream``, beside the streams current at ``grow``.

        Its memory is not unmapped, nor used on another stream, before that work is done.
        """
        self._require_open()
        if self.cache.device.type == "cuda":
            self.cache._arena.use(self.slot, stream.cuda_stream)

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
            OutOfPages, OutOfDeviceMemory: as in ``grow``; nothing has changed then.
        """
        self._require_open()
        require_at_least("n", n, 1)
        made: list[Sequence] = []
        try:
            for _ in range(n):
                made.append(self.cache._open_empty(self.slot))
            self.cache.fork_all(self, made, self.length if length is None else length, share=share)
        except BaseException:
            self.cache.close_all(made)
            raise
        return made

    def remember(self, tokens: Iterable[int]) -> None:
        """Tells whose rows the first of this sequence are, so that others that begin alike start behind them.

        They are known from now on, as far as the work queued on the sequence's streams writes them, and stay known when
        the sequence is closed, until the memory is needed: who was of use least recently goes first, from the end on.

        Args:
            tokens: ids of the first tokens of the sequence, at most ``length``.

        Raises:
            ValueError: the sequence is closed or shorter than that, or the model has recurrent layers.
        """
        self._require_open()
        self.cache._require_rows_only()
        self.cache._remember(self.slot, ids_of(tokens))

    def export(self, to: socket.socket, *, timeout: float = 30.0) -> None:
        """Hands the rows to another process on the same device, which takes them by ``KVCache.import_sequence``.

        Nothing is copied but what does not fill an extent. What is queued on the sequence's streams is waited for. The
        sequence goes on as it was; what it has in common with the other process neither of them writes any more.

        Args:
            to: a connected Unix socket, to a process of the same user.
            timeout: seconds that any step may take.

        Raises:
            Error: the other process has gone, was silent for too long, refused, or belongs to another user.
            ValueError: the cache was not made ``exportable``, the layouts differ, or every slot is in use.
            OutOfPages: as in ``fork``.
        """
        self._require_open()
        if not self.cache._arena.driver.exportable:
            raise ValueError("the cache cannot export: make it with exportable=True")
        with export.telling(to, timeout):
            [copy] = self.fork(share="alias")
            runs: export.ExportedRuns = []
            try:
                runs = self.cache._arena.export_rows(copy.slot, self.cache._stream())
                export.send(to, self.cache._exported_layout(), self.length, runs)
            finally:
                for _, extents in runs:
                    for _, descriptor in extents:
                        os.close(descriptor)
                copy.close()

    def swap_out(self) -> None:
        """Moves the sequence to page-locked host memory and lets its slot go, without waiting for the copy.

        What was queued on the sequence's streams comes first. Its memory serves others when the copy is done. Rows that
        it shares stay with who else has them; what ``remember`` was told is forgotten.

        Raises:
            OutOfPages: ``host_budget`` is spent; nothing has changed.
            ValueError: the sequence is closed or swapped out.
        """
        self._require_open()
        self._swapped = self.cache._arena.swap_out(self.slot, self.cache._stream())
        self.slot, self._slots = -1, ()

    def swap_in(self, *, slot: int | None = None) -> None:
        """Brings the sequence back, to ``slot`` or any, without waiting for the copy.

        What is queued on the current stream from now on comes after it.

        Raises:
            OutOfPages, OutOfDeviceMemory: as in ``grow``; the sequence is still swapped out.
            ValueError: the sequence is not swapped out, or the slot, or every slot, is in use.
        """
        if self._swapped is None:
            raise ValueError("the sequence is not swapped out")
        self.slot = self.cache._swap_in(self._swapped, slot)
        self._slots, self._swapped = (self.slot,), None

    @property
    def swapped(self) -> bool:
        """Whether the sequence is in host memory."""
        return self._swapped is not None

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
            OutOfPages, OutOfDeviceMemory: there is not so much memory; nothing has changed then, or all but the forks.
            ValueError: the sequence is closed, or shorter than that; or there are not so many slots.
        """
        self._require_open()
        require_at_least("length", length or 0, 0)
        require_at_least("forks", forks, 0)
        length = self.length if length is None else length
        self.cache._arena.compact(self.slot, length)
        if forks:
            self.cache._make_ready(self, length, forks)

    def k(self, layer: int) -> torch.Tensor:
        """This sequence's K, ``[length, kv_heads, head_dim]``, a view."""
        self._require_open()
        return self.cache.k(layer)[self.slot, : self.length]

    def v(self, layer: int) -> torch.Tensor:
        """This sequence's V, ``[length, kv_heads, v_head_dim]``, a view."""
        self._require_open()
        return self.cache.v(layer)[self.slot, : self.length]

    def close(self, *, tokens: Iterable[int] | None = None) -> None:
        """Ends the sequence and parks its slot. Closing twice is allowed.

        Args:
            tokens: what to ``remember`` before.
        """
        if not self._open:
            return
        if tokens is not None:
            self.remember(tokens)
        if self._swapped is not None:
            self._open, self._swapped, self.length = False, None, 0
        else:
            self.cache.close_all([self])

    def __enter__(self) -> Sequence:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"length {self.length}" if self._open else "closed"
        if self.swapped:
            state += ", swapped out"
        return f"Sequence(slot {self.slot}, {state})"

    def _require_open(self) -> None:
        if not self._open:
            raise ValueError("the sequence is closed: open a new one with KVCache.open")
        if self._swapped is not None:
            raise ValueError("the sequence is swapped out: swap it in first")


def require_at_least(name: str, value: int, least: int) -> None:
    """Raises ValueError, with the argument's name, where it is less."""
    if value < least:
        bound = f"be at least {least}" if least else "not be negative"
        raise ValueError(f"{name} must {bound}, not {value}")


def ids_of(tokens: Iterable[int]) -> tuple[int, ...]:
    """Tokens as the tree of known prefixes has them."""
    return tuple(tokens.tolist() if isinstance(tokens, torch.Tensor) else tokens)
