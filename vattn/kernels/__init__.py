"""Stock attention kernels on slot tensors, one backend a file, behind the door that ``base`` describes."""

import warnings
from typing import Any

from vattn.kernels.base import AttentionParams, AttentionSpec, Kernel, SequenceRanges, alike, many_shapes, reach_of
from vattn.kernels.reference import Reference, plain_attention
from vattn.kernels.registry import KERNELS, choose, named, refused_kv

__all__ = [
    "KERNELS",
    "AttentionParams",
    "AttentionSpec",
    "Kernel",
    "Reference",
    "SequenceRanges",
    "alike",
    "choose",
    "many_shapes",
    "named",
    "plain_attention",
    "reach_of",
    "refused_kv",
]

_RENAMED = {"Spans": "SequenceRanges", "Task": "AttentionSpec", "Scores": "AttentionParams"}


def __getattr__(name: str) -> Any:
    if (now := _RENAMED.get(name)) is None:
        raise AttributeError(f"module 'vattn.kernels' has no attribute {name!r}")
    warnings.warn(f"vattn.kernels.{name} is called {now} now", DeprecationWarning, stacklevel=2)
    return globals()[now]
