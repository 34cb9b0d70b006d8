"""``CallGuard``: whether the calls of a model that write to a cache fit together."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class CallGuard:
    """Whether the calls of a model that write to a cache fit together.

    One thread writes at a time, and each call of the model updates every layer. When a call ends between two layers,
    and what it appended cannot be taken back, the cache is torn: its layers hold different positions, and it refuses to
    be used until it is reset.

    Attributes:
        torn: why the cache is torn, or None.
    """

    def __init__(self) -> None:
        self.torn: str | None = None
        self._claim = threading.RLock()  # held by the thread whose call of a model the cache serves
        self._thread: int | None = None  # the thread that appended last
        self._even = -1  # the length of all layers when the last call of the model began; -1 where they differed

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within this context the cache belongs to the calling thread.

        Raises:
            RuntimeError: it belongs to another thread.
        """
        if not self._claim.acquire(blocking=False):
            raise _in_use()
        try:
            yield
        finally:
            self._claim.release()

    def require_whole(self) -> None:
        """Raises ValueError where the cache is torn."""
        if self.torn is not None:
            raise ValueError(f"the cache does not hold the same of all layers: {self.torn}. Call reset() on it")

    def begin_layer(self, start: int, lengths: list[int], *, all_seen: bool, in_call: bool) -> None:
        """Notes that a layer is about to be updated, and refuses what fits no call of a model.

        Args:
            start: positions that the layer holds.
            lengths: of all layers that have been updated so far.
            all_seen: whether these are all layers.
            in_call: whether other layers are still to be updated in the same call of the model.

        Raises:
            ValueError: the cache is torn, or a call has ended halfway.
            RuntimeError: another thread is in a call of the model.
        """
        self.require_whole()
        thread = threading.get_ident()
        if in_call and self._thread != thread:
            raise _in_use()
        self._thread = thread
        if lengths.count(start) == len(lengths):
            self._even = start if all_seen else -1
        elif self._even >= 0 and start > self._even == min(lengths) and sum(n > self._even for n in lengths) > 1:
            self.torn = f"a call of the model ended halfway, they hold {min(lengths)} to {max(lengths)} positions"
            self.require_whole()

    def forget_call(self) -> None:
        """Forgets where the last call of the model began, since layers were cut."""
        self._even = -1

    def reset(self) -> None:
        """Notes that all layers are empty."""
        self.torn, self._even = None, -1


def _in_use() -> RuntimeError:
    return RuntimeError("the cache is in use by another thread: give each thread a cache, or a copy of one")
