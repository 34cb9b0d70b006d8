"""Names that public things had before: they work for one more release, with a ``DeprecationWarning``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module whose names were others before.

    Args:
        module: its name.
        names: from each name that was, the one that is.
    """

    def getattr_of_module(name: str) -> Any:
        if (now := names.get(name)) is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", now)
        return getattr(sys.modules[module], now)

    return getattr_of_module


class Renamed:
    """An attribute or a method of a class whose name was another before.

    Args:
        now: the name that it has.
    """

    def __init__(self, now: str) -> None:
        self._now = now

    def __set_name__(self, owner: type, name: str) -> None:
        self._was = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type) -> Any:
        _warn(self._was, self._now)
        return getattr(owner if instance is None else instance, self._now)


def _warn(was: str, now: str) -> None:
    warnings.warn(f"{was} is called {now} now", DeprecationWarning, stacklevel=3)
