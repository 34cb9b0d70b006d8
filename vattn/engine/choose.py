"""``choose``: the token of each row, greedy or by Gumbel noise; on a GPU in two kernels that read the logits once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from vattn.engine.last_tokens import LastTokens
from vattn.engine.philox import gumbel

_PARTS = 16  # programs that share a row
_BLOCK = 512  # groups of four tokens that a program looks at together


@dataclass(frozen=True)
class SamplingState:
    """What the device knows of outputs to choose their next tokens, by their slots in the sampler.

    Args:
        temperatures: float32 ``[slots]``; 0 chooses the largest of the logits.
        seeds: of the noise, int64 ``[slots]``, see ``gumbel``.
        indexes: which of its request's outputs each is, int64 ``[slots]``.
        last: the last token of each.
    """

    temperatures: torch.Tensor
    seeds: torch.Tensor
    indexes: torch.Tensor
    last: LastTokens


def choose(
    logits: torch.Tensor, outputs: SamplingState, slots: torch.Tensor, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Chooses the token of each row, the largest of logits / temperature + noise, and notes it as its output's last.

    Args:
        logits: ``[n, vocabulary]``.
        outputs: of all slots.
        slots: of each row, int64 ``[n]``; 0 of idle rows, of which nothing is noted.
        lengths: positions before the token, int64 ``[n]``; None where each row is that of its output's last token.

    Returns:
        int64 ``[n]``; -1 where the logits of a row are no numbers, and 0 is noted.
    """
    if logits.is_cuda and (kernels := _kernels()) is not None:
        return _by_kernels(*kernels, logits, outputs, slots, lengths)
    last = outputs.last
    lengths = last.ends[slots].long() if lengths is None else lengths
    temperatures = outputs.temperatures[slots]
    scores = logits = logits.float()
    warm = temperatures > 0
    if logits.is_cuda or bool(warm.any()):
        noise = gumbel(outputs.seeds[slots], outputs.indexes[slots], lengths, logits.shape[1])
        scores = torch.where(warm[:, None], logits / temperatures[:, None] + noise, logits)
    # The largest is NaN where one is.
    tokens = torch.where(logits.amax(-1).isfinite(), scores.argmax(-1), -1)
    there = slots > 0
    last.tokens[slots] = tokens.clamp_min(0) * there
    last.ends[slots] = ((lengths + 1) * there).int()
    return tokens


def _by_kernels(
    score: Any,
    note: Any,
    logits: torch.Tensor,
    outputs: SamplingState,
    slots: torch.Tensor,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    rows, vocabulary = logits.shape
    best = torch.empty(rows, _PARTS, dtype=torch.float32, device=logits.device)
    room = torch.empty(rows * (_PARTS + 1), dtype=torch.int64, device=logits.device)
    tokens, chosen = room[rows:], room[:rows]
    last = outputs.last
    given = last.ends if lengths is None else lengths
    blocks = -(-vocabulary // (4 * _BLOCK * _PARTS))
    score[rows, _PARTS](
        logits, logits.stride(0), logits.stride(1), slots, outputs.temperatures, outputs.seeds, outputs.indexes, given,
        best, tokens, vocabulary, by_slot=lengths is None, blocks=blocks, parts=_PARTS, block=_BLOCK,
    )  # fmt: skip
    note[rows,](slots, given, best, tokens, chosen, last.tokens, last.ends, by_slot=lengths is None, parts=_PARTS)
    return chosen


@functools.cache
def _kernels() -> tuple[Any, Any] | None:
    """The kernel by which programs choose among the tokens of a part of a row, and the one that chooses of these."""
    try:
        import triton
        import triton.language as tl
        from triton.language.extra import libdevice
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def score(  # type: ignore[no-untyped-def]
        logits, row_stride, token_stride, slots, temperatures, seeds, indexes, lengths, best, tokens, vocabulary,
        by_slot: tl.constexpr, blocks: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        slot = tl.load(slots + row)
        temperature = tl.load(temperatures + slot)
        seed = tl.load(seeds + slot)
        index = tl.load(indexes + slot).to(tl.uint32)
        length = tl.load(lengths + (slot if by_slot else row)).to(tl.uint32)
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
                # The inner logarithm tells the largest numbers apart, which are close to 1; the outer one may be rough.
                scores = scores / temperature - libdevice.fast_logf(-tl.log(uniform))
            higher = there & (scores > highest)
            chosen = tl.where(higher, at, chosen)
            highest = tl.where(higher, scores, highest)
        value = tl.max(tl.reshape(highest, (4 * block,)), 0)
        alike = tl.where(highest == value, chosen, vocabulary - 1)
        token = tl.min(tl.reshape(alike, (4 * block,)), 0)  # the first of those that are alike
        nan = tl.max(tl.reshape(broken, (4 * block,)), 0) > 0
        tl.store(best + row * parts + part, tl.where(nan, float("nan"), value))
        tl.store(tokens + row * parts + part, token.to(tl.int64))

    @triton.jit  # type: ignore[untyped-decorator]
    def note(  # type: ignore[no-untyped-def]
        slots, lengths, best, tokens, chosen, last_tokens, last_ends, by_slot: tl.constexpr, parts: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        slot = tl.load(slots + row)
        length = tl.load(lengths + (slot if by_slot else row)).to(tl.int32)
        part = tl.arange(0, parts)
        values = tl.load(best + row * parts + part)
        broken = tl.max((values != values).to(tl.int32), 0) > 0
        value = tl.max(tl.where(values == values, values, float("-inf")), 0)
        first = tl.min(tl.where(values == value, part, parts - 1), 0)  # of those that are alike
        token = tl.load(tokens + row * parts + first)
        good = (value < float("inf")) & (value > float("-inf")) & (broken == 0)
        tl.store(chosen + row, tl.where(good, token, -1))
        tl.store(last_tokens + slot, tl.where(good, token, 0), mask=slot > 0)
        tl.store(last_ends + slot, length + 1, mask=slot > 0)

    return score, note
