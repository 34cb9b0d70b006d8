"""``Commands``: what callers ask of a thread that serves them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class Commands:
    """What callers ask of a thread that serves them. Each command is carried out or, once that thread ends, refused."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # held while a command is put in, or the last ones are refused
        self._ended: str | None = None

    def put(self, command: Callable[[], Any]) -> Future[Any]:
        """Asks the thread for something.

        Args:
            command: is called in the thread.

        Returns:
            A future of what it returns or raises.
        """
        done: Future[Any] = Future()
        with self._lock:
            if self._ended is None:
                self._waiting.put((command, done))
            else:
                done.set_exception(RuntimeError(self._ended))
        return done

    def obey(self, *, wait: bool) -> None:
        """Carries out what callers have asked for; with ``wait`` waits until there is something."""
        if wait:
            self._carry_out(*self._waiting.get())
        while not self._waiting.empty():
            self._carry_out(*self._waiting.get())

    def _carry_out(self, command: Callable[[], Any], done: Future[Any]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            done.set_result(command())
        except BaseException as error:
            done.set_exception(error)
            if not isinstance(error, Exception):
                raise

    def end(self, why: str) -> None:
        """Refuses what nobody will carry out any more, and whatever comes after, with a RuntimeError that says why."""
        with self._lock:
            self._ended = why
            while not self._waiting.empty():
                _, done = self._waiting.get()
                if done.set_running_or_notify_cancel():
                    done.set_exception(RuntimeError(why))
