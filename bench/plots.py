"""Draws the figures of benchmark results, as SVG.

A system has the same colour in all figures. Bars begin at 0; where values differ by orders of magnitude they are points
on a logarithmic axis. Legends stand outside of what is drawn.
"""

from __future__ import annotations

import contextlib
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams.update(
    {
        "svg.hashsalt": "vattn",
        "svg.fonttype": "path",
        "font.size": 9,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.facecolor": "white",
    }
)

from matplotlib import pyplot as plt  # noqa: E402 - after the backend is chosen
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

# The colour of a system is that of the first of these words that its name contains.
COLOURS = {
    "compiled vattn": "#0a3d7a",
    "eager vattn": "#a6c8ee",
    "mapper off": "#6aa5e3",
    "vattn": "#1f6fc4",
    "vLLM": "#e07b00",
    "StaticCache, compiled": "#1d7a50",
    "StaticCache": "#4db884",
    "offloaded": "#b9bec6",
    "DynamicCache": "#6b7280",
    "torch.cat": "#6b7280",
    "cudaMalloc": "#111827",
    "over a zero page": "#c05299",
    "2 MiB pages": "#8a5cc2",
    "a page for each": "#a0643c",
}
_CACHES = {
    "dynamic": "DynamicCache",
    "offloaded": "DynamicCache, offloaded",
    "static": "StaticCache",
    "static_compile": "StaticCache, compiled",
    "eager": "vattn, eager",
    "vllm 0.26.0": "vLLM 0.26.0",
}
_MIXES = {
    "nano": "100 to 1024 tokens in and out",
    "nano, 50% of K and V": "the same, half of the memory",
    "nano, 25% of K and V": "the same, a quarter of it",
    "prefixes": "groups of 16 share 2048 tokens",
}
_SHAPES = {"8b": "Llama-3-8B", "0.6b": "Qwen3-0.6B"}
_POINTS = {"64_mixed": "64 sequences of 64 to 4096 tokens"}


def colour(name: str) -> str:
    """The colour of a system."""
    of_vattn = name.startswith("vattn")
    known = f"{'compiled ' if 'compiled' in name else 'eager ' if 'eager' in name else ''}vattn" if of_vattn else name
    known = "mapper off" if "mapper off" in name else known
    return next((each for word, each in COLOURS.items() if word in known), "#9ca3af")


def mapping(result: dict[str, Any], path: Path) -> None:
    """Draws the times of driver calls, of mapping a prompt and of growing, and the calls of served requests."""
    with _figure(result, path, 4, 1, height=3.0) as axes:
        rows = result["rows"]
        _calls(axes[0, 0], [row for row in rows if row.get("through") == "vattn"])
        _prompts(axes[1, 0], [row for row in rows if "tokens" in row and "vattn ms" in row])
        _growth(axes[2, 0], [row for row in rows if "growing by" in row])
        _served(axes[3, 0], [row for row in rows if "calls / 1000 tokens" in row])


def generate(result: dict[str, Any], path: Path) -> None:
    """Draws the step time and the memory of each cache, for each context that it decodes behind."""
    rows = [{**row, "cache": _cache(row["cache"])} for row in result["rows"] if "error" not in row]
    points = list(dict.fromkeys(row["point"] for row in rows))
    with _figure(result, path, len(points), 2, height=2.1) as axes:
        for point, (steps, memory) in zip(points, axes, strict=True):
            mine = [row for row in rows if row["point"] == point]
            shown = _POINTS.get(point) or "{} x {:,} tokens".format(*(int(part) for part in point.split("x")))
            times = [row.get("step ms p50", row.get("step ms mean")) for row in mine]
            _bars(steps, [row["cache"] for row in mine], times, "ms a step; the line: weights, K and V read once")
            steps.axvline(next(row["floor ms"] for row in mine if "floor ms" in row), color="black", linewidth=0.9)
            steps.set(title=f"A step behind {shown}")
            measured = [row for row in mine if "device used" in row]
            used = [row["device used"] / 1e9 for row in measured]
            _bars(memory, [row["cache"] for row in measured], used, "GB of the device, weights included")
            memory.set(title="Memory")


def throughput(result: dict[str, Any], path: Path) -> None:
    """Draws the tokens per second of each mix, by engine, and how long one request waits for its first token."""
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in result["rows"]:
        if row["part"] == "throughput" and not row.get("warm-up"):
            mix = _MIXES.get(row["mix"], row["mix"])
            speeds[f"{_SHAPES[row['shape']]}: {mix}"][_engine(row)].append(row["tokens/s"])
    wanted = [f"{shape}: {mix}" for shape in _SHAPES.values() for mix in _MIXES.values()]
    order = sorted(speeds, key=lambda name: wanted.index(name) if name in wanted else len(wanted))
    with _figure(result, path, 2, 1, height=3.4) as axes:
        medians = {name: {who: statistics.median(each) for who, each in speeds[name].items()} for name in order}
        _groups(axes[0, 0], medians, "tokens per second, median of the rounds")
        axes[0, 0].set(title="Requests that come at once")
        axes[0, 0].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        waits: dict[str, dict[str, float]] = defaultdict(dict)
        for row in sorted((r for r in result["rows"] if r["part"] == "latency"), key=lambda row: row["prompt tokens"]):
            waits[f"{row['prompt tokens']:,} tokens"][_engine(row)] = row["first token ms"]
        for engine in dict.fromkeys(name for each in waits.values() for name in each):
            found = [(each[engine], name) for name, each in waits.items() if engine in each]
            axes[1, 0].scatter(*zip(*found, strict=True), color=colour(engine), label=engine, s=36, zorder=3)
            for value, name in found:
                above = engine.startswith("vattn")
                axes[1, 0].annotate(
                    f"{value:,.1f}" if value < 100 else f"{value:,.0f}", (value, name), ha="center",
                    va="bottom" if above else "top", xytext=(0, 6 if above else -6), textcoords="offset points",
                    color=colour(engine),
                )  # fmt: skip
        axes[1, 0].set(xscale="log", title="First token of one request, by the length of its prompt")
        axes[1, 0].margins(y=0.35)
        axes[1, 0].invert_yaxis()
        _plain(axes[1, 0].xaxis, "ms")
        _beside(axes[1, 0])


def kernels(result: dict[str, Any], path: Path) -> None:
    """Draws the rate of each kernel on each kind of memory, for each workload."""
    rows = [row for row in result["rows"] if "error" not in row]
    works = list(dict.fromkeys(row["work"] for row in rows))
    kinds = {
        "torch's memory": ("interleaved", "torch's", "#6b7280"),
        "pages": ("interleaved", "paged", COLOURS["vLLM"]),
        "vattn, compact": ("compact", "virtual", COLOURS["mapper off"]),
        "vattn, interleaved": ("interleaved", "virtual", COLOURS["vattn"]),
    }
    with _figure(result, path, len(works), 1, height=2.6) as axes:
        for work, part in zip(works, axes[:, 0], strict=True):
            mine = [row for row in rows if row["work"] == work]
            names = list(dict.fromkeys(row["kernel"] for row in mine))
            for number, (label, (memory, column, shade)) in enumerate(kinds.items()):
                rates = {row["kernel"]: row[column] for row in mine if row["memory"] == memory and column in row}
                places = [names.index(name) + 0.2 * number - 0.3 for name in rates]
                part.barh(places, list(rates.values()), 0.19, label=label, color=shade)
            part.set(title=work, xlabel=mine[0]["unit"])
            part.set_yticks(range(len(names)), names)
            part.grid(visible=False, axis="y")
            part.invert_yaxis()
            _beside(part)


@contextlib.contextmanager
def _figure(result: dict[str, Any], path: Path, rows: int, columns: int, *, height: float) -> Iterator[Any]:
    """Yields the axes of a new figure, ``[rows, columns]``, and saves the figure when the context ends."""
    size = (10, height * rows + 0.4)
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    yield axes
    commits = {str(row.get("commit", result["commit"]))[:7] for row in result["rows"]}
    figure.suptitle(f"{result['hardware']}, commit {', '.join(sorted(commits))}", x=0.01, ha="left", color="#6b7280")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _engine(row: dict[str, Any]) -> str:
    return str(row["engine"]).replace("vllm", "vLLM")


def _cache(name: str) -> str:
    """The name of a cache of ``generate``, as it is shown."""
    name = name.removeprefix("vattn ")
    return _CACHES.get(name) or f"vattn, {name.replace('+', ', ')}"


def _beside(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _plain(axis: Any, label: str) -> None:
    """Writes the numbers of a logarithmic axis as they are said."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
    axis.set_label_text(label)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _bars(axes: Any, names: list[str], values: list[float], label: str) -> None:
    bars = axes.barh(names, values, color=[colour(name) for name in names])
    axes.bar_label(bars, [_number(value) for value in values], padding=3)
    axes.set(xlabel=label)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.14)
    axes.invert_yaxis()


def _groups(axes: Any, groups: dict[str, dict[str, float]], label: str) -> None:
    """Draws a bar for each system in each group."""
    systems = list(dict.fromkeys(name for each in groups.values() for name in each))
    width = 0.8 / len(systems)
    for number, system in enumerate(systems):
        found = [(place, each[system]) for place, each in enumerate(groups.values()) if system in each]
        places = [place + width * (number - (len(systems) - 1) / 2) for place, _ in found]
        values = [value for _, value in found]
        bars = axes.barh(places, values, width * 0.95, label=system, color=colour(system))
        axes.bar_label(bars, [_number(value) for value in values], padding=3)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.set(xlabel=label)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.invert_yaxis()
    _beside(axes)


def _lines(axes: Any, lines: Iterable[tuple[str, list[Any], list[float]]], *, coloured: bool) -> None:
    for name, x, y in lines:
        shade = {"color": colour(name)} if coloured else {}
        axes.plot(x, y, marker="o", markersize=4, label=name, **shade)
    _beside(axes)


def _calls(axes: Any, rows: list[dict[str, Any]]) -> None:
    by_call = defaultdict(list)
    for row in rows:
        by_call[row["call"]].append((row["MiB"], row["p50 us"]))
    lines = [(call, *map(list, zip(*points, strict=True))) for call, points in by_call.items()]
    _lines(axes, lines, coloured=False)
    axes.set(xscale="log", yscale="log", title="One call of the driver, by the size of the extent")
    _plain(axes.xaxis, "MiB")
    _plain(axes.yaxis, "µs, median")


def _prompts(axes: Any, rows: list[dict[str, Any]]) -> None:
    tokens = [row["tokens"] for row in rows]
    names = [column for column in rows[0] if column != "tokens"]
    lines = [(column.removesuffix(" ms"), tokens, [row[column] for row in rows]) for column in names]
    _lines(axes, lines, coloured=True)
    axes.set(xscale="log", yscale="log", title="Mapping a prompt, by its length")
    _plain(axes.xaxis, "tokens")
    _plain(axes.yaxis, "ms, median")


def _growth(axes: Any, rows: list[dict[str, Any]]) -> None:
    columns = {"p50 us": "median", "p99 us": "99%", "p99.9 us": "99.9%", "max us": "longest"}
    _lines(
        axes,
        [(row["growing by"], list(columns.values()), [row[column] for column in columns]) for row in rows],
        coloured=True,
    )
    axes.set(yscale="log", title="Growing by a token: what the caller waits")
    _plain(axes.yaxis, "µs")


def _served(axes: Any, rows: list[dict[str, Any]]) -> None:
    fewest = min(row["requests"] for row in rows)  # the trace that all policies have served
    rows = [row for row in rows if row["requests"] == fewest]
    budgets = list(dict.fromkeys(row["budget"] for row in rows))
    names, values = [], []
    for row in sorted(rows, key=lambda row: budgets.index(row["budget"])):
        names.append(f"{row['policy']}, budget {row['budget']}")
        values.append(row["calls / 1000 tokens"])
    _bars(axes, names, values, "driver calls for 1000 tokens")
    axes.set(title="Requests that are served")
