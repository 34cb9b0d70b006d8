"""Decode steps of a Llama-3-8B shape through ``model.generate``, on vattn and on what transformers has.

Random weights in bfloat16 on one GPU. Each cache is filled with random K and V of the context's length, as a prompt
would; then ``generate`` goes on from it, greedily. All are warmed up, and then take rounds in turns, each of as many
steps: ``step_ms_*`` are medians of the rounds' median steps, of vattn and of the peers;
``step_over_floor_64_mixed``: of 64 sequences of 64 to 4096 tokens over the floor; ``memory_over_tokens_*``: what of the
device is taken beside the weights and a GB, over the tokens' K and V, of the same cache. That is the fastest of those
whose memory is at most 1.06 times the tokens', or of all where there is none. See ``vattn.bench.decode.Decoding``.
``--vllm`` adds what ``bench/vllm_decode.py`` has measured on the same machine, whose steps are means: so is
``step_ms_*_mean``. A file that is there keeps its other points.
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
MEMORY = 1.06  # over the tokens'


def missing(kernel: str) -> str | None:
    return KERNELS[kernel.partition("+")[0]].missing()


def fastest(rows: list[dict[str, Any]], most: float = math.inf) -> dict[str, Any] | None:
    """Of vattn's captured rows with at most so much memory over the tokens', of those that ran."""
    fit = [row for row in rows if "captured" in row["cache"] and "error" not in row]
    fit = [row for row in fit if row["used over weights and tokens"] <= most]
    return min(fit, key=lambda row: float(row["step ms p50"]), default=None)


def kernel_of(row: dict[str, Any]) -> str:
    return str(row["cache"]).split(", ")[1]


def measured(model: Any, point: str, kernels: list[str], peers: list[str], steps: int, rounds: int) -> list[Any]:
    """The rows of a point. A kernel ``best+how`` is what was fastest in the warm-up, and in little memory."""

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
    decodings += warmed_up([], peers)  # behind what moves weights
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
    if any(is_vllm(row) for row in peers):  # of which the mean is known
        bars[f"step_ms_{point}_mean"] = best["step ms mean"]
    time_of = {row["cache"].split()[0]: row["step ms mean" if is_vllm(row) else "step ms p50"] for row in peers}
    return bars | {f"step_ms_{point}_{peer}": took for peer, took in time_of.items()}


def is_vllm(row: dict[str, Any]) -> bool:
    return str(row["cache"]).startswith("vllm")


def of_vllm(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
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
