"""``private_copy``: a model of the same weights whose modules may be changed without anybody else seeing it."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)


def private_copy(module: _Module, copies: dict[int, nn.Module] | None = None) -> _Module:
    """Returns a copy of a module and of its children, which share their parameters and buffers with the original.

    Args:
        module: the module.
        copies: those of modules that were copied already, by the ``id`` of the original.
    """
    copies = {} if copies is None else copies
    if id(module) in copies:
        return copies[id(module)]  # type: ignore[return-value]
    mine = copies[id(module)] = copy.copy(module)
    for name in ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks"):
        mine.__dict__[name] = copy.copy(module.__dict__[name])
    for name, child in module.__dict__["_modules"].items():  # also those that have two names
        mine.add_module(name, None if child is None else private_copy(child, copies))
    return mine
