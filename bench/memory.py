"""How much memory a Llama-3-8B shape takes for its KV cache on one GPU, through vattn and its peers.

Random weights, bfloat16, stock SDPA. First the tokens are compared with DynamicCache's; then 32 prompts of 8192 tokens
generate 64 more; then the largest batch of 8192-token prompts is searched for each cache.

All of it with torch's expandable segments, as torch itself advises when memory is tight: a prefill of 32 x 8192 tokens at
once has activations of 7 GiB, whose remains fragment the default allocator.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # read when torch first allocates

import report
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from vattn import VirtualCache

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


def used() -> int:
    """Bytes of the device that are taken, by whomever."""
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
    return model.generate(**prompts(batch, length), past_key_values=cache, **options)


def run_32(model: Any, name: str, cache: Any, weights: int) -> dict[str, Any]:
    """32 prompts of 8192 tokens and 64 new ones each, prefilled at once."""
    clean()
    start = time.perf_counter()
    tokens = generate(model, cache, 32, PROMPT, NEW)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    cached = 32 * cache.get_seq_length() * TOKEN_BYTES
    row = {
        "what": "32 x 8192 + 64",
        "cache": name,
        "seconds": seconds,
        "kv_bytes_of_tokens": cached,
        "device_used_at_end": used(),
        "weights": weights,
        "torch_peak_allocated": torch.cuda.max_memory_allocated(),
        "torch_peak_reserved": torch.cuda.max_memory_reserved(),
        "kv_physical_peak": None,
        "activations_peak": None,
        "tokens_hash": hash(tuple(tokens[:, PROMPT:].flatten().tolist())),
    }
    if isinstance(cache, VirtualCache):
        stats = cache.stats()
        cache.check()
        row["kv_physical_peak"] = stats.peak
        # The cache is not torch's memory here: what torch had beside the weights was activations.
        row["activations_peak"] = torch.cuda.max_memory_allocated() - weights
        row["driver_calls"] = stats.driver_calls
    return row


def fits(model: Any, make: Callable[[int], Any], batch: int) -> bool:
    """Whether the prompts of a batch and one decoding step fit.

    The prefill's K and V are written through ``cache.update`` in chunks, layer by layer, as a chunked prefill of the
    model writes them; its arithmetic is left out. Activations of such a chunk are held beside. The step is real.
    """
    try:
        cache = make(batch)
        chunk = torch.empty(batch * CHUNK, LLAMA_3_8B.intermediate_size, device="cuda", dtype=torch.bfloat16)
        k = torch.full((batch, 8, CHUNK, 128), 0.01, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            for _ in range(PROMPT // CHUNK):
                for layer in range(LLAMA_3_8B.num_hidden_layers):
                    cache.update(k, k, layer)
            del chunk, k
            model(prompts(batch, 1)["input_ids"], past_key_values=cache, use_cache=True)
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
    """The largest batch that fits, walking from a guess."""
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
    options = parser.parse_args()
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LLAMA_3_8B, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    clean()
    weights = torch.cuda.memory_allocated()
    rows: list[dict[str, Any]] = []

    def virtual(max_len: int = 16384) -> VirtualCache:
        return VirtualCache(LLAMA_3_8B, max_len=max_len)

    for batch, length in ((1, 1000), (8, 2048)):
        same = torch.equal(
            generate(model, virtual(), batch, length, NEW),
            generate(model, DynamicCache(config=LLAMA_3_8B), batch, length, NEW),
        )
        rows.append({"what": "tokens equal to DynamicCache", "batch": batch, "prompt": length, "equal": same})
        print(rows[-1], flush=True)
        clean()

    ours = run_32(model, "vattn", virtual(), weights)
    print(ours, flush=True)
    theirs = run_32(model, "dynamic", DynamicCache(config=LLAMA_3_8B), weights)
    print(theirs, flush=True)
    rows += [ours, theirs]
    rows.append({"what": "32 x 8192 + 64: tokens equal", "equal": ours["tokens_hash"] == theirs["tokens_hash"]})
    clean()

    sizes = {
        "vattn": largest(model, lambda batch: virtual(), 58),
        "dynamic": largest(model, lambda batch: DynamicCache(config=LLAMA_3_8B), 50),
        "static": largest(model, lambda batch: StaticCache(LLAMA_3_8B, max_cache_len=PROMPT + NEW), 56),
        "static_16384": largest(model, lambda batch: StaticCache(LLAMA_3_8B, max_cache_len=16384), 28),
    }
    rows += [{"what": "largest batch of 8192-token prompts", "cache": name, "batch": n} for name, n in sizes.items()]
    bars = {
        "memory_over_tokens_32x8192": ours["kv_physical_peak"] / ours["kv_bytes_of_tokens"],
        "tokens_equal_32x8192": float(ours["tokens_hash"] == theirs["tokens_hash"]),
        **{f"max_batch_8192_{name}": sizes[name] for name in ("vattn", "dynamic", "static", "static_16384")},
    }
    report.write("memory", options.device, rows, bars, options.out)


if __name__ == "__main__":
    main()
