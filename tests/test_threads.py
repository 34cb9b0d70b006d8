"""Several threads on one cache, one sequence or one model: it works, or the second thread gets an error."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import build, generated, prompt, virtual_of
from transformers import DynamicCache

from vattn import CACHE_KEYWORD, Error, KVCache, KVLayout, LayerShape
from vattn.errors import BudgetExceeded

PAGE = 4096
# How long the mixed work runs, in seconds. VATTN_TEST_SECONDS sets another duration.
SECONDS = float(os.environ.get("VATTN_TEST_SECONDS", "3"))


def together(*calls: Callable[[], object]) -> list[object]:
    """Starts calls at the same time, each in a thread of its own.

    Returns:
        The result of each call, or the exception that it raised.
    """
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return call()
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def small_cache(**options) -> KVCache:
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=128, max_len=2000, granularity=PAGE, dtype="float32")
    return KVCache(layout, **{"slots": 12, **options})


@pytest.mark.parametrize("mapper", [True, False])
def test_growth_by_several_threads_is_not_lost(mapper):
    with small_cache(mapper=mapper) as cache, cache.open() as sequence:
        got = together(*[lambda: [sequence.grow(1) for _ in range(300)]] * 4)
        reached = [length for each in got for length in each]
        assert sorted(reached) == list(range(1, 1201))
        assert sequence.length == 1200
        cache.check()


def test_a_snapshot_adds_up_while_others_grow():
    with small_cache() as cache:
        done = threading.Event()
        wrong: list[object] = []

        def look():
            while not done.is_set():
                stats = cache.stats()
                if stats.physical != stats.mapped + stats.pooled + stats.deferred:
                    wrong.append(stats)

        def work():
            for _ in range(60):
                with cache.open() as sequence:
                    for _ in range(5):
                        sequence.grow(20)
                    for fork in sequence.fork(n=2):
                        fork.close()
                cache.trim()
            return True

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            assert together(work, work) == [True, True]
        finally:
            done.set()
            watcher.join()
        assert wrong == []


@pytest.mark.usefixtures("small")
def test_copies_of_one_prefix_by_six_threads(device):
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(1, 40, device)["input_ids"]
    with virtual_of(model.config, max_len=256) as cache, torch.no_grad():
        model(ids, **{CACHE_KEYWORD: cache}, use_cache=True)
        keys = cache.layers[2].keys.clone()

        def copies():
            for _ in range(200):
                other = copy.deepcopy(cache)
                assert torch.equal(other.layers[2].keys, keys)
                other.close()
            return True

        assert together(*[copies] * 6) == [True] * 6
        assert cache.kv_caches[0].stats().running_slots == 1
        cache.check()


@pytest.mark.thorough(1)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("made_with", ["model", "config"])
def test_two_threads_in_one_generate(made_with, device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=100)
    for _ in range(3):
        with virtual_of(model if made_with == "model" else model.config, attention=None) as cache:
            begun = threading.Event()

            def first(cache=cache, begun=begun):
                begun.set()
                return generated(model, cache, max_new_tokens=100)

            def second(cache=cache, begun=begun):
                begun.wait()
                while not cache.get_seq_length():
                    time.sleep(0.001)
                return generated(model, cache, max_new_tokens=100)

            one, two = together(first, second)
            told = [result for result in (one, two) if isinstance(result, Exception)]
            assert told
            for error in told:
                assert isinstance(error, RuntimeError)
                assert "in use by another thread" in str(error)
            if made_with == "model":
                assert torch.equal(one, expected)
            cache.reset()
            assert torch.equal(generated(model, cache, max_new_tokens=100), expected)


@pytest.mark.usefixtures("small")
def test_a_prompt_on_kernels_beside_a_plain_call(device):
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 60, device)["input_ids"]
    with virtual_of(model, attention="sdpa", capture=False) as cache, torch.no_grad():
        generated(model, cache)
        cache.reset()
        expected = model(ids).logits
        done = threading.Event()

        def plain():
            seen = set()
            while not done.is_set():
                torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(model.model(ids)[0], model.model(ids)[0])
                seen.add(model.config._attn_implementation)
            return seen

        def prompts():
            try:
                with torch.no_grad():
                    for _ in range(30):
                        logits = model(ids, **{CACHE_KEYWORD: cache}, use_cache=True).logits
                        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
                        cache.reset()
                return cache.decode_stats().prompts
            finally:
                done.set()

        with torch.no_grad():
            *seen, count = together(torch.no_grad()(plain), torch.no_grad()(plain), prompts)
        assert seen == [{"sdpa"}] * 2
        assert count >= 25


@pytest.mark.thorough(1)
@pytest.mark.parametrize("mapper", [True, False])
def test_mixed_work(mapper):
    """Threads open, grow, fork, swap, remember, compact and close under a budget, while another reads and trims."""
    with small_cache(mapper=mapper, budget=120 * PAGE) as cache:
        until = time.monotonic() + SECONDS
        refused = (BudgetExceeded, ValueError)

        def work(seed):
            chance = random.Random(seed)
            mark = float(seed)
            while time.monotonic() < until:
                try:
                    sequence = (
                        cache.open(tokens=[seed] * chance.randrange(1, 40)) if chance.random() < 0.3 else cache.open()
                    )
                except refused:
                    continue
                with sequence:
                    try:
                        for _ in range(chance.randrange(1, 6)):
                            start = sequence.length
                            sequence.grow(chance.randrange(1, 60))
                            sequence.k(0)[start:] = mark
                            assert bool((sequence.k(0) == mark).all())
                        if chance.random() < 0.3:
                            sequence.remember([seed] * min(sequence.length, 39))
                        if chance.random() < 0.3:
                            for fork in sequence.fork(sequence.length // 2):
                                with fork:
                                    assert bool((fork.k(0) == mark).all())
                                    fork.grow(3)
                        if chance.random() < 0.2:
                            sequence.compact()
                        if chance.random() < 0.3:
                            sequence.swap_out()
                            sequence.swap_in()
                        assert bool((sequence.k(0) == mark).all())
                    except refused:
                        if sequence.swapped:
                            continue
                        assert bool((sequence.k(0) == mark).all())
            return True

        def disturb():
            while time.monotonic() < until:
                stats = cache.stats()
                assert stats.physical == stats.mapped + stats.pooled + stats.deferred
                cache.map()
                with contextlib.suppress(Error):
                    cache.trim()
                time.sleep(0.002)
            return True

        calls = [lambda seed=seed: work(seed) for seed in range(1, 6)]
        assert together(*calls, disturb) == [True] * 6
        cache.check()
        assert cache.stats().running_slots == 0


def test_others_go_on_while_a_sequence_is_swapped():
    """A thread that asks for the length of a sequence waits for its swap without the GIL."""
    layout = KVLayout([LayerShape(kv_heads=8, head_dim=128, dtype="float32")] * 4, max_len=20_000)
    with KVCache(layout, slots=1, device="cpu", mapper=False) as cache:
        sequence = cache.open()
        sequence.grow(2000)
        cache.driver.charge("copy", 1_000_000_000)
        lengths: list[int] = []
        swaps = threading.Thread(target=sequence.swap_out)
        asks = threading.Thread(target=lambda: lengths.append(sequence.length))
        swaps.start()
        time.sleep(0.1)
        asks.start()
        time.sleep(0.1)
        assert swaps.is_alive()  # this thread has run meanwhile
        for thread in (swaps, asks):
            thread.join()
        assert lengths == [2000]
        cache.driver.charge("copy", 0)
        sequence.close()


def test_a_thread_that_finds_nothing_waits_for_what_another_is_taking():
    """One parked extent has memory for both: the second waits until the first has unmapped it."""
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=64, max_len=1000, dtype="float32", granularity=PAGE)
    with KVCache(layout, slots=3, budget=20 * PAGE, mapper=False, lookahead=0) as cache:
        small = cache.open(slot=1)
        for _ in range(4):
            small.grow(8)
        with cache.open(slot=0) as sequence:
            sequence.grow(128)
        one = cache.open(slot=2)
        cache.driver.charge("unmap", 200_000_000)
        before = cache.driver.counts()["unmap"]
        with ThreadPoolExecutor() as pool:
            grown = pool.submit(one.grow, 32)
            while cache.driver.counts()["unmap"] == before:  # it is taking the extent
                pass
            small.compact()
            grown.result()
        cache.driver.charge("unmap", 0)
        assert cache.map()[1]["runs"][0]["extents"] == [4 * PAGE]
        assert one.length == 32
        cache.check()
