"""``flex_attention`` of torch, for decode steps."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vattn.kernels.base import AttentionParams, AttentionSpec, Kernel, SequenceRanges, many_shapes, with_sinks


class Flex(Kernel):
    """``flex_attention``, compiled. It takes soft caps, sinks, and K and V of different head dims; it only decodes."""

    name = "flex"
    source = "torch, compiled"
    head_rows = tail_rows = 127
    measured = False
    _BLOCK = 128

    def missing(self) -> str | None:
        return None if torch.cuda.is_available() else "it needs a CUDA device"

    def refuses(self, task: AttentionSpec) -> str | None:
        if task.device != "cuda":
            return "it runs on cuda only"
        if task.queries != "one":
            return "it is used for decoding only"
        if not task.adjacent:
            return "it reads slots side by side from the first on"
        if min(task.head_dim, task.v_head_dim) < 16:
            return "it takes head dims from 16 on"
        return None if task.reach < 2**31 else "it reaches 2**31 elements only"  # beyond that it does not compile

    def decode(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spans: SequenceRanges, scores: AttentionParams
    ) -> torch.Tensor:
        if not spans.adjacent:
            raise NotImplementedError("flex reads slots side by side from the first on")
        batch, longest = len(spans), k.shape[1]
        mask = spans.once(("flex", longest), lambda: self._mask(spans, longest))
        k, v = (t[:batch].transpose(1, 2) for t in (k, v))
        with many_shapes():
            out, lse = _flex()(
                q[:, :, None], k, v, score_mod=_capped(scores.softcap) if scores.softcap else None, block_mask=mask,
                scale=scores.scale, enable_gqa=q.shape[1] != k.shape[1], return_lse=True,
            )  # fmt: skip
        return with_sinks(out[:, :, 0], lse[:, :, 0], scores.sinks) if scores.sinks is not None else out[:, :, 0]

    def _mask(self, spans: SequenceRanges, longest: int) -> Any:
        from torch.nn.attention.flex_attention import BlockMask

        first = spans.starts // self._BLOCK
        blocks = torch.arange(-(-longest // self._BLOCK), dtype=torch.int32, device=first.device)
        number = (spans.ends + self._BLOCK - 1) // self._BLOCK - first
        starts, ends = spans.starts, spans.ends

        def seen(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
            return (kv >= starts[b]) & (kv < ends[b])

        indices = torch.clamp_max(first[:, None] + blocks, blocks.shape[0] - 1)
        return BlockMask.from_kv_blocks(
            number[:, None, None].to(torch.int32),
            indices[:, None, None].to(torch.int32),
            BLOCK_SIZE=(self._BLOCK, self._BLOCK),
            mask_mod=seen,
            seq_lengths=(1, longest),
            compute_q_blocks=False,
        )


@functools.cache
def _flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@functools.cache
def _capped(softcap: float) -> Any:
    def capped(score: torch.Tensor, b: Any, h: Any, q: Any, kv: Any) -> torch.Tensor:
        return softcap * torch.tanh(score / softcap)

    return capped
