"""One long generation, and many calls on one cache, of a small model: memory and step times must not grow.

``long_captures`` and ``calls_captures``: the CUDA graphs captured in the long generation, and in the calls.
``long_memory_over_tokens``: K/V memory at the end of the long generation over the bytes of its tokens.
``calls_memory_growth``: how much less memory the device has free after the last call than after the first tenth of the
calls (GB).
``calls_step_drift``: the median step time of the last tenth of the calls over that of the first tenth, without the
first call.
The model has random weights. Without a GPU a shorter version runs, to test the script.
"""

from __future__ import annotations

import contextlib
import statistics
from typing import Any

import report
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteriaList

from vattn import CACHE_KEYWORD, VirtualCache
from vattn.bench import decode


def steps(model: Any, cache: VirtualCache, prompt: int, new: int) -> list[float]:
    """The seconds that each step of one call of ``generate`` takes."""
    clock = decode.Clock()
    ids = torch.randint(1, model.config.vocab_size, (1, prompt), device=model.device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, CACHE_KEYWORD: cache}
    model.generate(ids, attention_mask=torch.ones_like(ids), stopping_criteria=StoppingCriteriaList([clock]), **options)
    return clock.steps()


def taken(device: str) -> int:
    """Bytes of the current device that are in use; 0 where ``device`` is not ``"cuda"``."""
    free, total = torch.cuda.mem_get_info() if device.startswith("cuda") else (0, 0)
    return total - free


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, help="of the long generation (default: 131072, without a GPU 600)")
    parser.add_argument("--calls", type=int, help="(default: 1000, without a GPU 20)")
    options = parser.parse_args()
    on_gpu = options.device.startswith("cuda")
    tokens, calls = options.tokens or (131072 if on_gpu else 600), options.calls or (1000 if on_gpu else 20)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=2 * tokens,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(options.device, torch.bfloat16).eval()
    model.generation_config.pad_token_id = 0
    rows: list[dict[str, Any]] = []
    bars: dict[str, float] = {}
    with contextlib.closing(VirtualCache(model, max_len=tokens + 64, attention="auto")) as cache:
        took = steps(model, cache, 16, tokens)
        used = cache.kv_caches[0].stats().physical
        bytes_of_tokens = cache.get_seq_length() * cache.kv_caches[0].layout.bytes_per_token
        tenth = len(took) // 10
        stats = cache.decode_stats()
        rows += [
            {"long": f"tokens {at * tenth} to {(at + 1) * tenth}", "step ms p50": statistics.median(part) * 1e3}
            for at in range(10)
            if (part := took[max(at * tenth, 8) : (at + 1) * tenth])
        ]
        bars |= {"long_captures": stats.captures, "long_memory_over_tokens": used / bytes_of_tokens}
        print(stats, flush=True)
    with contextlib.closing(VirtualCache(model, max_len=4096, attention="auto")) as cache:
        medians, taken_then = [], 0
        for call in range(calls):
            medians.append(statistics.median(steps(model, cache, 16 + call % 100, 24)[4:]))
            cache.reset()
            if call == calls // 10:
                taken_then = taken(options.device)
        tenth = calls // 10
        parts = [medians[max(1, at * tenth) : (at + 1) * tenth] for at in range(10)]
        rows += [
            {"calls": f"{at * tenth} to {(at + 1) * tenth}", "step ms p50": statistics.median(part) * 1e3}
            for at, part in enumerate(parts)
            if part
        ]
        bars |= {
            "calls_captures": cache.decode_stats().captures,
            "calls_memory_growth": (taken(options.device) - taken_then) / 1e9,
            "calls_step_drift": statistics.median(parts[-1]) / statistics.median(parts[0]),
        }
        print(cache.decode_stats())
    report.write("endurance", options.device, rows, bars, options.out)


if __name__ == "__main__":
    main()
