"""``choose``: the token of each row, greedy or by Gumbel noise; on a GPU in one kernel that reads the logits once."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vattn.engine.philox import gumbel

_PARTS = 16  # programs that share a row
_BLOCK = 512  # groups of four tokens that a program looks at together


def choose(
    logits: torch.Tensor, temperatures: torch.Tensor, seeds: torch.Tensor, indexes: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Returns the token of each row: the largest of logits / temperature + noise.

    Args:
        logits: ``[n, vocabulary]``.
        temperatures: float32 ``[n]``; 0 chooses the largest of the logits.
        seeds: of the noise, int64 ``[n]``, see ``gumbel``.
        indexes: int64 ``[n]``.
        lengths: int64 ``[n]``.

    Returns:
        int64 ``[n]``; -1 where the logits of a row are no numbers.
    """
    if logits.is_cuda and (kernel := _kernel()) is not None:
        return _by_kernel(kernel, logits, temperatures, seeds, indexes, lengths)
    scores = logits = logits.float()
    warm = temperatures > 0
    if logits.is_cuda or bool(warm.any()):
        noise = gumbel(seeds, indexes, lengths, logits.shape[1])
        scores = torch.where(warm[:, None], logits / temperatures[:, None] + noise, logits)
    return torch.where(logits.amax(-1).isfinite(), scores.argmax(-1), -1)  # the largest is NaN where one is


def _by_kernel(
    kernel: Any,
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    indexes: torch.Tensor,
    lengths: torch.Tensor,
) -> torch.Tensor:
    rows, vocabulary = logits.shape
    best = torch.empty(rows, _PARTS, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, _PARTS, dtype=torch.int64, device=logits.device)
    blocks = -(-vocabulary // (4 * _BLOCK * _PARTS))
    kernel[rows, _PARTS](
        logits, logits.stride(0), logits.stride(1), temperatures, seeds, indexes, lengths, best, tokens, vocabulary,
        blocks=blocks, parts=_PARTS, block=_BLOCK,
    )  # fmt: skip
    value, part = best.max(1)  # NaN where one is; the first of those that are alike
    return torch.where(value.isfinite(), tokens.gather(1, part[:, None])[:, 0], -1)


@functools.cache
def _kernel() -> Any:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        logits, row_stride, token_stride, temperatures, seeds, indexes, lengths, best, tokens, vocabulary,
        blocks: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        temperature = tl.load(temperatures + row)
        seed = tl.load(seeds + row)
        index = tl.load(indexes + row).to(tl.uint32)
        length = tl.load(lengths + row).to(tl.uint32)
        # Of each place in a block: the highest score so far, its token, and whether there was a NaN.
        highest = tl.full((block, 4), float("-inf"), tl.float32)
        chosen = tl.zeros((block, 4), dtype=tl.int32)
        broken = tl.zeros((block, 4), dtype=tl.int32)
        for number in range(blocks):
            # One call of Philox gives the numbers of four tokens.
            groups = (part * blocks + number) * block + tl.arange(0, block)
            at = groups[:, None] * 4 + tl.arange(0, 4)[None, :]
            there = at < vocabulary
            scores = tl.load(logits + row * row_stride + at * token_stride, mask=there, other=0.0).to(tl.float32)
            broken = tl.where(scores != scores, 1, broken)
            if temperature > 0:
                zero = tl.zeros((block,), tl.uint32)
                r0, r1, r2, r3 = tl.philox(seed, zero + length, groups.to(tl.uint32), zero + index, zero)
                bits = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (block, 4))
                uniform = ((bits >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
                scores = scores / temperature - tl.log(-tl.log(uniform))
            higher = there & (scores > highest)
            chosen = tl.where(higher, at, chosen)
            highest = tl.where(higher, scores, highest)
        value = tl.max(tl.reshape(highest, (4 * block,)), 0)
        alike = tl.where(highest == value, chosen, vocabulary - 1)
        token = tl.min(tl.reshape(alike, (4 * block,)), 0)  # the first of those that are alike
        nan = tl.max(tl.reshape(broken, (4 * block,)), 0) > 0
        tl.store(best + row * parts + part, tl.where(nan, float("nan"), value))
        tl.store(tokens + row * parts + part, token.to(tl.int64))

    return kernel
