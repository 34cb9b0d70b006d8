"""A KV cache whose address never changes and whose memory grows."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vattn.aliases import renamed
from vattn.errors import (
    BackendUnavailable,
    BudgetExceeded,
    DriverError,
    Error,
    OutOfDeviceMemory,
    SequenceTooLong,
)
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import KVLayout
from vattn.memory.sequence import Sequence
from vattn.memory.shape import LayerShape
from vattn.memory.stats import CacheStats
from vattn.memory.swap_costs import SwapCosts
from vattn.ranges import set_profiler_ranges

if TYPE_CHECKING:
    from vattn.engine import (
        LLM,
        AsyncLLM,
        CompletionOutput,
        EngineArgs,
        RequestOutput,
        RequestOutputKind,
        SamplingParams,
    )
    from vattn.hf import CACHE_KEYWORD, DecodeStats, VirtualCache, install

__version__ = "0.1.0"

_OF_HF = ("CACHE_KEYWORD", "DecodeStats", "VirtualCache", "install")
_OF_ENGINE = (
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
)

__all__ = [
    "CACHE_KEYWORD",
    "LLM",
    "AsyncLLM",
    "BackendUnavailable",
    "BudgetExceeded",
    "CacheStats",
    "CompletionOutput",
    "DecodeStats",
    "DriverError",
    "EngineArgs",
    "Error",
    "KVCache",
    "KVLayout",
    "LayerShape",
    "OutOfDeviceMemory",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "Sequence",
    "SequenceTooLong",
    "SwapCosts",
    "VirtualCache",
    "install",
    "set_profiler_ranges",
]
if find_spec("transformers") is None:  # so that ``from vattn import *`` works
    __all__ = [name for name in __all__ if name not in (*_OF_HF, *_OF_ENGINE)]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import and is optional: it is imported only when one of these names is used.
    try:
        if name in _OF_HF:
            from vattn import hf

            return getattr(hf, name)
        if name in _OF_ENGINE:
            from vattn import engine

            return getattr(engine, name)
    except ModuleNotFoundError as error:
        missing = (error.name or "vattn").partition(".")[0]
        if missing == "vattn" or find_spec(missing) is not None:  # e.g. an old one without a part of it
            raise
        needs = f"vattn.{name} needs {missing}, which is not installed: pip install 'vattn[hf]'"
        raise ImportError(needs, name=missing) from error
    return _renamed(name)


_renamed = renamed(__name__, {"OutOfPages": "BudgetExceeded"})
