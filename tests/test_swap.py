"""Sequences that are swapped out to host memory and back in."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

from vattn import BudgetExceeded, DriverError, KVCache, KVLayout
from vattn.memory.shape import LayerShape
from vattn.memory.swap_costs import SwapCosts

PAGE = 4096
WINDOW = 16


def cache(device="cpu", slots=4, **options):
    shapes = [LayerShape(kv_heads=1, head_dim=64, dtype="float32", window=window) for window in (None, WINDOW)]
    granularity = PAGE if device == "cpu" else 2 * 1024 * 1024
    layout = KVLayout(shapes, max_len=200_000, granularity=granularity)
    return KVCache(layout, slots=slots, device=device, **{"lookahead": 0, **options})


def write(sequence, n, value=0):
    for step in (n - 3, 1, 1, 1):  # several steps, so that windows move
        start = sequence.length
        sequence.grow(step)
        values = torch.arange(start, start + step, dtype=torch.float32) + value
        for layer in range(2):
            for rows, sign in ((sequence.k(layer), 1), (sequence.v(layer), -1)):
                rows[max(start, 0) :] = sign * values.reshape(-1, 1, 1).to(rows.device)


def check(sequence, value=0):
    expected = torch.arange(sequence.length, dtype=torch.float32) + value
    for layer, first in ((0, 0), (1, max(sequence.length - WINDOW + 1, 0))):
        assert torch.equal(sequence.k(layer)[first:, 0, 5].cpu(), expected[first:])
        assert torch.equal(sequence.v(layer)[first:, 0, 7].cpu(), -expected[first:])


def test_a_sequence_comes_back_as_it_was(device):
    c = cache(device)
    s = c.open()
    write(s, 10_000)
    other = c.open()
    write(other, 500, value=3)
    s.swap_out()
    assert (s.slot, s.length, s.swapped) == (-1, 10_000, True)
    assert c.stats().host > 0
    write(other, 15_000)  # may get the memory that the swapped sequence gave back
    third = c.open()
    write(third, 10_000, value=9)
    s.swap_in()
    assert not s.swapped
    check(s)
    check(third, 9)
    write(s, 100)
    check(s)
    s.close()
    c.trim()
    assert c.stats().host == c.stats().host_pooled == 0
    c.check()


def test_the_memory_serves_others_meanwhile():
    c = cache(budget=110 * PAGE)
    s = c.open()
    write(s, 400)
    s.swap_out()
    other = c.open()
    write(other, 400, value=5)
    write(other, 150, value=5)
    with pytest.raises(BudgetExceeded):
        s.swap_in()
    assert s.swapped
    assert c.stats().running_slots == 1
    check(other, 5)
    other.close()
    s.swap_in(slot=3)
    assert s.slot == 3
    check(s)
    c.check()


def test_what_it_shared_stays_with_the_others():
    c = cache()
    s = c.open()
    write(s, 400)
    [fork] = s.fork(share="alias")
    s.swap_out()
    c.wait_idle()
    write(fork, 50)
    s.swap_in()
    write(s, 50, value=0)
    check(s)
    check(fork)
    c.check()


def physical(c):
    c.wait_idle()
    c.trim()
    return c.stats().physical


@pytest.mark.parametrize("first_to_go", [True, False], ids=["with its source", "beside its source"])
def test_a_family_shares_again_what_it_shared(device, first_to_go):
    """Rows that eight forks share are copied to the host only once, and are in memory only once when all are back."""
    c = cache(device, slots=10)
    s = c.open()
    length = 3000 if device == "cpu" else 40_000
    write(s, length)
    forks = s.fork(n=8, share="alias")
    for fork in forks:
        write(fork, 20)
    before, alone = physical(c), length * c.layout.bytes_per_token
    everybody = [s, *forks] if first_to_go else forks
    everybody[0].swap_out()
    copies = c.stats().driver_calls["copy"]
    for sequence in everybody[1:]:
        sequence.swap_out()
    c.wait_idle()
    block = 16 * c.layout.granularity
    assert c.stats().host - c.stats().host_pooled <= alone + block * (1 + len(everybody))
    assert c.stats().driver_calls["copy"] - copies <= 2 * len(c.map()[0]["runs"]) * (len(everybody) - 1)
    if first_to_go:
        assert physical(c) == 0
    for sequence in reversed(everybody):
        sequence.swap_in()
    assert physical(c) <= before * 1.1
    for sequence in [s, *forks]:
        check(sequence)
        write(sequence, 40)
        check(sequence)
    for sequence in everybody:
        sequence.close()
    s.close()
    assert c.stats().host == c.stats().host_pooled
    c.check()


@pytest.mark.parametrize("change", ["truncated", "closed and adopted"])
def test_what_is_written_meanwhile_is_shared_with_nobody(change):
    c = cache()
    s = c.open()
    write(s, 400)
    [fork] = s.fork(share="alias")
    fork.swap_out()
    c.wait_idle()
    if change == "truncated":
        s.truncate(0)
    else:
        s.close()
        s = c.open()
    write(s, 400, value=7)
    fork.swap_in()
    check(fork)
    check(s, 7)
    write(fork, 50)
    check(s, 7)
    c.check()


def test_rows_that_are_written_where_they_are_change_nobody_in_host_memory():
    """``copy_on_write`` before a write in place ends the sharing with sequences that are swapped out, too."""
    c = cache(mapper=False)
    s = c.open()
    write(s, 400)
    [fork] = s.fork(share="alias")
    fork.swap_out()
    c.trim()
    assert c.shares([s], 0)
    c.copy_on_write([s], 0)
    assert not c.shares([s], 0)
    for layer in range(2):
        s.k(layer)[-5:] = s.v(layer)[-5:] = 99
    fork.swap_in()
    check(fork)
    c.check()


def test_a_sequence_that_grows_while_another_of_its_family_comes_back():
    """One thread grows a sequence that was truncated, while another one swaps in a sequence that had the same rows."""
    shapes = [LayerShape(kv_heads=heads, head_dim=64, dtype="float32") for heads in (1, 8)]
    layout = KVLayout(shapes, max_len=4096, granularity=16 * PAGE)
    chance = random.Random(0)
    for _ in range(60):
        c = KVCache(layout, slots=8, mapper=False)
        grown = c.open()
        grown.grow(2048)
        for layer in range(2):
            grown.k(layer).fill_(1)
        away, other = grown.fork(n=2, share="alias")
        grown.fork(1500, share="alias")
        slots = away.slot, other.slot
        away.swap_out()
        grown.truncate(500)
        other.close()
        for slot in slots:  # unmaps the memory that was left in these slots
            c.open(slot=slot).grow(1)
        start = threading.Barrier(2)

        def come_back(away=away, start=start):
            start.wait()
            time.sleep(chance.random() * 0.002)
            away.swap_in()

        thread = threading.Thread(target=come_back)
        thread.start()
        start.wait()
        grown.grow(1)
        grown.k(0)[500] = 7
        thread.join()
        assert bool((away.k(0) == 1).all())
        c.check()
        c.close()


def test_what_grows_while_it_is_swapped_out_keeps_its_length():
    for _ in range(100):
        c = cache(slots=2)
        s = c.open()
        s.grow(300)
        grown = [300]

        def work(c=c, s=s, grown=grown):
            with contextlib.suppress(ValueError):  # raised once the sequence is swapped out and has no slot
                while True:
                    c.grow_all([s], grown[0] + 1, min_truncate_length=grown[0])
                    grown[0] += 1

        thread = threading.Thread(target=work)
        thread.start()
        s.swap_out()
        thread.join()
        assert s.length == grown[0]
        c.close()


def test_what_is_shared_again_is_protected():
    """With ``protect_shared``, a write to rows that are shared again after a swap faults, as it does after a fork."""
    code = """
    import sys
    from vattn import KVCache, KVLayout
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=64, dtype="float32", max_len=4000, granularity=4096)
    c = KVCache(layout, slots=4, protect_shared=True)
    s = c.open()
    s.grow(400)
    [fork] = s.fork(share="alias")
    for one in (fork, s):
        one.swap_out()
    c.trim()
    for one in (s, fork):
        one.swap_in()
    print(len(c.map()), flush=True)
    s.k(0)[0] = 5
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "4"
    assert done.returncode == -signal.SIGSEGV


def test_blocks_of_a_closed_cache_go_back():
    c = cache()
    s = c.open()
    s.grow(300)
    s.swap_out()
    c.close()
    s.close()
    assert c.stats().host == 0


def test_a_family_that_finds_no_memory_stays_swapped():
    """Each driver call of a swap-in fails once: nothing is lost, and the next attempt succeeds."""
    for k in range(1, 40):
        c = cache(slots=5, mapper=False)
        s = c.open()
        write(s, 400)
        forks = s.fork(n=2, share="alias")
        for sequence in (s, *forks):
            sequence.swap_out()
        s.swap_in()
        c.driver.fail_at(k)
        try:
            forks[0].swap_in()
        except DriverError:
            assert forks[0].swapped
            c.check()
            forks[0].swap_in()
        else:
            c.driver.fail_at(0)
        forks[1].swap_in()
        for sequence in (s, *forks):
            check(sequence)
        c.check()


def test_the_host_has_a_budget_of_its_own():
    c = cache(host_budget=16 * PAGE)
    first, second = c.open(), c.open()
    write(first, 100)  # one block of host memory holds its rows of all planes
    write(second, 100)
    first.swap_out()
    with pytest.raises(BudgetExceeded, match="the host_budget is spent"):
        second.swap_out()
    check(second)
    first.close()
    second.swap_out()
    second.swap_in()
    check(second)
    c.check()


def test_misuse_is_told():
    c = cache()
    s = c.open()
    with pytest.raises(ValueError, match="not swapped out"):
        s.swap_in()
    s.swap_out()
    for use in (s.swap_out, s.grow, s.fork, lambda: s.k(0), lambda: s.remember([]), lambda: s.truncate(0)):
        with pytest.raises(ValueError, match="the sequence is swapped out"):
            use()
    assert "swapped out" in repr(s)
    swapped = s.handle.swapped
    s.swap_in()
    with pytest.raises(ValueError, match="is being, or was, swapped in"):
        c._arena.swap_in(swapped)
    assert s.length == 0
    s.swap_out()
    s.close()
    s.close()
    with pytest.raises(ValueError, match="host_budget must not be negative"):
        cache(host_budget=-1)
    other = cache()
    t = other.open()
    t.swap_out()
    with pytest.raises(ValueError, match="swapped out of another cache"):
        c._arena.swap_in(t.handle.swapped)
    c.check()


@pytest.mark.parametrize("mapper", [False, True])
@pytest.mark.parametrize("way", ["out", "in"])
def test_the_kth_call_failing_for_every_k(way, mapper):
    k = 0
    while True:
        k += 1
        c = cache(mapper=mapper)
        s = c.open()
        write(s, 300)
        if way == "in":
            s.swap_out()
            c.trim()
        c.wait_idle()
        c.driver.fail_at(k)
        try:
            s.swap_out() if way == "out" else s.swap_in()
            failed = False
        except DriverError:
            failed = True
        c.driver.fail_at(0)
        c.wait_idle()
        c.check()
        if failed:
            assert s.swapped == (way == "in")
        if s.swapped:
            s.swap_in()
        check(s)
        s.close()
        c.trim()
        assert c.stats().physical == 0
        assert c.stats().host == c.stats().host_pooled == 0
        c.check()
        if not failed:
            break
    assert k > 5


def test_a_measured_estimate_says_whether_to_swap(device):
    measured = SwapCosts.measure(device, nbytes=64 << 20)
    assert min(measured.out_bytes, measured.in_bytes, measured.flops) > 1e6
    costs = SwapCosts(out_bytes=50e9, in_bytes=50e9, flops=600e12)
    llama = KVLayout.uniform(layers=32, kv_heads=8, head_dim=128, max_len=131072)
    large = {"parameters": 8_000_000_000, "query_heads": 32}
    assert costs.swap_seconds(llama, 8192) == pytest.approx(2 * 2**30 / 50e9)
    attention = 32 * 2 * 32 * 256 * 8192**2 / 2
    assert costs.recompute_seconds(llama, 8192, **large) == pytest.approx((2 * 8e9 * 8192 + attention) / 600e12)
    assert costs.better(llama, 8192, **large) == "swap"
    assert costs.better(llama, 100, parameters=10_000_000, query_heads=32) == "recompute"
    assert SwapCosts(out_bytes=1e9, in_bytes=1e9, flops=600e12).better(llama, 8192, **large) == "recompute"
