"""What mapping memory costs and what the mapper saves, for rows of Llama-3-8B, which have 128 KiB for each token.

``overhead_ratio_cpp``: the time to create and map a handle of 2 MiB and set access to it, through vattn's classes over
bare driver calls, in C++.
``hit_us``: microseconds of a growth into memory that was mapped ahead, in C++.
``prompt_8192_ms``: milliseconds to map a prompt of 8192 tokens (1 GiB) at once, on fresh memory.
``grow_waits_100``, ``grow_waits_5000``: how many growths after the first had to wait, of one sequence that grows to
8192 tokens at 100 and at 5000 tokens/s. Without a GPU the slower one grows to 1024 tokens.
``wait_fraction_64``: the part of the time for which the caller waited, with 64 sequences that grow at 40 steps/s and
close and open at random.
``calls_per_1000_tokens``, ``..._full``, ``waste_mean``, ``peak_over_tokens``: replays of requests whose lengths have
the median and the 90th percentile that the Sarathi-Serve paper gives for openchat_sharegpt4, at 40 steps/s after a
warm-up. They are served with a budget 20% above the most live tokens, and (``..._full``) with one 20% below them, for
which every admission waits. The waste is memory mapped under running sequences that is neither rows nor free for others
to take, over the rows. The peak is that of memory mapped under running sequences that is not free for others to take,
over the peak of the rows.
``launch_p99_ratio``: the 99th percentile of the time to launch a kernel while the mapper is busy for 64 sequences that
decode as fast as launches allow, over that with an idle mapper; medians of ten rounds in turns. ``..._flat_out``: the
same with twenty times the work. ``launch_p99_noise``: the highest over the lowest of the idle rounds.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from typing import Any

import report
import torch

from vattn import KVCache
from vattn.bench import mapping
from vattn.bench.trace import generate


def waits(device: str, rate: float, tokens: int) -> dict[str, Any]:
    """Grows one sequence to ``tokens`` at ``rate`` tokens/s, and counts how often it had to wait for memory."""
    with KVCache(mapping.layout(), slots=1, device=device) as cache, cache.open() as sequence:
        sequence.grow(1)
        before = cache.stats()
        clock = time.perf_counter()
        for _ in range(tokens - 1):
            sequence.grow(1)
            clock += 1 / rate
            while (left := clock - time.perf_counter()) > 0:
                time.sleep(left if left > 1e-3 else 0)
        after = cache.stats()
    return {
        "tokens/s": rate,
        "tokens": tokens,
        "waits": after.misses - before.misses,
        "hits": after.hits - before.hits,
        "waited seconds": after.waited_seconds - before.waited_seconds,
    }


def together(device: str, sequences: int, seconds: float) -> dict[str, Any]:
    """Grows sequences at 40 steps/s. In each step some close, and others open with a prompt of up to 2000 tokens."""
    source = random.Random(0)
    with KVCache(mapping.layout(), slots=2 * sequences, device=device) as cache:
        running = []
        coming: list[tuple[Any, int]] = []
        start = clock = time.perf_counter()
        steps = 0
        while clock - start < seconds:
            while len(running) + len(coming) < sequences:
                prompt = source.randint(1, 2000)
                sequence = cache.open(expected=prompt)
                sequence.prefetch(prompt)
                coming.append((sequence, prompt))
            for sequence, prompt in [one for one in coming if one[0].capacity >= one[1]]:
                sequence.grow(prompt)
                running.append(sequence)
                coming.remove((sequence, prompt))
            for sequence in running:
                sequence.grow(1)
            for sequence in [one for one in running if source.random() < 0.005]:
                sequence.close()
                running.remove(sequence)
            steps += 1
            clock += 1 / 40
            time.sleep(max(0.0, clock - time.perf_counter()))
        took = time.perf_counter() - start
        stats = cache.stats()
    return {
        "sequences": sequences,
        "steps": steps,
        "adopted": stats.adopted,
        "hits": stats.hits,
        "misses": stats.misses,
        "wait fraction": stats.waited_seconds / took,
    }


# The mapper's loads: how many kernels are launched between two requests for memory, each of which is for 64 tokens, as
# of one step of 64 sequences. An eager decode step of Llama-3-8B has 1170 kernels (36 per layer, counted in
# transformers).
LOADS = {"idle": None, "64 sequences": 1170, "flat out": 50}


def launches(device: str, *, rounds: int = 10, steps: int = 6) -> list[dict[str, Any]]:
    """Percentiles of the time to launch a small kernel, in turns at each load of the mapper."""
    value = torch.zeros(1, device=device)
    rows = []
    with KVCache(mapping.layout(), slots=8, device=device) as cache, cache.open() as sequence:
        for load, every in [*LOADS.items()] * rounds:
            sequence.truncate(0)
            cache.trim()
            sequence.grow(1)
            torch.cuda.synchronize()
            times = []
            asked = 2048
            for launch in range(steps * 1170):
                if launch % (every or 50) == 0:
                    asked = asked + 64 if asked < 10_000 else 2048
                    if every and asked == 2048:
                        sequence.truncate(0)
                        cache.trim()
                        sequence.grow(1)
                    sequence.prefetch(asked if every else 1)
                    value.add_(1)  # not timed: it reloads what ``prefetch`` has evicted from the CPU's caches
                start = time.perf_counter()
                value.add_(1)
                times.append((time.perf_counter() - start) * 1e6)
                if launch % 500 == 0:
                    torch.cuda.synchronize()
            cuts = statistics.quantiles(times, n=100, method="inclusive")
            rows.append({"mapper": load, "launch p50 us": cuts[49], "p99 us": cuts[98], "max us": max(times)})
    return rows


def fragmented(device: str) -> list[dict[str, Any]]:
    """The time to map an extent, and a prompt of 1 GiB, with all memory free and with every other granule taken."""
    driver = mapping.driver_of(device)
    size = driver.granularity
    fresh, prompt = _extents(driver), mapping.prompts(device, tokens=(8192,))[0]["vattn ms"]
    count = (driver.memory_info()[0] - 2**30) // size
    handles = [driver.create(size) for _ in range(count)]
    for handle in handles[::2]:
        driver.release(handle)
    rows = [
        {"extent MiB": mib, "fresh us": before, "fragmented us": after}
        for (mib, before), after in zip(fresh.items(), _extents(driver).values(), strict=True)
    ]
    rows.append(
        {"prompt": 8192, "fresh ms": prompt, "fragmented ms": mapping.prompts(device, tokens=(8192,))[0]["vattn ms"]}
    )
    for handle in handles[1::2]:
        driver.release(handle)
    return rows


def _extents(driver: Any, rounds: int = 20) -> dict[float, float]:
    medians = {}
    for granules in (1, 2, 4, 8, 16, 32, 64):
        nbytes = granules * driver.granularity
        base = driver.reserve(nbytes)
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            handle = driver.create(nbytes)
            driver.map(base, nbytes, handle)
            driver.set_access(base, nbytes)
            times.append((time.perf_counter() - start) * 1e6)
            driver.unmap(base, nbytes)
            driver.release(handle)
        driver.free_address(base, nbytes)
        medians[nbytes / 2**20] = statistics.median(times)
    return medians


def main() -> None:
    parser = report.options(__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=5000, help="of the replay")
    parser.add_argument("--warm-up", type=int, default=4000, help="of the requests, the ones served before measuring")
    parser.add_argument("--concurrency", type=int, default=128, help="sequences at once in the replay")
    parser.add_argument("--steps", type=int, default=1500, help="steps to measure of each replay")
    options = parser.parse_args()
    device, on_gpu = options.device, options.device.startswith("cuda")
    rows: list[dict[str, Any]] = mapping.call_latency(device)
    native = [json.loads(line) for line in report.native("map_latency", "cuda" if on_gpu else "cpu").splitlines()]
    rows += native
    prompts = mapping.prompts(device)
    rows += [*prompts, *mapping.growth(device)]
    slow, fast = waits(device, 100, 8192 if on_gpu else 1024), waits(device, 5000, 8192)
    crowd = together(device, 64, 30)
    rows += [slow, fast, crowd]
    bars: dict[str, float] = {
        "hit_us": native[-1]["hit_us"],
        "prompt_8192_ms": prompts[-1]["vattn ms"],
        "grow_waits_100": slow["waits"],
        "grow_waits_5000": fast["waits"],
        "wait_fraction_64": crowd["wait fraction"],
    }
    if on_gpu:
        bars["overhead_ratio_cpp"] = native[0]["vattn_us"] / native[0]["bare_us"]
        launched = launches(device)
        rows += [*launched, *fragmented(device)]
        idle, busy, flat_out = ([row["p99 us"] for row in launched if row["mapper"] == load] for load in LOADS)
        bars["launch_p99_ratio"] = statistics.median(busy) / statistics.median(idle)
        bars["launch_p99_ratio_flat_out"] = statistics.median(flat_out) / statistics.median(idle)
        bars["launch_p99_noise"] = max(idle) / min(idle)
    replays = mapping.replays(
        device,
        generate("sharegpt", options.requests),
        concurrency=options.concurrency,
        warm_up=options.warm_up,
        settling=options.concurrency,
        steps_per_second=40,
        max_steps=options.steps,
        policies=mapping.POLICIES[:1],
    )
    # All policies are replayed with fewer requests, since most of them are slow.
    peers = mapping.replays(
        device,
        generate("sharegpt", 600),
        concurrency=options.concurrency,
        steps_per_second=40,
        max_steps=options.steps // 10,
    )
    rows += [*replays, *peers]
    spare, full = replays
    bars |= {
        "calls_per_1000_tokens": spare["calls / 1000 tokens"],
        "calls_per_1000_tokens_full": full["calls / 1000 tokens"],
        "wait_fraction_replay": max(spare["waited"], full["waited"]),
        "waste_mean": max(spare["waste"], full["waste"]),
        "peak_over_tokens": max(spare["needed / tokens"], full["needed / tokens"]),
    }
    report.write("map", device, rows, bars, options.out)


if __name__ == "__main__":
    main()
