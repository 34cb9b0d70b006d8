"""Estimates from measurements whether to swap a preempted sequence out or to recompute it; for schedulers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from vattn.memory.device import resolve_device
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import GRANULARITY, KVLayout


@dataclass(frozen=True, kw_only=True)
class SwapCosts:
    """The speed of a device at swapping and at computing.

    Attributes:
        out_bytes: bytes per second swapped out.
        in_bytes: bytes per second swapped in.
        flops: floating-point operations per second of a large matrix product.
    """

    out_bytes: float
    in_bytes: float
    flops: float

    @classmethod
    def measure(
        cls, device: str | torch.device = "cuda", *, dtype: torch.dtype = torch.bfloat16, nbytes: int = 256 << 20
    ) -> SwapCosts:
        """Measures a device by swapping a sequence of ``nbytes`` out and in, and by multiplying matrices."""
        where = resolve_device(device)
        layout = KVLayout.uniform(
            layers=1, kv_heads=16, head_dim=128, max_len=max(1, nbytes // 8192), granularity=GRANULARITY
        )
        with KVCache(layout, slots=2, device=where) as cache, cache.open() as sequence:
            sequence.grow(layout.max_len)
            sequence.swap_out()  # allocates the host memory, which is not to be timed
            sequence.swap_in()
            out, back = (
                statistics.median(times)
                for times in zip(
                    *((_seconds(sequence.swap_out, where), _seconds(sequence.swap_in, where)) for _ in range(3)),
                    strict=True,
                )
            )
        n = 4096 if where.type == "cuda" else 512
        a = torch.randn(n, n, device=where).to(dtype)
        a @ a
        multiplied = statistics.median(_seconds(lambda: a @ a, where) for _ in range(5))
        swapped = layout.max_len * layout.bytes_per_token
        return cls(out_bytes=swapped / out, in_bytes=swapped / back, flops=2 * n**3 / multiplied)

    def swap_seconds(self, layout: KVLayout, length: int) -> float:
        """Returns the seconds to swap a sequence of ``length`` positions out and in."""
        nbytes = layout.used_bytes(length)
        return nbytes / self.out_bytes + nbytes / self.in_bytes

    def recompute_seconds(self, layout: KVLayout, length: int, *, parameters: int, query_heads: int) -> float:
        """Returns the seconds to prefill ``length`` tokens.

        The estimate has two operations for each parameter and token, and in each layer two for each element of the K
        and of the V of a query head, for each query and each position that it sees.

        Args:
            layout: the layout of the model's cache.
            length: tokens of the sequence.
            parameters: parameters of the model that each token uses.
            query_heads: query heads of a layer.
        """
        flops = 2.0 * parameters * length
        for shape in layout.layers:
            if shape is not None:
                seen = length if shape.window is None else min(length, 2 * shape.window)
                flops += 2.0 * query_heads * (shape.head_dim + shape.v_head_dim) * length * seen / 2
        return flops / self.flops

    def better(
        self, layout: KVLayout, length: int, *, parameters: int, query_heads: int
    ) -> Literal["swap", "recompute"]:
        """Returns what takes less time in total, swapping out and in or recomputing; see ``recompute_seconds``."""
        again = self.recompute_seconds(layout, length, parameters=parameters, query_heads=query_heads)
        return "swap" if self.swap_seconds(layout, length) <= again else "recompute"


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
