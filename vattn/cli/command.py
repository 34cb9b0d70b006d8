"""The command ``vattn``: parses arguments and prints results. No other module reads environment variables."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import os
import platform
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vattn import __version__, _core
from vattn.bench.mixes import MIXES
from vattn.bench.trace import DATASETS, generate, read
from vattn.errors import Error
from vattn.memory.layout import GRANULARITY, KVLayout

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with ``arguments``, by default those of the process; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("vattn").setLevel(logging.INFO if options.verbose == 1 else logging.DEBUG)
    try:
        result, text = options.run(options)
    except (Error, ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        if options.verbose:
            raise
        print(f"vattn {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"vattn {options.command}: interrupted", file=sys.stderr)
        return 130
    if options.json or text:
        print(json.dumps(result, indent=2) if options.json else text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vattn", description="A KV cache whose address never changes and whose memory grows."
    )
    parser.add_argument("--version", action="version", version=f"vattn {__version__}")
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log what is done, and show tracebacks")
    commands = parser.add_subparsers(dest="command", required=True)

    demo = commands.add_parser("demo", help="a real model generating through vattn, and what it saves")
    demo.add_argument("question", nargs="?", default="Why is the sky blue?")
    demo.add_argument("--max-new-tokens", type=_positive, default=96)
    demo.add_argument("--max-len", type=_positive, default=8192, help="positions to reserve (default 8192)")
    demo.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    demo.add_argument("--folder", type=Path, help="where the unpacked model is kept (default: the user's cache)")
    demo.set_defaults(run=_demo)

    info = commands.add_parser("info", help="what this machine can do")
    info.set_defaults(run=_info)

    plan = commands.add_parser("plan", help="how many sequences of a model fit a budget")
    plan.add_argument("config", metavar="MODEL_CONFIG", type=Path, help="a config.json, or a folder that has one")
    plan.add_argument("--max-len", type=_positive, required=True, help="positions of the longest sequence")
    plan.add_argument("--batch", type=_positive, default=1, help="sequences at once (default 1)")
    plan.add_argument("--budget", type=_size, required=True, help="memory for the cache, e.g. 40GiB")
    plan.add_argument("--dtype", help="of the cache (default: the model's)")
    plan.add_argument("--layout", choices=["interleaved", "compact"], default="interleaved")
    plan.set_defaults(run=_plan)

    bench = commands.add_parser("bench", help="measure on this machine")
    bench.add_argument(
        "what",
        choices=["map", "kernels", "generate", "throughput", "latency"],
        help="what memory costs; how fast kernels run on it; how long decode steps of a model take; how many tokens a "
        "second an engine samples; how long one request takes",
    )
    bench.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    bench.add_argument("--config", type=Path, help="generate: the model's config.json, or its folder (default: small)")
    bench.add_argument("--context", type=_positive, default=256, help="generate: tokens of a prompt (default 256)")
    bench.add_argument("--batch", type=_positive, default=1, help="generate: sequences at once (default 1)")
    bench.add_argument("--steps", type=_positive, default=24, help="generate, latency: tokens to time (default 24)")
    bench.add_argument("--trace", type=Path, help="JSON lines of requests (default: made up): for map with arrival, "
                       "prompt and output in tokens, for throughput with token ids as prompt, and output")  # fmt: skip
    bench.add_argument("--dataset", choices=sorted(DATASETS), default="sharegpt", help="whose lengths to make up")
    bench.add_argument("--requests", type=_positive, help="how many to make up (default: 400, or what the mix has)")
    bench.add_argument("--concurrency", type=_positive, default=32, help="sequences at once (default 32)")
    bench.add_argument("--model", help="throughput, latency: a folder, or a model on the disk (default: the demo's)")
    bench.add_argument("--mix", choices=sorted(MIXES), default="nano", help="throughput: which requests to make up")
    bench.add_argument("--rounds", type=_positive, default=3, help="throughput: how often (default 3)")
    bench.add_argument("--prompt-tokens", type=_positive, nargs="+", default=[1024], help="latency (default 1024)")
    bench.add_argument("--max-num-seqs", type=_positive, default=256, help="requests that run at once (default 256)")
    bench.add_argument("--max-num-batched-tokens", type=_positive, default=16384, help="of an iteration")
    bench.add_argument("--max-model-len", type=_positive, help="default: the model's")
    bench.add_argument("--kv-budget", type=_size, help="memory for K and V (default: half of what is free)")
    bench.add_argument("--enforce-eager", action="store_true", help="without CUDA graphs")
    bench.set_defaults(run=_bench)

    generate = commands.add_parser("generate", help="answer a file of prompts, several at once")
    generate.add_argument("model", help="a folder, or the name of a model that is on the disk")
    generate.add_argument("prompts", type=Path, help="a prompt in each line, or .jsonl with prompt or messages")
    generate.add_argument("--out", type=Path, required=True, help="JSON lines; a call that was stopped goes on there")
    generate.add_argument("--n", type=_positive, default=1, help="answers to a prompt (default 1)")
    generate.add_argument("--max-num-seqs", type=_positive, default=64, help="answers at once (default 64)")
    generate.set_defaults(run=_generate)

    chat = commands.add_parser("chat", help="talk with a model")
    chat.add_argument("model", nargs="?", help="a folder, or the name of a model on the disk (default: the demo's)")
    chat.add_argument("--system", help="tells the model how to answer")
    chat.set_defaults(run=_chat, max_num_seqs=1, n=1)

    for command in (generate, chat):
        command.add_argument("--max-tokens", type=_positive, default=256, help="of an answer (default 256)")
        command.add_argument("--temperature", type=float, help="default: the model's; 0 takes the most likely token")
        command.add_argument("--top-p", type=float, help="default: the model's")
        command.add_argument("--seed", type=int, help="makes samples the same in each call")
        command.add_argument("--device", help="default: cuda where there is a GPU")
        command.add_argument("--dtype", default="auto", help="of the weights (default: as they are stored)")
        command.add_argument("--max-model-len", type=_positive, help="default: the model's")
        command.add_argument("--kv-budget", type=_size, help="memory for K and V (default: half of what is free)")
        command.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    for command in (demo, info, plan, bench, generate, chat):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("-v", "--verbose", action="count", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def _demo(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # keeps libraries from downloading anything
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from vattn.cli import demo
    from vattn.memory.device import resolve_device
    from vattn.models.versions import VERSION

    resolve_device(options.device)
    folder = options.folder or default_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    progress = sys.stderr.isatty()
    model, tokenizer = demo.load(folder, progress=progress)
    model = model.to(options.device)
    lengths = {"max_new_tokens": options.max_new_tokens, "max_len": options.max_len}
    result = demo.run(model, tokenizer, options.question, progress=progress, **lengths)
    calls = ", ".join(f"{name} {count}" for name, count in result.driver_calls.items() if count)
    parts = [
        f"Q: {options.question}",
        f"A: {result.answer}",
        "",
        f"{result.new_tokens} tokens at {result.tokens_per_second:.1f} tokens/s through vattn, "
        f"{result.dynamic_tokens_per_second:.1f} through DynamicCache; "
        f"the tokens are {_same(result.same_tokens)}.",
        "",
        _sizes(
            "KV cache of one sequence",
            result.used,
            {
                f"the rows of {result.tokens - 1} cached tokens": result.used,
                "vattn: addresses reserved (cost nothing)": result.reserved,
                "vattn: memory mapped": result.mapped,
                "DynamicCache, while it copies a layer": result.dynamic,
                f"StaticCache of {options.max_len}": result.static,
            },
        ),
        "",
        f"Driver calls in all: {calls}",
        "",
    ]
    if VERSION < (5, 17):
        return asdict(result), "\n".join([*parts, "Serving needs transformers 5.17 or newer."])
    from vattn.cli import demo_serving

    served = demo_serving.run(model, tokenizer, progress=progress, **lengths)
    parts += ["Eight questions at once:", ""]
    for question, answer in zip(demo_serving.QUESTIONS, served.answers, strict=True):
        parts += [f"Q: {question}", f"A: {textwrap.shorten(answer, 110, placeholder=' ...')}"]
    parts += [
        "",
        f"{served.tokens_per_second:.1f} tokens/s at once, {served.one_by_one_tokens_per_second:.1f} one by one; "
        f"the tokens are {_same(served.same_tokens)}.",
        "",
    ]
    if served.used:
        sizes = {
            f"the rows of {served.tokens} tokens": served.used,
            "vattn: memory mapped, at its peak": served.mapped,
            f"eight reservations of {served.max_len}": served.reservations,
        }
        parts.append(_sizes("K and V of eight sequences", served.used, sizes))
    return {**asdict(result), "serving": asdict(served)}, "\n".join(parts)


def _same(same: bool) -> str:
    return "the same" if same else "DIFFERENT"


def _sizes(title: str, used: int, sizes: dict[str, int]) -> str:
    """A table of sizes, also as multiples of ``used`` bytes."""
    rows = [(name, _human(nbytes), f"{nbytes / used:.2f} x") for name, nbytes in sizes.items()]
    return _table([(title, "bytes", "of what the tokens need"), *rows])


def default_folder() -> Path:
    """Returns the folder of the demo's unpacked model: in the user's cache, one for each major version of transformers.

    A model that one major version has saved may not be readable by another one.
    """
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    line = (_version("transformers") or "").split(".")[0]
    return cache_home / "vattn" / f"SmolLM2-135M-Instruct-transformers{line}"


def _generate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vattn.cli import prompt_file

    return prompt_file.run(options)


def _chat(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vattn.cli import chat, demo

    if options.model is None:
        options.model = default_folder()
        options.model.parent.mkdir(parents=True, exist_ok=True)
        demo.unpack(options.model)
    return chat.run(options)


def _info(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    versions: dict[str, str | None] = {"vattn": __version__, "python": platform.python_version()}
    versions |= {name: _version(name) for name in ("torch", "transformers")}
    backends = [_backend(_core.host_driver(GRANULARITY))]
    probe = _core.probe_cuda()
    cuda: dict[str, Any] = {"driver_version": None, "unavailable": probe["why"] or None}
    if probe["available"]:
        cuda["driver_version"] = f"{probe['driver_version'] // 1000}.{probe['driver_version'] % 1000 // 10}"
        for device in range(probe["devices"]):
            try:
                backends.append(_backend(_core.cuda_driver(device)))
            except Error as error:
                backends.append({"device": f"cuda:{device}", "virtual_memory": False, "why": str(error)})
    result = {"versions": versions, "cuda": cuda, "backends": backends}
    rows = [("device", "what", "virtual memory", "granularity", "free", "total")]
    for row in backends:
        if row["virtual_memory"]:
            sizes = (_human(row[key]) for key in ("granularity", "free", "total"))
            rows.append((row["device"], row["description"], "works", *sizes))
        else:
            rows.append((row["device"], row["why"], "fails", "", "", ""))
    text = "\n".join(
        [
            ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
            f"CUDA driver API {cuda['driver_version']}" if cuda["driver_version"] else str(cuda["unavailable"]),
            "",
            _table(rows),
        ]
    )
    return result, text


def _backend(driver: _core.Driver) -> dict[str, Any]:
    """Describes a backend; maps one granule to find out whether virtual memory works."""
    free, total = driver.memory_info()
    size = driver.granularity
    result: dict[str, Any] = {
        "device": "cpu" if driver.kind == "cpu" else f"cuda:{driver.device}",
        "description": driver.description,
        "granularity": size,
        "free": free,
        "total": total,
        "virtual_memory": True,
    }
    try:
        arena = _core.Arena(driver, [(size, 0)], slots=1, max_len=1, budget=size)
        arena.grow([arena.acquire()], 1, 0)
        arena.close()
    except Error as error:
        result |= {"virtual_memory": False, "why": str(error)}
    return result


def _plan(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    config = _read_config(options.config)
    layout = KVLayout.from_config(config, max_len=options.max_len, dtype=options.dtype, kind=options.layout)
    lengths = sorted({max(1, options.max_len // part) for part in (64, 16, 4, 1)})
    rows = [
        {
            "length": length,
            "mapped_bytes": layout.mapped_bytes(length),
            "waste": layout.waste(length),
            "static_waste": layout.static_waste(length),
            "fit": options.budget // layout.mapped_bytes(length),
            "batch_bytes": options.batch * layout.mapped_bytes(length),
        }
        for length in lengths
    ]
    result = {
        "layout": layout.kind,
        "max_len": options.max_len,
        "batch": options.batch,
        "budget": options.budget,
        "bytes_per_token": layout.bytes_per_token,
        "tokens_per_granule": layout.tokens_per_granule,
        "growth_step_bytes": layout.growth_step_bytes,
        "static_bytes": layout.static_bytes,
        "static_fit": options.budget // layout.static_bytes,
        "lengths": rows,
    }
    text = "\n".join(
        [
            f"{layout.kind}: {_human(layout.bytes_per_token)} a token, "
            f"{layout.tokens_per_granule:g} tokens a granule of {_human(layout.granularity)}, "
            f"growth by {_human(layout.growth_step_bytes)}",
            f"A max-length reservation takes {_human(layout.static_bytes)} a sequence: "
            f"{result['static_fit']} fit {_human(options.budget)}.",
            "",
            _table(
                [
                    ("tokens", "mapped", "waste", "a reservation's", "fit", f"batch of {options.batch}"),
                    *(
                        (
                            str(row["length"]),
                            _human(row["mapped_bytes"]),
                            f"{row['waste']:.1%}",
                            f"{row['static_waste']:.1%}",
                            str(row["fit"]),
                            _human(row["batch_bytes"]) + ("" if row["fit"] >= options.batch else ", does not fit"),
                        )
                        for row in rows
                    ),
                ]
            ),
        ]
    )
    return result, text


def _read_config(path: Path) -> dict[str, Any]:
    """Reads the model configuration in a file, or in the ``config.json`` of a folder."""
    path = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is no model's configuration: it holds no object of JSON")
    return config


def _bench(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from vattn.memory.device import resolve_device

    resolve_device(options.device)
    measures = {"map": _bench_map, "kernels": _bench_kernels, "generate": _bench_generate}
    result = measures.get(options.what, _bench_serving)(options)
    parts = []
    for name, rows in result.items():
        columns = list(dict.fromkeys(column for row in rows for column in row))
        values = [[row.get(column, "") for column in columns] for row in rows]
        cells = [[f"{value:.4g}" if isinstance(value, float) else str(value) for value in row] for row in values]
        parts += [name, _table([columns, *cells]), ""]
    return result, "\n".join(parts).rstrip()


def _bench_kernels(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    from vattn.bench import decode

    scale = 1 if options.device.startswith("cuda") else 64  # shorter sequences on a CPU
    return {"kernels": list(decode.kernel_speed(options.device, scale))}


def _bench_generate(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    import torch
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig

    from vattn.bench import decode
    from vattn.kernels import KERNELS

    on_gpu = options.device.startswith("cuda")
    small = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config: Any = LlamaConfig(**small)
    if options.config:
        kind = _read_config(options.config).get("model_type", "a model that is not named")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"{options.config} is of {kind}, which the installed transformers does not know")
        config = AutoConfig.from_pretrained(options.config, local_files_only=True)
    with torch.device(options.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32).eval()
    model.generation_config.eos_token_id = None
    kernels = [name for name in ("fa3", "fa2", "flashinfer", "flex") if on_gpu and not KERNELS[name].missing()]
    kernels += [f"{name}+compiled" for name in kernels[:1]]
    max_len = max(4096, 2 * options.context, options.context + options.steps + 8)
    factories = decode.cache_factories(model, max_len, kernels, decode.baselines(options.device))
    lengths = [options.context] * options.batch
    point = f"{options.batch} x {options.context}"
    return {"generate": decode.decode_speed(factories, point, lengths, options.steps)}


def _bench_serving(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    from vattn.cli import bench_serving, demo

    model: Any = options.model or demo.load(default_folder())[0].to(options.device)
    measure = bench_serving.throughput if options.what == "throughput" else bench_serving.latency
    return measure(options, model)


def _bench_map(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    from vattn.bench import mapping

    requests = read(options.trace) if options.trace else generate(options.dataset, options.requests or 400)
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "calls": lambda: mapping.call_latency(options.device),
        "prompts": lambda: mapping.prompts(options.device),
        "growth": lambda: mapping.growth(options.device),
        "replay": lambda: mapping.replays(options.device, requests, concurrency=options.concurrency),
    }
    result = {}
    for number, (name, measure) in enumerate(parts.items(), 1):
        # The measurements take minutes. Progress goes to stderr, since other programs may read stdout.
        print(f"measuring {name} ({number} of {len(parts)})", file=sys.stderr, flush=True)
        result[name] = measure()
    return result


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _positive(text: str) -> int:
    if re.fullmatch(r"\+?[0-9]{1,18}", text.strip()) is None or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1 and 18 digits, not {_short(text)}")
    return int(text)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")


def _size(text: str) -> int:
    """Returns the bytes of a size such as 1500000, 16GiB, 16G or 500MB; all units are powers of 1024."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    nbytes = 0.0 if match is None else float(match[1]) * _UNITS[match[2].lower()]
    if not 1 <= nbytes < 2**62:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a size such as 40GiB")
    return int(nbytes)


def _human(nbytes: float) -> str:
    units = iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while nbytes >= 1024 and unit != "TiB":
        nbytes, unit = nbytes / 1024, next(units)
    return f"{nbytes:.4g} {unit}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])])


if __name__ == "__main__":
    sys.exit(main())
