"""``install``: makes every new ``DynamicCache`` of a process a ``VirtualCache``."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from transformers.cache_utils import DynamicCache

from vattn.hf.cache import VirtualCache
from vattn.hf.layers import virtualize
from vattn.hf.options import Options


@contextlib.contextmanager
def install(**options: Any) -> Iterator[None]:
    """Within this context every ``DynamicCache`` that is made in this process is a ``VirtualCache``.

    Caches made before are not changed, and neither are caches with ``offloading=True`` or of a subclass. Caches made in
    the context remain usable after it.

    Args:
        options: arguments of ``VirtualCache`` from ``max_len``, which is required, to ``mapper``.

    Raises:
        TypeError: an option is unknown, or ``max_len`` is missing.
        RuntimeError: another ``install`` is active.
    """
    known = {field.name for field in fields(Options)} - {"kernels", "scales"}  # which are no arguments of VirtualCache
    if unknown := sorted(set(options) - known):
        raise TypeError(f"install takes options of VirtualCache, of which {unknown[0]!r} is none")
    if "max_len" not in options:
        raise TypeError("max_len must be given")
    checked = Options(**options)
    original: Callable[..., None] = DynamicCache.__init__
    if hasattr(original, "_vattn"):
        raise RuntimeError("vattn.install is active already: leave the outer one first")

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if type(self) is DynamicCache and not self.offloading:
            self.__class__ = VirtualCache
            virtualize(self, checked)

    init._vattn = True  # type: ignore[attr-defined]
    DynamicCache.__init__ = init
    try:
        yield
    finally:
        DynamicCache.__init__ = original
