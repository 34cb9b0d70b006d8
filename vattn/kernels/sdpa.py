"""``scaled_dot_product_attention`` of torch, with each of its backends."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from vattn.kernels.base import HALVES, AttentionParams, AttentionSpec, Kernel, SequenceRanges, refused_dims
from vattn.kernels.reference import visible


class Sdpa(Kernel):
    """``scaled_dot_product_attention`` on slices of a slot tensor.

    One call computes one sequence, or in a decode step the whole batch where all ranges are equal.

    Args:
        name: the name of the kernel.
        backend: the backend that has to be used, or None for torch's choice.
        masks: whether the backend takes masks.
        gqa: whether the backend takes fewer KV heads than query heads.
        on: the device types that the backend runs on.
    """

    source = "torch"
    capturable = False  # the lengths of the slices would stay what they were at the capture

    def __init__(self, name: str, backend: SDPBackend | None, *, masks: bool, gqa: bool, on: tuple[str, ...]) -> None:
        self.name = name  # type: ignore[misc]
        self._backend = backend
        self._masks = masks
        self._gqa = gqa
        self._on = on

    def refuses(self, task: AttentionSpec) -> str | None:
        if task.device not in self._on:
            return f"it runs on {' and '.join(self._on)} only"
        if task.softcap or task.sinks:
            return "it has no soft cap and no sinks"
        if self._backend is not None:
            if task.dtype not in HALVES and self._backend is not SDPBackend.EFFICIENT_ATTENTION:
                return "it computes in float16 and bfloat16 only"
            if reason := refused_dims(task):
                return reason
            if self._backend is SDPBackend.CUDNN_ATTENTION and task.head_dim > 128:
                return "it takes head dims up to 128"
        if not self._gqa and task.query_heads != task.kv_heads:
            return "it takes as many query heads as KV heads"
        if not self._masks and (task.queries == "chunk" or (task.window and task.queries == "first")):
            return "it takes no mask, and so no window and no several queries behind a past"
        return None

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        if self._backend is None or k.shape[2] == 1:  # cuDNN refuses a single row
            return functional.scaled_dot_product_attention(q, k, v, **options)
        with sdpa_kernel(self._backend):
            return functional.scaled_dot_product_attention(q, k, v, **options)

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        places = spans.tolist()
        options: dict[str, Any] = {"scale": scores.scale, "enable_gqa": q.shape[1] != k.shape[2]}
        _, start, end = places[0]
        if spans.adjacent and all(place[1:] == (start, end) for place in places):
            seen = (t[: len(spans), start:end].transpose(1, 2) for t in (k, v))
            return self._attend(q[:, :, None], *seen, **options)[:, :, 0]
        parts = [
            self._attend(q[i, None, :, None], *(t[slot, None, start:end].transpose(1, 2) for t in (k, v)), **options)
            for i, (slot, start, end) in enumerate(places)
        ]
        return torch.cat(parts)[:, :, 0]

    def prefill(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        spans: SequenceRanges,
        counts: list[int],
        scores: AttentionParams,
    ) -> torch.Tensor:
        parts = []
        for queries, n, (slot, start, end) in zip(torch.split(q, counts), counts, spans.tolist(), strict=True):
            m = end - start
            options: dict[str, Any] = {"scale": scores.scale, "enable_gqa": q.shape[1] != k.shape[2]}
            if n == m and (scores.window is None or scores.window >= m):
                options["is_causal"] = True
            elif n > 1 or scores.window is not None:
                options["attn_mask"] = visible(n, m, scores.window, q.device)
            seen = (t[slot, None, start:end].transpose(1, 2) for t in (k, v))
            parts.append(self._attend(queries.transpose(0, 1)[None], *seen, **options)[0].transpose(0, 1))
        return torch.cat(parts)
