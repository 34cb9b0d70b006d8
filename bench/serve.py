"""Serves a trace on one GPU alone, and then on all GPUs of the host at once, with a process for each GPU.

The driver serialises its calls across GPUs; how many calls each server makes should not change.
``calls_ratio_gpus``, ``..._full``: memory calls per 1000 tokens with all GPUs at once, on the GPU with the most calls,
over those of one GPU alone; with a budget 20% above the most live tokens, and (``..._full``) with one 20% below them.
"""

from __future__ import annotations

import multiprocessing
from typing import Any

import report
import torch

from vattn.bench import mapping
from vattn.bench.trace import generate


def serve(device: int, requests: int, steps: int) -> list[dict[str, Any]]:
    """Replays the trace on one GPU; returns a row for each budget."""
    rows = mapping.replays(
        f"cuda:{device}",
        generate("sharegpt", requests),
        concurrency=128,
        steps_per_second=40,
        max_steps=steps,
        policies=("vattn",),
    )
    return [{"gpu": device, **row} for row in rows]


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="half of them a warm-up")
    parser.add_argument("--steps", type=int, default=1000, help="steps to measure")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    with multiprocessing.get_context("spawn").Pool(gpus) as processes:
        arguments = [(gpu, options.requests, options.steps) for gpu in range(gpus)]
        alone = processes.apply(serve, arguments[0])
        together = processes.starmap(serve, arguments, chunksize=1)
    rows = [{"at once": 1, **row} for row in alone]
    rows += [{"at once": gpus, **row} for served in together for row in served]
    calls = "calls / 1000 tokens"
    bars = {
        name: max(served[which][calls] for served in together) / alone[which][calls]
        for which, name in enumerate(("calls_ratio_gpus", "calls_ratio_gpus_full"))
    }
    report.write("serve", "cuda", rows, bars, options.out)


if __name__ == "__main__":
    main()
