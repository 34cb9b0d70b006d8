"""What sharing memory saves and costs, for rows of Llama-3-8B (128 KiB per token) and for a model of that shape.

``fork32_memory_ratio``: peak memory while 32 samples of an 8192-token prompt grow by 256 tokens each at 40 steps/s,
over the bytes of one prompt and the new tokens; the worse of that and the same with a prompt of 8107 tokens.
``fork32_ms``, ``fork32_compacted_ms``: milliseconds to make the 32 forks of a prompt that was mapped at once, before
and after ``compact``; ``fork32_compacted_for_ms``: after ``compact(forks=32)``.
``beam8_memory_ratio_to_dynamic``: peak K/V memory of ``model.generate`` with 8 beams on a prompt of 4096 tokens and 64
new ones, over the bytes of DynamicCache's tensors at the end.
``beam8_copied_per_step``: the most bytes that the reordering of one step copies, over the bytes of the beams' K/V.
``beam8_tokens_equal``: 1 where the tokens are those of DynamicCache, with transformers' attention.
``beam_step_over_dynamic``: the time of ``generate`` over that with DynamicCache; medians of rounds in turns, after a
warm-up of both. The cache of vattn, whose steps are replays, is kept from round to round.
``prefix_speedup``: the time to prefill 8192 tokens, over the time to open a sequence as a fork of a cached prefix that
has all but the last 100 of them.
``next_turn_driver_calls``: memory calls and copies to open a chat's next turn in the slot of the last one.
``swap_link_fraction``: the rate of swapping 1 and 2 GiB out and in, over that of plain copies to and from page-locked
memory; the lowest of both sizes and directions.
``swap_slowdown``: how much longer the attention of a decode step over 16 sequences of 8192 tokens takes while another
sequence is swapped out and in without pause, as a part of the time without.
Without a GPU only the parts that need none run.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import report
import torch

from vattn import KVCache, VirtualCache
from vattn.bench import decode, mapping
from vattn.bench.replay import MEMORY_CALLS
from vattn.hf.layer_views import LayerGroupViews

PROMPT = 8192
SAMPLES, NEW = 32, 256
ROUNDS = 3


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def seconds(device: str, work: Any, *args: Any, **options: Any) -> float:
    synchronize(device)
    start = time.perf_counter()
    work(*args, **options)
    synchronize(device)
    return time.perf_counter() - start


def forks(device: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows: list[dict[str, Any]] = []
    for how in ("at once", "token by token"):
        for compacted in ("no", "yes", "for the forks"):
            ahead = SAMPLES if compacted == "for the forks" else 0
            times: list[float] = []
            again: list[float] = []
            with KVCache(mapping.layout(), slots=SAMPLES + 1, device=device, lookahead=0) as cache:
                prompt = cache.open()
                for step in [PROMPT] if how == "at once" else [1] * PROMPT:
                    prompt.grow(step)
                took = seconds(device, prompt.compact, forks=ahead) if compacted != "no" else 0.0
                extents = len(cache.map()[prompt.slot]["runs"][0]["extents"])
            for _ in range(5):
                with KVCache(mapping.layout(), slots=SAMPLES + 1, device=device) as cache:
                    prompt = cache.open()
                    for step in [PROMPT] if how == "at once" else [1] * PROMPT:
                        prompt.grow(step)
                    for rounds in (times, again):
                        if compacted != "no":
                            prompt.compact(forks=ahead)
                        cache.wait_idle()
                        before = cache.stats().aliases
                        start = time.perf_counter()
                        made = prompt.fork(n=SAMPLES)
                        rounds.append(time.perf_counter() - start)
                        aliases = cache.stats().aliases - before
                        cache.close_all(made)
                        cache.trim()
            rows.append(
                {
                    "prompt mapped": how,
                    "compacted": compacted,
                    "compacting ms": took * 1e3,
                    "extents": extents,
                    "aliases": aliases,
                    "32 forks ms": statistics.median(times) * 1e3,
                    "in slots used before ms": statistics.median(again) * 1e3,
                }
            )
    ratios = []
    for length in (PROMPT, PROMPT - 85):
        with KVCache(mapping.layout(), slots=SAMPLES + 1, device=device) as cache:
            prompt = cache.open()
            prompt.grow(length)
            samples = prompt.fork(n=SAMPLES)
            clock = time.perf_counter()
            for grown in range(length, length + NEW):
                cache.grow_all(samples, grown + 1, min_truncate_length=grown)
                clock += 1 / 40
                time.sleep(max(0.0, clock - time.perf_counter()))
            peak = cache.stats().peak
            cache.check()
        tokens = (length + SAMPLES * NEW) * mapping.ROW_BYTES
        ratios.append(peak / tokens)
        rows.append(
            {"samples": SAMPLES, "prompt": length, "new": NEW, "peak": peak, "bytes of prompt and new tokens": tokens}
        )
    return rows, {
        "fork32_memory_ratio": max(ratios),
        "fork32_ms": rows[0]["32 forks ms"],
        "fork32_compacted_ms": rows[1]["32 forks ms"],
        "fork32_compacted_for_ms": rows[2]["32 forks ms"],
    }


def prefixes(device: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Opens sequences behind a cached prefix: in the slot of the last turn, as forks, as forks of compacted rows."""
    ids = list(range(PROMPT))
    rows: list[dict[str, Any]] = []

    def opened(cache: KVCache, what: str, tokens: list[int]) -> Any:
        before = cache.stats().driver_calls
        start = time.perf_counter()
        sequence = cache.open(tokens=tokens)
        took = time.perf_counter() - start
        after = cache.stats().driver_calls
        calls = sum(after[name] - before[name] for name in (*MEMORY_CALLS, "copy"))
        rows.append({"opened": what, "known": sequence.length, "ms": took * 1e3, "calls and copies": calls})
        return sequence

    with KVCache(mapping.layout(), slots=16, device=device) as cache:
        chat = cache.open(tokens=ids)
        chat.grow(PROMPT)
        chat.close(tokens=ids)
        cache.wait_idle()
        turn = opened(cache, "next turn", [*ids, 1, 2, 3])
        turn.remember(ids)
        opened(cache, "fork", [*ids[:-100], 1, 2, 3])
        opened(cache, "fork, again", [*ids[:-100], 1, 2, 4])
        turn.close()
        opened(cache, "fork of a closed one", [*ids[:-100], 1, 2, 5])
        cache.wait_idle()
        opened(cache, "fork of a compacted one", [*ids[:-100], 1, 2, 6])
        cache.check()
    return rows, {"next_turn_driver_calls": float(rows[0]["calls and copies"]), "open ms": rows[1]["ms"]}


def link(nbytes: int) -> tuple[float, float]:
    """Bytes per second of plain copies from the device to page-locked memory, and back."""
    here = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(nbytes, dtype=torch.uint8, device="cuda")
    out, back = (
        statistics.median(seconds("cuda", to.copy_, source, non_blocking=True) for _ in range(5))
        for to, source in ((here, there), (there, here))
    )
    return nbytes / out, nbytes / back


def swaps(device: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows: list[dict[str, Any]] = []
    ratios, bars = [], {}
    for tokens in (PROMPT, 2 * PROMPT):
        nbytes = tokens * mapping.ROW_BYTES
        with KVCache(mapping.layout(2 * PROMPT), slots=2, device=device) as cache:
            sequence = cache.open()
            sequence.grow(tokens)
            sequence.swap_out()  # allocates the host memory, which is not to be timed
            sequence.swap_in()
            out, back = [], []
            for _ in range(5):
                out.append(seconds(device, sequence.swap_out))
                back.append(seconds(device, sequence.swap_in))
            sequence.close()
        row: dict[str, Any] = {
            "swapped GiB": nbytes / 2**30,
            "out GB/s": nbytes / statistics.median(out) / 1e9,
            "in GB/s": nbytes / statistics.median(back) / 1e9,
        }
        if device.startswith("cuda"):
            link_out, link_in = link(nbytes)
            row |= {"link out GB/s": link_out / 1e9, "link in GB/s": link_in / 1e9}
            ratios += [row["out GB/s"] * 1e9 / link_out, row["in GB/s"] * 1e9 / link_in]
        rows.append(row)
    if ratios:
        bars["swap_link_fraction"] = min(ratios)
    return rows, bars


def swap_slowdown() -> tuple[list[dict[str, Any]], dict[str, float]]:
    batch = 16
    with KVCache(mapping.layout(), slots=batch + 2, device="cuda") as cache:
        others = [cache.open(slot=slot) for slot in range(batch)]
        cache.grow_all(others, PROMPT, min_truncate_length=0)
        k, v = ([get(layer)[:batch, :PROMPT].transpose(1, 2) for layer in range(32)] for get in (cache.k, cache.v))
        query = torch.randn(batch, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
        sequence = cache.open()
        sequence.grow(PROMPT)
        side = torch.cuda.Stream()

        def step() -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for layer in range(32):
                torch.nn.functional.scaled_dot_product_attention(query, k[layer], v[layer], enable_gqa=True)
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        def steps(swapping: bool) -> list[float]:
            times = []
            for number in range(120):
                if swapping and number % 4 == 0:
                    with torch.cuda.stream(side):
                        (sequence.swap_in if sequence.swapped else sequence.swap_out)()
                times.append(step())
            torch.cuda.synchronize()
            return times

        steps(True)
        alone, beside = [], []
        for _ in range(3):
            alone += steps(False)
            beside += steps(True)
    row = {
        "attention over 16 x 8192": "32 layers",
        "alone ms": statistics.median(alone),
        "beside swapping ms": statistics.median(beside),
        "alone p90 ms": statistics.quantiles(alone, n=10)[8],
        "beside p90 ms": statistics.quantiles(beside, n=10)[8],
    }
    return [row], {"swap_slowdown": row["beside swapping ms"] / row["alone ms"] - 1}


def beams() -> tuple[list[dict[str, Any]], dict[str, float]]:
    import memory
    from transformers import DynamicCache

    torch.backends.cuda.enable_cudnn_sdp(False)
    model = memory.llama_3_8b()
    copied: list[int] = []
    move = LayerGroupViews.move

    def counted(self: LayerGroupViews, sources: Any, targets: Any, batch: int, first: int, end: int) -> None:
        copied[-1] += len(targets) * (end - first) * memory.TOKEN_BYTES
        move(self, sources, targets, batch, first, end)

    class Watched(VirtualCache):
        def reorder_cache(self, beam_idx: torch.Tensor) -> None:
            copied.append(-self.stats().copied)
            super().reorder_cache(beam_idx)
            copied[-1] += self.stats().copied

    # The cache of a configuration leaves attention to transformers. Moves of rows are counted here only.
    LayerGroupViews.move = counted  # type: ignore[method-assign]
    tokens = []
    for cache in (Watched(memory.LLAMA_3_8B, max_len=8192), DynamicCache(config=memory.LLAMA_3_8B)):
        memory.clean()
        tokens.append(memory.generate(model, cache, 1, 4096, 64, num_beams=8))
        if isinstance(cache, VirtualCache):
            peak = cache.stats().peak
            cache.check()
            cache.close()
        else:
            held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    LayerGroupViews.move = move  # type: ignore[method-assign]
    # This factory's model has the same weights but is another object, so nothing is attached to DynamicCache's model.
    [factory, *_] = decode.cache_factories(model, 8192, [], [])
    kept = VirtualCache(factory.model, max_len=8192)
    took: dict[str, list[float]] = {"vattn": [], "DynamicCache": []}
    for turn in range(1 + ROUNDS):
        for name in list(took)[:: -1 if turn % 2 else 1]:
            memory.clean()
            mine = name == "vattn"
            cache = kept if mine else DynamicCache(config=memory.LLAMA_3_8B)
            start = time.perf_counter()
            memory.generate(factory.model if mine else model, cache, 1, 4096, 64, num_beams=8)
            torch.cuda.synchronize()
            took[name].append(time.perf_counter() - start)
            if mine:
                kept.check()
                kept.reset()
            del cache
    steps = kept.decode_stats()
    kept.close()
    memory.clean()
    with torch.no_grad():
        ids = memory.prompts(1, PROMPT)["input_ids"]
        prefill = statistics.median(seconds("cuda", model, ids, use_cache=True, logits_to_keep=1) for _ in range(3))
    rows: list[dict[str, Any]] = [
        {
            "8 beams on 4096 tokens": name,
            "K/V bytes": nbytes,
            "seconds": statistics.median(took[name][1:]),
            "least seconds": min(took[name][1:]),
            "first seconds": took[name][0],
            "rounds": ROUNDS,
            **({"steps": str(steps)} if name == "vattn" else {}),
        }
        for name, nbytes in (("vattn", peak), ("DynamicCache", held))
    ]
    rows.append({"prefill of 8192 tokens, ms": prefill * 1e3})
    return rows, {
        "beam8_memory_ratio_to_dynamic": peak / held,
        "beam8_copied_per_step": max(copied) / held,
        "beam8_tokens_equal": float(torch.equal(*tokens)),
        "beam_step_over_dynamic": statistics.median(took["vattn"][1:]) / statistics.median(took["DynamicCache"][1:]),
        "prefill ms": prefill * 1e3,
    }


def main() -> None:
    options = report.options(__doc__.splitlines()[0]).parse_args()
    device = options.device
    rows: list[dict[str, Any]] = []
    bars: dict[str, float] = {}
    parts = [lambda: forks(device), lambda: prefixes(device), lambda: swaps(device)]
    if device.startswith("cuda"):
        parts += [swap_slowdown, beams]
    for part in parts:
        more, found = part()
        rows += more
        bars |= found
        for row in more:
            print(row, flush=True)
    opening = bars.pop("open ms")
    if "prefill ms" in bars:
        bars["prefix_speedup"] = bars.pop("prefill ms") / opening
    report.write("sharing", device, rows, bars, options.out)


if __name__ == "__main__":
    main()
