"""Draws the figures of benchmark results, as SVG."""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update({"svg.hashsalt": "vattn", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3})

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen


def mapping(result: dict[str, Any], path: Path) -> None:
    """Draws the times of driver calls, of mapping a prompt and of growing, and the calls of served requests."""
    with _figure(result, path, 2, 2) as axes:
        rows = result["rows"]
        _calls(axes[0, 0], [row for row in rows if row.get("through") == "vattn"])
        _prompts(axes[0, 1], [row for row in rows if "tokens" in row and "vattn ms" in row])
        _growth(axes[1, 0], [row for row in rows if "growing by" in row])
        _served(axes[1, 1], [row for row in rows if "calls / 1000 tokens" in row])


def generate(result: dict[str, Any], path: Path) -> None:
    """Draws the step time and the memory of each cache, for each context that it decodes behind."""
    rows = [row for row in result["rows"] if "error" not in row]
    points = list(dict.fromkeys(row["point"] for row in rows))
    with _figure(result, path, len(points), 2) as axes:
        for point, (steps, memory) in zip(points, axes, strict=True):
            mine = [row for row in rows if row["point"] == point]
            caches = [row["cache"].removeprefix("vattn ") for row in mine]
            _bars(steps, caches, [row.get("step ms p50", row.get("step ms mean")) for row in mine], "ms")
            steps.axvline(next(row["floor ms"] for row in mine if "floor ms" in row), color="black", linewidth=0.8)
            steps.set(xscale="log", title=f"A step behind {point}; the line is its floor")
            measured = [row for row in mine if "device used" in row]
            caches = [row["cache"].removeprefix("vattn ") for row in measured]
            _bars(memory, caches, [row["device used"] / 1e9 for row in measured], "GB of the device")
            memory.set(title="Memory, weights included")


def throughput(result: dict[str, Any], path: Path) -> None:
    """Draws the tokens per second of each mix, by engine, and how long one request waits for its first token."""
    with _figure(result, path, 1, 2) as axes:
        rounds = [row for row in result["rows"] if row["part"] == "throughput" and not row.get("warm-up")]
        speeds: dict[str, list[float]] = defaultdict(list)
        for row in rounds:
            speeds[f"{row['shape']}, {row['mix']}: {row['engine']}"].append(row["tokens/s"])
        _bars(
            axes[0, 0], list(speeds), [statistics.median(each) for each in speeds.values()], "tokens per second", "%.4g"
        )
        axes[0, 0].set(title="Requests that come at once, median of the rounds")
        one = [row for row in result["rows"] if row["part"] == "latency"]
        one.sort(key=lambda row: row["prompt tokens"])
        names = [f"{row['shape']}, {row['prompt tokens']}: {row['engine']}" for row in one]
        _bars(axes[0, 1], names, [row["first token ms"] for row in one], "ms", "%.4g")
        axes[0, 1].set(xscale="log", title="First token of one request, by the tokens of its prompt")


def kernels(result: dict[str, Any], path: Path) -> None:
    """Draws the rate of each kernel on each kind of memory, for each workload."""
    rows = [row for row in result["rows"] if "error" not in row]
    works = list(dict.fromkeys(row["work"] for row in rows))
    kinds = {"torch's": ("interleaved", "torch's"), "paged": ("interleaved", "paged")}
    kinds |= {f"virtual, {kind}": (kind, "virtual") for kind in ("compact", "interleaved")}
    with _figure(result, path, len(works), 1) as axes:
        for work, part in zip(works, axes[:, 0], strict=True):
            mine = [row for row in rows if row["work"] == work]
            names = list(dict.fromkeys(row["kernel"] for row in mine))
            for number, (label, (memory, column)) in enumerate(kinds.items()):
                rates = {row["kernel"]: row[column] for row in mine if row["memory"] == memory and column in row}
                places = [names.index(name) + 0.2 * number - 0.3 for name in rates]
                part.barh(places, list(rates.values()), 0.2, label=label)
            part.set(title=work, xlabel=mine[0]["unit"])
            part.set_yticks(range(len(names)), names)
            part.invert_yaxis()
        axes[0, 0].legend()


@contextlib.contextmanager
def _figure(result: dict[str, Any], path: Path, rows: int, columns: int) -> Iterator[Any]:
    """Yields the axes of a new figure, ``[rows, columns]``, and saves the figure when the context ends."""
    size = (10, 3.5 * rows if rows < 3 else 2.2 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    figure.suptitle(f"{result['hardware']}, commit {result['commit'][:12]}")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _bars(axes: Any, names: list[str], values: list[float], unit: str, form: str = "%.3g") -> None:
    axes.bar_label(axes.barh(names, values), fmt=form, padding=2)
    axes.set(xlabel=unit)
    axes.margins(x=0.12)
    axes.invert_yaxis()


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
    fewest = min(row["requests"] for row in rows)  # the trace that all policies have served
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
