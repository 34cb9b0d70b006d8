"""Decode steps of a Llama-3-8B shape through ``model.generate``, with caches of vattn and of transformers.

The model has random weights in bfloat16 and runs on one GPU. Each cache is filled with random K and V of the context's
length, as a prompt would fill it; then ``generate`` continues from there, greedily. All caches are warmed up first.
Then they take turns in rounds of equally many steps. See ``vattn.bench.decode.Decoding``.

``step_ms_*``: the median of the rounds' median step times, of vattn and of the other caches.
``step_over_floor_64_mixed``: the step time of 64 sequences of 64 to 4096 tokens over the floor, which is the time to
read the weights and the tokens' K and V.
``memory_over_tokens_*``: device memory in use besides the weights and 1 GB, over the bytes of the tokens' K and V.

The results for vattn are those of its fastest cache whose memory is at most 1.06 times that of the tokens, or of its
fastest one where there is no such cache. ``--vllm`` adds what ``bench/vllm_decode.py`` has measured on the same
machine. Its step times are means; to compare them, ``step_ms_*_mean`` is the mean step time of vattn. The other points
of an existing result file are kept.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import memory
import report

from vattn.bench import decode
from vattn.kernels import KERNELS

POINTS: dict[str, list[int]] = {
    "1x1024": [1024],
    "8x1024": [1024] * 8,
    "1x32768": [32768],
    "16x8192": [8192] * 16,
    "32x8192": [8192] * 32,
    "1x130000": [130_000],
    "64_mixed": [64 + (4096 - 64) * i // 63 for i in range(64)],
}
MEMORY = 1.06  # the limit on memory for the results of vattn, over the bytes of the tokens' K and V


def missing(kernel: str) -> str | None:
    """Why a kernel, named with or without options such as ``+fp8``, cannot run on this machine, or None."""
    return KERNELS[kernel.partition("+")[0]].missing()


def fastest(rows: list[dict[str, Any]], most: float = math.inf) -> dict[str, Any] | None:
    """The row with the shortest step among those of vattn that were captured and ran without an error.

    Args:
        rows: the rows of a point.
        most: the limit on memory, over the bytes of the tokens' K and V.
    """
    fit = [row for row in rows if "captured" in row["cache"] and "error" not in row]
    fit = [row for row in fit if row["used over weights and tokens"] <= most]
    return min(fit, key=lambda row: float(row["step ms p50"]), default=None)


def kernel_of(row: dict[str, Any]) -> str:
    return str(row["cache"]).split(", ")[1]


def measured(model: Any, point: str, kernels: list[str], peers: list[str], steps: int, rounds: int) -> list[Any]:
    """Measures the caches at one point, and returns their rows.

    A kernel ``best+how`` stands for the kernel with the shortest step in the warm-up, and for the one with the shortest
    step among those whose memory is within the limit ``MEMORY``; each with the option ``how``.
    """

    def warmed_up(kernels: list[str], peers: list[str]) -> list[decode.Decoding]:
        factories = decode.cache_factories(model, 131072, kernels, peers)
        chosen = [factory for factory in factories if peers or "captured" in factory.name]
        decodings = [decode.Decoding(factory, point, POINTS[point], steps) for factory in chosen]
        for decoding in decodings:
            decoding.warm_up()
            print(decoding.row, flush=True)
        return decodings

    decodings = warmed_up([name for name in kernels if not name.startswith("best+")], [])
    rows = [decoding.row for decoding in decodings]
    best = dict.fromkeys(kernel_of(row) for limit in (math.inf, MEMORY) if (row := fastest(rows, limit)))
    for how in (name.removeprefix("best+") for name in kernels if name.startswith("best+")):
        decodings += warmed_up([f"{kernel}+{how}" for kernel in best], [])
    decodings += warmed_up([], peers)  # last, since compiled steps move the weights
    return decode.in_turns(decodings, rounds)


def bars_of(rows: list[dict[str, Any]], point: str) -> dict[str, float]:
    best = fastest(rows, MEMORY) or fastest(rows)
    if best is None:
        return {}
    bars = {f"memory_over_tokens_{point}": best["used over weights and tokens"]}
    if point == "64_mixed":
        return bars | {"step_over_floor_64_mixed": best["step ms p50"] / best["floor ms"]}
    bars[f"step_ms_{point}"] = best["step ms p50"]
    ours = "vattn "
    peers = [row for row in rows if not row["cache"].startswith(ours) and "error" not in row]
    if any(is_vllm(row) for row in peers):  # only the mean of its step times is known
        bars[f"step_ms_{point}_mean"] = best["step ms mean"]
    time_of = {row["cache"].split()[0]: row["step ms mean" if is_vllm(row) else "step ms p50"] for row in peers}
    return bars | {f"step_ms_{point}_{peer}": took for peer, took in time_of.items()}


def is_vllm(row: dict[str, Any]) -> bool:
    return str(row["cache"]).startswith("vllm")


def of_vllm(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines, as ``bench/vllm_decode.py`` writes it."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--peers", nargs="*", default=["dynamic", "static_compile"])
    parser.add_argument(
        "--slow-peers", nargs="*", default=["static", "offloaded", "quantized"], help="at the first point only"
    )
    parser.add_argument(
        "--kernels", nargs="*", default=["fa2", "fa3", "flashinfer", "best+compiled"],
        help="with +fp8, +compiled or +tuned; best are those before with the shortest step, and in little memory",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vllm", type=Path, help="what bench/vllm_decode.py has written on this machine")
    parser.add_argument("--name", default="generate", help="of the result")
    options = parser.parse_args()
    model = memory.llama_3_8b()
    kernels = [name for name in options.kernels if name.startswith("best+") or not missing(name)]
    old = report.read(options.name, "cuda", options.out)
    theirs = of_vllm(options.vllm) if options.vllm else []
    found = {row["point"]: [] for row in old}
    for row in old:
        found[row["point"]].append(row)
    for number, point in enumerate(options.points):
        peers = options.peers + options.slow_peers * (number == 0)
        rows = measured(model, point, kernels, peers, options.steps, options.rounds)
        found[point] = rows + (
            [row for row in theirs if row["point"] == point] or list(filter(is_vllm, found.get(point, [])))
        )
        rows = [row for point in POINTS for row in found.get(point, [])]
        bars = [bars_of(found[point], point) for point in POINTS if point in found]
        report.write(options.name, "cuda", rows, {k: v for more in bars for k, v in more.items()}, options.out)


if __name__ == "__main__":
    main()
