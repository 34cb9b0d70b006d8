"""Stock attention kernels on slot tensors, one backend a file, behind the door that ``base`` describes."""

from vattn.kernels.base import Kernel, Scores, Spans, Task, alike, many_shapes, reach_of
from vattn.kernels.reference import Reference, plain_attention
from vattn.kernels.registry import KERNELS, choose, named, refused_kv

__all__ = [
    "KERNELS",
    "Kernel",
    "Reference",
    "Scores",
    "Spans",
    "Task",
    "alike",
    "choose",
    "many_shapes",
    "named",
    "plain_attention",
    "reach_of",
    "refused_kv",
]
