"""The other ways of mapping memory, to which the benchmarks compare vattn."""

from __future__ import annotations

import pytest

from vattn import BudgetExceeded, _core
from vattn.bench.baseline_pages import Pages

PAGE = 4096


def pages(*, planes=1, budget=100, zero_page=False):
    return Pages(
        _core.host_driver(PAGE), planes=planes, row_bytes=512, slots=3, max_len=100,
        budget=budget * PAGE, zero_page=zero_page,
    )  # fmt: skip


@pytest.mark.parametrize("planes", [1, 4])
def test_a_growth_maps_page_by_page_in_every_plane(planes):
    cache = pages(planes=planes)
    sequence = cache.open()
    assert sequence.grow(9) == 9
    counts = cache.driver.counts()
    assert (counts["create"], counts["map"], counts["set_access"]) == (2 * planes,) * 3
    assert sequence.capacity == 16
    sequence.grow(7)
    assert cache.driver.counts() == counts
    stats = cache.stats()
    assert (stats.rows, stats.mapped, stats.misses) == (16 * 512 * planes, 2 * planes * PAGE, 1)
    cache.close()
    counts = cache.driver.counts()
    assert counts["map"] == counts["unmap"]
    assert counts["create"] == counts["release"]
    assert counts["reserve"] == counts["free_address"]


def test_the_next_sequence_has_the_pages_of_the_last():
    cache = pages()
    for _ in range(2):
        sequence = cache.open()
        sequence.grow(40)
        sequence.close()
    assert cache.driver.counts()["map"] == 5
    assert (cache.stats().parked, cache.stats().parked_slots) == (5 * PAGE, 1)
    cache.close()


def test_pages_are_taken_from_who_needs_them_least():
    cache = pages(budget=6)
    first, second = cache.open(), cache.open()
    first.grow(24)
    second.grow(24)
    first.close()
    second.grow(16)
    assert (cache.driver.counts()["unmap"], cache.stats().parked) == (2, PAGE)
    third = cache.open()  # adopts the page that is left
    third.prefetch(8)
    with pytest.raises(BudgetExceeded):
        third.grow(9)
    assert third.length == 0
    second.close()
    again = cache.open()
    again.grow(8)
    third.grow(24)
    assert again.capacity == 24
    assert cache.stats().spare == 2 * PAGE
    cache.close()


def test_what_is_not_mapped_reads_a_page_of_zeros():
    cache = pages(zero_page=True)
    everywhere = cache.driver.counts()["map"]
    assert everywhere == cache.reserved // PAGE
    cache.open().grow(16)
    counts = cache.driver.counts()
    assert (counts["map"] - everywhere, counts["unmap"]) == (2, 2)
    cache.close()
    assert cache.driver.counts()["map"] == cache.driver.counts()["unmap"]
