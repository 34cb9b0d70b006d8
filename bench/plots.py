"""Figures of a result, as SVG."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "vattn", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3})

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen


def mapping(result: dict[str, Any], path: Path) -> None:
    """The driver's calls, a prompt, a growth and served requests, by policy."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    rows = result["rows"]
    _calls(axes[0, 0], [row for row in rows if row.get("through") == "vattn"])
    _prompts(axes[0, 1], [row for row in rows if "tokens" in row and "vattn ms" in row])
    _growth(axes[1, 0], [row for row in rows if "growing by" in row])
    _served(axes[1, 1], [row for row in rows if "calls / 1000 tokens" in row])
    figure.suptitle(f"{result['hardware']}, commit {result['commit'][:12]}")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _calls(axes: Any, rows: list[dict[str, Any]]) -> None:
    by_call = defaultdict(list)
    for row in rows:
        by_call[row["call"]].append((row["MiB"], row["p50 us"]))
    for call, points in by_call.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=call)
    axes.set(xscale="log", yscale="log", xlabel="extent (MiB)", ylabel="µs, median", title="One call of the driver")
    axes.legend()


def _prompts(axes: Any, rows: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] for row in rows]
    for column in rows[0]:
        if column != "tokens":
            axes.plot(tokens, [row[column] for row in rows], marker="o", markersize=3, label=column.removesuffix(" ms"))
    axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="ms, median", title="Mapping a prompt")
    axes.legend()


def _growth(axes: Any, rows: list[dict[str, Any]]) -> None:
    columns = ("p50 us", "p99 us", "p99.9 us", "max us")
    for row in rows:
        axes.plot(columns, [row[column] for column in columns], marker="o", markersize=3, label=row["growing by"])
    axes.set(yscale="log", ylabel="µs of the caller", title="Growing by a token")
    axes.legend()


def _served(axes: Any, rows: list[dict[str, Any]]) -> None:
    fewest = min(row["requests"] for row in rows)  # those that all policies served
    rows = [row for row in rows if row["requests"] == fewest]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    for number, budget in enumerate(dict.fromkeys(row["budget"] for row in rows)):
        calls = {row["policy"]: row["calls / 1000 tokens"] for row in rows if row["budget"] == budget}
        bars = axes.barh(
            [policies.index(policy) + 0.4 * number - 0.2 for policy in calls], list(calls.values()), 0.4, label=budget
        )
        axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.set(xscale="log", xlabel="driver calls / 1000 tokens", title="Served requests, by budget")
    axes.set_yticks(range(len(policies)), policies)
    axes.invert_yaxis()
    axes.legend()
