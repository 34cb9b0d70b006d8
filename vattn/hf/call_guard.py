"""``CallGuard``: checks that the calls of a model that write to a cache are complete, and come from one thread."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class CallGuard:
    """Checks that the calls of a model that write to a cache are complete, and come from one thread at a time.

    One thread writes at a time, and each call of the model updates every layer. When a call ends between two layers,
    and what it appended cannot be undone, the cache is torn: its layers hold different positions, and every use raises
    ValueError until the cache is reset.

    Attributes:
        torn: why the cache is torn, or None.
        lost: whether rows have no memory any more, so that they must not even be read.
    """

    def __init__(self) -> None:
        self.torn: str | None = None
        self.lost = False
        self._claim = threading.RLock()  # owned by the thread that the cache belongs to, see ``claimed``
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
        """Notes that a layer is about to be updated, and raises where no complete call of a model would update it.

        Args:
            start: positions that the layer holds.
            lengths: the lengths of all layers that have been updated so far.
            all_seen: whether these are all layers of the cache.
            in_call: whether other layers are still to be updated in the same call of the model.

        Raises:
            ValueError: the cache is torn, or a call has ended between two layers.
            RuntimeError: a call of the model is running in another thread.
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

    def lose(self, reason: str) -> None:
        """Notes that rows have lost their memory, and why."""
        self.torn, self.lost = reason, True

    def reset(self) -> None:
        """Notes that all layers are empty."""
        self.torn, self.lost, self._even = None, False, -1


def _in_use() -> RuntimeError:
    return RuntimeError("the cache is in use by another thread: give each thread a cache, or a copy of one")
