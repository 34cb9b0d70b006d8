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
        replayed: steps that were replays of a graph.
        eager: steps on slot tensors that were not, among them those that transformers computed too, to compare.
        speculative: of the replayed ones, those that had started before they were called for.
        prompts: calls with several tokens for each row whose attention was a kernel's of vattn.
        captures: graphs captured so far.
        graphs: graphs kept, at most 8: the least recently used goes first. Each is for batches up to a size.
        graph_bytes: device memory that capturing them took.
        kernel: the attention kernels that steps use, by name.
        fallback: the last reason why a step ran without vattn's attention, or without a graph; None where all did.
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
    """Counts the decode steps of a ``VirtualCache``, and keeps the last reason why one ran in another way.

    Attributes:
        counts: those of ``DecodeStats`` that only grow.
        kernels: names of the attention kernels that steps use, in the order of their first use.
        fallback: as in ``DecodeStats``.
    """

    def __init__(self) -> None:
        self.counts = dict.fromkeys(("replayed", "eager", "speculative", "prompts", "captures"), 0)
        self.kernels: dict[str, None] = {}
        self.fallback: str | None = None

    def fall_back(self, reason: str) -> None:
        """Notes why a step runs in another way, and warns where that is not the last reason."""
        if self.fallback != reason:
            _LOG.warning("%s", reason)
        self.fallback = reason

    def refuse(self, forward: Forward, reason: str) -> None:
        """Notes why no further step of a model is computed on slot tensors."""
        forward.refused = f"{type(forward.model).__name__} decodes as transformers does: {reason}"
        self.fall_back(forward.refused)

    def stats(self, graphs: int, graph_bytes: int) -> DecodeStats:
        """The statistics so far."""
        kernel = ", ".join(self.kernels) or None
        return DecodeStats(**self.counts, graphs=graphs, graph_bytes=graph_bytes, kernel=kernel, fallback=self.fallback)
