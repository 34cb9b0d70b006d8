"""How much memory the KV cache of a Llama-3-8B shape takes on one GPU, with vattn and with transformers' caches.

The model has random weights in bfloat16 and attends by torch's SDPA without the cuDNN backend, whose decode steps do
not even repeat their own results. First, 32 prompts of 8192 tokens generate 64 more each. Then the tokens of smaller
batches are compared with those of DynamicCache. Last, the largest batch of 8192-token prompts is searched for each
cache.

With --at-once only the first part runs, and the prompts are prefilled in one piece instead of in chunks. Torch then
uses expandable segments, because activations of 7 GiB fragment its default allocator too much for the memory that is
left.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import report
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from vattn import CACHE_KEYWORD, VirtualCache

PROMPT, NEW = 8192, 64
CHUNK = 512
LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
TOKEN_BYTES = 32 * 2 * 8 * 128 * 2


def llama_3_8b() -> Any:
    """The model with random weights and no end-of-sequence token, so that it generates as many tokens as it is told."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LLAMA_3_8B, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    return model


def used() -> int:
    """Bytes of device memory in use, by any process."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def clean() -> None:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def prompts(batch: int, length: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, LLAMA_3_8B.vocab_size, (batch, length), device="cuda")
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def generate(model: Any, cache: Any, batch: int, length: int, new: int, **options: Any) -> torch.Tensor:
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, **options}
    return model.generate(**prompts(batch, length), **{CACHE_KEYWORD: cache}, **options)


def run_32(model: Any, name: str, cache: Any, weights: int, chunk: int | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Generates 64 tokens behind each of 32 prompts of 8192; returns the row of measurements, and the tokens."""
    clean()
    start = time.perf_counter()
    tokens = generate(model, cache, 32, PROMPT, NEW, prefill_chunk_size=chunk)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    cached = 32 * cache.get_seq_length() * TOKEN_BYTES
    row = {
        "what": "32 x 8192 + 64",
        "cache": name,
        "prefill_chunk": chunk,
        "seconds": seconds,
        "kv_bytes_of_tokens": cached,
        "device_used_at_end": used(),
        "weights": weights,
        "torch_peak_allocated": torch.cuda.max_memory_allocated(),
        "torch_peak_reserved": torch.cuda.max_memory_reserved(),
        "kv_physical_peak": None,
        "activations_peak": None,
    }
    if isinstance(cache, VirtualCache):
        stats = cache.stats()
        cache.check()
        row["kv_physical_peak"] = stats.peak
        # The cache is not in torch's memory here, so what torch allocated besides the weights was activations.
        row["activations_peak"] = torch.cuda.max_memory_allocated() - weights
        row["driver_calls"] = stats.driver_calls
    return row, tokens


def fits(model: Any, make: Callable[[int], Any], batch: int) -> bool:
    """Whether the prompts of a batch and one decode step fit into the device's memory.

    The K and V of the prompts are written through ``cache.update`` in chunks, layer by layer, as a chunked prefill of
    the model writes them, but nothing else of the prefill is computed. Meanwhile, memory as large as the activations of
    such a chunk is held. The decode step is real.
    """
    try:
        cache = make(batch)
        chunk = torch.empty(batch * CHUNK, LLAMA_3_8B.intermediate_size, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(batch, 8, CHUNK, 128, device="cuda", dtype=torch.bfloat16)  # equal rows would share memory
        with torch.no_grad():
            for _ in range(PROMPT // CHUNK):
                for layer in range(LLAMA_3_8B.num_hidden_layers):
                    cache.update(k, k, layer)
            del chunk, k
            model(prompts(batch, 1)["input_ids"], **{CACHE_KEYWORD: cache}, use_cache=True)
        torch.cuda.synchronize()
    except MemoryError:
        return False
    except torch.OutOfMemoryError:
        return False
    finally:
        cache = None
        clean()
    return True


def largest(model: Any, make: Callable[[int], Any], guess: int) -> int:
    """The largest batch that fits, searched for from a guess in steps of one."""
    best = guess
    if fits(model, make, best):
        while fits(model, make, best + 1):
            best += 1
        return best
    while best > 1 and not fits(model, make, best - 1):
        best -= 1
    return best - 1


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--at-once", action="store_true", help="prefill 32 x 8192 in one piece")
    options = parser.parse_args()
    if options.at_once:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # torch reads it at its first allocation
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = llama_3_8b()
    clean()
    weights = torch.cuda.memory_allocated()
    rows: list[dict[str, Any]] = []

    def virtual() -> VirtualCache:
        return VirtualCache(LLAMA_3_8B, max_len=16384)

    def dynamic() -> DynamicCache:
        return DynamicCache(config=LLAMA_3_8B)

    chunk = None if options.at_once else 2048
    ours, tokens = run_32(model, "vattn", virtual(), weights, chunk)
    theirs, dynamic_tokens = run_32(model, "dynamic", dynamic(), weights, chunk)
    same = torch.equal(tokens, dynamic_tokens)
    rows += [
        ours,
        theirs,
        {"what": "tokens equal to DynamicCache", "batch": 32, "prompt": PROMPT, "equal": same},
    ]
    ratio = ours["kv_physical_peak"] / ours["kv_bytes_of_tokens"]
    if options.at_once:
        bars = {"memory_over_tokens_32x8192_at_once": ratio}
        report.write("memory_at_once", options.device, rows, bars, options.out)
        return

    for batch, length in ((1, 1000), (8, 2048)):
        clean()
        tokens, again, theirs = (generate(model, make(), batch, length, NEW) for make in (virtual, dynamic, dynamic))
        same = same and torch.equal(tokens, theirs)
        rows.append(
            {
                "what": "tokens equal to DynamicCache",
                "batch": batch,
                "prompt": length,
                "equal": torch.equal(tokens, theirs),
                "dynamic_repeats_itself": torch.equal(again, theirs),
            }
        )
    clean()
    sizes = {
        "vattn": largest(model, lambda batch: virtual(), 61),
        "dynamic": largest(model, lambda batch: dynamic(), 56),
        "static": largest(model, lambda batch: StaticCache(LLAMA_3_8B, max_cache_len=PROMPT + NEW), 55),
        "static_16384": largest(model, lambda batch: StaticCache(LLAMA_3_8B, max_cache_len=16384), 28),
    }
    rows += [{"what": "largest batch of 8192-token prompts", "cache": name, "batch": n} for name, n in sizes.items()]
    bars = {
        "memory_over_tokens_32x8192": ratio,
        "tokens_equal_to_dynamic": float(same),
        **{f"max_batch_8192_{name}": float(size) for name, size in sizes.items()},
    }
    report.write("memory", options.device, rows, bars, options.out)


if __name__ == "__main__":
    main()
