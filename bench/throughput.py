"""How fast the engine serves the shapes of Llama-3-8B and Qwen3-0.6B, with random weights, on one GPU.

``engine_over_vllm_8b``, ``engine_over_vllm_06b``: tokens per second of nano-vllm's mix over those of vLLM, of which
``--vllm`` names the file that the peer's benchmark has written on the same machine; medians of rounds.
``tpot_ms_1x1024``, ``ttft_ms_1024`` and so on: one request at a time, and the same with ``_vllm``.
``prefix_over_vllm``: as ``engine_over_vllm_8b``, with prefixes that groups of requests share.
``engine_over_generate``: as ``engine_over_vllm_8b``, over the best of ``model.generate`` with either cache, on batches
of requests of the mix.
``tight_over_vllm_25``, ``tight_over_vllm_50``: the same with so many percent of the K and V that all requests need.
``engine_calls_per_1000_tokens``: memory calls of the driver in the last round, per 1000 tokens of prompts and outputs.
``ready_s_cold``, ``ready_s_warm``: seconds from the making of the engine until iterations of 256 rows and then of one
are at their speed, without what earlier processes have compiled (``--cold``) and with it.
``mapped_over_needed``: what 100 running requests have mapped, over their rows and a granule each, before the memory is
cut to half of that; the row tells what became free.
``iteration_host_ms_256``: the host's work of an iteration of 256 rows, ``iteration_scheduler_ms_256`` the scheduler's.

Earlier rows of a result file stay unless they are measured again. ``--write FOLDER`` only writes the requests of the
mixes, for other engines.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import report
import torch
import torch._inductor.compile_fx  # so that importing is no part of what is measured
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from vattn.bench import mixes, serving
from vattn.bench.static_batch import static_batch
from vattn.engine import LLM
from vattn.graphs import artifacts

SHAPES = {
    "8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=131072, rope_theta=500000.0,
    ),
    "0.6b": Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, max_position_embeddings=40960, tie_word_embeddings=True,
    ),
}  # fmt: skip
PARTS = ("ready", "throughput", "latency", "host", "resize", "generate")


def model_of(shape: str) -> Any:
    """A model whose weights are drawn as vLLM draws those of its own: a GPU's clocks depend on the data."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16, attn_implementation="sdpa").eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.uniform_(-1e-3, 1e-3)
    model.generation_config.eos_token_id = None
    return model


def measured(options: Any) -> list[dict[str, Any]]:
    """The rows of all parts that are asked for."""
    model = model_of(options.shape)
    vocabulary = SHAPES[options.shape].vocab_size
    memory: dict[str, Any] = {"gpu_memory_utilization": options.memory}
    if options.tight:
        memory = {"kv_budget": tight_budget(options)}
    rows = []
    if "generate" in options.parts:  # before an engine has moved weights
        works = mixes.mix(options.mix, vocabulary, count=options.requests)
        for batch in options.batches:
            for cache in ("dynamic", "vattn"):
                row = {"engine": "generate", "shape": options.shape, "part": "generate", "mix": options.mix}
                rows.append({**row, **static_batch(model, works[:batch], cache)})
                print(rows[-1], flush=True)
    parts = [part for part in options.parts if part != "generate"]
    if not parts:
        return rows
    known, start = kept(), time.perf_counter()
    with LLM(
        model, max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=options.max_model_len, enable_prefix_caching=options.prefix_cache, attention=options.attention,
        compile=not options.no_compile,
        **memory,
    ) as llm:  # fmt: skip
        report_of = llm.report()
        print(report_of, flush=True)
        common = {"engine": "vattn", "shape": options.shape, "kernels": "+".join(report_of["kernels"])}
        for part in parts:
            found: Iterable[dict[str, Any]]
            if part == "ready":
                temperature = "warm" if known and kept() == known else "cold"
                found = [{"start": temperature, **serving.ready(llm, start, options.max_num_seqs, vocabulary)}]
            elif part == "throughput":
                seeds = range(options.rounds) if options.prefix_cache else [0] * options.rounds
                rounds = [mixes.mix(options.mix, vocabulary, count=options.requests, seed=seed) for seed in seeds]
                found = ({"mix": name_of(options), **row} for row in serving.throughput(llm, rounds))
            elif part == "latency":
                found = serving.latency(llm, options.prompts, options.steps, vocabulary)
            elif part == "resize":
                found = [serving.resized(llm, 100, vocabulary)]
            else:
                found = [serving.host_work(llm, options.max_num_seqs, vocabulary)]
            for row in found:
                rows.append({**common, "part": part, **row})
                print(rows[-1], flush=True)
        print(llm.report(), flush=True)
    return rows


def kept() -> dict[Path, float]:
    """When processes have written what they have compiled so far, and left for later ones."""
    return {path: path.stat().st_mtime for path in artifacts.FOLDER.expanduser().glob("*")}


def tight_budget(options: Any) -> int:
    """The bytes of K and V that ``--tight`` leaves."""
    works = mixes.mix(options.mix, SHAPES[options.shape].vocab_size, count=options.requests)
    config = SHAPES[options.shape]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return sum(len(work.prompt) + work.output for work in works) * row_bytes * options.tight // 100


def name_of(options: Any) -> str:
    """The name of a mix, and of the memory that it is given."""
    return f"{options.mix}, {options.tight}% of K and V" if options.tight else str(options.mix)


def of_vllm(path: Path, mix: str) -> list[dict[str, Any]]:
    """The rows of the peer's benchmark, of a mix of requests, under the names of ours."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        common = {"engine": "vllm 0.26.0", "shape": row["model"], "part": row["mode"]}
        if row["mode"] == "throughput":
            names = {
                "run": "round",
                "seqs": "requests",
                "input_tokens": "prompt tokens",
                "output_tokens": "sampled tokens",
            }
            names |= {"seconds": "seconds", "tokens_per_s": "tokens/s"}
            common["mix"] = mix
        else:
            names = {"input": "prompt tokens", "output": "sampled tokens", "first_token_ms": "first token ms"}
            names |= {"ms_per_token": "ms per token", "ms_per_token_all": "ms per token, all"}
        rows.append({**common, **{mine: row[theirs] for theirs, mine in names.items()}})
    return rows


def bars_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    bars: dict[str, float] = {}

    def speed(engine: str, shape: str, mix: str) -> float | None:
        found = [
            row["tokens/s"]
            for row in rows
            if (row["engine"].startswith(engine), row["shape"], row["part"]) == (True, shape, "throughput")
            and row.get("mix") == mix
            and not row.get("warm-up")
        ]
        return statistics.median(found) if found else None

    for shape, name in (("8b", "8b"), ("0.6b", "06b")):
        ours, theirs = speed("vattn", shape, "nano"), speed("vllm", shape, "nano")
        if ours and theirs:
            bars[f"engine_over_vllm_{name}"] = ours / theirs
    batches = [row["tokens/s"] for row in rows if row["part"] == "generate" and row["shape"] == "8b"]
    if batches and (ours := speed("vattn", "8b", "nano")):
        bars["engine_over_generate"] = ours / max(batches)
    for mix, name in (
        ("prefixes", "prefix_over_vllm"),
        ("nano, 25% of K and V", "tight_over_vllm_25"),
        ("nano, 50% of K and V", "tight_over_vllm_50"),
    ):
        ours, theirs = speed("vattn", "8b", mix), speed("vllm", "8b", mix)
        if ours and theirs:
            bars[name] = ours / theirs
    for row in rows:
        end = "_vllm" if row["engine"].startswith("vllm") else ""
        if row["part"] == "latency" and row["shape"] == "8b":
            bars[f"ttft_ms_{row['prompt tokens']}{end}"] = row["first token ms"]
            if row["prompt tokens"] == 1024:
                bars[f"tpot_ms_1x1024{end}"] = row["ms per token"]
        elif row["shape"] != "8b":
            continue
        elif row["part"] == "ready":
            bars[f"ready_s_{row['start']}"] = max(value for name, value in row.items() if name.startswith("ready s"))
        elif row["part"] == "resize":
            bars["mapped_over_needed"] = row["mapped, over needed"]
        elif row["part"] == "host":
            bars["iteration_host_ms_256"], bars["iteration_scheduler_ms_256"] = row["host ms"], row["scheduler ms"]
        elif row.get("mix") == "nano" and "memory calls/1000 tokens" in row:  # earlier files have all calls
            bars["engine_calls_per_1000_tokens"] = row["memory calls/1000 tokens"]  # of the last round
    return bars


def merge(options: Any) -> None:
    """Adds the peer's rows to those that were measured on its machine, and leaves the rest of the file as it is."""
    path = options.out / "throughput-cuda.json"
    result = json.loads(path.read_text())
    new = of_vllm(options.vllm, name_of(options))
    again = set(map(_place, new))
    result["rows"] = [row for row in result["rows"] if _place(row) not in again] + new
    result["bars"] = bars_of(result["rows"])
    path.write_text(json.dumps(result, indent=1) + "\n")


def _place(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row is of: measured again, it takes the place of earlier ones."""
    length = row["prompt tokens"] if row["part"] in ("latency", "generate") else None
    return row["engine"], row["shape"], row["part"], row.get("mix"), row.get("start"), row.get("cache"), length


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--mix", choices=sorted(mixes.MIXES), default="nano")
    parser.add_argument("--requests", type=int, help="of the mix")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="*", default=[1024, 8192, 32768], help="of latency, in tokens")
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 64, 128], help="of ``model.generate``")
    parser.add_argument("--steps", type=int, default=128, help="tokens that a request of latency samples")
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384)
    parser.add_argument("--max-model-len", type=int, default=40960)
    parser.add_argument("--memory", type=float, default=0.9, help="the part of the device's memory that is used")
    parser.add_argument("--tight", type=int, help="memory for K and V: percent of what all requests at once would need")
    parser.add_argument("--cold", action="store_true", help="uses nothing that earlier processes have compiled")
    parser.add_argument("--prefix-cache", action="store_true", help="rounds then have other prompts each")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--no-compile", action="store_true", help="layers are not compiled")
    parser.add_argument("--vllm", type=Path, help="JSON lines that the peer's benchmark has written on this machine; "
                        "with --parts and nothing behind it they are only added to the result file")  # fmt: skip
    parser.add_argument("--write", type=Path, help="writes the requests of the mixes there, and measures nothing")
    options = parser.parse_args()
    if options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        for name in mixes.MIXES:
            works = mixes.mix(name, SHAPES[options.shape].vocab_size, count=options.requests)
            mixes.write(options.write / f"{name}.jsonl", works)
        return
    if options.vllm and not options.parts:
        merge(options)
        return
    print(f"{tight_budget(options) / 2**30:.3f} GiB of K and V" if options.tight else "all of K and V", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        if options.cold:
            artifacts.FOLDER = Path(folder) / "compiled"
            os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/torch", "TRITON_CACHE_DIR": f"{folder}/triton"}
            os.environ["FLASHINFER_WORKSPACE_BASE"] = folder
        rows = measured(options)
    rows += of_vllm(options.vllm, name_of(options)) if options.vllm else []
    again = set(map(_place, rows))
    if not options.vllm:  # the peer's were measured on another machine
        again |= {("vllm 0.26.0", *place[1:]) for place in again}
    rows = [row for row in report.read("throughput", "cuda", options.out) if _place(row) not in again] + rows
    report.write("throughput", "cuda", rows, bars_of(rows), options.out)


if __name__ == "__main__":
    main()
