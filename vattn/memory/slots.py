"""``Slots``: the slots of a cache as its sequences use them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Literal, TypeVar

import torch

from vattn import _core
from vattn.errors import OutOfDeviceMemory
from vattn.memory.layout import KVLayout
from vattn.memory.prefix_cache import PrefixCache

Share = Literal["auto", "alias", "copy"]
SHARES: tuple[Share, ...] = ("auto", "alias", "copy")
_HOT = 2  # forks of known rows after which they are compacted
_T = TypeVar("_T")


class Slots:
    """An arena, called with the stream that is current in this thread; what sequences and their cache have in common.

    Attributes:
        arena: the core's.
        layout: where rows lie in it.
        device: where it is.
        prefixes: which of its slots hold the rows of which tokens.
    """

    def __init__(self, arena: _core.Arena, layout: KVLayout, device: torch.device) -> None:
        self.arena, self.layout, self.device = arena, layout, device
        self.prefixes = PrefixCache()

    def stream(self) -> int:
        """The current stream, as the core takes it."""
        # What torch.cuda.current_stream wraps; this runs at every growth.
        return torch._C._cuda_getCurrentRawStream(self.device.index) if self.device.type == "cuda" else 0

    def taking(self, call: Callable[..., _T], *args: Any) -> _T:
        """What a call that takes memory returns; on a full device it is made again without what torch only keeps."""
        try:
            return call(*args)
        except OutOfDeviceMemory:
            if self.device.type != "cuda":
                raise
        torch.cuda.empty_cache()
        return call(*args)

    def open_empty(self, like: int | None, expected: int = 0) -> _core.Sequence:
        """In a slot that is ready for a fork of the slot ``like``, or fits ``expected``, or is as empty as can be."""
        return self.arena.open(expected=expected, stream=self.stream(), empty=not expected, like=like)

    def fork(self, slot: int, length: int, targets: list[int], *, generation: int | None = None, share: Share) -> bool:
        """Gives empty sequences the first rows of another, see the core; false where they are not there any more."""
        fork = functools.partial(self.arena.fork, generation=generation, share=share, stream=self.stream())
        return self.taking(fork, slot, length, targets)

    def remember(self, name: int, slot: int, ids: tuple[int, ...], namespace: Hashable) -> None:
        """Notes that the first rows of a sequence are those of some tokens."""
        generation, _, _ = self.arena.commit(name, len(ids))
        self.prefixes.insert(ids, slot, namespace, generation)

    def note_fork(self, slot: int, generation: int, length: int) -> None:
        """Has the rows of who is forked again and again put into few extents, in the background."""
        if self.prefixes.note_fork(slot) >= _HOT:
            self.arena.compact_later(slot, generation, length)

    def require_rows_only(self) -> None:
        """Raises ValueError where rows alone do not continue a sequence."""
        if self.layout.recurrent:
            raise ValueError("the model has recurrent layers, whose state is in no row: what tokens left is not known")

    def exported_layout(self) -> dict[str, Any]:
        """What two processes must have in common."""
        device = "cpu"
        if self.device.type == "cuda":
            device = str(torch.cuda.get_device_properties(self.device).uuid)
        return {
            "device": device,
            "granularity": self.layout.granularity,
            "kind": self.layout.kind,
            "layers": [None if shape is None else list(vars(shape).values()) for shape in self.layout.layers],
        }
