"""``FlatWatch``: compares the attention of each layer in a flat call with its definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vattn.kernels import AttentionParams, Kernel
from vattn.kernels.check import Comparison, sampled
from vattn.kernels.probe import probe_decode, probe_prefill
from vattn.kernels.quantize import rounded

if TYPE_CHECKING:
    from vattn.models.flat import Part

_QUERIES = 8  # of a segment that are compared


class FlatWatch(Comparison):
    """Checks flat calls of a model, layer by layer."""

    def attended(
        self,
        layer: int,
        kernel: Kernel,
        out: torch.Tensor,
        part: Part,
        q: torch.Tensor,
        rows: tuple[torch.Tensor, torch.Tensor],
        new: tuple[torch.Tensor, torch.Tensor],
        how: AttentionParams,
    ) -> None:
        """Compares the rows of a layer with what was appended, and its attention with the definition.

        Args:
            layer: its index.
            kernel: computed the attention.
            out: ``[n, query_heads, v_head_dim]``, of the tokens of ``part``.
            part: of the call.
            q: ``[T, query_heads, head_dim]``, of all tokens.
            rows: the slot tensors of K and V.
            new: K and V of the call, ``[1, kv_heads, T, dim]``.
            how: how scores are computed, and the window.
        """
        assert isinstance(part.segments, list)
        q, new = q[part.tokens], (new[0][0][:, part.tokens], new[1][0][:, part.tokens])
        narrow, at = kernel.narrows and rows[0].dtype.itemsize == 1, 0
        for segment in part.segments:
            start, count, end = segment.start, segment.count, segment.start + segment.count
            for name, each, states in zip("KV", rows, new, strict=True):
                right = states[:, at : at + count]
                right = rounded(right, None, each.dtype) if each.dtype.itemsize == 1 else right.to(each.dtype)
                stored = each[segment.slot, start:end].float().nan_to_num()
                if not torch.equal(stored, right.transpose(0, 1).float().nan_to_num()):
                    self.note(f"{name} of layer {layer} is not what was appended")
            first = 0 if how.window is None else max(0, start - how.window + 1)
            keys, values = (each[segment.slot, first:end] for each in rows)
            queries = torch.tensor(sampled(count, _QUERIES), device=q.device)
            behind = (start + queries)[:, None] - torch.arange(first, end, device=q.device)
            seen = (behind >= 0) & (behind < (end if how.window is None else how.window))
            what = f"{kernel.name} in layer {layer}"
            self.compare(what, out[at + queries], q[at + queries], keys, values, seen, how, narrow=narrow)
            at += count
        if part.decodes:
            fault = probe_decode(kernel, q, *rows, len(part.segments), how)
        else:
            fault = probe_prefill(kernel, q[None], *rows, how.window, any(each.start for each in part.segments), how)
        if fault:
            self.note(fault)
