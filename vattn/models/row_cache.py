"""Caches of transformers' own, for models whose sequences are computed one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.cache_utils import DynamicCache


def row_caches(model: Any) -> Callable[[], Any]:
    """Returns a function that makes an empty cache for one sequence of a model, with the states of all its layers."""
    return lambda: DynamicCache(config=model.config)
