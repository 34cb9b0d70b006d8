"""Decode steps of a Llama-3-8B shape through ``model.generate``, on vattn and on what transformers has.

Random weights in bfloat16 on one GPU. Each cache is filled with random K and V of the context's length, as a prompt
would; then ``generate`` goes on from it, greedily. ``step_ms_*``: the median step of the fastest of vattn's ways, and
of the peers; ``step_over_floor_64_mixed``: of 64 sequences of 64 to 4096 tokens over the floor;
``memory_over_tokens_*``: what of the device is taken beside the weights and a GB, over the tokens' K and V.
See ``vattn.speed.decode_speed``.
"""

from __future__ import annotations

from typing import Any

import memory
import report
import torch

from vattn import speed
from vattn.kernels import KERNELS

POINTS: dict[str, list[int]] = {
    "1x1024": [1024],
    "16x8192": [8192] * 16,
    "32x8192": [8192] * 32,
    "1x130000": [130_000],
    "64_mixed": [64 + (4096 - 64) * i // 63 for i in range(64)],
}


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--peers", nargs="*", default=["dynamic", "static"], help="also static_compile")
    parser.add_argument("--kernels", nargs="*", default=["fa2", "fa3", "fa3+compiled"], help="with +compiled or +tuned")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    model = memory.llama_3_8b()
    kernels = [name for name in options.kernels if not KERNELS[name.partition("+")[0]].missing()]
    ways = speed.ways(model, 131072, kernels, options.peers)
    rows: list[dict[str, Any]] = []
    bars: dict[str, float] = {}
    for point in options.points:
        for name, make in ways.items():
            steps = options.steps if "captured" in name or "compile" in name else 12
            try:
                row = speed.decode_speed(model, point, POINTS[point], name, make, steps)
            except (torch.OutOfMemoryError, MemoryError) as error:
                row = {"point": point, "cache": name, "error": str(error).splitlines()[0]}
            rows.append(row)
            print(row, flush=True)
        mine = {r["cache"]: r for r in rows if r["point"] == point and "error" not in r}
        captured = [row for name, row in mine.items() if "captured" in name]
        if not captured:
            continue
        best = min(captured, key=lambda row: row["step ms p50"])
        if point == "64_mixed":
            bars["step_over_floor_64_mixed"] = best["step ms p50"] / best["floor ms"]
        else:
            bars[f"step_ms_{point}"] = best["step ms p50"]
            bars |= {f"step_ms_{point}_{peer}": mine[peer]["step ms p50"] for peer in options.peers if peer in mine}
        bars[f"memory_over_tokens_{point}"] = best["used over weights and tokens"]
        report.write("generate", "cuda", rows, bars, options.out)  # as far as it is


if __name__ == "__main__":
    main()
