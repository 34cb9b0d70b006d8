"""Philox 4x32-10: random numbers that follow from a key and a counter, the same on every device.

Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011). There is no state: the number for a token at a
position of an output does not depend on what was drawn before, so batches, preemption and graphs do not matter.
"""

from __future__ import annotations

import torch

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns four numbers of 32 random bits for each counter and key.

    Args:
        counter: four int64 tensors with values in [0, 2**32), of shapes that broadcast.
        key: two such tensors.

    Returns:
        Four int64 tensors with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(_MULTIPLIERS[0], c0)
        high1, low1 = _product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _INCREMENTS[0]) & _LOW, (k1 + _INCREMENTS[1]) & _LOW
    return c0, c1, c2, c3


def _product(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper and the lower 32 bits of a product of two numbers of 32 bits, without an overflow of 64 bits."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def gumbel(seed: torch.Tensor, index: torch.Tensor, position: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Returns noise by which the largest of logits + noise is a sample of their softmax.

    Args:
        seed: int64 ``[n]``, of the requests.
        index: int64 ``[n]``, which of its request's outputs each row is.
        position: int64 ``[n]``, of the token that is sampled.
        vocabulary: tokens.

    Returns:
        float32 ``[n, vocabulary]``.
    """
    # One call gives the numbers of four tokens.
    blocks = torch.arange(-(-vocabulary // 4), device=seed.device)
    counter = (position[:, None] & _LOW, blocks[None], index[:, None] & _LOW, torch.zeros_like(seed)[:, None])
    bits = philox(counter, ((seed & _LOW)[:, None], (seed >> 32 & _LOW)[:, None]))
    numbers = torch.stack(bits, -1).flatten(1)[:, :vocabulary]
    # 23 bits and a half are exact in float32, and never 0 or 1.
    uniform = ((numbers >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))
