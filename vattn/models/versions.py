"""What differs between versions of transformers."""

from __future__ import annotations

import inspect
from typing import Any

import transformers

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE_KEYWORD = "cache" if VERSION >= (5, 24) else "past_key_values"
"""The keyword by which models of the installed transformers take a cache, for programs that support several versions.
"""
CACHE_KEYWORDS = ("cache", "past_key_values")


def cache_keyword(model: Any) -> str:
    """The keyword by which a model takes a cache.

    Raises:
        ValueError: it takes none.
    """
    parameters = inspect.signature(model.forward).parameters
    for keyword in (CACHE_KEYWORD, *CACHE_KEYWORDS, "cache_params"):
        if keyword in parameters:
            return keyword
    raise ValueError(f"{type(model).__name__} takes no cache")
