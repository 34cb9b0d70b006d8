"""What mapping costs: each driver call, a prompt by policy, and served requests. The rows are those of a table."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vattn import _core
from vattn.cache import KVCache, resolve_device
from vattn.layout import GRANULARITY, KVLayout
from vattn.replay import MEMORY_CALLS, Result, replay
from vattn.trace import Request

ROW_BYTES = 128 * 1024  # a token of Llama-3-8B in bfloat16: 32 layers of K and V, 8 heads of 128
# Microseconds a call takes on an H100, for the host to charge; see docs/design.md.
CHARGES = {"create": 13.0, "map": 1.0, "set_access": 30.0, "unmap": 20.0, "release": 15.0}


def driver_of(device: str) -> _core.Driver:
    """A driver of its own: the device's, or the host's with an H100's costs charged."""
    where = resolve_device(device)
    if where.type == "cuda":
        torch.zeros(1, device=where)  # the context is torch's
        return _core.cuda_driver(where.index)
    driver = _core.host_driver(GRANULARITY)
    charge(driver)
    return driver


def charge(driver: _core.Driver) -> None:
    """On the host, makes every call take what it does on an H100."""
    for call, microseconds in CHARGES.items() if driver.kind == "cpu" else ():
        driver.charge(call, round(1000 * microseconds))


def call_latency(device: str, *, rounds: int = 100) -> list[dict[str, Any]]:
    """Microseconds of each call by handle size, through our driver and, where it is installed, cuda-python."""
    rows = []
    for size in (1, 2, 4, 8, 16, 32, 64):
        driver = driver_of(device)
        nbytes = size * driver.granularity
        base = driver.reserve(nbytes)
        times: dict[str, list[float]] = {call: [] for call in MEMORY_CALLS}

        def timed(call: str, work: Callable[..., Any], *args: Any, times: dict[str, list[float]] = times) -> Any:
            start = time.perf_counter()
            result = work(*args)
            times[call].append((time.perf_counter() - start) * 1e6)
            return result

        for _ in range(rounds):
            handle = timed("create", driver.create, nbytes)
            timed("map", driver.map, base, nbytes, handle)
            timed("set_access", driver.set_access, base, nbytes)
            timed("unmap", driver.unmap, base, nbytes)
            timed("release", driver.release, handle)
        driver.free_address(base, nbytes)
        rows += [_percentiles("vattn", call, nbytes, times[call]) for call in MEMORY_CALLS]
        if driver.kind == "cuda":
            rows += _cuda_python(nbytes, driver.device, rounds)
    return rows


def _percentiles(through: str, call: str, nbytes: int, times: list[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    row: dict[str, Any] = {"call": call, "MiB": nbytes / 2**20, "through": through}
    return row | {"p50 us": cuts[49], "p90 us": cuts[89], "p99 us": cuts[98]}


def _cuda_python(nbytes: int, device: int, rounds: int) -> list[dict[str, Any]]:
    try:
        from cuda.bindings import driver as cu  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return []
    prop = cu.CUmemAllocationProp()
    prop.type = cu.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    prop.location.type = cu.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    prop.location.id = device
    access = cu.CUmemAccessDesc()
    access.location = prop.location
    access.flags = cu.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    times: dict[str, list[float]] = {call: [] for call in MEMORY_CALLS}

    def timed(call: str, work: Callable[..., Any], *args: Any) -> Any:
        start = time.perf_counter()
        status, *result = work(*args)
        times[call].append((time.perf_counter() - start) * 1e6)
        if status != cu.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{call} through cuda-python failed: {status}")
        return result[0] if result else None

    status, base = cu.cuMemAddressReserve(nbytes, 0, 0, 0)
    if status != cu.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"reserve through cuda-python failed: {status}")
    for _ in range(rounds):
        handle = timed("create", cu.cuMemCreate, nbytes, prop, 0)
        timed("map", cu.cuMemMap, base, nbytes, 0, handle, 0)
        timed("set_access", cu.cuMemSetAccess, base, nbytes, [access], 1)
        timed("unmap", cu.cuMemUnmap, base, nbytes)
        timed("release", cu.cuMemRelease, handle)
    cu.cuMemAddressFree(base, nbytes)
    return [_percentiles("cuda-python", call, nbytes, times[call]) for call in MEMORY_CALLS]


def layout(max_len: int = 16384, *, scale: int = 1) -> KVLayout:
    """Rows of ``ROW_BYTES / scale`` in granules of ``GRANULARITY / scale``: the same calls in less memory."""
    return KVLayout.uniform(
        layers=32, kv_heads=8, head_dim=128 // scale, max_len=max_len, dtype="bfloat16",
        granularity=GRANULARITY // scale,
    )  # fmt: skip


def prompts(device: str, *, tokens: Sequence[int] = (128, 1024, 8192), rounds: int = 5) -> list[dict[str, Any]]:
    """Milliseconds to map a prompt on fresh memory, by policy; medians."""
    rows = []
    for n in tokens:
        ours = []
        with KVCache(layout(), slots=1, device=device) as cache:
            charge(cache._arena.driver)
            for _ in range(rounds):
                with cache.open() as sequence:
                    start = time.perf_counter()
                    sequence.grow(n)
                    ours.append((time.perf_counter() - start) * 1e3)
                cache.trim()
        handles = -(-n * ROW_BYTES // GRANULARITY)
        # A granule for each layer's K and V holds 1024 tokens.
        by_layer = 64 * -(-n * ROW_BYTES // (64 * GRANULARITY))
        row: dict[str, Any] = {"tokens": n, "vattn ms": statistics.median(ours)}
        for name, count, zero_page in (
            ("2 MiB handles ms", handles, False),
            ("a handle for each layer's K and V ms", by_layer, False),
            ("2 MiB handles over a zero page ms", handles, True),
        ):
            row[name] = statistics.median(_handles(device, count, zero_page) for _ in range(rounds))
        row["cudaMalloc ms"] = statistics.median(_torch(device, n * ROW_BYTES) for _ in range(rounds))
        rows.append(row)
    return rows


def _handles(device: str, count: int, zero_page: bool) -> float:
    """Milliseconds to create, map and open so many granules one by one; not zeroed."""
    driver = driver_of(device)
    size = driver.granularity
    base = driver.reserve(count * size)
    places = [base + number * size for number in range(count)]
    zero = driver.create(size) if zero_page else None
    if zero is not None:
        for at in places:
            driver.map(at, size, zero)
            driver.set_access(at, size)
    handles = []
    start = time.perf_counter()
    for at in places:
        if zero is not None:
            driver.unmap(at, size)
        handles.append(driver.create(size))
        driver.map(at, size, handles[-1])
        driver.set_access(at, size)
    took = (time.perf_counter() - start) * 1e3
    for at in places:
        driver.unmap(at, size)
    for handle in [*handles, *([] if zero is None else [zero])]:
        driver.release(handle)
    driver.free_address(base, count * size)
    return took


def _torch(device: str, nbytes: int) -> float:
    where = resolve_device(device)
    if where.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
    start = time.perf_counter()
    memory = torch.empty(nbytes, dtype=torch.uint8, device=where)
    took = (time.perf_counter() - start) * 1e3
    del memory
    return took


def live_tokens(requests: Sequence[Request], concurrency: int) -> int:
    """The most tokens at once that a server of so many sequences holds."""
    waiting = deque(requests)
    running: list[list[int]] = []
    most = 0
    while waiting:
        while waiting and len(running) < concurrency:
            request = waiting.popleft()
            running.append([request.prompt, request.output])
        for one in running:
            one[0] += 1
            one[1] -= 1
        most = max(most, sum(tokens for tokens, _ in running))
        running = [one for one in running if one[1]]
    return most


def replays(
    device: str,
    requests: Sequence[Request],
    *,
    concurrency: int,
    warm_up: int | None = None,
    steps_per_second: float | None = None,
    max_steps: int | None = None,
    mappers: Sequence[bool] = (True, False),
) -> list[dict[str, Any]]:
    """Served requests with a budget 20% above the live tokens and with a full one, with each of ``mappers``: on, off.

    On the host rows and granules are 1/128 of their size, and a call costs what it does on an H100. A server expects
    the 90th percentile of the outputs.
    """
    scale = 1 if resolve_device(device).type == "cuda" else 128
    row_bytes = ROW_BYTES // scale
    outputs = sorted(request.output for request in requests)
    rows = []
    for mapper in mappers:
        for budget, factor in (("live + 20%", 1.2), ("full", 0.8)):
            nbytes = int(factor * live_tokens(requests, concurrency) * row_bytes)
            longest = max(request.prompt + request.output for request in requests)
            described = layout(longest + 1, scale=scale)
            with KVCache(described, slots=2 * concurrency, device=device, budget=nbytes, mapper=mapper) as cache:
                charge(cache._arena.driver)
                result = replay(
                    cache,
                    requests,
                    concurrency=concurrency,
                    warm_up=len(requests) // 2 if warm_up is None else warm_up,
                    steps_per_second=steps_per_second,
                    output_guess=outputs[len(outputs) * 9 // 10],
                    max_steps=max_steps,
                )
            rows.append(_summary(budget, mapper, result))
    return rows


def _summary(budget: str, mapper: bool, result: Result) -> dict[str, Any]:
    return {
        "budget": budget,
        "mapper": "on" if mapper else "off",
        "calls / 1000 tokens": result.calls_per_1000_tokens,
        "in the caller": sum(result.caller_calls[call] for call in MEMORY_CALLS),
        "waited": result.wait_fraction,
        "waste": result.waste_mean,
        "unused": result.unused_mean,
        "needed / tokens": result.needed_peak / result.rows_peak,
        "physical / tokens": result.physical_peak / result.rows_peak,
        "running": result.running_mean,
        "thousand tokens": result.tokens / 1e3,
        "finished": result.finished,
        "preempted": result.preempted,
    }
