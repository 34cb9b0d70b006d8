"""Whether wrong kernels are refused and correct ones are not, and what verification costs steps that have passed it.

``planted_faults_caught``: of the faults that move a kernel's output by more than five times the spread of correct
kernels, the part that was refused within two steps.
``honest_runs`` and ``honest_runs_refused``: how many runs of correct kernels there were, and how many were refused.
``verified_step_cost_ratio``: the median step time at 1 x 1024 tokens, over that of an earlier commit. It is measured
with ``--before``, a checkout of that commit with its extension built, as are the same ratios for ``Sequence.grow`` and
``VirtualCache.update``. All commits run in turns. Ratios to further checkouts have the names of their folders. The
time of ``grow`` is the least of all rounds, since processes differ by up to two times in it; the others are medians.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import report
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_verify as trials  # noqa: E402

from vattn.hf.placement import Placement  # noqa: E402


def tried(name: str, dtype: torch.dtype, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tries the planted faults, and correct kernels, with one model; returns the rows of both."""
    if device == "cpu":
        Placement.granularity = 4096
        torch.set_num_threads(1)
    model = trials.tiny(name, device, dtype)
    faults: list[dict[str, Any]] = []
    if dtype in trials.HALVES:
        with pytest.MonkeyPatch.context() as patch:
            faults = trials.caught(model, device, trials.kernel_of(name, device), patch)
    return faults, trials.honest_runs(model, name, device, dtype)


def try_all(device: str, workers: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of ``tried`` for all models, each in a process of its own, since compilation takes long."""
    cases = [(name, dtype, device) for name in trials.TINY for dtype in (*trials.HALVES, torch.float32)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(tried, *zip(*cases, strict=True)))
    return [row for faults, _ in found for row in faults], [row for _, runs in found for row in runs]


# A program that measures a checkout, in a process of its own and with the benchmarks of that checkout.
STEP = """
import sys
sys.path.insert(0, "bench")
import json, generate, latency
device, steps = sys.argv[1:]
ours, theirs = latency.update_us(device, 1)
took = {"grow_us": latency.grow_us_python(device), "update_us": ours, "update_us_dynamic": theirs}
if steps == "steps":
    import statistics, torch, vattn
    try:
        from vattn.bench.decode import Clock
    except ImportError:  # an earlier commit, which is measured beside
        from vattn.speed import Clock
    model = generate.memory.llama_3_8b()
    cache = vattn.VirtualCache(model, max_len=4096, attention="fa3")
    rounds = []
    for _ in range(4):
        clock = Clock()
        prompt = generate.memory.prompts(1, 1024)
        model.generate(**prompt, past_key_values=cache, max_new_tokens=60, do_sample=False, stopping_criteria=[clock])
        rounds.append(statistics.median(clock.steps()[15:]))
        cache.reset()
    took["step_ms"] = 1e3 * statistics.median(rounds[1:])
print(json.dumps(took))
"""


def measured(folder: Path, device: str, steps: bool) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", STEP, device, "steps" if steps else "calls"]
    done = subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    took: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return took


def beside(folders: dict[str, Path], device: str, turn: int, steps: bool) -> list[dict[str, Any]]:
    """Measures this commit and others, one after the other; returns the rows.

    Args:
        folders: checkouts of the other commits, by name.
        device: the device.
        turn: number of the round.
        steps: whether decode steps are measured, too.
    """
    rows = []
    for commit, folder in {**folders, "now": ROOT}.items():
        rows.append({"round": turn, "commit": commit, **measured(folder.resolve(), device, steps)})
        print(rows[-1], flush=True)
    return rows


def ratios(rows: list[dict[str, Any]], before: str) -> dict[str, float]:
    """The times of this commit over those of another.

    The time of an update is first divided by that of DynamicCache's update in the same process.
    """

    def took(commit: str, key: str) -> float:
        over, summary = f"{key}_dynamic", min if key == "grow_us" else statistics.median
        return summary(row[key] / row.get(over, 1) for row in rows if row["commit"] == commit)

    names = {"grow_ratio": "grow_us", "update_ratio": "update_us"}
    if "step_ms" in rows[0]:
        names["verified_step_cost_ratio"] = "step_ms"
    return {name: took("now", key) / took(before, key) for name, key in names.items()}


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument(
        "--before", type=Path, nargs="+", help="checkouts of earlier commits, their extensions built in place"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=["trials", "cost", "calls"], help="a part of it; calls: cost without steps")
    parser.add_argument("--workers", type=int, default=max(2, (os.cpu_count() or 2) * 3 // 4))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    bars: dict[str, float] = {}
    if options.before is not None and options.only != "trials":
        steps = options.only != "calls" and options.device != "cpu"
        folders = {folder.name.strip("."): folder for folder in options.before}
        for turn in range(options.rounds):
            rows += beside(folders, options.device, turn, steps)
            first, *others = folders
            bars = ratios(rows, first)
            for other in others:
                bars |= {f"{name}_since_{other}": ratio for name, ratio in ratios(rows, other).items()}
            name = "verification_cost" if steps or options.device == "cpu" else "verification_calls"
            report.write(name, options.device, rows, bars, options.out)
    if options.only in ("cost", "calls"):
        return
    faults, runs = try_all(options.device, options.workers)
    counting = [row for row in faults if row["counts"]]
    bars = {
        "planted_faults": len(counting),
        "planted_faults_caught": sum(row["refused"] for row in counting) / len(counting),
        "honest_runs": len(runs),
        "honest_runs_refused": sum(row["refused"] is not None for row in runs),
        "honest_runs_nearest": max(row["of what may differ"] for row in runs),
    }
    nearest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in runs:
        key = row["model"], row["dtype"], row["kernel"]
        if key not in nearest or nearest[key]["of what may differ"] < row["of what may differ"]:
            nearest[key] = row
    report.write("verification", options.device, [*faults, *nearest.values()], bars, options.out)


if __name__ == "__main__":
    main()
