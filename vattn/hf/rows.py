"""``Rows``: the rows of a batch on all devices of a model: their lengths, what they share, how they are reordered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from vattn.errors import Error
from vattn.hf.beams import SharedPrompts
from vattn.hf.call_guard import CallGuard
from vattn.hf.device_rows import DeviceKey, DeviceRows
from vattn.hf.padding import Padding
from vattn.hf.placement import Placement
from vattn.hf.row_format import Blocks, RowFormat
from vattn.memory.sequence import Sequence
from vattn.memory.slots import Share


class Rows:
    """The rows of a batch on all devices of a model.

    Rows that hold the same positions share memory. Each operation changes all rows or, after an error, none.

    Args:
        placement: where the layers keep their rows.
        row_format: how rows store K and V.

    Attributes:
        placement: as given.
        format: ``row_format``.
        lengths: positions that each layer holds, padding included. The list object never changes.
        guard: checks that calls of the model are complete.
        prompts: which rows hold the same prompt.
        floor: the length at the last crop, or at ``activate_past_recording``. Sliding windows keep the rows that a
            query there sees, so that rows can still be cut to it. None where windows keep nothing for that.
    """

    def __init__(self, placement: Placement, row_format: RowFormat) -> None:
        self.placement = placement
        self.format = row_format
        self.lengths = [0] * len(placement.windows)
        self.prompts = SharedPrompts()
        self.guard = CallGuard()
        self.floor: int | None = None

    @property
    def batch(self) -> int:
        """How many rows there are."""
        return max((len(rows.sequences) for rows in self._every()), default=0)

    def _every(self) -> Iterable[DeviceRows]:
        return self.placement.rows.values()

    def _uneven(self) -> bool:
        """Returns whether layers differ in length. Then some write where others hold rows, so no memory is shared."""
        return len({self.lengths[layer] for layer in self.placement.expected}) > 1

    # Memory.

    def set_batch(self, rows: DeviceRows, key: DeviceKey, batch: int) -> DeviceRows:
        """Opens or closes empty rows of one ``KVCache`` until there are ``batch``.

        Args:
            rows: in the ``KVCache``.
            key: names the ``KVCache``.
            batch: rows.

        Returns:
            ``rows``, or a new object where the ``KVCache`` had too few slots and was rebuilt.

        Raises:
            ValueError: the number of rows would change while they hold something.
        """
        have = len(rows.sequences)
        if have == batch:
            return rows
        if any(self.lengths[layer] for layer in rows.views):
            raise ValueError(
                f"the cache holds {have} rows and was given a batch of {batch}: call reset(), "
                "batch_repeat_interleave() or batch_select_indices() first"
            )
        with self.placement.taking_slots():
            if batch > rows.room:
                self.rebuild({key: 2 * batch})
                rows = self.placement.rows[key]
            rows.close(batch)
            rows.open(batch)
        return rows

    def grow(self, rows: DeviceRows, length: int, *, min_truncate_length: int = 0) -> None:
        """Grows the rows that have memory of their own to ``length`` positions.

        Args:
            rows: in one ``KVCache``.
            length: positions, padding included.
            min_truncate_length: the shortest length that the rows may still be cut to; sliding windows give back no row
                that a query there sees.
        """
        sequences = self.prompts.leaders(rows.sequences)
        stored = self.format.stored(length, len(sequences))
        shortest = self.format.stored(min_truncate_length, len(sequences))
        try:
            rows.cache.grow_all(sequences, stored, min_truncate_length=shortest)
        except BaseException:
            self._note_losses()
            raise

    def require_held(self, rows: DeviceRows, layer: int) -> None:
        """Raises ValueError where rows that the next update of a layer needs were given back.

        That happens where layers of a group with a sliding window differ in length: the window of the longest moves.
        """
        window, length = self.placement.windows[layer], self.lengths[layer]
        if window is not None and rows.first_positions()[layer] > max(length - window + 1, 0):
            raise ValueError(
                f"layer {layer} holds {length} positions, and the window of {window} of longer layers has moved past "
                "them: reset the cache"
            )

    def grow_speculatively(self, length: int) -> bool:
        """Gets memory for a speculative step at this length; returns False where there is none."""
        [rows] = self.placement.rows.values()
        try:
            self.grow(rows, length + 1)
        except Error:
            return False
        return True

    def min_truncate_length(self, rows: DeviceRows) -> int:
        """Returns the ``min_truncate_length`` for ``grow``: the shortest length that a layer has or may be cut to."""
        shortest = min(self.lengths[layer] for layer in rows.views if layer in self.placement.seen)
        return self.room_before(rows, shortest if self.floor is None else self.floor)

    def room_before(self, rows: DeviceRows, length: int) -> int:
        """Returns the ``min_truncate_length`` with which rows that kernels load before a window stay mapped.

        Args:
            rows: in one ``KVCache``.
            length: the shortest length that the rows may be cut to.
        """
        if rows.cache.device.type == "cpu":
            return length
        return max(0, length - max((kernel.head_rows for kernel in self.placement.options.kernels), default=0))

    def shorten(self) -> None:
        """Truncates rows that were grown for an operation that failed; else a fork would share the surplus."""
        for rows in self._every():
            length = max((self.lengths[layer] for layer in rows.views), default=0)
            stored = self.format.stored(length, len(rows.sequences))
            for sequence, held in zip(rows.sequences, stored, strict=True):
                if sequence.length > held:
                    sequence.truncate(held)

    def _copy_on_write(self, rows: DeviceRows, sequences: list[Sequence], length: int) -> None:
        """Copies what sequences share behind ``length``."""
        try:
            rows.cache.copy_on_write(sequences, length)
        except BaseException:
            self._note_losses()
            raise

    def _note_losses(self) -> None:
        """Tears the cache where rows were lost: a driver that keeps failing may refuse to map what it has unmapped."""
        for rows in self._every():
            length = max((self.lengths[layer] for layer in rows.views), default=0)
            sequences = self.prompts.leaders(rows.sequences)
            stored = self.format.stored(length, len(sequences))
            if any(sequence.length < held for sequence, held in zip(sequences, stored, strict=True)):
                self.guard.lose("rows were lost, since the driver refused to map them again")

    def rebuild(self, slots: dict[DeviceKey, int]) -> None:
        """Makes the ``KVCache`` of each key anew, with the number of slots given, and copies what the old one holds."""
        if not slots:
            return
        self.materialize(share="copy")  # the next write may go to positions that a fork would share
        if any(self.lengths):
            self.restore_padding()
        self.placement.rebuild(slots, self.lengths)

    # Rows that share a prompt.

    def find_shared_prompts(self, rows: DeviceRows, k: torch.Tensor, v: torch.Tensor, start: int) -> None:
        """Finds out whether groups of rows hold the same prompt, as beams and return sequences do at first.

        Args:
            rows: in the ``KVCache`` of the layer that is updated.
            k: what the layer appends, ``[batch, kv_heads, n, head_dim]``.
            v: ``[batch, kv_heads, n, v_head_dim]``.
            start: positions that the layer holds.
        """
        batch, layout = k.shape[0], rows.cache.layout
        first = not any(self.lengths)  # the first layer of a new prompt
        if first:
            self.prompts.begin(batch)
        elif self.prompts.size == 1:
            return
        worthwhile = batch > 1 and k.shape[2] * layout.bytes_per_token >= layout.granularity
        allowed = self.placement.options.scales is None and not (k.requires_grad or v.requires_grad)
        # A later chunk is given views of rows, and only those of a single leader can be expanded to the whole batch.
        if not worthwhile or not allowed or (start and batch != self.prompts.size):
            self.materialize()
        elif first:
            self.prompts.find(k, v)
            # Only leaders keep memory: what ``Store.reserve`` got for the other rows is given back.
            for each in self._every():
                for i, sequence in enumerate(each.sequences):
                    if i % self.prompts.size and sequence.length:
                        sequence.truncate(0)
        elif not self.prompts.holds(k, v):
            # The layers that follow in this call write at positions that a fork would share, so rows are copied.
            self.materialize(share="copy")

    def materialize(self, share: Share = "auto") -> None:
        """Gives each row memory of its own, where so far one row has the memory for all that share its prompt.

        Args:
            share: as in ``Sequence.fork``; rows are copied in any case where layers differ in length.
        """
        if self.prompts.size == 1:
            return
        self.shorten()
        if self._uneven():
            share = "copy"
        # Where copies are made, rows differ or may differ in layers that are still to come: nothing counts as common.
        alike = 0 if share == "copy" else min((length for length in self.lengths if length), default=0)
        try:
            self.prompts.separate(self._every(), alike, share)
        except BaseException:
            self._note_losses()
            raise

    # Padding.

    @contextlib.contextmanager
    def unpadded(self, mask: torch.Tensor | None) -> Iterator[None]:
        """Within this context a prompt is stored without the padding on the left that ``mask`` hides.

        Args:
            mask: ``[batch, length]``, or None, which changes nothing.
        """
        placement = self.placement
        empty = not any(self.lengths) and self.floor is None and not placement.open_ended and all(placement.cached)
        padding = self.format.coming if mask is None else Padding.of(mask) if empty else None
        with self.format.hiding(padding):
            yield

    def require_hidden(self, mask: torch.Tensor | None) -> None:
        """Raises ValueError where an attention mask shows blank positions, see ``RowFormat``.

        Args:
            mask: ``[batch, length]``, or None, which shows all positions.
        """
        if any(self.lengths):
            self.format.require_hidden(mask)

    def restore_padding(self) -> None:
        """Stores rows whole, with zeros for the padding that they were stored without.

        When there is not enough memory, the error leaves all rows unchanged. An error or interrupt while rows are
        moved empties the cache.
        """
        padding = self.format.padding
        if padding is None or not any(self.lengths):
            self.format.padding = None
            return
        blocks: Blocks = {}
        try:
            for rows in self._every():
                length = max(self.lengths[layer] for layer in rows.views)
                shortest = padding.stored(self.min_truncate_length(rows))
                rows.cache.grow_all(rows.sequences, length, min_truncate_length=shortest)
                if rows.cache.shares(rows.sequences, 0):
                    self._copy_on_write(rows, rows.sequences, 0)
                self.format.allocate_blocks(rows, self.lengths, blocks)
        except BaseException:
            self.shorten()
            raise
        self.format.padding = None
        try:
            for rows in self._every():
                self.format.restore(padding, rows, self.lengths, blocks)
        except BaseException:
            self.reset()
            raise

    # Changes of whole rows.

    def truncate(self, lengths: list[int]) -> None:
        """Shortens the layers to ``lengths``, and truncates rows to what the longest layer needs.

        Args:
            lengths: positions that each layer keeps, padding included.

        Raises:
            ValueError: a sliding window has moved past one of the lengths.
        """
        if any(lengths):
            self.restore_padding()
        self.format.padding = None
        for rows in self._every():
            for layer, first in rows.first_positions().items():
                window, length = self.placement.windows[layer] or 0, lengths[layer]
                if length and max(length - window + 1, 0) < first:
                    raise ValueError(
                        f"cannot truncate to {length} positions: the window of {window} has moved on and the rows "
                        "before it are given back"
                    )
        if any(lengths):
            self.materialize()
        seen = self.placement.seen
        self.prompts.crop(min((lengths[layer] for layer in seen), default=0))
        for rows in self._every():
            longest = max(lengths[layer] for layer in rows.views)
            if rows.sequences and longest < rows.sequences[0].length:
                rows.cache.truncate_all(rows.sequences, longest)
            shortest = min((lengths[layer] for layer in rows.views if layer in seen), default=0)
            if rows.sequences and shortest < longest and rows.cache.shares(rows.sequences, shortest):
                # The shorter layers will write at positions where the longer ones hold rows that are shared.
                self._copy_on_write(rows, rows.sequences, shortest)
        self.lengths[:] = lengths
        longest = max(lengths, default=0)
        self.format.crop(longest)
        for rows in self._every():
            rows.copied_from = {layer: first for layer, first in rows.copied_from.items() if lengths[layer]}
        if self.floor is not None:
            self.floor = longest

    def reset(self) -> None:
        """Closes every row. Their memory is parked for the next batch, and the shapes of layers are forgotten."""
        for rows in self._every():
            rows.close(0)
            rows.copied_from.clear()
        self.guard.reset()
        self.prompts.size = 1
        self.format.forget()
        for layer in list(self.placement.seen):
            self.placement.forget(layer)
        self.lengths[:] = [0] * len(self.lengths)
        if self.floor is not None:
            self.floor = 0

    def gather(self, indices: torch.Tensor) -> None:
        """Makes row ``i`` what row ``indices[i]`` was, for every layer.

        Args:
            indices: integers ``[n]``, or a mask ``[batch]``, as torch indexes by.

        Raises:
            ValueError: there would be more rows than slots.
            IndexError: an index is out of range.
        """
        before = max((len(rows.sequences) for rows in self._every() if rows.filled(self.lengths)), default=0)
        if before == 0:
            return
        everyone = torch.arange(before)
        indices = everyone[torch.as_tensor(indices).cpu()]
        if torch.equal(indices, everyone):
            return
        if len(indices) == 0:
            self.reset()
            return
        self.placement.require_slots(len(indices))
        self.materialize()
        self.restore_padding()
        self.shorten()
        with self.placement.taking_slots():
            self._gather(indices.tolist(), before)

    def _gather(self, chosen: list[int], before: int) -> None:
        batch = len(chosen)
        self.rebuild({key: 2 * batch for key, rows in self.placement.rows.items() if rows.room < batch})
        every = [rows for rows in self._every() if rows.filled(self.lengths)]
        changed = [i for i, source in enumerate(chosen[:before]) if source != i]
        alike = min((self.prompts.common[i][chosen[i]] for i in changed), default=0)
        share: Share = "copy" if self._uneven() else "auto"
        try:
            for rows in every:
                rows.open(batch, 0)
                sequences = rows.sequences
                for source in set(chosen[before:]):
                    new = [sequences[i] for i in range(before, batch) if chosen[i] == source]
                    rows.cache.fork_all(sequences[source], new, sequences[source].length, share=share)
                targets = [sequences[i] for i in changed]
                if changed and rows.cache.shares(targets, alike):
                    rows.cache.copy_on_write(targets, alike)
        except BaseException:
            try:
                for rows in every:
                    rows.close(before)
            finally:
                self._note_losses()
            raise
        # From here on nothing takes memory from a ``KVCache``. Positions that rows have in common are not copied.
        for rows in every if changed else ():
            rows.move(chosen, changed, before, alike, self.lengths)
        for rows in every:
            rows.close(batch)
        self.format.select(chosen)
        self.prompts.select(chosen, min(self.lengths[layer] for layer in self.placement.expected))

    def clone(self) -> Rows:
        """Returns a copy of the rows, which shares their memory where possible."""
        bases = {key: rows.cache.free_slots(len(rows.sequences)) for key, rows in self.placement.rows.items()}
        self.shorten()
        if None in bases.values():
            self.restore_padding()
        self.materialize()
        other = Rows(self.placement.clone(), self.format.clone())
        other.lengths[:] = self.lengths
        other.floor, other.prompts = self.floor, self.prompts.clone()
        try:
            for key, mine in self.placement.rows.items():
                base = bases[key]
                if not mine.sequences or base is None:
                    theirs = other.placement.build(key, mine.cache.slots, self.placement.options.budget)
                    theirs.copy_from(mine, self.lengths)
                    continue
                theirs = other.placement.join(key, mine, base)
                theirs.copied_from = dict(mine.copied_from)
                theirs.open(len(mine.sequences), 0)
                for source, target in zip(mine.sequences, theirs.sequences, strict=True):
                    share: Share = "copy" if self._uneven() else "auto"
                    mine.cache.fork_all(source, [target], source.length, share=share)
        except BaseException:
            try:
                other.leave(keep_caches=True)
            finally:
                self._note_losses()
            raise
        return other

    def leave(self, *, keep_caches: bool) -> None:
        """Gives the rows up, and closes each ``KVCache`` that no other batch uses unless ``keep_caches`` is set."""
        for key, rows in list(self.placement.rows.items()):
            if rows.leave(keep_cache=keep_caches) and not keep_caches:
                del self.placement.rows[key]  # from now on the ``KVCache`` belongs to other batches alone
