"""``Slots``: what a ``KVCache`` and its sequences share, the arena and the index of cached prefixes."""

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
_HOT = 2  # forks of cached rows from which on they are compacted
_T = TypeVar("_T")


class Slots:
    """An arena and its prefix cache. The methods pass on the stream that is current in the calling thread.

    Attributes:
        arena: the core's arena.
        layout: where the rows lie in the arena.
        device: the device of the arena.
        empties_torch: whether torch has to release what it has cached when the device is full.
        prefixes: the index from token ids to the slots that hold their rows.
    """

    def __init__(self, arena: _core.Arena, layout: KVLayout, device: torch.device, *, empties_torch: bool) -> None:
        self.arena, self.layout, self.device, self.empties_torch = arena, layout, device, empties_torch
        self._index = device.index if device.type == "cuda" else None
        self.prefixes = PrefixCache()

    def stream(self) -> int:
        """Returns the handle of the current stream, as the core expects it; 0 on the host."""
        # torch.cuda.current_stream wraps this function; it is called directly since this runs at every growth.
        return 0 if self._index is None else torch._C._cuda_getCurrentRawStream(self._index)

    def taking(self, call: Callable[..., _T], *args: Any) -> _T:
        """Returns the result of a call that takes memory; on a full device, empties torch's cache and repeats it."""
        try:
            return call(*args)
        except OutOfDeviceMemory:
            if self.device.type != "cuda" or not self.empties_torch:
                raise
        torch.cuda.empty_cache()
        return call(*args)

    def open_empty(self, like: int | None, expected: int = 0, positions: int = 0) -> _core.Sequence:
        """Opens an empty sequence in a suitable slot.

        A slot that was prepared for forks of the slot ``like``, of which ``positions`` rows will be forked, comes
        first; then the slot whose memory best fits ``expected`` positions or, where that is 0, the one with the least
        memory.
        """
        stream = self.stream()
        return self.arena.open(expected=expected, stream=stream, empty=not expected, like=like, positions=positions)

    def fork(self, slot: int, length: int, targets: list[int], *, generation: int | None = None, share: Share) -> bool:
        """Gives empty sequences the first rows of a slot, see ``Arena::fork`` in the core.

        Returns:
            False if a generation is given and the slot does not hold the rows of that generation any more.
        """
        fork = functools.partial(self.arena.fork, generation=generation, share=share, stream=self.stream())
        return self.taking(fork, slot, length, targets)

    def remember(self, name: int, slot: int, ids: tuple[int, ...], namespace: Hashable) -> None:
        """Commits the first rows of a sequence as those of some tokens, and adds them to the index."""
        generation, _, _ = self.arena.commit(name, len(ids))
        self.prefixes.insert(ids, slot, namespace, generation)

    def note_fork(self, slot: int, generation: int, length: int) -> None:
        """Counts a fork of cached rows; has the mapper compact rows that are forked repeatedly into few extents."""
        if self.prefixes.note_fork(slot) >= _HOT:
            self.arena.compact_later(slot, generation, length)

    def require_rows_only(self) -> None:
        """Raises ValueError if the model has recurrent layers, so that rows alone do not continue a sequence."""
        if self.layout.recurrent:
            raise ValueError("the model has recurrent layers, whose state is in no row: what tokens left is not known")

    def exported_layout(self) -> dict[str, Any]:
        """Returns what the caches of two processes must have in common to pass a sequence on."""
        device = "cpu"
        if self.device.type == "cuda":
            device = str(torch.cuda.get_device_properties(self.device).uuid)
        return {
            "device": device,
            "granularity": self.layout.granularity,
            "kind": self.layout.kind,
            "layers": [None if shape is None else list(vars(shape).values()) for shape in self.layout.layers],
            "planes": [plane.row_bytes for plane in self.layout.planes],
        }
