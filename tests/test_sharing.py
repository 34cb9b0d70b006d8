"""Slots that share extents: forks, what they copy and what they write, rows that outlive their sequence, compacting."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch

from vattn import BudgetExceeded, DriverError, KVCache, KVLayout, _core
from vattn.memory.shape import LayerShape

PAGE = 4096
ROW = 512  # bytes of a token: 8 a granule


def layout(**options):
    options = {"max_len": 1000, "granularity": PAGE, **options}
    return KVLayout.uniform(layers=1, kv_heads=1, head_dim=64, dtype="float32", **options)


def cache(slots=6, *, layout=layout(), **options):  # noqa: B008
    return KVCache(layout, slots=slots, **{"lookahead": 0, **options})


def write(sequence, n, value=None):
    """Appends n positions, each with a value of its own."""
    start = sequence.length
    sequence.grow(n)
    values = torch.arange(start, start + n, dtype=torch.float32) if value is None else torch.full((n,), float(value))
    sequence.k(0)[start:] = values.reshape(-1, 1, 1)
    sequence.v(0)[start:] = -values.reshape(-1, 1, 1)


def rows(sequence):
    assert torch.equal(sequence.k(0)[:, 0, 0], -sequence.v(0)[:, 0, 0])
    return sequence.k(0)[:, 0, 0].tolist()


def memory_calls(cache):
    return [cache.stats().driver_calls[name] for name in ("create", "map", "set_access", "unmap", "release")]


def test_a_fork_shares_whole_extents_and_copies_the_rest():
    c = cache()
    s = c.open()
    write(s, 100)  # 12.5 granules: 8 + 4 + 1
    before = c.stats()
    forks = s.fork(n=3, share="alias")
    assert [rows(fork) for fork in forks] == [list(range(100))] * 3
    after = c.stats()
    assert after.aliases - before.aliases == 3 * 2
    assert after.copied - before.copied == 3 * 4 * ROW
    assert after.mapped - before.mapped == 3 * PAGE
    assert after.shared == 3 * 12 * PAGE
    c.check()
    for value, fork in enumerate(forks):
        write(fork, 30, value)
    write(s, 10, 9)
    assert rows(s) == [*range(100), *[9] * 10]
    for value, fork in enumerate(forks):
        assert rows(fork) == [*range(100), *[value] * 30]
    s.close()
    assert rows(forks[0]) == [*range(100), *[0] * 30]
    c.check()


def test_many_forks_split_the_extent_in_which_they_end():
    c = cache(slots=20, budget=600 * PAGE)
    s = c.open()
    write(s, 8 * 32 - 4)  # an extent of 32 granules, of which the last is not full
    before = c.stats()
    forks = s.fork(n=16)
    assert c.map()[s.slot]["runs"][0]["extents"] == [31 * PAGE, PAGE]
    after = c.stats()
    assert after.mapped - before.mapped == 16 * PAGE
    assert after.copied - before.copied == 32 * PAGE + 16 * 4 * ROW
    for fork in forks:
        write(fork, 3, 7)
        assert rows(fork) == [*range(252), 7, 7, 7]
    write(s, 3, 8)
    assert rows(s) == [*range(252), 8, 8, 8]
    # Where there is no memory to split the extent, the forks have to copy it, which the budget does not allow here.
    c = cache(slots=20, budget=80 * PAGE)
    s = c.open()
    write(s, 8 * 64 - 4)
    with pytest.raises(BudgetExceeded):
        s.fork(n=2)
    assert rows(s) == list(range(508))
    c.check()


def test_a_fork_of_a_part():
    c = cache()
    s = c.open()
    write(s, 100)
    [fork] = s.fork(70, share="alias")  # the extent of 8 granules lies wholly within these positions
    assert rows(fork) == list(range(70))
    write(fork, 5, 7)
    assert rows(fork) == [*range(70), *[7] * 5]
    assert rows(s) == list(range(100))
    [empty] = s.fork(0)
    assert empty.length == 0
    c.check()


def test_a_fork_of_a_fork():
    c = cache()
    s = c.open()
    write(s, 64)
    [a] = s.fork(share="alias")
    write(a, 64, 1)
    [b] = a.fork(share="alias")
    write(b, 3, 2)
    s.close()
    a.close()
    assert rows(b) == [*range(64), *[1] * 64, *[2] * 3]
    c.check()


@pytest.mark.parametrize("who", ["source", "fork"])
@pytest.mark.parametrize("length", [0, 3, 64, 65, 80, 95, 96])
def test_truncating_into_what_is_shared_and_appending_changes_nobody_else(who, length):
    c = cache()
    s = c.open()
    write(s, 100)
    [fork] = s.fork(share="alias")
    mine, other = (s, fork) if who == "source" else (fork, s)
    mine.truncate(length)
    before = c.stats()
    write(mine, 20, 5)
    assert rows(mine) == [*range(length), *[5] * 20]
    assert rows(other) == list(range(100))
    # Only the rows that are left in the extent in which they end are copied. Extents begin at rows 0, 64 and 96.
    assert c.stats().copied - before.copied == {3: 3, 65: 1, 80: 16, 95: 31}.get(length, 0) * ROW
    c.check()


def test_who_is_left_alone_writes_without_a_copy():
    c = cache()
    s = c.open()
    write(s, 100)
    [fork] = s.fork(share="alias")
    fork.close()
    c.wait_idle()
    c.trim()
    s.truncate(50)
    before = c.stats()
    write(s, 20, 5)
    assert rows(s) == [*range(50), *[5] * 20]
    assert c.stats().copied == before.copied
    for name in ("create", "map", "unmap", "release"):
        assert c.stats().driver_calls[name] == before.driver_calls[name]


def test_copying_and_sharing_can_be_forced():
    c = cache()
    s = c.open()
    write(s, 96)
    [copy] = s.fork(share="copy")
    assert rows(copy) == list(range(96))
    assert c.stats().aliases == 0
    assert c.stats().shared == 0
    [alias] = s.fork(share="alias")
    assert c.stats().shared == 12 * PAGE
    assert rows(alias) == list(range(96))
    with pytest.raises(ValueError, match="share must be 'auto', 'alias' or 'copy'"):
        s.fork(share="both")
    assert c.stats().running_slots == 3


def test_a_few_rows_are_copied_where_there_is_memory_and_many_are_shared():
    c = cache(slots=2)
    s, other = c.open(), c.open()
    write(s, 8)  # a granule
    write(other, 8)
    other.close()
    [fork] = s.fork()
    assert c.stats().aliases == 0
    assert rows(fork) == list(range(8))
    fork.close()
    write(s, 400)
    [fork] = s.fork()
    assert c.stats().aliases > 0
    assert rows(fork) == list(range(408))


def test_aliases_give_way_to_copies_before_the_device_has_too_many_mappings():
    c = cache(alias_limit=4)
    s = c.open()
    write(s, 96)  # two mappings
    first, second = s.fork(n=2, share="alias")
    assert c.stats().aliases == 2
    assert rows(first) == rows(second) == list(range(96))
    assert c.driver.mappings == 6
    assert c.driver.mapping_limit > 1000


def test_a_forks_growth_is_proportional_to_what_it_added():
    c = cache(slots=3, layout=layout(max_len=100_000), growth_divisor=4)
    s = c.open()
    write(s, 64 * 8 * 64)
    [fork] = s.fork(share="alias")
    before = c.stats().mapped
    write(fork, 1)
    assert c.stats().mapped - before == PAGE


def test_what_cannot_be_forked_is_told():
    c = cache(slots=2)
    s = c.open()
    write(s, 10)
    with pytest.raises(ValueError, match="cannot fork at 11 positions: the sequence has 10"):
        s.fork(11)
    with pytest.raises(ValueError, match="n must be at least 1"):
        s.fork(n=0)
    with pytest.raises(ValueError, match="all 2 slots are in use"):
        s.fork(n=2)
    assert c.stats().running_slots == 1
    [fork] = s.fork()
    with pytest.raises(ValueError, match="is not empty"):
        c.fork_all(s, [fork], 5)
    with pytest.raises(ValueError, match="named twice"):
        c.fork_all(s, [s], 5)
    s.close()
    with pytest.raises(ValueError, match="closed"):
        s.fork()
    c.check()


def test_windows_are_forked_as_far_as_their_rows_are_there():
    shapes = [LayerShape(kv_heads=1, head_dim=64, dtype="float32", window=window) for window in (None, 16)]
    c = cache(layout=KVLayout(shapes, max_len=1000, granularity=PAGE))
    s = c.open()
    for _ in range(100):
        write(s, 1)
        s.k(1)[-1] = float(s.length - 1)
    [fork] = s.fork(share="alias")
    assert torch.equal(fork.k(1)[85:, 0, 0], torch.arange(85.0, 100.0))
    with pytest.raises(ValueError, match="a window has moved on"):
        s.fork(50)
    write(fork, 60, 3)
    assert rows(s) == list(range(100))
    assert torch.equal(s.k(1)[85:, 0, 0], torch.arange(85.0, 100.0))
    fork.close()
    s.close()
    c.check()
    again = c.open()
    write(again, 100)
    assert rows(again) == list(range(100))


def test_a_window_does_not_move_under_a_fork():
    driver = _core.host_driver(PAGE)
    arena = _core.Arena(driver, [(PAGE, 8)], slots=4, max_len=200, budget=1000 * PAGE, lookahead=0)
    arena.acquire()
    for length in range(1, 41):
        arena.grow([0], length, 0)
    targets = [arena.acquire(), arena.acquire()]
    driver.charge("map", 1_000_000)
    fork = threading.Thread(target=arena.fork, args=(0, 40, targets), kwargs={"share": "alias"})
    fork.start()
    while driver.mappings < 45:  # the fork is under way
        pass
    arena.grow([0], 41, 40)
    fork.join()
    arena.check()
    assert [arena.head(slot, 0) for slot in (0, *targets)] == [33 * PAGE, 0, 0]


def test_who_shares_is_not_alone_while_another_gets_its_own():
    for k in range(1, 20):
        c = cache(mapper=False)
        s, driver = c.open(), c.driver
        write(s, 61)
        [fork] = s.fork(share="alias")
        fork.truncate(30)
        driver.charge("set_access", 2_000_000)

        def grow(fork=fork, driver=driver, k=k):
            driver.fail_at(k)
            with contextlib.suppress(DriverError):
                fork.grow(1)
            driver.fail_at(0)

        growing = threading.Thread(target=grow)
        accesses = driver.counts()["set_access"]
        growing.start()
        while driver.counts()["set_access"] < accesses + 2 and growing.is_alive():
            pass
        with contextlib.suppress(DriverError):
            s.truncate(40)
        growing.join()
        c.check()
        assert rows(fork)[:30] == list(range(30))
        assert rows(s)[:40] == list(range(40))


def test_a_fork_that_the_budget_refuses_changes_nothing():
    c = cache(budget=15 * PAGE)
    s = c.open()
    write(s, 100)  # 13 granules
    with pytest.raises(BudgetExceeded):
        s.fork(n=3)  # each needs a granule of its own
    assert c.stats().running_slots == 1
    assert rows(s) == list(range(100))
    assert len(s.fork(n=2)) == 2
    c.check()


@pytest.mark.parametrize("operation", ["fork", "compact", "append"])
@pytest.mark.parametrize("protect_shared", [False, True])
def test_the_kth_call_failing_for_every_k(operation, protect_shared):
    k = 0
    while True:
        k += 1
        c = cache(mapper=False, protect_shared=protect_shared)
        s = c.open()
        for _ in range(100):
            write(s, 1)
        fork = None
        if operation == "append":
            [fork] = s.fork(share="alias")
            s.truncate(70)
        expected = list(range(s.length))
        c.driver.fail_at(k)
        try:
            if operation == "fork":
                [fork] = s.fork(share="alias")
            elif operation == "compact":
                s.compact()
            else:
                s.grow(1)
                s.truncate(70)
        except DriverError:
            failed = True
        else:
            failed = False
        untouched = c.driver
        untouched.fail_at(0)
        c.check()
        assert rows(s) == expected
        if fork:
            assert rows(fork) == list(range(100))
        write(s, 10, 4)
        assert rows(s) == [*expected, *[4] * 10]
        if fork:
            assert rows(fork) == list(range(100))
            fork.close()
        s.close()
        c.trim()
        c.check()
        assert c.stats().physical == 0
        if not failed:
            break
    assert k > 8


def test_forks_of_what_is_compacted_for_them_make_no_driver_call():
    c = cache(slots=8)
    s = c.open()
    write(s, 100)
    other = c.open()
    write(other, 8)
    other.close(tokens=range(8))
    s.compact(96, forks=3)
    assert [slot["state"] for slot in c.map()].count("parked") == 4
    before = c.stats()
    forks = s.fork(96, n=3)
    after = c.stats()
    calls = [
        name for name in ("create", "map", "unmap", "copy") if after.driver_calls[name] != before.driver_calls[name]
    ]
    assert calls == []
    assert after.aliases == before.aliases
    assert after.copied == before.copied
    for value, fork in enumerate(forks):
        assert rows(fork) == list(range(96))
        write(fork, 5, 1000 * value)
    [another] = s.fork(96)
    assert c.stats().aliases == before.aliases + 1
    for value, fork in enumerate(forks):
        assert rows(fork) == [*range(96), *[1000 * value] * 5]
    assert rows(another) == list(range(96))
    assert c.open(tokens=range(20)).length == 8  # the cached prefix of another sequence has stayed
    with pytest.raises(ValueError, match="forks must not be negative"):
        s.compact(forks=-1)


def test_slots_that_are_ready_for_forks_serve_others_too():
    c = cache(slots=4)
    s = c.open()
    write(s, 100)
    s.compact(forks=3)
    s.truncate(50)
    write(s, 1, 7)  # copies on write, so that the slots that are ready for forks share nothing with s any more
    others = [*s.fork(48, n=2), c.open()]
    for value, fork in enumerate(others):
        assert rows(fork) == list(range(48))[: fork.length]
        write(fork, 10, value)
        assert rows(fork)[-10:] == [value] * 10
    with pytest.raises(ValueError, match="slots are in use"):
        s.compact(forks=1)


def test_compacting_makes_one_extent_at_the_same_address():
    c = cache()
    s = c.open()
    for _ in range(100):
        write(s, 1)
    address = s.k(0).data_ptr()
    assert len(c.map()[s.slot]["runs"][0]["extents"]) == 13
    s.compact()
    assert c.map()[s.slot]["runs"][0]["extents"] == [12 * PAGE, PAGE]
    assert s.k(0).data_ptr() == address
    assert rows(s) == list(range(100))
    before = c.stats().aliases
    [fork] = s.fork(share="alias")
    assert c.stats().aliases - before == 1
    with pytest.raises(ValueError, match="cannot compact 101 positions: the sequence has 100"):
        s.compact(101)
    s.compact(44)  # splits the extent behind 5 granules
    assert c.map()[s.slot]["runs"][0]["extents"] == [5 * PAGE, 4 * PAGE, 2 * PAGE, PAGE, PAGE]
    assert rows(s) == list(range(100))
    write(fork, 1, 7)
    s.truncate(50)
    write(s, 1, 8)
    assert rows(fork) == [*range(100), 7]
    assert rows(s) == [*range(50), 8]
    c.check()


def test_rows_outlive_their_sequence_until_the_memory_is_needed():
    c = cache(slots=4, budget=20 * PAGE)
    arena = c._arena
    s = c.open()
    write(s, 100)
    generation, positions, parked = arena.commit(s.slot, 90)
    assert (positions, parked) == (90, False)
    s.close()
    assert arena.cached_prefix(0) == (generation, 90, True)
    other = c.open()
    assert other.slot != s.slot  # slots with a cached prefix are adopted last
    write(other, 8)
    fork = c.open()
    assert arena.fork(s.slot, 80, [fork.slot], generation=generation)
    assert rows(fork) == list(range(80))
    empty = c.open()
    assert not arena.fork(s.slot, 95, [empty.slot], generation=generation)
    write(other, 60)  # needs more than is free, so that cached rows are reclaimed from their end on
    assert arena.cached_prefix(0) == (generation, 64, True)
    assert rows(fork) == list(range(80))
    c.check()


def test_a_sequence_resumes_in_the_slot_of_another():
    c = cache(slots=3)
    arena = c._arena
    s = c.open()
    write(s, 100)
    generation, _, _ = arena.commit(s.slot, 100)
    [fork] = s.fork(share="alias")
    s.close()
    c.wait_idle()
    calls = memory_calls(c)
    assert arena.resume(0, generation, 100)
    assert memory_calls(c) == calls
    assert not arena.resume(0, generation, 100)
    arena.release([0])
    assert arena.cached_prefix(0) == (generation, 100, True)
    assert arena.resume(0, generation, 60)
    arena.grow([0], 70, 60)  # copies on write, since the fork shares the extent
    c.k(0)[0, 60:70] = 5
    assert rows(fork) == list(range(100))
    assert arena.cached_prefix(0) == (generation, 60, False)
    arena.truncate([0], 20)
    assert arena.cached_prefix(0) == (generation, 20, False)
    arena.forget(0, generation)
    arena.release([0])
    assert arena.cached_prefix(0)[1] == 0
    assert not arena.resume(0, generation, 1)
    with pytest.raises(ValueError, match="cannot commit 200 positions"):
        arena.commit(fork.slot, 200)


@pytest.mark.gpu
def test_on_a_gpu():
    c = KVCache(
        KVLayout.uniform(layers=2, kv_heads=2, head_dim=64, max_len=200_000, dtype="float32"), slots=8, device="cuda"
    )
    s = c.open()
    for length in range(1, 200_000, 9_999):
        s.grow(length - s.length)
    expected = torch.arange(s.length, dtype=torch.float32, device="cuda")
    s.k(0)[:] = expected.reshape(-1, 1, 1)
    s.v(1)[:] = -expected.reshape(-1, 1, 1)
    forks = s.fork(n=3, share="alias")
    assert c.stats().shared > 0
    s.compact()
    forks += s.fork(n=2, share="copy")
    for fork in forks:
        assert torch.equal(fork.k(0)[:, 1, 3], expected)
        assert torch.equal(fork.v(1)[:, 0, 5], -expected)
    s.truncate(100_000)
    s.grow(1000)
    s.k(0)[100_000:] = 7
    forks[0].truncate(5)
    forks[0].grow(5)
    forks[0].k(0)[5:] = 8
    for fork in forks[1:]:
        assert torch.equal(fork.k(0)[:, 1, 3], expected)
    assert torch.equal(s.k(0)[:100_000, 1, 3], expected[:100_000])
    c.check()
    c.close()


def test_driver_takes_read_only_mappings(driver):
    size = driver.granularity
    base = driver.reserve(size)
    handle = driver.create(size)
    driver.map(base, size, handle)
    driver.set_access(base, size)
    driver.zero(base, size)
    driver.zeroed()
    driver.set_access(base, size, read_only=True)
    view = torch.utils.dlpack.from_dlpack(driver.dlpack(base, [8], [1], 8))
    assert not view.any()
    driver.set_access(base, size)
    view[3] = 7
    assert view[3] == 7
    driver.synchronize()
    driver.unmap(base, size)
    driver.release(handle)
    driver.free_address(base, size)
    assert isinstance(driver, _core.Driver)


def test_a_prepared_slot_is_forked_into_whatever_the_limit_of_mappings():
    c = cache(alias_limit=60, mapper=False)
    a = c.open()
    write(a, 200)
    a.compact(200, forks=1)
    other = c.open()
    for _ in range(80):
        write(other, 8)
    before = c.stats()
    [fork] = a.fork(200)
    after = c.stats()
    assert after.copied == before.copied
    for name in ("create", "map", "unmap", "release"):  # what is shared may be made read-only
        assert after.driver_calls[name] == before.driver_calls[name]
    assert rows(fork) == list(range(200))
    c.check()


def test_a_fork_gives_up_what_it_kept_where_its_memory_is_short():
    """One of the targets has more behind the shared rows than it needs yet, and the other one needs that."""
    c = cache(slots=4, mapper=False, tail_rows=80)
    b, a = c.open(), c.open()
    write(b, 160)
    write(a, 160)
    [parked] = b.fork(160, share="alias")
    for _ in range(50):
        write(parked, 8)
    parked.remember(range(160))
    parked.close()
    c.set_budget(c.stats().physical)
    forks = a.fork(160, 2, share="alias")
    assert [rows(fork) for fork in forks] == [list(range(160))] * 2
    assert rows(b) == list(range(160))
    c.check()


def test_copy_on_write_leaves_what_ends_where_rows_may_be_written():
    c = cache(mapper=False)
    s = c.open()
    write(s, 64)  # an extent of eight granules
    [fork] = s.fork(share="alias")
    before, copied = memory_calls(c), c.stats().copied
    c.copy_on_write([fork], 64)
    assert (memory_calls(c), c.stats().copied) == (before, copied)
    c.copy_on_write([fork], 63)
    assert c.stats().copied == copied + 8 * PAGE
    assert rows(fork) == rows(s) == list(range(64))
    c.check()


def test_shared_memory_behind_the_rows_is_unmapped_behind_a_fence():
    """Kernels that were queued before the truncation may still read it."""
    c = cache(mapper=False)
    s = c.open()
    write(s, 64)
    write(s, 32)  # an extent of its own
    [fork] = s.fork(share="alias")
    fork.truncate(64)
    before = c.stats().driver_calls["record"]
    write(fork, 8, 5)
    assert c.stats().driver_calls["record"] == before + 1
    assert rows(s) == list(range(96))
    assert rows(fork) == [*range(64), *[5] * 8]
    c.check()
