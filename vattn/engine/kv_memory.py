"""``KVMemory``: the memory of a ``KVCache`` as the engine asks for it: a sequence for each branch."""

from __future__ import annotations

import contextlib
from collections import abc
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from vattn.engine.request import Branch, Request
from vattn.errors import Error
from vattn.kernels.measure import FEW
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import KVLayout
from vattn.memory.sequence import Sequence
from vattn.models.flat import Margins

_MOST = 64  # positions that a granule is taken for at most, where K and V of a position are small
_FEWEST = 4  # positions that the mapper maps ahead at least, where a granule has as many


def lookahead(layout: KVLayout) -> int | None:
    """Positions behind an output up to which the mapper is to map ahead: enough for several iterations.

    An output takes what is left of a granule in two steps, of which the second makes the mapper map the next one. With
    sliding windows outputs take position after position, and the cache chooses by itself (None).
    """
    if any(plane.window is not None for plane in layout.planes):
        return None
    granule = _granule(layout)
    return max(granule // 4, min(granule, _FEWEST))


def _granule(layout: KVLayout) -> int:
    """Positions that a granule has room for."""
    return min(max(int(layout.tokens_per_granule), 1), _MOST)


@dataclass
class _Batch:
    """Outputs that are computed a position each, in the same iterations.

    Args:
        branches: the outputs, in the order in which they get memory.
        launched: positions of each that were launched when it became this batch.
        room: the lengths of their sequences.
        side_by_side: the same outputs, those that share rows side by side; None where nobody has asked for it.
        slots: of each of these; None where nobody has asked for them.
    """

    branches: list[Branch]
    launched: npt.NDArray[np.int64]
    room: npt.NDArray[np.int64]
    side_by_side: list[Branch] | None = None
    slots: list[int] | None = None

    @property
    def wanted(self) -> npt.NDArray[np.int64]:
        """One position more than were launched by now, of each."""
        ahead = self.branches[0].launched + 1 - int(self.launched[0])
        return self.launched + ahead


class KVMemory:
    """The memory of a ``KVCache`` as the engine asks for it; see ``Memory``.

    Args:
        cache: holds the rows. Its budget is that of the engine. It takes memory for ``margins.behind``.
        margins: rows around those that queries see, which kernels may load.
        max_model_len: positions of the longest sequence.
        swap_is_faster: whether a sequence of so many positions is swapped out and in faster than it is computed; None
            never swaps.
        reuse_prefixes: whether requests begin behind rows that others have computed.
    """

    def __init__(
        self,
        cache: KVCache,
        margins: Margins,
        max_model_len: int,
        *,
        swap_is_faster: Callable[[int], bool] | None = None,
        reuse_prefixes: bool = True,
    ) -> None:
        self.cache = cache
        self._margins, self._max_model_len = margins, max_model_len
        self._swap_is_faster = swap_is_faster
        self._reuse = reuse_prefixes and not cache.layout.recurrent
        self._ahead = lookahead(cache.layout) or 0
        self._slides = any(plane.window is not None for plane in cache.layout.planes)
        self.keeps_prompts = self._reuse and not self._slides  # windows that have passed rows give these back
        self._sequences: dict[Branch, Sequence] = {}
        self._asked: _Batch | None = None  # the outputs that were asked about last
        self._unclosed: list[Sequence] = []  # that the driver refused to close
        self._resets = 0  # of prefixes: what was computed before the last one is of no use any more

    def slot(self, branch: Branch) -> int:
        """The slot of a branch."""
        return self._sequences[branch].slot

    def slots(self, branches: list[Branch]) -> list[int]:
        """The slots of branches; the same list as long as it is asked for the outputs of ``side_by_side``."""
        batch, of = self._asked, self._sequences
        if batch is None or batch.side_by_side != branches:
            return [of[branch].slot for branch in branches]
        if batch.slots is None:
            batch.slots = [of[branch].slot for branch in branches]
        return batch.slots

    def _batch(self, branches: list[Branch]) -> _Batch:
        """What is known of outputs; the same object as long as it is asked for the same ones and none moves."""
        if self._asked is None or self._asked.branches != branches:
            launched = np.array([branch.launched for branch in branches])
            room = np.array([self._sequences[branch].length for branch in branches])
            self._asked = _Batch(list(branches), launched, room)
        return self._asked

    def shortage(self, request: Request) -> str | None:
        """See ``Memory.shortage``."""
        layout, budget = self.cache.layout, self.cache.stats().budget
        if request.most_tokens > self._max_model_len:
            return (
                f"the request needs {request.most_tokens} positions ({len(request.prompt)} of its prompt and "
                f"max_tokens={request.max_tokens}), and max_model_len is {self._max_model_len}"
            )
        # Outputs share the whole granules of their prompt in the planes that keep all of it.
        shared = sum(
            len(request.prompt) * plane.row_bytes // layout.granularity * layout.granularity
            for plane in layout.planes
            if plane.window is None
        )
        # What was sampled may have to be computed again, as a prompt is.
        most = request.most_tokens + self._margins.behind + self._margins.more_behind_prompts
        each = layout.mapped_bytes(most) + layout.growth_step_bytes
        needs = each if request.n == 1 else request.n * (each - shared) + shared + layout.growth_step_bytes
        if budget is None or needs <= budget:
            return None
        return f"the request may need {needs / 2**20:.1f} MiB of K and V, and the budget is {budget / 2**20:.1f} MiB"

    def cached_positions(self, request: Request) -> int:
        """See ``Memory.cached_positions``."""
        if not (self._reuse and request.reuse_prefix):
            return 0
        return self.cache.cached_positions(request.prompt, namespace=self._namespace(request))

    def room_for(self, positions: int) -> bool:
        """See ``Memory.room_for``."""
        stats = self.cache.stats()
        if stats.budget is None:
            return True
        used = stats.mapped - stats.parked - stats.spare  # what is shared counts once
        tails = self._margins.behind + self._margins.more_behind_prompts
        return (positions + tails) * self.cache.layout.bytes_per_token <= stats.budget - used

    def open(self, request: Request, expected: int) -> int | None:
        """See ``Memory.open``."""
        self._asked = None
        self._close_all()
        tokens, expected = None, expected + _granule(self.cache.layout)  # the last granule is never full
        if self._reuse and request.reuse_prefix:
            # Several outputs are forked behind the prompt; a single one may go on behind rows of its own.
            tokens = request.prompt if len(request.live) > 1 else (*request.prompt, *request.trunk.output)
        try:
            namespace = self._namespace(request)
            sequence = self.cache.open(tokens=tokens, namespace=namespace, expected=expected)
        except (Error, ValueError):
            return None
        if (left := self._sequences.pop(request.trunk, None)) is not None:  # by a call that was interrupted
            self._unclosed.append(left)
        self._sequences[request.trunk] = sequence
        if self._reuse or len(request.live) > 1:
            sequence.expect(expected, prompt=len(request.prompt) + self._margins.more_behind_prompts)
        return sequence.length

    def side_by_side(self, branches: list[Branch]) -> list[Branch]:
        """See ``Memory.side_by_side``."""
        batch = self._batch(branches)
        if batch.side_by_side is None:
            order = self.cache.side_by_side([self._sequences[branch] for branch in branches])
            batch.side_by_side = [branches[at] for at in order]
        return batch.side_by_side

    def grow(
        self, decodes: list[Branch], branches: abc.Sequence[Branch], positions: abc.Sequence[int]
    ) -> Branch | None:
        """See ``Memory.grow``."""
        if self._unclosed:
            self._close_all()
        # Kernels may load rows behind a prompt. Tokens that are sampled later are written to them.
        positions = [each + self._margins.more_behind_prompts for each in positions]
        if not (self._windowed if self._slides else self._reserved)(decodes, branches, positions):
            return [*decodes, *branches][-1]
        return None

    def _windowed(self, decodes: list[Branch], branches: abc.Sequence[Branch], positions: list[int]) -> bool:
        """Grows branches, and gives back what windows have passed, unless an output may be cut to it."""
        further = 1 + self._behind(decodes)
        branches, positions = [*decodes, *branches], [*(branch.launched + further for branch in decodes), *positions]
        keep = [max(0, branch.confirmed - self._margins.before) for branch in branches]
        return self._grow(branches, positions, keep)

    def _reserved(self, decodes: list[Branch], branches: abc.Sequence[Branch], positions: list[int]) -> bool:
        """Grows branches, decodes to where their last granules end: most of them need nothing in most iterations.

        The last positions of a granule are a step of their own, see ``lookahead``.
        """
        if not decodes:
            return self._grow(list(branches), positions, 0)
        batch = self._batch(decodes)
        wanted = batch.wanted + self._behind(decodes)
        due = np.flatnonzero(wanted > batch.room)
        if not (len(due) or branches):
            return True
        room = _granules_end(self.cache, wanted[due])
        room = np.where(room - self._ahead < wanted[due], room, room - self._ahead)
        if not self._grow([*(decodes[at] for at in due), *branches], [*room.tolist(), *positions], 0):
            return False
        batch.room[due] = room
        return True

    def _behind(self, decodes: list[Branch]) -> int:
        """Rows behind outputs that are computed a position each, which a kernel for few of them loads."""
        return self._margins.more_behind_few if len(decodes) <= FEW else 0

    def _grow(self, branches: list[Branch], positions: list[int], keep: int | list[int]) -> bool:
        """Brings branches to so many positions each; False where there is no memory."""
        of = self._sequences
        try:
            self.cache.grow_all([of[branch] for branch in branches], positions, min_truncate_length=keep)
        except Error:
            return False
        return True

    def fork(self, request: Request) -> bool:
        """See ``Memory.fork``."""
        self._close_all()
        targets = [branch for branch in request.live if branch not in self._sequences]
        try:
            forks = self._sequences[request.trunk].fork(len(request.prompt), len(targets))
        except (Error, ValueError):
            # Sharing may have unmapped rows of the trunk that the driver refused to map again: they are computed again.
            self._asked = None
            request.trunk.launched = min(request.trunk.launched, self._sequences[request.trunk].length)
            return False
        self._sequences.update(zip(targets, forks, strict=True))
        return True

    def remember(self, branch: Branch, positions: int) -> None:
        """See ``Memory.remember``."""
        sequence = self._sequences[branch]
        with contextlib.suppress(Error):
            if self._reuse and positions and not sequence.swapped:
                sequence.remember(branch.tokens(0, positions))

    def close(self, branch: Branch, positions: int) -> None:
        """See ``Memory.close``."""
        self._asked = None
        self.remember(branch, positions)
        sequence = self._sequences.pop(branch)
        self._unclosed.append(sequence)
        self._close_all()

    def _close_all(self) -> None:
        """Closes sequences that have ended; those that the driver refuses are tried again at the next call."""
        for sequence in 2 * self._unclosed:  # twice, since nobody may ask for memory for a long time
            with contextlib.suppress(Error):
                if sequence in self._unclosed:
                    sequence.close()
                    self._unclosed.remove(sequence)

    def prefers_swap(self, request: Request) -> bool:
        """See ``Memory.prefers_swap``."""
        return self._swap_is_faster is not None and self._swap_is_faster(request.held_positions)

    def swap_out(self, request: Request) -> bool:
        """See ``Memory.swap_out``."""
        self._asked = None
        try:
            for sequence in self._of(request):
                if not sequence.swapped:
                    sequence.swap_out()
        except (Error, ValueError):
            return False
        return True

    def swap_in(self, request: Request) -> bool:
        """See ``Memory.swap_in``."""
        self._asked = None
        self._close_all()
        back = []
        try:
            for sequence in self._of(request):
                if sequence.swapped:
                    sequence.swap_in()
                    back.append(sequence)
        except (Error, ValueError):
            for sequence in back:
                with contextlib.suppress(Error):
                    sequence.swap_out()
            return False
        return True

    def resize(self, budget: int) -> bool:
        """See ``Memory.resize``."""
        self._close_all()
        try:
            self.cache.set_budget(budget)
        except Error:
            return False
        return True

    def reset_prefixes(self) -> None:
        """See ``Memory.reset_prefixes``."""
        self._resets += 1
        self._close_all()
        with contextlib.suppress(Error):
            self.cache.trim()

    def _namespace(self, request: Request) -> tuple[int, Hashable]:
        return self._resets, request.namespace

    def _of(self, request: Request) -> list[Sequence]:
        return [self._sequences[branch] for branch in request.branches if branch in self._sequences]


def _granules_end(cache: KVCache, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The most positions for which the granules of so many are enough."""
    layout, tail = cache.layout, cache.tail_rows
    most = np.full_like(positions, layout.max_len - tail)
    for plane in layout.planes:
        granules = -(-(positions + tail) * plane.row_bytes // layout.granularity)
        most = np.minimum(most, granules * layout.granularity // plane.row_bytes - tail)
    return np.maximum(most, positions)
