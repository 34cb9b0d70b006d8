"""Decode steps of a Llama-3-8B shape through ``model.generate``, on vattn and on what transformers has.

Random weights in bfloat16 on one GPU. Each cache is filled with random K and V of the context's length, as a prompt
would; then ``generate`` goes on from it, greedily. ``step_ms_*``: the median step of one of vattn's ways, and of the
peers; ``step_over_floor_64_mixed``: of 64 sequences of 64 to 4096 tokens over the floor; ``memory_over_tokens_*``: what
of the device is taken beside the weights and a GB, over the tokens' K and V, by the same way. It is the fastest of
those whose memory is at most 1.06 times the tokens', or of all where there is none. See ``vattn.speed.decode_speed``.
"""

from __future__ import annotations

import math
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
MEMORY = 1.06  # over the tokens'


def missing(kernel: str) -> str | None:
    return KERNELS[kernel.partition("+")[0]].missing()


def measured(model: Any, point: str, name: str, make: Any, steps: int) -> dict[str, Any]:
    """The row of one cache at one point; fewer steps of those that are slow."""
    try:
        steps = steps if "captured" in name or "compile" in name else 12
        row = speed.decode_speed(model, point, POINTS[point], name, make, steps)
    except (torch.OutOfMemoryError, MemoryError, ImportError) as error:
        row = {"point": point, "cache": name, "error": str(error).splitlines()[0]}
    print(row, flush=True)
    return row


def fastest(rows: list[dict[str, Any]], point: str, most: float = math.inf) -> dict[str, Any] | None:
    """Of vattn's captured ways with at most so much memory over the tokens', of those that ran."""
    fit = [row for row in rows if row["point"] == point and "captured" in row["cache"] and "error" not in row]
    fit = [row for row in fit if row["used over weights and tokens"] <= most]
    return min(fit, key=lambda row: float(row["step ms p50"]), default=None)


def kernel_of(row: dict[str, Any]) -> str:
    return str(row["cache"]).split(", ")[1]


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--peers", nargs="*", default=["dynamic", "static"])
    parser.add_argument(
        "--slow-peers", nargs="*", default=["static_compile", "offloaded", "quantized"],
        help="these only at the first point, in the end",
    )  # fmt: skip
    parser.add_argument(
        "--kernels", nargs="*", default=["fa2", "fa3", "flashinfer", "best+compiled"],
        help="with +fp8, +compiled or +tuned; best are those before with the shortest step, and in little memory",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--name", default="generate", help="of the result")
    options = parser.parse_args()
    model = memory.llama_3_8b()
    best_of = [how for name in options.kernels if (how := name.removeprefix("best+")) != name]
    kernels = [name for name in options.kernels if not (name.startswith("best") or missing(name))]
    rows: list[dict[str, Any]] = []
    bars: dict[str, float] = {}
    for point in options.points:
        for name, make in speed.ways(model, 131072, kernels, options.peers).items():
            rows.append(measured(model, point, name, make, options.steps))
        kernels_of_best = [kernel_of(row) for limit in (math.inf, MEMORY) if (row := fastest(rows, point, limit))]
        for how in best_of:
            for kernel in dict.fromkeys(kernels_of_best):
                [(name, make), *_] = speed.ways(model, 131072, [f"{kernel}+{how}"], []).items()
                rows.append(measured(model, point, name, make, options.steps))
        if (best := fastest(rows, point, MEMORY) or fastest(rows, point)) is None:
            continue
        mine = {r["cache"]: r for r in rows if r["point"] == point and "error" not in r}
        if point == "64_mixed":
            bars["step_over_floor_64_mixed"] = best["step ms p50"] / best["floor ms"]
        else:
            bars[f"step_ms_{point}"] = best["step ms p50"]
            bars |= {f"step_ms_{point}_{peer}": mine[peer]["step ms p50"] for peer in options.peers if peer in mine}
        bars[f"memory_over_tokens_{point}"] = best["used over weights and tokens"]
        report.write(options.name, "cuda", rows, bars, options.out)  # as far as it is
    point = options.points[0]
    for peer in options.slow_peers:
        rows.append(measured(model, point, peer, speed.ways(model, 131072, [], [peer])[peer], options.steps))
        if "error" not in rows[-1]:
            bars[f"step_ms_{point}_{peer}"] = rows[-1]["step ms p50"]
        report.write(options.name, "cuda", rows, bars, options.out)


if __name__ == "__main__":
    main()
