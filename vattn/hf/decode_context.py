"""``DecodeContext``: a decode step of a Hugging Face model on slot tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vattn import kernels
from vattn.hf.step_rows import StepRows
from vattn.hf.store import Store
from vattn.kernels import AttentionParams, AttentionSpec, Kernel, SequenceRanges
from vattn.kernels.append import append
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import UnsupportedError, attending

if TYPE_CHECKING:
    from vattn.hf.watch import Watch


@dataclass
class _Run:
    """The state of a step while it runs.

    Args:
        store: of the cache.
        length: positions before the step.
        returned: for each K that ``update`` returned, by its ``id``, the layer and the K and V.
        waiting: layers that were updated and whose attention was not computed yet.
        ranges: the rows that queries see, by window.
    """

    store: Store
    length: int
    returned: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    ranges: dict[int | None, SequenceRanges] = field(default_factory=dict)


class DecodeContext:
    """Implements ``VirtualCache.update`` and the attention function for decode steps of a batch.

    Args:
        cache: holds the rows of all layers.
        base: slot of row 0; row ``i`` of the batch is slot ``base + i``.
        rows: which positions each row sees.
        attention: the name of the kernel, or ``"auto"``.
        capture: whether steps are captured into CUDA graphs, which not all kernels support.

    Attributes:
        rows: as given.
        watch: checks what the current step computes, where the step is verified.
        shares_kv_across_layers: whether a layer attends to the K and V of another one.
        used: names of the kernels used so far.
    """

    own_attention = False  # the attention is vattn's, not the model's own, see ``models.attention``

    def __init__(self, cache: KVCache, base: int, rows: StepRows, attention: str, capture: bool) -> None:
        self.cache, self._base, self.rows = cache, base, rows
        self._attention = attention
        self._capture = capture and cache.device.type == "cuda"
        self._kernels: dict[Any, Kernel] = {}
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._run: _Run | None = None
        self.watch: Watch | None = None
        self.shares_kv_across_layers = False
        self.used: dict[str, None] = {}

    @property
    def store(self) -> Store | None:
        """The store of the cache that the running step appends to; None while no step runs."""
        return None if self._run is None else self._run.store

    @contextlib.contextmanager
    def run(self, store: Store, length: int, configs: list[Any]) -> Iterator[None]:
        """Within this context a model computes a step.

        Args:
            store: of the cache.
            length: positions before the step.
            configs: the configurations of the model.

        Raises:
            UnsupportedError: a layer was updated, but its attention was not computed by the attention function.
        """
        self._run = run = _Run(store, length)
        try:
            with attending(self, configs):
                yield
        finally:
            store.lengths[:] = [length] * len(store.lengths)  # the caller counts the step once it accepts its output
            self._run = None
        if run.waiting:
            raise UnsupportedError(
                f"the attention of layer {min(run.waiting)} takes no attention function", of_model=True
            )

    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError("no decode step runs")
        return self._run

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends K and V of one layer, and returns tensors by which the attention function recognizes the layer.

        Args:
            layer: its index.
            k: ``[batch, kv_heads, 1, head_dim]``.
            v: ``[batch, kv_heads, 1, v_head_dim]``.

        Returns:
            Views of exact length, so that a model that reads them outside of the attention function reads correct rows.
            Zeros of the same shape where rows are idle or not stored as the model computes them.
        """
        mine, run = self.append(layer, k, v), self._running()
        window = run.store.windows[layer]
        first = 0 if window is None else max(run.length + 1 - window, 0)
        idle = self.rows.live < len(self.rows.slots)
        if self.rows.stored_whole and run.store.options.scales is None and not idle:
            keys, values = (t[:, first : run.length + 1].transpose(1, 2) for t in mine)
        else:  # a model that reads the zeros does not call the attention function, and ``run`` raises
            n = run.length + 1 - first
            keys, values = (t.new_zeros(1, 1, 1, 1).expand(*t.shape[:2], n, t.shape[3]) for t in (k, v))
        run.returned[id(keys)] = layer, keys, values
        run.waiting.add(layer)
        run.store.lengths[layer] = run.length + 1
        return keys, values

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes K and V ``[batch, kv_heads, 1, dim]`` of one layer, and returns the layer's slot tensors of the batch.

        Raises:
            UnsupportedError: K has another number of rows or positions.
        """
        batch = len(self.rows.slots)
        if k.shape[2] != 1 or k.shape[0] != batch:
            raise UnsupportedError(f"layer {layer} is given {tuple(k.shape)}")
        if layer not in self._views:
            slots = slice(self._base, self._base + batch)
            k_slots, v_slots = self.cache.slot_tensors(layer)
            self._views[layer] = k_slots[slots], v_slots[slots]
        mine = self._views[layer]
        append(k[:, :, 0], v[:, :, 0], *mine, self.rows.ends, self.rows.indices, self._scales_of(layer))
        if self.watch is not None:
            self.watch.appended(layer, k[:, :, 0], v[:, :, 0], *mine, self._scales_of(layer))
        return mine

    def attend(
        self, at: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: AttentionParams
    ) -> torch.Tensor:
        """Computes the attention of the module of layer ``at`` on K and V that ``update`` returned, see ``attend_to``.

        Raises:
            UnsupportedError: ``k`` and ``v`` are other tensors than ``update`` returned, or no kernel fits.
        """
        run = self._running()
        layer, keys, values = run.returned.get(id(k), (-1, None, None))
        if keys is not k or values is not v:
            raise UnsupportedError(
                "an attention function is given other K and V than the cache returned", of_model=True
            )
        if layer != at or layer not in run.waiting:
            self.shares_kv_across_layers = True
        run.waiting.discard(layer)
        return self.attend_to(layer, q, how)

    def attend_to(self, layer: int, q: torch.Tensor, how: AttentionParams) -> torch.Tensor:
        """Computes attention on the rows of a layer.

        Args:
            layer: its index.
            q: ``[batch, query_heads, 1, head_dim]``.
            how: scale, softcap, sinks and window.

        Returns:
            ``[batch, 1, query_heads, v_head_dim]``.

        Raises:
            UnsupportedError: no kernel computes it.
        """
        windows = [window for window in (self._running().store.windows[layer], how.window) if window is not None]
        window = min(windows, default=None)
        mine = self._views[layer]
        kernel = self._kernel_for(layer, q, window is not None, how)
        k_scale, v_scale = self._scales_of(layer)
        scaled = q[:, :, 0] if k_scale is None else self._scaled(q[:, :, 0], k_scale)
        ranges = self._ranges_of(window)
        out = kernel.decode(scaled, *mine, ranges, how)
        out = out if v_scale is None else self._scaled(out, v_scale)
        if self.watch is not None:
            self.watch.attended(layer, kernel, q[:, :, 0], out, ranges, how)
        return out[:, None]

    def _kernel_for(self, layer: int, q: torch.Tensor, windowed: bool, how: AttentionParams) -> Kernel:
        options = {"window": windowed, "softcap": how.softcap is not None, "sinks": how.sinks is not None}
        key = layer, q.dtype, q.shape[1], *options.values()
        if (kernel := self._kernels.get(key)) is None:
            spec = AttentionSpec.of(q[:, :, 0], *self._views[layer], **options)  # type: ignore[arg-type]
            try:
                kernel = kernels.choose(spec, name=self._attention, capturable=self._capture)
            except ValueError as error:
                raise UnsupportedError(str(error)) from None
            self._kernels[key] = kernel
            self.used[kernel.name] = None
        return kernel

    def _scales_of(self, layer: int) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        scales = self._running().store.options.scales
        return (None, None) if scales is None else scales.at(layer, self.cache.device)

    def _scaled(self, states: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Returns ``states`` ``[batch, query_heads, dim]``, with each head multiplied by the scale of its KV head."""
        heads = states.shape[1] // len(scale) if len(scale) > 1 else 1
        return (states.float() * scale.repeat_interleave(heads)[:, None]).to(states.dtype)

    def _ranges_of(self, window: int | None) -> SequenceRanges:
        run, rows = self._running(), self.rows
        if window not in run.ranges:
            longest, starts = self.cache.layout.max_len, rows.starts
            if window is not None:
                starts, longest = torch.maximum(starts, rows.ends - window), min(window, longest)
            run.ranges[window] = SequenceRanges(rows.slots, starts, rows.ends, longest=longest, adjacent=True)
        return run.ranges[window]
