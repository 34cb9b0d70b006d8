"""Attention kernels on three kinds of memory: torch's own, virtual with a plane for each layer's K and V, virtual rows.

One layer of Llama-3-8B's heads in bfloat16; the virtual caches hold 32 layers and one is computed on. ``TB/s`` counts
the K and V that a decode step reads, ``TFLOP/s`` the products of a causal prefill. ``prefill_virtual_over_cudamalloc``:
the rate of prefills on virtual rows over that on torch's memory, of the kernel that is fastest there, the lower of all
works; ``prefill_contiguous_over_paged``: the same over FlashAttention-3 on shuffled pages of 64 rows.
Without a GPU small ones run, to try the script.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import report
import torch

from vattn import KVCache, KVLayout, kernels
from vattn.kernels import KERNELS, Kernel, Scores, Spans, Task

HEADS, KV_HEADS, DIM = 32, 8, 128
PAGE = 64


@dataclass(frozen=True)
class Work:
    """Sequences of some lengths, of which the last positions are computed, or one of each in a decode step."""

    name: str
    lengths: list[int]
    new: list[int]

    @property
    def prefill(self) -> bool:
        return max(self.new) > 1

    def rate(self, seconds: float) -> tuple[str, float]:
        if not self.prefill:
            return "TB/s", sum(self.lengths) * 2 * KV_HEADS * DIM * 2 / seconds / 1e12
        pairs = sum(n * (length - n) + n * (n + 1) / 2 for n, length in zip(self.new, self.lengths, strict=True))
        return "TFLOP/s", 4 * pairs * HEADS * DIM / seconds / 1e12


def works(scale: int) -> list[Work]:
    mixed = [64 + (8192 // scale - 64) * i // 31 for i in range(32)]
    return [
        Work("prefill 4 x 16384", [16384 // scale] * 4, [16384 // scale] * 4),
        Work("chunk of 8192 at 65536", [73728 // scale], [8192 // scale]),
        Work("decode 8 x 8192", [8192 // scale] * 8, [1] * 8),
        Work("decode 32 mixed to 8192", mixed, [1] * 32),
        Work("decode 1 x 131072", [131072 // scale], [1]),
    ]


class Memory:
    """K and V of the sequences of a work, in one kind of memory."""

    def __init__(self, kind: str, work: Work, device: str, tail: int) -> None:
        longest, batch = max(work.lengths), len(work.lengths)
        self.cache = None
        if kind == "cudaMalloc":
            shape = batch, longest + tail, KV_HEADS, DIM
            self.k, self.v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
            return
        layout = KVLayout.uniform(
            layers=32, kv_heads=KV_HEADS, head_dim=DIM, max_len=longest, dtype="bfloat16",
            kind="compact" if kind == "virtual, compact" else "interleaved",
        )  # fmt: skip
        self.cache = KVCache(layout, slots=batch, device=device, tail_rows=tail, lookahead=0)
        for slot, length in enumerate(work.lengths):
            sequence = self.cache.open(slot=slot)
            sequence.grow(length)
            for view in (sequence.k(7), sequence.v(7)):
                view.normal_()
        self.k, self.v = self.cache.k(7), self.cache.v(7)

    def close(self) -> None:
        self.k = self.v = None
        if self.cache is not None:
            self.cache.close()


def seconds(device: str, call: Callable[[], Any]) -> float:
    """The median of a kernel's time, launched as a graph is: without waiting for the host."""
    for _ in range(3):
        call()
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(200_000)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def paged(work: Work, device: str) -> float:
    """The time of FlashAttention-3 on shuffled pages."""
    flash = kernels._flash3()
    batch, pages = len(work.lengths), -(-max(work.lengths) // PAGE)
    k, v = (torch.randn(batch * pages, PAGE, KV_HEADS, DIM, dtype=torch.bfloat16, device=device) for _ in range(2))
    table = torch.randperm(batch * pages, device=device).to(torch.int32).reshape(batch, pages)
    lengths = torch.tensor(work.lengths, dtype=torch.int32, device=device)
    q = torch.randn(batch, work.new[0], HEADS, DIM, dtype=torch.bfloat16, device=device)
    options = {"page_table": table, "cache_seqlens": lengths, "causal": True, "softmax_scale": DIM**-0.5}
    return seconds(device, lambda: flash.flash_attn_with_kvcache(q, k, v, **options))


def measure(kernel: Kernel, work: Work, memory: Memory, device: str) -> float:
    spans = Spans.of([(slot, 0, length) for slot, length in enumerate(work.lengths)], device)
    q = torch.randn(sum(work.new), HEADS, DIM, dtype=torch.bfloat16, device=device)
    how = Scores(scale=DIM**-0.5)
    if work.prefill:
        return seconds(device, lambda: kernel.prefill(q, memory.k, memory.v, spans, work.new, how))
    return seconds(device, lambda: kernel.decode(q, memory.k, memory.v, spans, how))


def main() -> None:
    options = report.options(__doc__.splitlines()[0]).parse_args()
    on_gpu = options.device.startswith("cuda")
    rows: list[dict[str, Any]] = []
    ratios: dict[str, list[float]] = {"prefill_virtual_over_cudamalloc": [], "prefill_contiguous_over_paged": []}
    for work in works(1 if on_gpu else 64):
        rates: dict[tuple[str, str], float] = {}
        for kernel in KERNELS.values():
            queries = "one" if not work.prefill else "first" if work.new == work.lengths else "chunk"
            task = Task(
                device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16, query_heads=HEADS, kv_heads=KV_HEADS,
                head_dim=DIM, v_head_dim=DIM, queries=queries,
            )  # fmt: skip
            if kernel.missing() or kernel.refuses(task) or (kernel.name == "reference" and on_gpu):
                continue
            for kind in ("cudaMalloc", "virtual, compact", "virtual, interleaved"):
                memory = Memory(kind, work, options.device, kernel.tail_rows)
                unit, rates[kernel.name, kind] = work.rate(measure(kernel, work, memory, options.device))
                memory.close()
                rows.append({"work": work.name, "kernel": kernel.name, "memory": kind, unit: rates[kernel.name, kind]})
                print(rows[-1], flush=True)
        if work.prefill and rates:
            best = max((name for name, kind in rates), key=lambda name: rates[name, "cudaMalloc"])
            virtual = rates[best, "virtual, interleaved"]
            ratios["prefill_virtual_over_cudamalloc"].append(virtual / rates[best, "cudaMalloc"])
        if on_gpu and kernels._flash3() is not None and len(set(work.lengths)) == 1:
            unit, rate = work.rate(paged(work, options.device))
            rows.append({"work": work.name, "kernel": "fa3", "memory": f"pages of {PAGE}", unit: rate})
            print(rows[-1], flush=True)
            if work.prefill:
                ratios["prefill_contiguous_over_paged"].append(rates["fa3", "virtual, interleaved"] / rate)
    report.write("kernels", options.device, rows, {name: min(r) for name, r in ratios.items() if r}, options.out)


if __name__ == "__main__":
    main()
