"""``DecodeContext``: a decode step of a Hugging Face model on slot tensors."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from vattn import kernels
from vattn.hf.padding import Padding
from vattn.hf.store import Store
from vattn.kernels import AttentionParams, AttentionSpec, Kernel, SequenceRanges
from vattn.kernels.append import append
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import UnsupportedError, attending

if TYPE_CHECKING:
    from vattn.hf.verify import Watch


class DecodeContext:
    """What ``VirtualCache.update`` and the attention function do in a decode step of a batch.

    Row i of the batch is slot ``base + i``. ``starts`` and ``ends``, int32 ``[batch]`` on the device, are the first row
    of the slot that the queries see but for windows, and one past the row that the step appends. ``hidden`` is how many
    positions the attention mask hides on the left, stored or not. Rows from ``live`` on are idle: their slots are no
    business of the step, and their ``ends`` are 0.
    """

    own_attention = False  # as in ``verify.Perturbed``
    watch: Watch | None = None  # of a step that is verified

    def __init__(
        self,
        cache: KVCache,
        base: int,
        batch: int,
        attention: str,
        capture: bool,
        side: torch.cuda.Stream | None,
    ) -> None:
        self.cache, self._base, self._batch = cache, base, batch
        self._attention = attention
        self._capture = capture and cache.device.type == "cuda"
        with torch.inference_mode(False):
            self.slots = torch.arange(batch, dtype=torch.int32, device=cache.device)
            self._rows = self.slots.long()
            self._of_rows = [torch.zeros_like(self.slots) for _ in range(5)]
        self.starts, self.ends, *_ = self._of_rows
        self.set_live(batch)
        self._side = side  # on CUDA
        if side is not None:
            self._before = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._kernels: dict[Any, Kernel] = {}
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.odd = False  # whether a layer attends to another one's K and V
        self.used: dict[str, None] = {}  # names of kernels

    def set_live(self, live: int) -> None:
        """Lets the rows from there on be idle; of none is known what is hidden."""
        self.live = live
        with torch.inference_mode(False):
            self._starts, self._ends, self.hidden, self._less, self._least = (t.zero_()[:live] for t in self._of_rows)
        self._padding: Padding | None = None
        self._blank: Padding | None = None
        self._most_hidden = 0

    @property
    def padded(self) -> bool:
        return self._most_hidden > 0

    def set_padding(self, padding: Padding | None, blank: Padding | None, length: int) -> bool:
        """Takes what of the positions is not stored, what is blank; whether that is something else than before."""
        if padding is self._padding and blank is self._blank and self._most_hidden <= length:
            return False
        self._most_hidden = sys.maxsize  # should this be interrupted
        for tensor, given in ((self._less, padding), (self._least, blank)):
            tensor.copy_(torch.tensor([0] * self.live if given is None else given.rows, dtype=torch.int32))
        self._less.neg_()
        self._padding, self._blank = padding, blank
        self._hide_least()
        return True

    def mark(self) -> None:
        """What the stream has to do now comes before the mask is looked at, and what comes later does not."""
        if self._side is not None:
            self._before.record()

    def starts_fit(self, mask: torch.Tensor | None, length: int) -> bool:
        """Whether a mask, ``[live, length + 1]``, hides just what was hidden so far."""
        if mask is None or mask.shape != (self.live, length + 1):
            return mask is None and not self.padded
        if self._side is None:
            return torch.equal(mask != 0, self._seen_from(length))
        with torch.cuda.stream(self._side):
            self._side.wait_event(self._before)
            return torch.equal(mask.to(self.ends.device) != 0, self._seen_from(length))

    def set_starts(self, mask: torch.Tensor | None, length: int) -> bool:
        """Takes the padding from a mask; False, and least of it, when it is anything else than on the left."""
        self._hide_least()
        if mask is not None:
            if mask.shape != (self.live, length + 1):
                return False
            visible = mask.to(self.ends.device) != 0
            self.hidden.copy_(length + 1 - visible.sum(1))
            most = int(self.hidden.max())
            if most > length or not torch.equal(visible, self._seen_from(length)):
                self._hide_least()
                return False
            self._most_hidden = most
            torch.add(self.hidden, self._less, out=self._starts)
        return True

    def _hide_least(self) -> None:
        """Shows all but what is blank."""
        self.hidden.copy_(self._least)
        torch.add(self.hidden, self._less, out=self._starts)
        self._most_hidden = 0 if self._blank is None else max(self._blank.rows)

    def _seen_from(self, length: int) -> torch.Tensor:
        return torch.arange(length + 1, device=self.ends.device) >= self.hidden[:, None]

    def set_length(self, length: int) -> None:
        """Brings the ends to one past a row at ``length``."""
        torch.add(self._less, length + 1, out=self._ends)

    @contextlib.contextmanager
    def run(self, store: Store, length: int, configs: list[Any]) -> Iterator[None]:
        """While it lasts the model with these configurations computes this step."""
        self.store, self._length = store, length
        self._returned: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._waiting: set[int] = set()
        self._spans: dict[int | None, SequenceRanges] = {}
        try:
            with attending(self, configs):
                yield
        finally:
            store.lengths[:] = [length] * len(store.lengths)  # who takes the step says that it is taken
            del self.store, self._returned, self._spans
        if self._waiting:
            raise UnsupportedError(
                f"the attention of layer {min(self._waiting)} takes no attention function", of_model=True
            )

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[batch, kv_heads, 1, dim]``; what it returns is for the attention function to know the layer by.

        They are views of exact length, so that a model that reads them itself reads right rows.
        """
        mine = self.append(layer, k, v)
        window = self.store.windows[layer]
        first = 0 if window is None else max(self._length + 1 - window, 0)
        if self._padding is None and self.store.options.scales is None and self.live == self._batch:
            keys, values = (t[:, first : self._length + 1].transpose(1, 2) for t in mine)
        else:  # what such a model reads is not used, see ``run``
            n = self._length + 1 - first
            keys, values = (t.new_zeros(1, 1, 1, 1).expand(*t.shape[:2], n, t.shape[3]) for t in (k, v))
        self._returned[id(keys)] = layer, keys, values
        self._waiting.add(layer)
        self.store.lengths[layer] = self._length + 1
        return keys, values

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes ``[batch, kv_heads, 1, dim]`` to their place; returns the layer's slot tensors of the batch."""
        if k.shape[2] != 1 or k.shape[0] != self._batch:
            raise UnsupportedError(f"layer {layer} is given {tuple(k.shape)}")
        if layer not in self._views:
            batch = slice(self._base, self._base + self._batch)
            k_slots, v_slots = self.cache.slot_tensors(layer)
            self._views[layer] = k_slots[batch], v_slots[batch]
        mine = self._views[layer]
        append(k[:, :, 0], v[:, :, 0], *mine, self.ends, self._rows, self._scales_of(layer))
        if self.watch is not None:
            self.watch.appended(layer, k[:, :, 0], v[:, :, 0], *mine, self._scales_of(layer))
        return mine

    def attend(
        self, at: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams
    ) -> torch.Tensor:
        """Attention of the module at a layer, on what ``update`` returned, see ``attend_to``."""
        layer, keys, values = self._returned.get(id(k), (-1, None, None))
        if keys is not k or values is not v:
            raise UnsupportedError(
                "an attention function is given other K and V than the cache returned", of_model=True
            )
        self.odd = self.odd or layer != at or layer not in self._waiting
        self._waiting.discard(layer)
        return self.attend_to(layer, q, how)

    def attend_to(self, layer: int, q: torch.Tensor, how: AttentionParams) -> torch.Tensor:
        """q ``[batch, query_heads, 1, head_dim]`` on the K and V of a layer; ``[batch, 1, query_heads, v_dim]``."""
        windows = [window for window in (self.store.windows[layer], how.window) if window is not None]
        window = min(windows, default=None)
        mine = self._views[layer]
        key = layer, q.dtype, q.shape[1], window is None, how.softcap is None, how.sinks is None
        if (kernel := self._kernels.get(key)) is None:
            options: dict[str, Any] = {
                "window": window is not None,
                "softcap": how.softcap is not None,
                "sinks": how.sinks is not None,
            }
            task = AttentionSpec.of(q[:, :, 0], *mine, **options)
            try:
                kernel = kernels.choose(task, name=self._attention, capturable=self._capture)
            except ValueError as error:
                raise UnsupportedError(str(error)) from None
            self._kernels[key] = kernel
            self.used[kernel.name] = None
        k_scale, v_scale = self._scales_of(layer)
        scaled = q[:, :, 0] if k_scale is None else self._scaled(q[:, :, 0], k_scale)
        spans = self._spans_of(window)
        out = kernel.decode(scaled, *mine, spans, how)
        out = out if v_scale is None else self._scaled(out, v_scale)
        if self.watch is not None:
            self.watch.attended(layer, kernel, q[:, :, 0], out, spans, how)
        return out[:, None]

    def _scales_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        scales = self.store.options.scales
        return (None, None) if scales is None else scales.at(layer, self.ends.device)

    def _scaled(self, states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """``[batch, query_heads, dim]``, each head times the scale of its KV head."""
        heads = states.shape[1] // len(scale) if len(scale) > 1 else 1
        return (states.float() * scale.repeat_interleave(heads)[:, None]).to(states.dtype)

    def _spans_of(self, window: int | None) -> SequenceRanges:
        if window not in self._spans:
            longest = self.cache.layout.max_len
            starts = self.starts
            if window is not None:
                starts, longest = torch.maximum(starts, self.ends - window), min(window, longest)
            self._spans[window] = SequenceRanges(self.slots, starts, self.ends, longest=longest, adjacent=True)
        return self._spans[window]
