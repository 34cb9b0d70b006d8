"""Measures an engine: tokens per second of a mix of requests, times of one request, and the work of the host."""

from __future__ import annotations

import dataclasses
import itertools
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vattn.bench.mixes import Work
from vattn.bench.replay import MEMORY_CALLS
from vattn.engine.llm import LLM
from vattn.engine.sampling_params import SamplingParams
from vattn.transfer import Download

_READY = 48  # tokens that requests sample to see when iterations are at their speed
_REPEATS = 5  # of one request, whose median time counts


def _params(output: int, temperature: float) -> SamplingParams:
    return SamplingParams(temperature=temperature, ignore_eos=True, max_tokens=output, detokenize=False)


def _answered(llm: LLM, works: Iterable[Work], temperature: float) -> tuple[float, int]:
    """The seconds that requests take, and the tokens of their prompts that were known."""
    works = list(works)
    params = [_params(work.output, temperature) for work in works]
    start = time.perf_counter()
    outputs = llm.generate([work.prompt for work in works], params, use_tqdm=False)
    took = time.perf_counter() - start
    for work, output in zip(works, outputs, strict=True):
        if len(output.outputs[0].token_ids) != work.output:
            raise RuntimeError(f"a request for {work.output} tokens got {len(output.outputs[0].token_ids)}")
    return took, sum(output.num_cached_tokens for output in outputs)


def others(works: Iterable[Work], by: int, vocabulary: int) -> list[Work]:
    """Requests of the same lengths with other tokens, of which no prefix is known."""
    return [dataclasses.replace(work, prompt=[(token + by) % vocabulary for token in work.prompt]) for work in works]


def throughput(llm: LLM, rounds: list[list[Work]], temperature: float = 0.6) -> Iterator[dict[str, Any]]:
    """Measures tokens per second.

    All requests of a round come at once. The first round is one of the same lengths as the next one, with other tokens:
    graphs are captured and memory is mapped in it.

    Args:
        llm: the engine.
        rounds: the requests of each round.
        temperature: of all requests.

    Yields:
        A row for each round, also for the first one.
    """
    for number, works in enumerate([others(rounds[0], len(rounds), llm.engine.intake.vocabulary), *rounds]):
        before = _counts(llm)
        took, cached = _answered(llm, works, temperature)
        counts = {name: value - before[name] for name, value in _counts(llm).items()}
        sampled, prompts = sum(work.output for work in works), sum(len(work.prompt) for work in works)
        yield {
            "round": number,
            "warm-up": not number,
            "requests": len(works),
            "prompt tokens": prompts,
            "known tokens": cached,
            "sampled tokens": sampled,
            "seconds": took,
            "tokens/s": sampled / took,
            "memory calls/1000 tokens": 1000 * counts["calls"] / (prompts + sampled),
            "waited": counts["waited"] / took,
            "preemptions": counts["preemptions"],
            "graphs": llm.engine.tier.runner.graphs,
        }


def _counts(llm: LLM) -> dict[str, float]:
    """Memory calls of the driver, seconds that were waited for memory, and requests that lost their memory, so far."""
    preemptions = llm.engine.scheduler.requests.counters.preemptions
    if (cache := llm.engine.tier.cache) is None:
        return {"calls": 0, "waited": 0.0, "preemptions": preemptions}
    stats = cache.stats()
    calls = sum(stats.driver_calls[name] for name in MEMORY_CALLS)
    return {"calls": calls, "waited": stats.waited_seconds, "preemptions": preemptions}


def latency(llm: LLM, prompts: Iterable[int], output: int, vocabulary: int) -> list[dict[str, Any]]:
    """Measures one request at a time: its first token, and each further one.

    Args:
        llm: the engine.
        prompts: tokens of the prompts, a row for each.
        output: tokens that are sampled, at least 2.
        vocabulary: of the model.
    """
    if output < 2:
        raise ValueError(f"output must be at least 2, not {output}: the time of a further token is asked for")
    chance, rows = random.Random(1), []
    for length in prompts:

        def timed(count: int, length: int = length) -> float:
            prompt = [chance.randint(0, min(10_000, vocabulary - 1)) for _ in range(length)]  # of which none is known
            return _answered(llm, [Work(prompt, count)], 0.0)[0]

        timed(output), timed(1)
        first = statistics.median(timed(1) for _ in range(_REPEATS))
        whole = statistics.median(timed(output) for _ in range(_REPEATS))
        per_token = (whole - first) / (output - 1)
        row = {"prompt tokens": length, "sampled tokens": output, "first token ms": first * 1e3}
        rows.append({**row, "ms per token": per_token * 1e3, "ms per token, all": whole / output * 1e3})
    return rows


def host_work(llm: LLM, requests: int, vocabulary: int, iterations: int = 100) -> dict[str, Any]:
    """Measures the host's work in iterations in which all requests sample a token each.

    Args:
        llm: the engine, which lets that many requests run.
        requests: how many run.
        vocabulary: of the model.
        iterations: that are measured.

    Returns:
        A row with milliseconds of an iteration: of the whole, of waiting for tokens, of the scheduler, and of the host,
        which is the whole without the waiting.
    """
    _require_positions(llm, 32 + iterations + 32)
    engine, chance = llm.engine, random.Random(2)
    spent = dict.fromkeys(("waiting", "schedule", "read"), 0.0)
    for number in range(requests):
        prompt = [chance.randint(0, min(10_000, vocabulary - 1)) for _ in range(32)]
        engine.add(f"host-{number}", prompt, _params(iterations + 32, 0.6))
    with (
        _timed(Download, "lists", spent, "waiting"),
        _timed(engine.scheduler, "schedule", spent, "schedule"),
        _timed(engine.scheduler, "read", spent, "read"),
    ):
        for _ in range(24):
            engine.step(final_only=True)
        spent.update(dict.fromkeys(spent, 0.0))
        start = time.perf_counter()
        for _ in range(iterations):
            engine.step(final_only=True)
        whole = time.perf_counter() - start
    engine.cancel([f"host-{number}" for number in range(requests)])
    times = {"whole": whole, **spent, "host": whole - spent["waiting"], "scheduler": spent["schedule"] + spent["read"]}
    return {"requests": requests, **{f"{name} ms": 1e3 * took / iterations for name, took in times.items()}}


def resized(llm: LLM, requests: int, vocabulary: int, prompt: int = 512, output: int = 1024) -> dict[str, Any]:
    """Measures what running requests have mapped, and what a resize to half of it gives back while they run.

    Args:
        llm: the engine, on the slots of a ``KVCache``, which lets that many requests run.
        requests: how many run.
        vocabulary: of the model.
        prompt: tokens of each prompt.
        output: tokens that each samples.

    Returns:
        A row with the bytes mapped under running requests, over those of their rows, of the rows that kernels load
        behind these, and of one granule each; the memory that the cache has before and after the resize, and what
        became free on the device; and how many requests were preempted, and failed.

    Raises:
        ValueError: the engine has no ``KVCache``, or no room for so many requests at once.
    """
    _require_positions(llm, prompt + output)
    engine, chance = llm.engine, random.Random(4)
    if (cache := engine.tier.cache) is None:
        raise ValueError("the engine has no KVCache: its rows are computed one by one")
    for number in range(requests):
        tokens = [chance.randint(0, min(10_000, vocabulary - 1)) for _ in range(prompt)]
        engine.add(f"resize-{number}", tokens, _params(output, 0.0))
    ended: list[Any] = []
    while sum(branch.sampled for branch in engine.scheduler.requests.decoding) < requests * output // 2:
        ended += engine.step(final_only=True)
        if ended:
            break
    if len(engine.scheduler.requests.decoding) < requests:
        engine.cancel([f"resize-{number}" for number in range(requests)])
        raise ValueError(f"there is no room for {requests} requests of {prompt + output} tokens at once")
    before, layout = cache.stats(), cache.layout
    positions = sum(branch.launched for branch in engine.scheduler.requests.decoding)
    needed = (positions + requests * cache.tail_rows) * layout.bytes_per_token + requests * layout.granularity
    held, free = before.mapped - before.parked - before.spare, _free(cache.device)
    preemptions = engine.scheduler.requests.counters.preemptions
    engine.resize(held // 2)
    while engine.resizing:
        ended += engine.step(final_only=True)
    after, gained = cache.stats(), _free(cache.device) - free
    while engine.unfinished:
        ended += engine.step(final_only=True)
    engine.resize(before.budget or before.physical)
    return {
        "requests": requests,
        "mapped, over needed": held / needed,
        "physical MiB, before": before.physical / 2**20,
        "budget MiB, after": held / 2 / 2**20,
        "physical MiB, after": after.physical / 2**20,
        "free on the device MiB, more": gained / 2**20,
        "preemptions": engine.scheduler.requests.counters.preemptions - preemptions,
        "failed": requests - sum(answer.outputs[0].finish_reason == "length" for answer in ended),
    }


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _require_positions(llm: LLM, positions: int) -> None:
    if llm.engine.max_model_len < positions:
        raise ValueError(f"max_model_len must be at least {positions}, not {llm.engine.max_model_len}")


@contextmanager
def _timed(owner: Any, name: str, spent: dict[str, float], key: str) -> Iterator[None]:
    """Adds the time that calls of a method take to ``spent[key]``."""
    plain = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return plain(*args, **options)
        finally:
            spent[key] += time.perf_counter() - start

    own = name in vars(owner)
    setattr(owner, name, timed)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, plain)
        else:
            delattr(owner, name)


def ready(llm: LLM, start: float, requests: int, vocabulary: int) -> dict[str, Any]:
    """Measures when an engine that was just made is at its steady speed, with many requests and with one.

    Args:
        llm: the engine.
        start: ``time.perf_counter()`` before it was made.
        requests: how many run at once.
        vocabulary: of the model.

    Returns:
        A row with seconds since ``start``: when the engine was made, and from when on iterations of that many requests,
        and then of one, took at most 1.1 times as long as later ones.
    """
    _require_positions(llm, 32 + _READY)
    row: dict[str, Any] = {"requests": requests, "made s": time.perf_counter() - start}
    chance = random.Random(3)
    for count in (requests, 1):
        for number in range(count):
            prompt = [chance.randint(0, min(10_000, vocabulary - 1)) for _ in range(32)]
            llm.engine.add(f"ready-{count}-{number}", prompt, _params(_READY, 0.6))
        ends = []
        while llm.engine.unfinished:
            llm.engine.step(final_only=True)
            ends.append(time.perf_counter())
        took = [end - before for before, end in itertools.pairwise(ends)]
        steady = statistics.median(took[-_READY // 2 : -4])
        reached = max((place for place, each in enumerate(took[: _READY // 2]) if each > 1.1 * steady), default=-1) + 1
        row[f"ready s, {count}"] = ends[reached] - start
        row[f"steady ms, {count}"] = steady * 1e3
    return row
