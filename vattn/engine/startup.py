"""``Startup``: how long the parts of an engine's start take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Startup:
    """How long the parts of an engine's start take.

    Attributes:
        seconds: of each part, by name, in the order in which they began.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of what is done within this context to a part."""
        start = time.perf_counter()
        self.seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
