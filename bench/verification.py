"""Whether wrong kernels are refused and honest ones are not, and what verification costs a step that it is behind.

``planted_faults_caught``: of the faults that move a kernel's output by more than five times what honest kernels differ
by, those that were refused within two steps; ``honest_runs`` and ``honest_runs_refused``. With ``--before``, a checkout
of an earlier commit with its extension built, also ``verified_step_cost_ratio``, the median step at 1 x 1024
over that commit's, and the same of ``Sequence.grow`` and ``VirtualCache.update``: both are run in turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import report
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import test_verify as trials  # noqa: E402

from vattn.store import Store  # noqa: E402


def planted(device: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in trials.TINY:
            for dtype in trials.HALVES:
                model = trials.tiny(name, device, dtype)
                rows += trials.caught(model, device, trials.kernel_of(name, device), patch)
    return rows


def honest(device: str) -> list[dict[str, Any]]:
    rows = []
    for name in trials.TINY:
        for dtype in (*trials.HALVES, torch.float32):
            model = trials.tiny(name, device, dtype)
            rows += trials.honest_runs(model, name, device, dtype)
    return rows


def measured(folder: Path, script: str, *arguments: str) -> dict[str, float]:
    """The bars that a benchmark of a checkout prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(folder / "bench" / script), *arguments, "--out", out]
        subprocess.run(command, check=True, env=environment, cwd=folder, stdout=subprocess.DEVNULL)
        [path] = Path(out).glob("*.json")
        bars: dict[str, float] = json.loads(path.read_text())["bars"]
        return bars


def beside(before: Path, device: str, rounds: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """What both commits take, in turns."""
    rows = []
    for turn in range(rounds):
        for commit, folder in (("before", before), ("now", ROOT)):
            bars = measured(folder, "latency.py", "--device", device)
            if device == "cuda":
                points = ["--points", "1x1024", "--kernels", "fa3", "--peers", "--slow-peers"]
                bars |= measured(folder, "generate.py", *points)
            rows.append({"round": turn, "commit": commit, **bars})
    ratios = {}
    for name, bar in (
        ("verified_step_cost_ratio", "step_ms_1x1024"),
        ("grow_ratio_to_before", "grow_us_python"),
        ("update_ratio_to_before", "update_us_ratio_to_dynamic"),
    ):
        took = {
            commit: [row[bar] for row in rows if row["commit"] == commit and bar in row] for commit in ("before", "now")
        }
        if took["now"]:
            ratios[name] = statistics.median(took["now"]) / statistics.median(took["before"])
    return rows, ratios


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.device == "cpu":
        Store.granularity = 4096
    faults, runs = planted(options.device), honest(options.device)
    counting = [row for row in faults if row["counts"]]
    bars = {
        "planted_faults": len(counting),
        "planted_faults_caught": sum(row["refused"] for row in counting) / len(counting),
        "honest_runs": len(runs),
        "honest_runs_refused": sum(row["refused"] is not None for row in runs),
        "honest_runs_nearest": max(row["of what may differ"] for row in runs),
    }
    rows: list[dict[str, Any]] = [
        {key: row[key] for key in ("model", "dtype", "kernel", "fault", "moves", "honest", "counts", "refused")}
        for row in faults
    ]
    if options.before is not None:
        timings, ratios = beside(options.before, options.device, options.rounds)
        bars |= ratios
        rows += timings
    report.write("verification", options.device, rows, bars, options.out)


if __name__ == "__main__":
    main()
