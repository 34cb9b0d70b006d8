"""``Watch`` and ``PromptWatch``: compare the attention of each layer of a step or a prompt with its definition."""

from __future__ import annotations

import torch

from vattn.hf.padding import Padding
from vattn.hf.store import Store
from vattn.kernels import AttentionParams, Kernel, SequenceRanges
from vattn.kernels.check import Comparison, sampled
from vattn.kernels.probe import probe_decode, probe_prefill
from vattn.kernels.quantize import rounded

_POSITIONS = 1 << 16  # positions of a batch that are compared in each layer; four rows are compared in any case


class Watch(Comparison):
    """Checks a decode step of a batch, layer by layer, against what the host knows of the rows.

    Args:
        store: of the cache that the step appends to.
        mask: the attention mask of the step, ``[live, length + 1]``, with zeros on the left only; or None.
        length: positions of the rows before the step, padding included.
        live: rows of the batch.
    """

    def __init__(self, store: Store, mask: torch.Tensor | None, length: int, live: int) -> None:
        super().__init__()
        self._store = store
        hidden = [0] * live if mask is None else (mask == 0).sum(1).tolist()
        padding = store.rows.format.padding or Padding([0] * live)
        self._ends = padding.stored(length + 1)
        self._firsts = [hides - pad for hides, pad in zip(hidden, padding.rows, strict=True)]
        self._rows = sampled(live, max(4, _POSITIONS // (length + 1)))
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _spans(self, window: int | None) -> list[tuple[int, int]]:
        """Returns for each row the range of its slot that its query sees."""
        return [
            (first if window is None else max(first, end - window), end)
            for first, end in zip(self._firsts, self._ends, strict=True)
        ]

    def appended(
        self,
        layer: int,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    ) -> None:
        """Checks that the new rows of a layer were written where they belong; arguments as in ``append``."""
        self._slots[layer] = k, v
        rows = torch.arange(len(self._ends), device=k.device)
        at = torch.tensor(self._ends, device=k.device) - 1
        for name, new, slots, scale in zip("KV", (k_new, v_new), (k, v), scales, strict=True):
            new = new[: len(rows)]
            if slots.dtype.itemsize == 1:  # torch cannot index fp8
                stored = slots.view(torch.uint8)[rows, at].view(slots.dtype).float()
                right = rounded(new[:, :, None], scale, slots.dtype)[:, :, 0].float()
                wrong = bool(((stored - right).norm() > 0.02 * right.norm()) & right.isfinite().all())
            else:
                wrong = not torch.equal(slots[rows, at].nan_to_num(), new.to(slots.dtype).nan_to_num())
            if wrong:
                self.note(f"{name} of layer {layer} is not what was appended")

    def attended(
        self,
        layer: int,
        kernel: Kernel,
        q: torch.Tensor,
        out: torch.Tensor,
        spans: SequenceRanges,
        scores: AttentionParams,
    ) -> None:
        """Compares the attention of a layer with its definition, after ``appended`` was called for the layer.

        Args:
            layer: its index.
            kernel: computed the attention.
            q: ``[batch, query_heads, head_dim]``, before scales of K are applied.
            out: ``[batch, query_heads, v_head_dim]``, after scales of V are applied.
            spans: the ranges that the kernel was given.
            scores: scale, softcap, sinks and window.
        """
        windows = [window for window in (self._store.windows[layer], scores.window) if window is not None]
        expected = self._spans(min(windows, default=None))
        live = len(expected)
        if [span[1:] for span in spans.tolist()[:live]] != expected or any(e for _, _, e in spans.tolist()[live:]):
            self.note(f"layer {layer} is given other rows than its queries see")
        k, v = self._slots[layer]
        scales = self._store.options.scales
        of_layer = (None, None) if scales is None else scales.at(layer, q.device)
        for row in self._rows:
            first, end = expected[row]
            keys, values = k[row, first:end], v[row, first:end]
            seen = torch.ones(1, end - first, dtype=torch.bool, device=q.device)
            what = f"{kernel.name} in layer {layer}"
            narrow = kernel.narrows and k.dtype.itemsize == 1
            self.compare(what, out[row, None], q[row, None], keys, values, seen, scores, of_layer, narrow=narrow)
        if fault := probe_decode(kernel, q, k, v, live, scores):
            self.note(fault)


class PromptWatch(Comparison):
    """Checks the attention of a prompt, at some of its positions.

    Args:
        hidden: for each row, positions on the left that its attention mask hides.
        start: positions that the cache holds before the prompt, padding included.
        n: tokens of each row, padding included.
        windows: the sliding window of each layer, or None.
    """

    def __init__(self, hidden: list[int], start: int, n: int, windows: list[int | None]) -> None:
        super().__init__()
        self._hidden, self._start, self._n, self._windows = hidden, start, n, windows
        self._rows = sampled(len(hidden), max(4, _POSITIONS // (4 * (start + n))))

    def attended(
        self,
        layer: int,
        kernel: Kernel,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        scores: AttentionParams,
    ) -> None:
        """Compares the attention of a layer with its definition, for some queries of some rows.

        Args:
            layer: its index.
            kernel: computed the attention.
            q: ``[batch, n, query_heads, head_dim]``.
            k: ``[batch, positions, kv_heads, head_dim]``, as the cache returned it: the last ``positions`` positions.
            v: ``[batch, positions, kv_heads, v_head_dim]``.
            out: ``[batch, n, query_heads, v_head_dim]``.
            scores: scale, softcap, sinks and window.
        """
        windows = [window for window in (self._windows[layer], scores.window) if window is not None]
        window = min(windows, default=None)
        left_out = self._start + self._n - k.shape[1]
        positions = torch.arange(k.shape[1], device=q.device) + left_out
        for row in self._rows:
            first = max(self._hidden[row] - self._start, 0)
            queries = [first + i for i in sampled(self._n - first, 4)]
            at = torch.tensor(queries, device=q.device)[:, None] + self._start
            seen = (positions <= at) & (positions >= self._hidden[row])
            if window is not None:
                seen &= positions > at - window
            # Rows before a window that no query sees may be unmapped, or hold nothing that the model has computed.
            used = int(seen.any(0).nonzero()[0])
            keys, values = k[row, used:], v[row, used:]
            what = f"{kernel.name} in the prompt of layer {layer}"
            self.compare(what, out[row, queries], q[row, queries], keys, values, seen[:, used:], scores)
        if fault := probe_prefill(kernel, q, k, v, window, self._start > 0, scores):
            self.note(fault)
