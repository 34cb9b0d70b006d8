"""The time that growing a sequence and updating a cache take the caller when no driver call is needed.

``grow_us_cpp``, ``grow_us_python``: microseconds of one ``grow`` by a token into memory that is mapped, in C++ and in
Python.
``update_us_ratio_to_dynamic``: the time of ``VirtualCache.update`` for one token over that of ``DynamicCache.update``,
per layer of a 32-layer model, with caches of 1 to 20 tokens; medians of alternating rounds.
On CUDA this is the time of the calling thread: kernels are launched and not waited for.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import report
import torch
from transformers import DynamicCache, LlamaConfig

from vattn import KVCache, KVLayout, VirtualCache

LAYERS = 32


def grow_us_cpp() -> float:
    return float(report.native("grow_latency")) / 1000


def grow_us_python(device: str) -> float:
    n = 20000
    layout = KVLayout.uniform(layers=LAYERS, kv_heads=1, head_dim=8, max_len=n)
    rounds = []
    with KVCache(layout, slots=1, device=device) as cache:
        sequence = cache.open()
        sequence.grow(n)
        for _ in range(11):
            sequence.truncate(0)
            start = time.perf_counter()
            for _ in range(n):
                sequence.grow(1)
            rounds.append((time.perf_counter() - start) / n * 1e6)
    return statistics.median(rounds)


def update_us(device: str, batch: int) -> tuple[float, float]:
    """Median microseconds of ``update`` per layer, of ``VirtualCache`` and of ``DynamicCache``."""
    config = LlamaConfig(num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=8, hidden_size=4096)
    k, v = (torch.randn(batch, 8, 1, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
    virtual = VirtualCache(config, max_len=4096)

    def steps(cache: Any, n: int) -> float:
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(n):
            for layer in range(LAYERS):
                cache.update(k, v, layer)
        return (time.perf_counter() - start) / n / LAYERS * 1e6

    ours, theirs = [], []
    with torch.no_grad():
        steps(virtual, 200)  # maps the memory that the rounds below reuse
        for _ in range(150):
            virtual.reset()
            steps(virtual, 1)
            ours.append(steps(virtual, 20))
            dynamic = DynamicCache(config=config)
            steps(dynamic, 1)
            theirs.append(steps(dynamic, 20))
    return statistics.median(ours), statistics.median(theirs)


def main() -> None:
    options = report.options(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for batch in (1, 8):
        ours, theirs = update_us(options.device, batch)
        rows.append({"what": "update", "batch": batch, "vattn_us": ours, "dynamic_us": theirs, "ratio": ours / theirs})
    bars = {
        "grow_us_cpp": grow_us_cpp(),
        "grow_us_python": grow_us_python(options.device),
        "update_us_ratio_to_dynamic": rows[0]["ratio"],
    }
    report.write("latency", options.device, rows, bars, options.out)


if __name__ == "__main__":
    main()
