"""Stock attention kernels on slot tensors, one backend per file, behind the interface that ``base`` defines."""

from vattn.aliases import renamed
from vattn.kernels.base import AttentionParams, AttentionSpec, Kernel, SequenceRanges, alike, many_shapes, reach_of
from vattn.kernels.reference import Reference, plain_attention
from vattn.kernels.registry import KERNELS, choose, margins, named, refused_kv

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
    "margins",
    "named",
    "plain_attention",
    "reach_of",
    "refused_kv",
]

__getattr__ = renamed(__name__, {"Spans": "SequenceRanges", "Task": "AttentionSpec", "Scores": "AttentionParams"})
