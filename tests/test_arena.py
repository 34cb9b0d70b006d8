"""Slots that grow, shrink, park and are adopted; the budget; and what happens when a driver call fails."""

from __future__ import annotations

import threading

import pytest

from vattn import BudgetExceeded, DriverError, Error, OutOfDeviceMemory, SequenceTooLong, _core

PAGE = 4096
ROW = 512  # bytes: 8 rows a granule
UNLIMITED = 1 << 62


@pytest.fixture(autouse=True, params=["alone", "mapper"])
def mapper(request, monkeypatch):
    """Runs every test without a mapper, and with one that maps nothing ahead (``lookahead=0``)."""
    monkeypatch.setitem(OPTIONS, "mapper", _core.Mapper() if request.param == "mapper" else None)


OPTIONS = {"lookahead": 0}


def arena(*, slots=4, max_len=1000, budget=UNLIMITED, planes=((ROW, 0),), capacity=0, driver=None, **options):
    driver = driver or _core.host_driver(PAGE, capacity=capacity)
    return _core.Arena(driver, list(planes), slots=slots, max_len=max_len, budget=budget, **{**OPTIONS, **options})


def extents(arena, slot=0, plane=0):
    granularity = arena.driver.granularity
    return [extent // granularity for extent in arena.map()[slot]["runs"][plane]["extents"]]


def mapped(arena):
    return arena.stats()["mapped"] // arena.driver.granularity


def vmm_calls(arena):
    names = ("create", "map", "set_access", "unmap", "release")
    return sum(arena.driver.counts()[name] for name in names)


def test_a_known_length_takes_the_largest_extents_that_fit():
    a = arena()
    a.acquire()
    a.grow([0], 800, 0)  # 100 granules
    assert extents(a) == [64, 32, 4]
    a.check()


def test_growth_takes_extents_in_proportion_to_what_there_is():
    a = arena(max_len=4000, growth_divisor=4)
    a.acquire()
    for length in range(1, 401):
        a.grow([0], length, length - 1)
        used, have = -(-length * ROW // PAGE), mapped(a)
        assert used <= have <= max(used + used / 4, used + 1)
    assert extents(a) == [1] * 8 + [2] * 4 + [4] * 4 + [8] * 3
    a.check()


def test_growth_stays_within_the_slot():
    a = arena(slots=2, max_len=100, growth_divisor=1)
    a.acquire()
    for length in range(1, 101):
        a.grow([0], length, length - 1)
    assert sum(extents(a)) == 13
    a.check()


def test_growing_within_what_is_mapped_makes_no_call():
    a = arena()
    a.acquire()
    a.grow([0], 1, 0)
    calls = vmm_calls(a)
    for length in range(2, 9):
        a.grow([0], length, length - 1)
    assert vmm_calls(a) == calls
    a.grow([0], 9, 8)
    assert vmm_calls(a) == calls + 3


def test_tail_rows_are_mapped_past_the_length():
    a = arena(tail_rows=3, max_len=16)
    a.acquire()
    a.grow([0], 5, 0)
    assert mapped(a) == 1
    a.grow([0], 6, 5)
    assert mapped(a) == 2
    a.grow([0], 16, 6)
    assert mapped(a) == 3
    a.check()


def test_every_plane_grows():
    a = arena(planes=[(ROW, 0), (3 * ROW, 0)])
    a.acquire()
    a.grow([0], 16, 0)
    assert extents(a, plane=0) == [2]
    assert extents(a, plane=1) == [4, 2]
    a.check()


def test_several_slots_grow_together_or_not_at_all():
    a = arena(budget=5 * PAGE)
    for _ in range(3):
        a.acquire()
    a.grow([0, 1, 2], 8, 0)
    with pytest.raises(BudgetExceeded) as caught:
        a.grow([0, 1, 2], 9, 8)
    assert (caught.value.needed, caught.value.free) == (3 * PAGE, 2 * PAGE)
    assert [a.length(slot) for slot in range(3)] == [8, 8, 8]
    assert mapped(a) == 3
    a.check()
    a.grow([0, 1], 9, 8)
    assert mapped(a) == 5


def test_too_long():
    a = arena(max_len=10)
    a.acquire()
    with pytest.raises(SequenceTooLong, match="11 positions are more than max_len, 10"):
        a.grow([0], 11, 0)
    assert a.length(0) == 0


@pytest.mark.parametrize("call", ["grow", "truncate", "release"])
@pytest.mark.parametrize("slot", [0, 99])
def test_a_slot_without_a_sequence_is_refused(call, slot):
    a = arena()
    with pytest.raises(ValueError, match=f"slot {slot} has no sequence"):
        {
            "grow": lambda: a.grow([slot], 1, 0),
            "truncate": lambda: a.truncate([slot], 0),
            "release": lambda: a.release([slot]),
        }[call]()


def test_bad_arguments_name_themselves():
    for options, name in [
        ({"slots": 0}, "slots"),
        ({"max_len": 0}, "max_len"),
        ({"budget": PAGE - 1}, "below one granule"),
        ({"planes": []}, "planes"),
        ({"planes": [(0, 0)]}, "row_bytes"),
        ({"growth_divisor": 0}, "growth_divisor"),
        ({"slots": 1 << 30, "max_len": 1 << 30}, "128 TiB"),
    ]:
        with pytest.raises(ValueError, match=name):
            arena(**options)
    a = arena(slots=1)
    with pytest.raises(ValueError, match="slot 1 does not exist"):
        a.acquire(1)
    a.acquire(0)
    with pytest.raises(ValueError, match="slot 0 is in use"):
        a.acquire(0)
    with pytest.raises(ValueError, match="all 1 slots are in use"):
        a.acquire()
    with pytest.raises(ValueError, match="cannot truncate to 5 positions: the sequence has 0"):
        a.truncate([0], 5)


def test_truncating_keeps_memory_until_somebody_needs_it():
    a = arena(budget=4 * PAGE)
    a.acquire()
    a.grow([0], 32, 0)
    a.truncate([0], 20)
    assert mapped(a) == 4
    calls = vmm_calls(a)
    a.grow([0], 24, 20)
    assert vmm_calls(a) == calls
    a.truncate([0], 8)
    # The four granules came as one extent, which still holds the first rows: nothing can be taken away.
    a.acquire()
    with pytest.raises(BudgetExceeded):
        a.grow([1], 1, 0)
    a.check()
    a.release([0])
    a.grow([1], 1, 0)
    assert (mapped(a), extents(a, 1)) == (1, [1])
    a.check()


def test_what_a_running_slot_has_past_its_length_serves_others():
    a = arena(budget=4 * PAGE)
    a.acquire()
    for length in (8, 16, 24, 32):
        a.grow([0], length, 0)
    a.truncate([0], 9)
    a.acquire()
    a.grow([1], 16, 0)
    assert (extents(a, 0), extents(a, 1)) == ([1, 1], [2])
    assert a.length(0) == 9
    a.check()


def test_a_parked_slot_is_adopted_without_a_driver_call():
    a = arena()
    a.acquire()
    a.grow([0], 64, 0)
    a.release([0])
    assert a.stats()["parked_slots"] == 1
    calls = vmm_calls(a)
    assert a.acquire(expected=60) == 0
    a.grow([0], 64, 0)
    assert vmm_calls(a) == calls
    assert a.stats()["adopted"] == 1
    a.check()


def test_the_parked_slot_that_fits_best_is_adopted():
    a = arena()
    for slot, length in enumerate((8, 80, 40)):
        a.acquire(slot)
        a.grow([slot], length, 0)
    for slot in range(3):
        a.release([slot])
    assert a.acquire(expected=30) == 2  # the smallest that is large enough
    assert a.acquire(expected=500) == 1  # the largest, when none is large enough
    assert a.acquire(expected=9) == 0
    assert a.acquire(expected=9) == 3  # a bare one, when none is parked
    a.check()


def test_a_slot_that_never_had_memory_is_bare_again():
    a = arena()
    a.release([a.acquire()])
    assert a.map()[0]["state"] == "bare"


def test_parked_memory_is_taken_from_the_longest_parked_one_extent_at_a_time():
    a = arena(budget=6 * PAGE)
    for slot in (0, 1):
        a.acquire(slot)
        for length in (8, 16, 24):
            a.grow([slot], length, 0)
    a.release([1])
    a.release([0])
    a.acquire(2)
    a.grow([2], 8, 0)
    assert [len(extents(a, slot)) for slot in range(3)] == [3, 2, 1]
    a.grow([2], 32, 8)
    assert [len(extents(a, slot)) for slot in range(2)] == [2, 0]
    assert a.map()[1]["state"] == "bare"
    a.check()


def test_extents_that_can_be_mapped_as_they_are_are_taken_first():
    a = arena(budget=13 * PAGE)
    for slot, rows in ((0, 32), (1, 16), (2, 48)):
        a.acquire(slot)
        a.grow([slot], rows, 0)
    assert [extents(a, slot) for slot in range(3)] == [[4], [2], [4, 2]]
    a.release([0])
    a.release([1])
    a.release([2])
    a.acquire(3)
    a.grow([3], 24, 0)  # 2 + 1 granules, one of which is free
    assert [extents(a, slot) for slot in range(4)] == [[4], [], [4, 2], [2, 1]]
    assert a.driver.counts()["release"] == 0
    a.check()


def test_memory_goes_first_where_most_is_mapped_past_what_is_expected():
    a = arena(budget=14 * PAGE, slots=5)
    for slot, lengths in enumerate(([8, 16], [8, 16, 24, 32], [8, 16, 24, 32, 40], [8, 16, 24])):
        a.acquire(slot)
        for length in lengths:
            a.grow([slot], length, 0)
    a.truncate([0, 1, 2], 8)
    a.release([3])
    a.acquire(4)
    a.grow([4], 40, 0)  # in extents of 4 granules and 1
    assert [len(extents(a, slot)) for slot in range(4)] == [2, 3, 1, 3]
    a.check()


def test_pooled_extents_of_another_class_make_room():
    a = arena(budget=8 * PAGE)
    a.acquire(0)
    a.grow([0], 64, 0)
    a.release([0])
    a.acquire(1)
    a.grow([1], 8, 0)
    assert extents(a, 1) == [1]
    assert a.driver.counts()["release"] == 1
    a.check()


def test_when_the_device_is_full_what_is_parked_goes_first():
    a = arena(capacity=4 * PAGE)
    a.acquire(0)
    a.grow([0], 32, 0)
    a.release([0])
    a.acquire(1)
    a.grow([1], 24, 0)
    assert sum(extents(a, 1)) == 3
    a.acquire(2)
    with pytest.raises(OutOfDeviceMemory):
        a.grow([2], 16, 0)
    assert a.length(2) == 0
    a.check()
    a.grow([2], 8, 0)
    a.check()


def test_when_the_budget_is_short_growth_takes_only_what_it_needs():
    a = arena(budget=10 * PAGE, growth_divisor=1)
    a.acquire()
    a.grow([0], 64, 0)
    a.grow([0], 65, 64)  # with a larger budget, growth_divisor would allow an extent of 8 granules
    assert extents(a) == [8, 1]
    a.check()


def test_trim_gives_everything_back_that_no_sequence_needs():
    a = arena()
    for slot in range(3):
        a.acquire(slot)
        a.grow([slot], 8, 0)
        a.grow([slot], 100, 8)
    a.release([0])
    a.truncate([1], 3)
    a.trim()
    stats = a.stats()
    assert (mapped(a), stats["pooled"], stats["deferred"]) == (14, 0, 0)
    assert stats["physical"] == stats["mapped"]
    assert [slot["state"] for slot in a.map()] == ["bare", "running", "running", "bare"]
    a.check()


def test_a_window_gives_back_what_lies_before_it():
    a = arena(planes=[(ROW, 0), (ROW, 16)], max_len=400)
    a.acquire()
    for length in range(1, 401):
        a.grow([0], length, length - 1)
        runs = a.map()[0]["runs"]
        assert runs[0]["head"] == 0
        first = max(length - 1 - 16 + 1, 0)  # the first row that the query at position length - 1 sees
        assert runs[1]["head"] <= first * ROW
        assert runs[1]["tail"] - runs[1]["head"] <= (16 + 3 * 8) * ROW
    a.check()
    a.release([0])
    run = a.map()[0]["runs"][1]
    assert run["tail"] == 0
    a.acquire(0)
    a.grow([0], 400, 0)
    a.check()


def test_a_window_that_has_moved_on_cannot_be_truncated_into():
    a = arena(planes=[(ROW, 16)])
    a.acquire()
    a.grow([0], 56, 0)  # in extents of one granule, 8 rows
    a.grow([0], 57, 56)
    assert a.map()[0]["runs"][0]["head"] == 40 * ROW  # the window at 56 starts at row 41
    a.truncate([0], 55)  # its window starts at row 40
    with pytest.raises(ValueError, match="cannot truncate to 54 positions: the window of 16 has moved on"):
        a.truncate([0], 54)
    assert a.length(0) == 55
    a.truncate([0], 0)
    a.grow([0], 30, 0)
    assert a.map()[0]["runs"][0]["head"] == 0
    a.check()


def test_keep_holds_a_window_back():
    a = arena(planes=[(ROW, 16)], max_len=400)
    a.acquire()
    for length in range(1, 301):
        a.grow([0], length, min(length - 1, 100))
    a.truncate([0], 100)
    assert a.map()[0]["runs"][0]["head"] <= 85 * ROW
    a.check()


def test_a_long_prompt_keeps_little_more_than_the_window():
    a = arena(planes=[(ROW, 256), (ROW, 0)], max_len=5000)
    a.acquire()
    a.grow([0], 4000, 0)
    assert max(extents(a, plane=0)) == 4  # an eighth of the window
    assert max(extents(a, plane=1)) == 64
    a.grow([0], 4001, 4000)
    run = a.map()[0]["runs"][0]
    assert run["tail"] - run["head"] <= (256 + 2 * 32) * ROW
    a.check()


def test_slots_of_other_lengths_keep_what_they_have():
    a = arena(planes=[(ROW, 4)], slots=2)
    for slot, length in ((0, 100), (1, 10)):
        a.acquire(slot)
        a.grow([slot], length, 0)
    a.grow([0, 1], 101, 100)
    long, short = (slot["runs"][0] for slot in a.map())
    assert long["head"] == 96 * ROW
    assert long["tail"] == 104 * ROW
    assert short["head"] == 0  # the query at position 10 sees rows 7 to 9
    a.truncate([1], 10)
    a.check()


def test_a_window_of_one_position_needs_one_granule():
    a = arena(planes=[(ROW, 1)], budget=2 * PAGE)
    a.acquire()
    for length in range(1, 400):
        a.grow([0], length, length - 1)
        a.check()
    with pytest.raises(ValueError, match="the window of 1 has moved on"):
        a.truncate([0], 100)
    a.release([0])
    a.acquire(0)
    a.grow([0], 8, 0)
    a.check()


def test_a_slot_named_twice_is_refused():
    a = arena()
    a.acquire()
    with pytest.raises(ValueError, match="a slot is named twice"):
        a.grow([0, 0], 5, 0)
    a.grow([0], 5, 0)


def test_a_window_lives_within_a_budget_of_its_own_size():
    a = arena(planes=[(ROW, 16)], max_len=4000, budget=4 * PAGE)
    a.acquire()
    for length in range(1, 4001):
        a.grow([0], length, length - 1)
    assert a.stats()["peak"] <= 4 * PAGE
    a.check()


def test_closing_returns_everything():
    a = arena(capacity=100 * PAGE)
    for slot in range(3):
        a.acquire(slot)
        a.grow([slot], 50, 0)
    a.release([1])
    a.close()
    assert a.driver.memory_info()[0] == 100 * PAGE
    a.check()
    a.close()
    for call in (lambda: a.acquire(), lambda: a.grow([0], 51, 50), lambda: a.trim(), lambda: a.release([0])):
        with pytest.raises(ValueError, match="the cache is closed"):
            call()


def life(a):
    """Yields (name, operation) pairs of a scenario that makes driver calls of every kind."""
    yield "acquire", lambda: a.acquire(0)
    yield "grow", lambda: a.grow([0], 20, 0)
    yield "acquire", lambda: a.acquire(1)
    yield "grow", lambda: a.grow([0, 1], 30, 20)
    for length in range(31, 60):
        yield "grow", lambda length=length: a.grow([0], length, length - 1)
    yield "truncate", lambda: a.truncate([0], 56)
    yield "grow", lambda: a.grow([1], 45, 30)
    yield "release", lambda: a.release([0])
    yield "acquire", lambda: a.acquire(2)
    yield "grow", lambda: a.grow([2], 60, 0)  # takes the memory of slot 0, which is parked
    yield "acquire", lambda: a.acquire(0)
    yield "release", lambda: a.release([1])
    yield "grow", lambda: a.grow([0], 12, 0)
    yield "truncate", lambda: a.truncate([2], 0)
    yield "grow", lambda: a.grow([2], 8, 0)
    yield "trim", lambda: a.trim()
    yield "release", lambda: a.release([2])
    yield "close", lambda: a.close()


def new_life(driver):
    # One of the two planes has a window. The budget is so small that parked slots are stripped, fences are waited for
    # and pooled extents are released.
    unit = driver.granularity
    row = unit // 8
    return _core.Arena(driver, [(row, 0), (row, 12)], slots=3, max_len=64, budget=28 * unit, growth_divisor=4)


def snapshot(a):
    return [(slot["state"], slot["length"]) for slot in a.map()]


def tails(a):
    return [[run["tail"] for run in slot["runs"]] for slot in a.map()]


def run_life(driver, k, *, times=1, out_of_memory=False):
    """Runs ``life`` while the k-th driver call fails, and tries every failed operation again.

    Returns:
        The number of operations that failed.
    """
    a = new_life(driver)
    failures = 0
    driver.fail_at(k, times=times, out_of_memory=out_of_memory)
    for what, operation in life(a):
        before, tails_before = snapshot(a), tails(a)
        try:
            operation()
        except (DriverError, BudgetExceeded) as error:
            failures += 1
            if isinstance(error, DriverError):
                assert isinstance(error, OutOfDeviceMemory) == out_of_memory
            driver.fail_at(0)
            a.check()
            if what in ("acquire", "grow", "truncate", "release"):
                assert snapshot(a)[:3] == [
                    # Memory taken from a parked slot on the way may have left it bare.
                    now if (now[0], then[0]) == ("bare", "parked") else then
                    for now, then in zip(snapshot(a), before, strict=True)
                ]
            if what == "grow":
                assert all(
                    now <= then
                    for slots in zip(tails(a), tails_before, strict=True)
                    for now, then in zip(*slots, strict=True)
                )
            operation()
        a.check()
    driver.fail_at(0)
    return failures


def test_a_life_without_faults_meets_every_call():
    driver = _core.host_driver(PAGE, capacity=30 * PAGE)
    assert run_life(driver, 0) == 0
    counts = driver.counts()
    assert all(
        counts[name] for name in ("reserve", "create", "release", "map", "set_access", "unmap", "zero", "record")
    )
    assert driver.memory_info()[0] == 30 * PAGE


def calls_of_a_life():
    driver = _core.host_driver(PAGE)
    start = sum(driver.counts().values())
    run_life(driver, 0)
    return sum(driver.counts().values()) - start


@pytest.mark.parametrize("out_of_memory", [False, True], ids=["refused", "out of memory"])
def test_the_kth_call_failing_for_every_k(out_of_memory):
    total = calls_of_a_life()
    assert total > 100
    failed = 0
    for k in range(2, total + 1):  # the first is the reservation, see test_a_reservation_that_fails_leaves_nothing
        driver = _core.host_driver(PAGE, capacity=30 * PAGE)
        failed += run_life(driver, k, out_of_memory=out_of_memory)
        assert driver.memory_info()[0] == 30 * PAGE, f"memory lost when call {k} failed"
        assert driver.reports == 0
    assert failed > (total // 4 if out_of_memory else total * 0.9)


def test_several_calls_failing_in_a_row():
    """The second failure hits the clean-up after the first one; memory is given back later, and not lost."""
    for k in range(2, calls_of_a_life() + 1):
        driver = _core.host_driver(PAGE, capacity=30 * PAGE)
        run_life(driver, k, times=3)
        assert driver.memory_info()[0] == 30 * PAGE, f"memory lost when calls {k} to {k + 2} failed"


def test_a_reservation_that_fails_leaves_nothing():
    driver = _core.host_driver(PAGE)
    driver.fail_at(1)
    with pytest.raises(DriverError, match="reserve failed"):
        new_life(driver)
    assert driver.counts()["free_address"] == 0


def test_a_destructor_reports_what_the_driver_refuses(capfd):
    driver = _core.host_driver(PAGE)
    a = new_life(driver)
    a.acquire()
    a.grow([0], 1, 0)
    driver.fail_at(1, times=1000)
    del a
    assert driver.reports > 0
    assert "vattn: while giving memory back: unmap failed with code -1" in capfd.readouterr().err
    driver.fail_at(0)


@pytest.mark.gpu
def test_the_kth_call_failing_on_the_gpu():
    total = calls_of_a_life()
    for k in range(2, total + 1, 3):
        driver = _core.cuda_driver(0)
        before = driver.memory_info()[0]
        run_life(driver, k)
        assert driver.memory_info()[0] >= before - driver.granularity, f"memory lost when call {k} failed"
        assert driver.reports == 0


def test_threads_share_a_tight_budget():
    """Each thread grows and releases a slot of its own; driver calls are made slow, so that threads overlap in them."""
    driver = _core.host_driver(PAGE)
    for call in ("create", "map", "set_access", "unmap", "release"):
        driver.charge(call, 20_000)
    a = arena(driver=driver, slots=4, budget=40 * PAGE, max_len=200)
    failures: list[BaseException] = []
    refused = [0]

    def work(slot: int) -> None:
        try:
            for turn in range(15):
                a.acquire(slot)
                length = 0
                for step in range(10):
                    goal = length + 1 + (slot * 7 + turn * 3 + step) % 17
                    try:
                        a.grow([slot], goal, length)
                        length = goal
                    except BudgetExceeded:
                        refused[0] += 1
                        break
                a.truncate([slot], length // 2)
                a.release([slot])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(slot,)) for slot in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        a.check()
    for thread in threads:
        thread.join()
    assert not failures
    a.check()
    a.trim()
    assert a.stats()["physical"] == 0


def test_check_is_part_of_the_errors():
    assert issubclass(BudgetExceeded, Error)
    assert issubclass(BudgetExceeded, MemoryError)
    assert issubclass(SequenceTooLong, ValueError)
    assert issubclass(OutOfDeviceMemory, DriverError)


def test_a_truncation_that_changes_nothing_records_no_fence():
    a = arena()
    a.acquire()
    a.grow([0], 40, 0)
    before = a.driver.counts()["record"]
    a.truncate([0], 40)
    assert a.driver.counts()["record"] == before
    a.truncate([0], 30)
    assert a.driver.counts()["record"] > before
    a.check()
