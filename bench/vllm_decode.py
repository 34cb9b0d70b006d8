"""Decode steps of a Llama-3-8B shape through vLLM, to compare with ``bench/generate.py`` on the same machine.

vLLM is not a dependency of vattn: this script runs where vLLM is installed, with vLLM's dummy weights. The step time is
measured through ``LLM.generate`` for a batch of prompts of equal length: it is the time to generate a number of tokens,
minus the time to generate a quarter of them, divided by the difference in tokens. Every point is warmed up first. The
median of several rounds is written, as one JSON line for each point.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

POINTS = {"1x1024": (1, 1024), "8x1024": (8, 1024), "1x32768": (1, 32768)}
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False, "bos_token_id": 128000,
    "eos_token_id": 128001, "torch_dtype": "bfloat16",
}  # fmt: skip


def engine(folder: str, impl: str) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    os.environ.setdefault("VLLM_USE_DEEP_GEMM", "0")
    os.environ.setdefault("VLLM_CACHE_ROOT", folder + "/cache")
    from vllm import LLM

    (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
    return LLM(
        model=folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", max_model_len=33792,
        max_num_seqs=8, enable_prefix_caching=False, gpu_memory_utilization=0.85, seed=0, disable_log_stats=True,
        generation_config="vllm", model_impl=impl,
    )  # fmt: skip


def seconds(llm: Any, batch: int, length: int, tokens: int, first: int) -> float:
    """The seconds to generate ``tokens`` tokens for each prompt. Prompts of another ``first`` have other tokens."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(first + 7 * row + at) % 10000 for at in range(length)]} for row in range(batch)]
    how = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=tokens, detokenize=False)
    start = time.perf_counter()
    outputs = llm.generate(prompts, how, use_tqdm=False)
    took = time.perf_counter() - start
    if any(len(output.outputs[0].token_ids) != tokens for output in outputs):
        raise RuntimeError("vLLM has generated fewer tokens than it was asked for")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", nargs="*", default=list(POINTS), choices=list(POINTS))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--impl", default="auto", choices=["auto", "vllm", "transformers"])
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        llm = engine(folder, options.impl)
        ready = time.perf_counter() - start
        import vllm

        quarter = max(2, options.steps // 4)
        firsts: dict[str, list[float]] = {point: [] for point in options.points}
        steps: dict[str, list[float]] = {point: [] for point in options.points}
        for turn in range(options.rounds + 1):
            for number, point in enumerate(options.points):
                took = [
                    seconds(llm, *POINTS[point], tokens, 1000 * turn + 10 * number + tokens)
                    for tokens in (1, quarter, options.steps)
                ]
                if turn:  # turn 0 is the warm-up
                    firsts[point].append(took[0])
                    steps[point].append((took[2] - took[1]) / (options.steps - quarter))
    rows = [
        {
            "point": point,
            "cache": f"vllm {vllm.__version__}" + (f", {options.impl}" if options.impl != "auto" else ""),
            "step ms mean": statistics.median(steps[point]) * 1e3,
            "step ms mean, least": min(steps[point]) * 1e3,
            "first token ms": statistics.median(firsts[point]) * 1e3,
            "tokens/s": POINTS[point][0] / statistics.median(steps[point]),
            "rounds": options.rounds,
            "ready after s": ready,
        }
        for point in options.points
    ]
    options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
