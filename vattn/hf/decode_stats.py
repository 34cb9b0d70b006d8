"""``DecodeStats``: how the decode steps of a ``VirtualCache`` ran; ``DecodeLog`` counts them."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from vattn.aliases import Renamed
from vattn.hf.attach import Forward

_LOG = logging.getLogger("vattn")


@dataclass(frozen=True)
class DecodeStats:
    """How the decode steps of a ``VirtualCache`` ran.

    Args:
        replayed: steps that were replays of a CUDA graph.
        eager: steps on slot tensors without a replay, including those that transformers computed too for comparison.
        speculative: of the replayed steps, those that were started before they were called for.
        prompts: calls with several tokens for each row whose attention was computed by a kernel of vattn.
        captures: graphs captured so far.
        graphs: graphs that are kept, at most 8, each for batches up to a size. The least recently used is dropped.
        graph_bytes: device memory that the captures of these graphs took.
        kernel: the names of the attention kernels that steps use, separated by commas; None before the first.
        fallback: the last reason why a step ran without vattn's attention or without a graph; None where none did.
    """

    replayed: int
    eager: int
    speculative: int
    prompts: int
    captures: int
    graphs: int
    graph_bytes: int
    kernel: str | None
    fallback: str | None

    ahead = Renamed("speculative")


class DecodeLog:
    """Counts the decode steps of a ``VirtualCache``, and keeps the last reason for a fallback.

    Attributes:
        counts: the fields of ``DecodeStats`` that only grow, by name.
        kernels: names of the attention kernels that steps use, in the order of their first use.
        fallback: as in ``DecodeStats``.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("replayed", "eager", "speculative", "prompts", "captures"), 0)
        self.kernels: dict[str, None] = {}
        self.fallback: str | None = None

    def fall_back(self, reason: str) -> None:
        """Notes why a step runs without vattn's attention or without a graph, and warns where the reason is new."""
        if self.fallback != reason:
            _LOG.warning("%s", reason)
        self.fallback = reason

    def refuse(self, forward: Forward, reason: str) -> None:
        """Notes that no further step of a model is computed on slot tensors, and why."""
        forward.refused = f"{type(forward.model).__name__} decodes as transformers does: {reason}"
        self.fall_back(forward.refused)

    def stats(self, graphs: int, graph_bytes: int) -> DecodeStats:
        """Returns the statistics so far, with the number and the memory of the graphs that are kept."""
        kernel = ", ".join(self.kernels) or None
        return DecodeStats(**self.counts, graphs=graphs, graph_bytes=graph_bytes, kernel=kernel, fallback=self.fallback)
