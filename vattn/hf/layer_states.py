"""States of cache layers that are transformers' own: whether they changed, and how to put them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


def marks_of(layers: list[Any]) -> list[Any]:
    """Returns a value that differs once the layers hold another state."""
    return [_marks(vars(layer)) for layer in layers]


@contextlib.contextmanager
def calling(layers: list[Any], name: str, *args: Any) -> Iterator[None]:
    """Calls a method of each layer, then runs the context; after an error the layers hold what they held before."""
    before = [_copied(vars(layer)) for layer in layers]  # the methods replace tensors and do not write to them
    try:
        for layer in layers:
            getattr(layer, name)(*args)
        yield
    except BaseException:
        for layer, state in zip(layers, before, strict=True):
            vars(layer).clear()
            vars(layer).update(state)
        raise


def _marks(value: Any) -> Any:
    """Returns something that differs once tensors in a value are replaced or written to."""
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict):
        return {name: _marks(each) for name, each in value.items()}
    return [_marks(each) for each in value] if isinstance(value, (list, tuple)) else value


def _copied(value: Any) -> Any:
    """Copies the dicts and lists of a value, but not what is in them."""
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value
