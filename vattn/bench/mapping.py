"""Measures what mapping costs: driver calls, prompts, growth and served requests. Results are the rows of a table."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vattn import _core
from vattn.bench.baseline_pages import Pages
from vattn.bench.replay import MEMORY_CALLS, Result, Served, replay
from vattn.bench.trace import Request
from vattn.errors import BudgetExceeded
from vattn.memory.device import resolve_device
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import GRANULARITY, KVLayout

_UNLIMITED = 1 << 62  # bytes
ROW_BYTES = 128 * 1024  # of a token of Llama-3-8B in bfloat16: K and V of 32 layers, with 8 heads of 128
# Microseconds that a call takes on an H100; the driver of the host is slowed down to them. See docs/design/driver.md.
CHARGES = {"create": 13.0, "map": 1.0, "set_access": 30.0, "unmap": 20.0, "release": 15.0}


def driver_of(device: str, *, scale: int = 1) -> _core.Driver:
    """Makes a driver: of a CUDA device, or of the host, as slow as an H100 and with granules divided by ``scale``."""
    where = resolve_device(device)
    if where.type == "cuda":
        torch.zeros(1, device=where)  # makes torch create the CUDA context
        return _core.cuda_driver(where.index)
    driver = _core.host_driver(GRANULARITY // scale)
    charge(driver)
    return driver


def charge(driver: _core.Driver) -> None:
    """Makes each call of a host driver take at least as long as on an H100; leaves a CUDA driver as it is."""
    for call, microseconds in CHARGES.items() if driver.kind == "cpu" else ():
        driver.charge(call, round(1000 * microseconds))


def call_latency(device: str, *, rounds: int = 100) -> list[dict[str, Any]]:
    """Returns percentiles of the microseconds of each call, by size of the handle.

    The calls are made through vattn's driver and, on CUDA where it is installed, through cuda-python.
    """
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
    """Returns a layout with rows and granules divided by ``scale``: growth makes the same calls in less memory."""
    return KVLayout.uniform(
        layers=32, kv_heads=8, head_dim=128 // scale, max_len=max_len, dtype="bfloat16",
        granularity=GRANULARITY // scale,
    )  # fmt: skip


# The policies with which requests are served. Those with a zero page under every slot are left out, since they would
# take more mappings than a host allows.
POLICIES = ("vattn", "vattn, mapper off", "2 MiB pages", "a page for each layer's K and V")
# Other policies to map K/V memory, by name: the number of planes, and whether unmapped addresses read a page of zeros.
PAGES = {
    "2 MiB pages": (1, False),
    "a page for each layer's K and V": (64, False),
    "2 MiB pages over a zero page": (1, True),
}


@contextlib.contextmanager
def _pages(device: str, policy: str, *, scale: int = 1, **options: Any) -> Iterator[Pages]:
    planes, zero_page = PAGES[policy]
    pages = Pages(driver_of(device, scale=scale), planes=planes, row_bytes=ROW_BYTES // scale // planes,
                  zero_page=zero_page, **options)  # fmt: skip
    try:
        yield pages
    finally:
        pages.close()


def prompts(device: str, *, tokens: Sequence[int] = (128, 1024, 8192), rounds: int = 5) -> list[dict[str, Any]]:
    """Returns the median milliseconds to map a prompt in a new cache, for each number of tokens and each policy."""

    def ours(n: int) -> float:
        with KVCache(layout(), slots=1, device=device) as cache:
            charge(cache.driver)
            return _milliseconds(cache.open().grow, n)

    def pages(policy: str, n: int) -> float:
        with _pages(device, policy, slots=1, max_len=n, budget=_UNLIMITED) as cache:
            return _milliseconds(cache.open().grow, n)

    ways: dict[str, Callable[[int], float]] = {"vattn": ours}
    ways |= {policy: functools.partial(pages, policy) for policy in PAGES}
    ways["cudaMalloc"] = lambda n: _torch(device, n * ROW_BYTES)
    return [
        {"tokens": n} | {f"{name} ms": statistics.median(way(n) for _ in range(rounds)) for name, way in ways.items()}
        for n in tokens
    ]


def _milliseconds(work: Callable[..., Any], *args: Any) -> float:
    start = time.perf_counter()
    work(*args)
    return (time.perf_counter() - start) * 1e3


def growth(device: str, *, tokens: int = 2100, rate: float = 1000.0) -> list[dict[str, Any]]:
    """Grows a sequence token by token and measures the time of the caller for each token, by policy.

    Args:
        device: ``"cpu"`` or a CUDA device.
        tokens: tokens to grow by.
        rate: tokens per second.

    Returns:
        A row for each policy, with percentiles of the time in microseconds.
    """

    def measured(name: str, grow: Callable[[], Any], calls: Callable[[], dict[str, int]]) -> dict[str, Any]:
        grow()
        before, times = calls(), []
        clock = time.perf_counter()
        for _ in range(tokens - 1):
            times.append(_milliseconds(grow) * 1e3)
            clock += 1 / rate
            time.sleep(max(0.0, clock - time.perf_counter()))
        after = calls()
        cuts = statistics.quantiles(times, n=1000, method="inclusive")
        return {
            "growing by": name,
            "tokens": tokens,
            "p50 us": cuts[499],
            "p99 us": cuts[989],
            "p99.9 us": cuts[998],
            "max us": max(times),
            "mean us": statistics.fmean(times),
            "calls of the caller": sum(after[call] - before[call] for call in MEMORY_CALLS if after),
        }

    def made_by_caller(cache: KVCache) -> dict[str, int]:
        stats = cache.stats()
        return {call: count - stats.background_calls[call] for call, count in stats.driver_calls.items()}

    rows = []
    for mapper in (True, False):
        with KVCache(layout(), slots=1, device=device, mapper=mapper) as cache, cache.open() as sequence:
            charge(cache.driver)
            name = "vattn" if mapper else "vattn, mapper off"
            rows.append(measured(name, sequence.grow, functools.partial(made_by_caller, cache)))
    for policy in PAGES:
        with _pages(device, policy, slots=1, max_len=tokens, budget=_UNLIMITED) as pages:
            rows.append(measured(policy, pages.open().grow, pages.driver.counts))
    if resolve_device(device).type == "cuda":
        memory = [torch.empty(0, ROW_BYTES, dtype=torch.uint8, device=device)]

        def concatenate() -> None:
            memory[0] = torch.cat((memory[0], memory[0].new_empty(1, ROW_BYTES)))
            torch.cuda.synchronize()

        rows.append(measured("torch.cat", concatenate, dict))
    return rows


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
    """Returns the most tokens that a server of at most ``concurrency`` sequences holds at once."""
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
    settling: int = 0,
    steps_per_second: float | None = None,
    max_steps: int | None = None,
    policies: Sequence[str] = POLICIES,
) -> list[dict[str, Any]]:
    """Serves requests with each policy, with a budget 20% above the most live tokens and with one 20% below ("full").

    On the host, rows and granules have 1/128 of their size, and a call takes as long as on an H100. The server expects
    each output to have the 95th percentile of the output lengths. By default the warm-up is half of the requests; for
    the other arguments see ``replay``.
    """
    scale = 1 if resolve_device(device).type == "cuda" else 128
    live = live_tokens(requests, concurrency) * (ROW_BYTES // scale)
    outputs = sorted(request.output for request in requests)
    max_len = max(request.prompt + request.output for request in requests) + 1
    rows = []
    for policy in policies:
        for budget, factor in (("live + 20%", 1.2), ("full", 0.8)):
            nbytes = int(factor * live)
            with contextlib.ExitStack() as stack:
                cache: Served
                if policy in PAGES:
                    options = {"slots": 2 * concurrency, "max_len": max_len, "budget": nbytes}
                    cache = stack.enter_context(_pages(device, policy, scale=scale, **options))
                else:
                    ours = KVCache(
                        layout(max_len, scale=scale),
                        slots=2 * concurrency,
                        device=device,
                        budget=nbytes,
                        mapper=policy == POLICIES[0],
                    )
                    charge(ours.driver)
                    cache = stack.enter_context(ours)
                served = functools.partial(
                    replay,
                    cache,
                    requests,
                    concurrency=concurrency,
                    warm_up=len(requests) // 2 if warm_up is None else warm_up,
                    settling=settling,
                    steps_per_second=steps_per_second,
                    output_guess=outputs[len(outputs) * 19 // 20],
                    max_steps=max_steps,
                )
                row: dict[str, Any] = {"policy": policy, "budget": budget, "requests": len(requests)}
                try:
                    rows.append(row | _summary(served()))
                except BudgetExceeded as error:
                    rows.append(row | {"not served": str(error)})
    return rows


def _summary(result: Result) -> dict[str, Any]:
    return {
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
