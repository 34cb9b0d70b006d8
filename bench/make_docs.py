"""Makes docs/benchmarks.md, docs/measurements.md and their figures from the JSON files in bench/results.

With --check it only reports whether the pages are up to date and the figures exist.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HEADLINES = ROOT / "docs" / "benchmarks.md"
MEASUREMENTS = ROOT / "docs" / "measurements.md"
INTRODUCTION = """# Benchmarks

What vattn does, in figures, beside what others do on the same machine. Each names the machine and the commit that
it was measured at. [All measurements](measurements.md) are on a page of their own, with every row that was measured.

How it was measured: all that is compared is warmed up first and then measured in rounds, in turns where both fit in one
process. A step that is not captured takes as long as the host needs to launch it, and varies with the host by a factor
of two. Earlier versions of this page gave 82.7 ms for DynamicCache at 1 x 1024, which was measured first in a fresh
process and was two to three times too high. Measure again with `bench/gpu.sh` on a machine with a GPU.
"""
APPENDIX = """# All measurements

This page is made by `bench/make_docs.py` from the files in `bench/results`, which name the commit that they were
measured at. Measure again with `bench/gpu.sh` on a machine with a GPU, or with a single script, e.g.
`python bench/latency.py --device cpu --out bench/results`. [Benchmarks](benchmarks.md) has the headline figures.
"""
# The benchmarks whose figures are headlines, in the order of that page.
FIRST = ("throughput", "generate", "memory", "sharing", "map", "kernels")
# The benchmarks that have a figure, and the function of ``plots`` that draws it. ``plots`` is imported only to draw.
DRAWN = {"map": "mapping", "generate": "generate", "kernels": "kernels", "throughput": "throughput"}
# The benchmarks in the order of the page, and the title of each. The keys of its rows are the columns of its tables.
SECTIONS = {
    "latency": "Latency of growing and updating",
    "map": "Mapping memory: the driver's calls, prompts, growth and served requests",
    "sharing": "Forks, prefixes, beams and swapping",
    "generate": "Decode steps of a Llama-3-8B shape",
    "generate_fp8": "Decode steps of a Llama-3-8B shape, K and V in fp8",
    "kernels": "Attention kernels on virtual memory and on torch's",
    "verification": "Planted faults, and whether they are refused",
    "verification_cost": "What verification costs, beside the commit before it",
    "robustness": "What odd and hostile input does",
    "architectures": "Decode steps of each architecture, tiny models with random weights",
    "engine": "The engine: its tokens beside those of generate, pressure, and speed on a CPU",
    "scheduler": "The engine's scheduler on a simulated cache",
    "throughput": "The engine on a GPU beside vLLM, shapes of Llama-3-8B and Qwen3-0.6B",
    "endurance": "One long generation, and many calls on one cache",
    "serve": "A trace served on one GPU, and on all at once, a process each",
    "memory": "Memory of a Llama-3-8B shape, prompts prefilled in chunks",
    "memory_at_once": "Memory of a Llama-3-8B shape, prompts prefilled in one piece",
}
_POINTS = {
    "1x1024": "1 x 1024",
    "8x1024": "8 x 1024",
    "1x32768": "1 x 32,768",
    "16x8192": "16 x 8192",
    "32x8192": "32 x 8192",
    "1x130000": "1 x 130,000",
}
BARS = {
    "grow_us_cpp": "`grow` within what is mapped, C++ (µs)",
    "grow_us_python": "`Sequence.grow` within what is mapped, Python (µs)",
    "update_us_ratio_to_dynamic": "`VirtualCache.update` over `DynamicCache.update`, time of the caller",
    "overhead_ratio_cpp": "create + map + set access of 2 MiB, our classes over the bare calls, C++",
    "hit_us": "a growth into memory mapped ahead, C++ (µs)",
    "prompt_8192_ms": "mapping a known prompt of 8192 tokens, 1 GiB of fresh memory (ms)",
    "grow_waits_100": "growths after the first that waited, to 8192 at 100 tokens/s",
    "grow_waits_5000": "the same at 5000 tokens/s",
    "wait_fraction_64": "time waited, 64 sequences at 40 steps/s with random closes and opens",
    "calls_per_1000_tokens": "memory calls per 1000 tokens served, budget 20% above the most live tokens",
    "calls_per_1000_tokens_full": "the same with the budget full",
    "wait_fraction_replay": "time waited while serving, the worse of both",
    "waste_mean": "mapped under running sequences, neither rows nor free for others, over the rows; the worse of both",
    "peak_over_tokens": "peak of what is mapped and not free for others over the peak of the rows, the worse of both",
    "launch_p99_ratio": "a kernel's launch, 99th percentile, mapper busy for 64 sequences over idle, medians of rounds",
    "launch_p99_ratio_flat_out": "the same with twenty times the work",
    "launch_p99_noise": "the highest over the lowest 99th percentile of the rounds with the mapper idle",
    "fork32_memory_ratio": "most memory of 32 samples of an 8192-token prompt, 256 new tokens each, over the bytes",
    "fork32_ms": "making the 32 forks of the prompt (ms)",
    "fork32_compacted_ms": "the same once the prompt is compacted (ms)",
    "fork32_compacted_for_ms": "the same once it is compacted for so many forks (ms)",
    "beam8_memory_ratio_to_dynamic": "K/V memory of 8 beams on a 4096-token prompt and 64 new ones over DynamicCache's",
    "beam8_copied_per_step": "most bytes that a beam step copies, over those of all beams' K/V",
    "beam8_tokens_equal": "beams equal to DynamicCache's (1 is yes)",
    "beam_step_over_dynamic": "time of the beams over DynamicCache's",
    "prefix_speedup": "prefilling 8192 tokens over opening a sequence behind them where they are known",
    "next_turn_driver_calls": "memory calls and copies to open a chat's next turn",
    "swap_link_fraction": "swapping 1 and 2 GiB over plain copies of as much, the slowest way",
    "swap_slowdown": "attention of other sequences beside swapping without pause, how much longer it takes",
    **{
        f"step_ms_{point}{peer}": f"decode step of generate, {shown} tokens, {what} (ms)"
        for point, shown in _POINTS.items()
        for peer, what in {
            "": "the fastest of vattn's in at most 1.06 times the tokens' memory",
            "_dynamic": "DynamicCache",
            "_static": "StaticCache",
            "_static_compile": "StaticCache compiled",
            "_offloaded": "DynamicCache offloaded",
            "_quantized": "QuantizedCache of 4 bits",
            "_vllm": "vLLM 0.26.0 with its own model, mean",
            "_mean": "the same of vattn's, mean",
        }.items()
    },
    "prefill_virtual_over_cudamalloc": "prefill, the fastest kernel on virtual rows over torch's memory, the lowest",
    "prefill_contiguous_over_paged": "prefill of a kernel on virtual rows over its form on shuffled pages, the lowest",
    "protocol_inputs": "messages of a peer, each refused or gone through, with nothing else happening",
    "plan_configs_right": "of transformers' configurations, the part whose layers are right, or refused for a cause",
    "calls_expected_on_hit": "calls of the driver from 500 known tokens to 2000 expected ones, beside a parked slot",
    "allocations_failed": "allocations of the core that failed once each and lost nothing",
    "planted_faults": "faults planted that move attention by more than five times what honest kernels differ by",
    "planted_faults_caught": "of these, the part that is refused within two steps",
    "honest_runs": "runs of honest kernels",
    "honest_runs_refused": "of these, those that are refused",
    "honest_runs_nearest": "the most that honest attention differs, of what it may",
    "verified_step_cost_ratio": "a steady step of generate, 1 x 1024 tokens, over the commit before",
    "engine_over_vllm_8b": "tokens per second of nano-vllm's mix over vLLM 0.26.0's, Llama-3-8B shape",
    "engine_over_generate": "nano-vllm's mix over the best of `model.generate` with either cache, batches of 32 to 128",
    "engine_over_vllm_06b": "tokens per second of nano-vllm's mix over vLLM 0.26.0's, Qwen3-0.6B shape",
    "prefix_over_vllm": "tokens per second over vLLM 0.26.0's, groups of 16 requests that share 2048 tokens",
    "tight_over_vllm_25": "nano-vllm's mix over vLLM 0.26.0, a quarter of the K and V that all requests need",
    "tight_over_vllm_50": "nano-vllm's mix over vLLM 0.26.0, half of it",
    "engine_calls_per_1000_tokens": "memory calls per 1000 tokens of prompts and outputs, last round",
    "mapped_over_needed": "mapped under 100 running requests, over their rows, tail rows and a granule each",
    "iteration_host_ms_256": "the host's work of an iteration of 256 outputs (ms)",
    "iteration_scheduler_ms_256": "the scheduler's part of an iteration of 256 outputs (ms)",
    "ready_s_cold": "ready to serve at full speed, nothing compiled before (s)",
    "ready_s_warm": "ready to serve at full speed, in a second process (s)",
    "tpot_ms_1x1024": "a token of one request behind 1024 (ms)",
    "tpot_ms_1x1024_vllm": "a token of one request behind 1024, vLLM 0.26.0's (ms)",
    **{
        f"ttft_ms_{length}{end}": f"first token behind {length}{of} (ms)"
        for length in (1024, 8192, 32768)
        for end, of in {"": "", "_vllm": ", vLLM 0.26.0's"}.items()
    },
    "grow_ratio": "`Sequence.grow` within what is mapped, Python, over the commit before",
    "update_ratio": "`VirtualCache.update` over the commit before",
    "exact_architectures": "architectures of which each mode of the engine gives the tokens of generate",
    "exact_modes": "pairs of an architecture and a mode that were compared, and equal",
    "pressure_requests": "requests on a tenth of the memory that they ask for, each ended once, all memory back",
    "batch_speedup_cpu": "eight prompts of SmolLM2 at once over one by one, tokens per second",
    "scheduler_us": "an iteration of the scheduler and its simulation (µs)",
    "scheduler_running_mean": "requests that ran on average",
    "scheduler_iterations": "iterations simulated",
    "captured_architectures": "architectures whose decode steps are captured",
    "step_over_floor_64_mixed": "decode step of 64 sequences of 64 to 4096 tokens over its floor",
    **{
        f"memory_over_tokens_{point}": f"memory of the device less weights and a GB, over K and V of {shown} tokens"
        for point, shown in {**_POINTS, "64_mixed": "64 mixed"}.items()
    },
    "long_captures": "graphs captured in one long generation",
    "long_memory_over_tokens": "K/V memory at its end over the bytes of the tokens",
    "calls_captures": "graphs captured in many calls",
    "calls_memory_growth": "memory of the device that the last nine tenths of them took (GB)",
    "calls_step_drift": "median step of the last tenth of them over the first",
    "calls_ratio_gpus": "memory calls per 1000 tokens, all GPUs at once over one alone, budget live + 20%",
    "calls_ratio_gpus_full": "the same with the budget full",
    "memory.memory_over_tokens_32x8192": "memory mapped over the bytes of the tokens, 32 x 8192 + 64",
    "memory_over_tokens_32x8192_at_once": "memory mapped over the bytes of the tokens, 32 x 8192 + 64",
    "tokens_equal_to_dynamic": "tokens equal to DynamicCache's (1 is yes)",
    "max_batch_8192_vattn": "largest batch of 8192-token prompts, vattn (max_len 16384)",
    "max_batch_8192_dynamic": "the same, DynamicCache",
    "max_batch_8192_static": "the same, StaticCache of exactly 8256 positions",
    "max_batch_8192_static_16384": "the same, StaticCache of 16384 positions",
}


def pages() -> dict[Path, str]:
    """The text of each page."""
    headlines, rows = [INTRODUCTION], [APPENDIX]
    for name in FIRST:
        headlines += [headline(SECTIONS[name], *found) for found in results(name) if found[0]["hardware"] != "cpu"]
    for name, title in SECTIONS.items():
        rows += [measured(title, result) for result, _ in results(name)]
    return {HEADLINES: "\n".join(headlines), MEASUREMENTS: "\n".join(rows)}


def results(name: str) -> list[tuple[dict[str, Any], Path | None]]:
    """The results of a benchmark, and the figure of each that has one."""
    paths = sorted((ROOT / "bench" / "results").glob(f"{name}-*.json"))
    return [(json.loads(path.read_text()), figures().get(path)) for path in paths]


def figures() -> dict[Path, Path]:
    """The path of the figure of each result file that has one."""
    results = (ROOT / "bench" / "results").glob("*.json")
    return {path: ROOT / "docs" / "plots" / f"{path.stem}.svg" for path in results if path.stem.split("-")[0] in DRAWN}


def headline(title: str, result: dict[str, Any], drawn: Path | None) -> str:
    """What a benchmark says in few numbers, and its figure."""
    figure = [f"![{title}](plots/{drawn.name})", ""] if drawn else []
    return "\n".join([f"## {title}", "", *figure, *table_of_bars(result), "", f"Measured on {origin(result)}.", ""])


def measured(title: str, result: dict[str, Any]) -> str:
    """All rows of a benchmark."""
    lines = [f"## {title}: {result['hardware']}", "", origin(result), "", *table_of_bars(result)]
    for keys in dict.fromkeys(tuple(row) for row in result["rows"]):
        lines += ["", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
        lines += [
            f"| {' | '.join(shown(value) for value in row.values())} |" for row in result["rows"] if tuple(row) == keys
        ]
    return "\n".join([*lines, ""])


def origin(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    driver = f", driver {result['driver']}" if result["driver"] else ""
    return f"{result['hardware']}{driver}; {versions}; commit {result['commit'][:12]}; {result['date'][:10]}"


def table_of_bars(result: dict[str, Any]) -> list[str]:
    benchmark = result["benchmark"]
    named = {name: f"{benchmark}.{name}" if f"{benchmark}.{name}" in BARS else name for name in result["bars"]}
    names = sorted(result["bars"], key=lambda name: list(BARS).index(named[name]))
    return [
        "| measure | value |",
        "|---|---|",
        *(f"| {BARS[named[name]]} | {shown(result['bars'][name])} |" for name in names),
    ]


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10**6:
        return f"{value / 1e9:.2f} GB"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items() if count)
    return "" if value is None else str(value)


def main() -> int:
    if "--check" in sys.argv:
        old = [path.name for path, text in pages().items() if not path.exists() or path.read_text() != text]
        if old or not all(figure.exists() for figure in figures().values()):
            print(f"{', '.join(old) or 'a figure'} is not what bench/results says: run make docs", file=sys.stderr)
            return 1
        return 0
    for path, text in pages().items():
        path.write_text(text)
    import plots

    for path, figure in figures().items():
        getattr(plots, DRAWN[path.stem.split("-")[0]])(json.loads(path.read_text()), figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
