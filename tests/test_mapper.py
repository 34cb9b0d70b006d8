"""The mapper thread: what it maps ahead, what happens when it cannot, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from vattn import BudgetExceeded, DriverError, KVCache, KVLayout, VirtualCache, _core

PAGE = 4096
ROW = 512  # bytes: 8 rows a granule
UNLIMITED = 1 << 62
pytestmark = pytest.mark.mapper


def arena(*, slots=4, max_len=1000, budget=UNLIMITED, planes=((ROW, 0),), lookahead=8, driver=None, mapper=None):
    return _core.Arena(
        driver or _core.host_driver(PAGE),
        list(planes),
        slots=slots,
        max_len=max_len,
        budget=budget,
        lookahead=lookahead,
        mapper=mapper or _core.Mapper(),
    )


def cache(**options):
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=32, max_len=500, dtype="float32", granularity=PAGE)
    return KVCache(layout, slots=4, **options)


def two_running(granules):
    """Returns an arena with a budget of ``granules`` and two running slots, of which slot 0 has a granule of rows."""
    a = arena(budget=granules * PAGE)
    a.acquire()
    a.acquire()
    a.grow([0], 8, 0)
    a.wait_idle()
    return a


def grow_by_one(a, to, slot=0):
    for length in range(a.length(slot) + 1, to + 1):
        a.grow([slot], length, length - 1)
        a.wait_idle()


def test_growth_finds_its_memory_mapped_and_the_caller_makes_no_call():
    a = arena()
    a.acquire()
    grow_by_one(a, 400)
    stats = a.stats()
    extents = len(a.map()[0]["runs"][0]["extents"])
    assert stats["misses"] == 1
    assert extents - 2 <= stats["hits"] <= extents
    assert a.capacity(0) >= 408
    total, background = a.driver.counts(), a.driver.counts(background=True)
    for call in ("create", "map", "set_access", "zero", "zeroed", "release", "unmap"):
        assert total[call] == background[call]
    a.check()


def test_lookahead_zero_maps_nothing_ahead():
    a = arena(lookahead=0)
    a.acquire()
    grow_by_one(a, 9)
    assert (a.stats()["hits"], a.stats()["misses"], a.stats()["pooled"]) == (0, 2, 0)


def test_the_next_extents_are_kept_created():
    a = arena()
    a.acquire()
    grow_by_one(a, 30)
    assert a.stats()["pooled"] > 0
    a.trim()
    assert a.stats()["pooled"] == 0


def test_a_demand_waits_for_what_is_in_flight_and_does_not_map_twice():
    a = arena()
    a.acquire()
    a.grow([0], 8, 0)
    a.wait_idle()
    a.driver.charge("map", 50_000_000)
    capacity = a.capacity(0)
    a.grow([0], capacity - 1, 8)  # asks the mapper for the next extent
    time.sleep(0.01)
    a.grow([0], capacity + 1, 8)
    a.driver.charge("map", 0)
    a.wait_idle()
    assert a.driver.counts()["map"] == len(a.map()[0]["runs"][0]["extents"])
    assert a.driver.counts()["unmap"] == 0
    assert a.stats()["waited_seconds"] > 0.005


def test_what_the_driver_refuses_ahead_is_told_to_who_needs_it():
    a = arena()
    a.acquire()
    a.grow([0], 8, 0)
    a.wait_idle()
    capacity = a.capacity(0)
    a.driver.fail_at(1, times=10_000)
    a.grow([0], capacity, 8)  # asks the mapper for memory ahead, which fails
    a.wait_idle()
    assert a.stats()["background_failures"] > 0
    with pytest.raises(DriverError):
        a.grow([0], capacity + 1, capacity)
    assert a.length(0) == capacity
    a.driver.fail_at(0)
    a.grow([0], capacity + 1, capacity)
    a.check()


def test_who_found_no_memory_gets_it_when_another_closes():
    a = two_running(4)
    a.grow([1], 16, 0)
    a.wait_idle()
    held = a.capacity(0)
    a.grow([0], held, 8)
    a.wait_idle()
    assert a.capacity(0) == held
    a.release([1])
    a.wait_idle()
    assert a.capacity(0) >= held + 8
    assert a.stats()["misses"] == 2
    a.check()


def test_prefetch_maps_in_the_background_and_takes_nothing_that_others_will_need():
    a = two_running(8)
    kept = a.capacity(0)
    assert a.prefetch(1, 40) is False
    a.wait_idle()
    assert a.capacity(1) >= 40
    assert a.prefetch(1, 40) is True
    a.prefetch(1, 80)
    a.wait_idle()
    assert a.capacity(1) < 80
    assert a.capacity(0) == kept
    a.grow([1], 40, 0)
    assert a.stats()["misses"] == 1
    a.check()


def test_prefetch_without_a_mapper_is_a_wait_and_leaves_nothing_when_refused():
    c = cache(mapper=False, budget=20 * PAGE)  # a page holds 16 rows
    c.driver.charge("map", 1_000_000)
    first = c.open()
    assert first.prefetch(160) is True
    assert c.stats().misses == 1
    assert c.stats().waited_seconds > 0.001
    first.close()
    heir, other = c.open(), c.open()
    assert heir.capacity == 160
    with pytest.raises(BudgetExceeded):
        heir.prefetch(400)
    other.grow(304)  # no memory is kept for the prefetch that was refused
    c.check()


def test_what_was_prefetched_is_not_given_to_others():
    a = two_running(8)
    a.prefetch(1, 40)
    a.wait_idle()
    kept = a.capacity(1)
    with pytest.raises(BudgetExceeded):
        a.grow([0], 32, 8)
    assert a.capacity(1) == kept >= 40
    a.truncate([1], 0)
    a.grow([0], 32, 8)
    assert a.capacity(1) < 40
    a.check()


def test_the_lookahead_is_a_part_of_the_length_at_most():
    a = arena(lookahead=None, slots=1, max_len=40_000)
    a.driver.charge("map", 2_000_000)
    a.acquire()
    a.grow([0], 1000, 0)
    longest = 0  # the longest lookahead, which depends on the rate of growth on this machine
    for length in range(1001, 20_000):
        a.grow([0], length, length - 1)
        if length % 50 == 0:
            now = a.stats()["lookahead"]
            assert now <= max(length // 32, 32)
            longest = max(longest, now)
    assert longest > 2000 // 32
    a.check()


def test_retired_memory_comes_back_without_being_asked_for():
    a = arena(planes=((ROW, 8),))
    a.acquire()
    grow_by_one(a, 200)
    deadline = time.monotonic() + 10
    while a.stats()["deferred"] and time.monotonic() < deadline:
        time.sleep(0.001)
    assert a.stats()["deferred"] == 0
    assert a.driver.counts()["unmap"] == a.driver.counts(background=True)["unmap"] > 10
    a.check()


@pytest.mark.parametrize("mapper", [False, True])
def test_the_budget_changes_at_run_time(mapper):
    with cache(budget=40 * PAGE, mapper=mapper, lookahead=0) as c:
        a, b = c.open(), c.open()
        a.grow(160)
        b.grow(64)
        a.k(0)[:] = 7
        b.close()
        c.set_budget(10 * PAGE)
        stats = c.stats()
        assert (stats.budget, stats.physical) == (10 * PAGE, 10 * PAGE)
        assert (a.k(0) == 7).all()
        with pytest.raises(BudgetExceeded):
            c.set_budget(9 * PAGE)
        assert c.stats().budget == 10 * PAGE
        with pytest.raises(BudgetExceeded):
            a.grow(16)
        c.set_budget(None)
        a.grow(16)
        with pytest.raises(ValueError, match="budget"):
            c.set_budget(1)
        c.check()


def test_a_slot_used_in_several_streams_leaves_a_fence_in_each():
    a = arena()
    a.acquire(stream=1)
    a.grow([0], 8, 0, 1)
    a.use(0, 2)
    a.wait_idle()
    before = a.driver.counts()["record"]
    a.release([0], 3)
    assert a.driver.counts()["record"] - before == 3


def test_the_slot_whose_memory_is_nearest_is_adopted():
    a = arena(planes=((ROW, 0), (ROW, 0)), lookahead=0)
    for slot, length in enumerate((8, 80, 160)):
        a.acquire(slot)
        a.grow([slot], length, 0)
    a.release([0, 1, 2])
    calls = a.driver.counts()["map"]
    assert a.acquire(expected=72) == 1
    a.grow([1], 72, 0)
    assert a.driver.counts()["map"] == calls
    assert a.acquire(expected=150) == 2
    assert a.acquire(expected=100) == 0  # slot 0 has memory for 8 positions, the only other slot is bare


def test_caches_of_a_device_share_their_mapper():
    with cache() as one, cache() as other:
        assert one._mapper is other._mapper is not None
        assert cache(mapper=False)._mapper is None


def test_closing_while_it_maps():
    a = arena()
    a.driver.charge("map", 20_000_000)
    a.acquire()
    a.grow([0], 8, 0)
    a.prefetch(0, 900)
    a.close()
    assert a.stats()["physical"] == 0
    a.check()


def test_a_stopped_mapper_leaves_everything_to_the_callers():
    mapper = _core.Mapper()
    a = arena(mapper=mapper)
    a.acquire()
    a.grow([0], 8, 0)
    mapper.stop()
    mapper.stop()
    grow_by_one(a, 100)
    a.release([0])
    a.trim()
    assert a.stats()["physical"] == 0
    a.check()


def test_many_threads_and_one_mapper():
    mapper = _core.Mapper()
    arenas = [arena(mapper=mapper, budget=60 * PAGE) for _ in range(3)]

    def work(a):
        for _ in range(20):
            slot = a.acquire()
            for length in range(1, 60):
                a.grow([slot], length, length - 1)
            a.release([slot])

    threads = [threading.Thread(target=work, args=(a,)) for a in arenas for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a in arenas:
        a.check()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_mapper_of_its_own():
    with cache() as c:
        sequence = c.open()
        sequence.grow(10)
        child = os.fork()
        if child == 0:
            with cache() as own:
                other = own.open()
                for _ in range(100):
                    other.grow()
                own.wait_idle()
                os._exit(0 if own.stats().misses == 1 or own.stats().hits > 0 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        sequence.grow(100)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "c.driver.charge('map', 10**8); s.prefetch(400)"])
def test_the_interpreter_ends_with_caches_open(ending):
    code = (
        "from vattn import KVCache, KVLayout\n"
        "layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=32, max_len=500, granularity=4096)\n"
        "c = KVCache(layout, slots=2); s = c.open(); s.grow(100); k = s.k(0)\n" + ending
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_operation_out_of_memory_is_tried_again_after_a_trim():
    with cache() as c:
        with c.open() as sequence:
            sequence.grow(100)
        failures = [True]

        @torch.library.custom_op("custom::needs_memory", mutates_args=())
        def needs_memory(x: torch.Tensor) -> torch.Tensor:
            if failures:
                failures.pop()
                raise torch.OutOfMemoryError("no memory")
            return x + 1

        with c.trim_on_oom():
            assert needs_memory(torch.ones(2)).tolist() == [2, 2]
        assert c.stats().physical == 0
        failures += [True, True]
        with pytest.raises(torch.OutOfMemoryError), c.trim_on_oom():
            needs_memory(torch.ones(2))


@pytest.mark.gpu
def test_torch_gets_on_a_full_device_what_is_parked():
    layout = KVLayout.uniform(layers=32, kv_heads=8, head_dim=128, max_len=1 << 20, dtype="bfloat16")
    row = sum(plane.row_bytes for plane in layout.planes)
    free = torch.cuda.mem_get_info()[0]
    with KVCache(layout, slots=1, device="cuda") as c:
        with c.open() as sequence:
            sequence.grow(int(0.7 * free) // row)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(free // 2, dtype=torch.uint8, device="cuda")
        with c.trim_on_oom():
            assert torch.empty(free // 2, dtype=torch.uint8, device="cuda").numel() == free // 2
        assert c.stats().physical == 0
    torch.cuda.empty_cache()


def test_the_arguments_reach_the_caches_of_a_virtual_cache():
    from transformers import LlamaConfig

    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
    virtual = VirtualCache(config, max_len=300, lookahead=0, mapper=False)
    k = torch.ones(1, 2, 5, 16)
    for layer in range(2):
        virtual.update(k, k, layer)
    (inner,) = virtual.kv_caches
    assert inner._mapper is None
    virtual.set_budget(1 << 30)
    assert virtual.stats().budget == 1 << 30
    with pytest.raises(ValueError, match="lookahead must not be negative"):
        VirtualCache(config, max_len=300, lookahead=-1)
    with pytest.raises(ValueError, match="lookahead must not be negative"):
        cache(lookahead=-1)
