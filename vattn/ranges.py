"""Named ranges for vattn's operations in the timelines of profilers. They are off by default, and cost nothing then."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, get_args

import torch

from vattn.arguments import choice

Kind = Literal["torch", "nvtx"]

_lock = threading.Lock()
_methods: dict[tuple[type, str], tuple[str, Any]] = {}  # by class and method name: the range's name, the method
_range: Callable[[str], AbstractContextManager[Any]] | None = None


def set_profiler_ranges(kind: Kind | None) -> None:
    """Shows growth, forks, swaps, decode steps, captures and prompts as ranges in the timeline of a profiler.

    The ranges are named ``vattn::grow``, ``vattn::fork``, ``vattn::swap_out``, ``vattn::swap_in``, ``vattn::step``,
    ``vattn::capture`` and ``vattn::prompt``. They cover the time on the host; kernels that are launched in them appear
    where the profiler places them.

    Args:
        kind: ``"torch"`` for ``torch.profiler``, ``"nvtx"`` for Nsight Systems, None for no ranges.

    Raises:
        TypeError, ValueError: ``kind`` is none of these, or this PyTorch has no NVTX.
    """
    global _range
    if kind is not None:
        choice("kind", kind, get_args(Kind))
    if kind == "nvtx" and not torch.backends.cuda.is_built():  # type: ignore[no-untyped-call]
        raise ValueError("kind is 'nvtx', and this PyTorch is built without CUDA: use 'torch'")
    with _lock:
        _range = {None: None, "torch": torch.profiler.record_function, "nvtx": torch.cuda.nvtx.range}[kind]
        for owner, method in _methods:
            _apply(owner, method)


def register_range(name: str, owner: type, method: str) -> None:
    """Registers a method of a class: while ranges are on, each call of it is a range with this name."""
    with _lock:
        _methods[owner, method] = name, vars(owner)[method]
        _apply(owner, method)


def _apply(owner: type, method: str) -> None:
    """Replaces a method by one that opens a range, or restores the original where ranges are off."""
    name, original = _methods[owner, method]
    if _range is None:
        if vars(owner)[method] is not original:
            setattr(owner, method, original)
        return
    make = _range

    @functools.wraps(original)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with make(name):
            return original(*args, **kwargs)

    setattr(owner, method, ranged)
