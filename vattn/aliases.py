"""Former names of public objects: they work for one more release, with a ``DeprecationWarning``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Returns a ``__getattr__`` for a module in which names were changed.

    Args:
        module: the name of the module.
        names: maps each former name to the present one.
    """

    def getattr_of_module(name: str) -> Any:
        if (now := names.get(name)) is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        _warn(f"{module}.{name}", now)
        return getattr(sys.modules[module], now)

    return getattr_of_module


class Renamed:
    """A class attribute that stands for the former name of an attribute or a method.

    Args:
        now: the present name.
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
