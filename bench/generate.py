"""Decode steps of a Llama-3-8B shape through ``model.generate``, on vattn and on what transformers has.

Random weights in bfloat16 on one GPU. Each cache is filled with random K and V of the context's length, as a prompt
would; then ``generate`` goes on from it, greedily. A step is what lies between two calls of the stopping criteria, the
device waited for: forward, sampling and all that ``generate`` does around. ``floor`` is reading the weights, without
the embedding, and the tokens' K and V at 3.0 TB/s. The mixed batch is padded on the left, as ``generate`` wants it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import memory
import report
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache, StoppingCriteria, StoppingCriteriaList

from vattn import CACHE_KEYWORD, VirtualCache
from vattn.kernels import KERNELS

CONFIG = memory.LLAMA_3_8B
BANDWIDTH = 3.0e12
POINTS: dict[str, list[int]] = {
    "1x1024": [1024],
    "16x8192": [8192] * 16,
    "32x8192": [8192] * 32,
    "1x130000": [130_000],
    "64_mixed": [64 + (4096 - 64) * i // 63 for i in range(64)],
}
CHUNK = 1024


class Clock(StoppingCriteria):
    """Notes when each step is done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def fill(cache: Any, batch: int, length: int) -> None:
    for start in range(0, length, CHUNK):
        n = min(CHUNK, length - start)
        k = torch.randn(batch, 8, n, 128, device="cuda", dtype=torch.bfloat16)
        for layer in range(CONFIG.num_hidden_layers):
            if isinstance(cache, StaticCache):
                cache.update(k, k, layer, {"cache_position": torch.arange(start, start + n, device="cuda")})
            else:
                cache.update(k, k, layer)


def measure(
    model: Any, point: str, name: str, make: Callable[[int, int], Any], steps: int, skip: int
) -> tuple[dict[str, Any], Any]:
    lengths = POINTS[point]
    batch, longest = len(lengths), max(lengths)
    memory.clean()
    cache = make(batch, longest + steps + 8)
    if hasattr(model.forward, "refused"):
        model.forward.refused = None  # by what was measured before
    with torch.no_grad():
        fill(cache, batch, longest)
    torch.manual_seed(1)
    ids = torch.randint(1, CONFIG.vocab_size, (batch, longest + 1), device="cuda")
    columns = torch.arange(longest + 1, device="cuda")
    mask = (columns >= longest - torch.tensor(lengths, device="cuda")[:, None]).long()
    clock = Clock()
    options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, CACHE_KEYWORD: cache}
    model.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([clock]), **options)
    took = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)][skip:]
    kv = sum(length + steps for length in lengths) * memory.TOKEN_BYTES
    weights = sum(p.numel() for p in model.parameters()) * 2
    floor = (weights - CONFIG.vocab_size * CONFIG.hidden_size * 2 + kv) / BANDWIDTH
    row = {
        "point": point,
        "cache": name,
        "step ms p50": statistics.median(took) * 1e3,
        "step ms p99": sorted(took)[int(0.99 * (len(took) - 1))] * 1e3,
        "floor ms": floor * 1e3,
        "tokens/s": batch / statistics.median(took),
        "device used": memory.used(),
        "torch reserved": torch.cuda.max_memory_reserved(),
        # A GB of what is used is that of the CUDA context and of activations.
        "used over weights and tokens": (memory.used() - weights - 1e9) / kv,
    }
    if isinstance(cache, VirtualCache):
        cache.check()
        stats = cache.decode_stats()
        row |= {"kv physical": cache.stats().peak, "decode": str(stats)}
        cache.close()
    return row, took


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--peers", nargs="*", default=["dynamic", "static"], help="also static_compile")
    parser.add_argument("--kernels", nargs="*", default=["fa2", "fa3", "fa3+compiled"], help="with +compiled or +tuned")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    chosen = [name for name in options.kernels if not KERNELS[name.partition("+")[0]].missing()]
    compiling: dict[str, Any] = {"": False, "compiled": True, "tuned": {"coordinate_descent_tuning": True}}

    def virtual(batch: int, length: int, **more: Any) -> VirtualCache:
        return VirtualCache(model, max_len=131072, slots=batch, **more)

    ways: dict[str, tuple[Callable[[int, int], Any], int, int]] = {}
    for name in chosen:
        kernel, _, how = name.partition("+")
        make = functools.partial(virtual, attention=kernel, compiled=compiling[how])
        ways[f"vattn captured, {name}"] = make, options.steps, 8
    ways["vattn eager"] = (lambda b, n: virtual(b, n, capture=False), 16, 4)
    peers = {
        "dynamic": (lambda b, n: DynamicCache(config=CONFIG), 12, 4),
        "static": (lambda b, n: StaticCache(config=CONFIG, max_cache_len=n), 12, 4),
        "static_compile": (lambda b, n: StaticCache(config=CONFIG, max_cache_len=n), 40, 16),
    }
    rows: list[dict[str, Any]] = []
    bars: dict[str, float] = {}
    for point in options.points:
        for name, (make, steps, skip) in [*ways.items(), *((peer, peers[peer]) for peer in options.peers)]:
            model.generation_config.disable_compile = name != "static_compile"
            try:
                row, _ = measure(model, point, name, make, steps, skip)
            except torch.OutOfMemoryError as error:
                row = {"point": point, "cache": name, "error": str(error).splitlines()[0]}
            rows.append(row)
            print(row, flush=True)
        mine = {r["cache"]: r for r in rows if r["point"] == point and "error" not in r}
        best = min((r for name, r in mine.items() if "captured" in name), key=lambda r: r["step ms p50"])
        if point == "64_mixed":
            bars["step_over_floor_64_mixed"] = best["step ms p50"] / best["floor ms"]
        else:
            bars[f"step_ms_{point}"] = best["step ms p50"]
            bars |= {f"step_ms_{point}_{peer}": mine[peer]["step ms p50"] for peer in options.peers if peer in mine}
        bars[f"memory_over_tokens_{point}"] = best["used over weights and tokens"]
        report.write("generate", "cuda", rows, bars, options.out)  # as far as it is


if __name__ == "__main__":
    main()
