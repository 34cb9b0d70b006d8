from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random

import numpy as np
import pytest
import torch

from vattn import BackendUnavailable, BudgetExceeded, CacheStats, KVCache, KVLayout, LayerShape, SequenceTooLong

PAGE = 4096
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


def small(kind="interleaved", *, dtype="float32", device="cpu", max_len=500, **options):
    layout = KVLayout.uniform(
        layers=3, kv_heads=2, head_dim=16, v_head_dim=24, max_len=max_len, dtype=dtype, kind=kind,
        granularity=PAGE if device == "cpu" else 1 << 21,
    )  # fmt: skip
    return KVCache(layout, slots=3, device=device, **options)


def noise(cache, n, head_dim):
    return torch.randn(n, 2, head_dim, device=cache.device).to(cache.k(0).dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["interleaved", "compact"])
def test_what_is_written_is_read_while_everything_grows(device, kind, dtype):
    cache = small(kind, dtype=dtype, device=device)
    written = {}
    address = cache.k(1).data_ptr()
    a, b = cache.open(), cache.open()
    for step in range(20):
        for sequence in (a, b):
            start, n = sequence.length, 1 + step * (1 + sequence.slot)
            sequence.grow(n)
            for layer in range(3):
                k, v = noise(cache, n, 16), noise(cache, n, 24)
                sequence.k(layer)[start:].copy_(k)
                sequence.v(layer)[start:].copy_(v)
                written.setdefault((sequence.slot, layer), []).append((k, v))
    for sequence in (a, b):
        for layer in range(3):
            k, v = (torch.cat(parts) for parts in zip(*written[sequence.slot, layer], strict=True))
            assert torch.equal(sequence.k(layer).float(), k.float())
            assert torch.equal(sequence.v(layer).float(), v.float())
    assert cache.k(1).data_ptr() == address
    assert cache.k(0).shape == (3, 500, 2, 16)
    assert cache.v(2).shape == (3, 500, 2, 24)
    assert cache.k(0).dtype == getattr(torch, dtype)


def test_strides_suit_kernels():
    cache = small(dtype="bfloat16")
    for tensor in (cache.k(0), cache.v(2)):
        assert tensor.stride(-1) == 1
        assert all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:3])
        assert tensor.data_ptr() % 16 == 0


def test_new_memory_is_zero(device):
    cache = small(device=device)
    with cache.open() as sequence:
        sequence.grow(100)
        assert not sequence.k(0).any()
        assert not sequence.v(2).any()


def test_plain_attention_runs_on_a_slice(device):
    cache = small(device=device)
    sequence = cache.open()
    sequence.grow(37)
    k, v = torch.randn(37, 2, 16, device=device), torch.randn(37, 2, 24, device=device)
    sequence.k(1).copy_(k)
    sequence.v(1).copy_(v)
    q = torch.randn(1, 2, 5, 16, device=device)
    attend = torch.nn.functional.scaled_dot_product_attention
    got = attend(q, sequence.k(1).transpose(0, 1)[None], sequence.v(1).transpose(0, 1)[None])
    torch.testing.assert_close(got, attend(q, k.transpose(0, 1)[None], v.transpose(0, 1)[None]))


def test_sequences_grow_truncate_and_close():
    cache = small()
    sequence = cache.open()
    assert sequence.grow(10) == 10
    assert sequence.grow() == 11
    assert sequence.grow(0) == 11
    sequence.truncate(4)
    assert (sequence.length, sequence.k(0).shape[0]) == (4, 4)
    sequence.close()
    sequence.close()
    assert repr(sequence) == "Sequence(slot 0, closed)"
    for use in (
        lambda: sequence.grow(1),
        lambda: sequence.truncate(0),
        lambda: sequence.k(0),
        lambda: sequence.v(0),
    ):
        with pytest.raises(ValueError, match="the sequence is closed: open a new one"):
            use()


def test_a_batch_grows_together():
    cache = small(budget=8 * PAGE)
    rows = [cache.open() for _ in range(3)]
    cache.grow_all(rows, 3, min_truncate_length=0)
    with pytest.raises(BudgetExceeded):
        cache.grow_all(rows, 400, min_truncate_length=3)
    assert [row.length for row in rows] == [3, 3, 3]
    cache.grow_all(rows, [4, 3, 9], min_truncate_length=[3, 3, 3])
    with pytest.raises(BudgetExceeded):
        cache.grow_all(rows, [5, 400, 400], min_truncate_length=3)
    assert [row.length for row in rows] == [4, 3, 9]
    assert [cache.map()[row.slot]["length"] for row in rows] == [4, 3, 9]
    cache.grow_all(rows, np.int64(3), min_truncate_length=0)
    with pytest.raises(ValueError, match="length must be one number or one for each of 3 sequences, not 2"):
        cache.grow_all(rows, [9, 9], min_truncate_length=0)


def test_a_batch_of_different_lengths_grows_in_one_call_or_not_at_all():
    with small(budget=60 * PAGE, mapper=False) as cache:
        rows = [cache.open() for _ in range(3)]
        cache.grow_all(rows, [5, 1, 9], min_truncate_length=[0, 0, 0])
        misses = cache.stats().misses
        cache.grow_all(rows, [40, 60, 20], min_truncate_length=0)
        assert cache.stats().misses == misses + 1
        assert [row.length for row in rows] == [40, 60, 20]
        with pytest.raises(BudgetExceeded):
            cache.grow_all(rows, [41, 490, 490], min_truncate_length=[40, 60, 20])
        longest = cache.layout.max_len
        with pytest.raises(SequenceTooLong, match=rf"sequence 1 of the batch: {longest + 1} positions are more"):
            cache.grow_all(rows, [41, longest + 1, longest + 2], min_truncate_length=0)
        assert [row.length for row in rows] == [40, 60, 20]
        cache.grow_all([], 5, min_truncate_length=0)
        cache.grow_all([], [], min_truncate_length=[])
        cache.check()


def test_queries_say_what_the_map_says():
    """Compares queries with what ``map()`` says, for random caches whose sequences share memory."""
    chance = random.Random(0)
    for _ in range(30):
        with small(mapper=False, lookahead=0) as cache:
            running = []
            for _ in range(chance.randrange(1, 7)):
                with contextlib.suppress(ValueError):
                    sequence = cache.open(slot=chance.randrange(cache.slots))
                    sequence.grow(chance.randrange(1, 60))
                    running.append(sequence)
                    running += sequence.fork(chance.randrange(sequence.length + 1), share="alias")
            for sequence in running:
                if chance.random() < 0.4:
                    sequence.close()
            running = [sequence for sequence in running if not sequence.handle.closed]
            states = [slot["state"] for slot in cache.map()]
            for n in range(1, cache.slots + 2):
                starts = [at for at in range(cache.slots - n + 1) if "running" not in states[at : at + n]]
                assert cache.free_slots(n) == (starts[-1] if starts else None)
                slot = n - 1
                rest = states[slot:]
                assert cache.free_slots_from(slot) == (rest.index("running") if "running" in rest else len(rest))
            for sequence in running:
                for length in (0, 1, sequence.length // 2, sequence.length):
                    assert cache.shares([sequence], length) == _shares_by_the_map(cache, sequence, length)
            assert cache._arena.running_slots == states.count("running")
            cache.check()


def _shares_by_the_map(cache, sequence, length):
    for plane, run in zip(cache.layout.planes, cache.map()[sequence.slot]["runs"], strict=True):
        end = run["head"]
        for extent, shared in zip(run["extents"], run["shared"], strict=True):
            end += extent
            if shared and end > length * plane.row_bytes:
                return True
    return False


def test_very_many_slots():
    """A few of a million slots are used, and they are chosen as in a cache with few slots."""
    with KVCache(small().layout, slots=1_000_000, budget=100 * PAGE) as cache:
        a, b = cache.open(slot=999_999), cache.open()
        assert (a.slot, b.slot) == (999_999, 0)
        a.grow(10)
        a.close()
        c, d = cache.open(expected=10), cache.open()
        assert (c.slot, d.slot) == (999_999, 1)
        assert cache.free_slots(1) == 999_998
        assert cache.free_slots(1_000_000) is None


def test_a_batch_is_of_running_sequences_of_the_cache():
    cache, other = small(), small()
    closed = cache.open()
    closed.close()
    running, stranger = cache.open(slot=closed.slot), other.open(slot=closed.slot)
    running.grow(5)
    for sequence, message in (
        (closed, "the sequence is closed"),
        (stranger, "holds a sequence of another cache"),
    ):
        for use in (
            lambda batch: cache.grow_all(batch, 9, min_truncate_length=0),
            lambda batch: cache.truncate_all(batch, 2),
            cache.close_all,
        ):
            with pytest.raises(ValueError, match=message):
                use([sequence])
    assert (running.length, cache.map()[running.slot]["length"], stranger.length) == (5, 5, 0)


def test_misuse_is_told():
    cache = small(max_len=10)
    sequence = cache.open()
    with pytest.raises(ValueError, match="n must not be negative"):
        sequence.grow(-1)
    with pytest.raises(ValueError, match="length must not be negative"):
        sequence.truncate(-1)
    with pytest.raises(ValueError, match="length must not be negative"):
        cache.grow_all([sequence], -1, min_truncate_length=0)
    with pytest.raises(ValueError, match="expected must not be negative"):
        cache.open(expected=-1)
    with pytest.raises(ValueError, match="slot must not be negative"):
        cache.open(slot=-1)
    with pytest.raises(ValueError, match="cannot truncate to 5"):
        sequence.truncate(5)
    with pytest.raises(SequenceTooLong, match="11 positions are more than max_len, 10"):
        sequence.grow(11)
    with pytest.raises(ValueError, match="layer 3 has no cache"):
        cache.k(3)
    with pytest.raises(ValueError, match="slot 0 is in use"):
        cache.open(slot=0)
    assert sequence.length == 0
    for options, message in [
        ({"budget": 100}, "budget of 100 bytes is below one granule"),
        ({"budget": -1}, "budget must not be negative"),
        ({"budget": 1.5}, r"budget as a part of the free memory must be in \(0, 1\]"),
        ({"budget": 0.0}, "budget as a part"),
        ({"budget": "4GiB"}, "budget must be bytes, a part"),
        ({"growth_divisor": -1}, "growth_divisor must be at least 1"),
        ({"capacity": -1}, "capacity must not be negative"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            small(**options)
    with pytest.raises(ValueError, match="slots must be at least 1"):
        KVCache(cache.layout, slots=0)
    with pytest.raises(BackendUnavailable, match="'mps' is not supported"):
        KVCache(cache.layout, slots=1, device="mps")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_cuda_without_a_gpu_says_what_to_do():
    with pytest.raises(BackendUnavailable, match=r"device 'cuda' cannot be used: .* Use device='cpu' instead"):
        small(device="cuda")


@pytest.mark.gpu
def test_a_device_that_does_not_exist():
    with pytest.raises(BackendUnavailable, match="CUDA device 99 does not exist"):
        small(device="cuda:99")


def test_a_budget_as_a_part_of_what_is_free():
    cache = small(budget=0.5, capacity=100 * PAGE)
    assert cache.stats().budget == 50 * PAGE


@pytest.mark.frees
def test_views_keep_the_memory_alive():
    cache = small()
    sequence = cache.open()
    sequence.grow(10)
    view = sequence.k(0)
    view.fill_(3)
    del cache, sequence
    gc.collect()
    assert (view == 3).all()


def test_closing_gives_everything_back_and_parking_keeps_it():
    cache = small(capacity=100 * PAGE, lookahead=0)
    with cache:
        for _ in range(3):
            with cache.open() as sequence:
                sequence.grow(50)
        stats = cache.stats()
        assert (stats.parked_slots, stats.running_slots, stats.adopted) == (1, 0, 2)
        assert stats.mapped == stats.parked == stats.physical > 0
        cache.trim()
        assert cache.stats().physical == 0
    with pytest.raises(ValueError, match="the cache is closed"):
        cache.open()


def test_a_sequence_may_outlive_its_cache():
    cache = small()
    with cache.open() as sequence:
        sequence.grow(3)
        cache.close()
    assert sequence.length == 0


def test_the_map_can_be_read():
    cache = small(max_len=1000, lookahead=0)
    first, second = cache.open(), cache.open()
    first.grow(20)
    second.grow(1)
    cache.open(slot=2).close()
    text = cache.show()
    assert "slot 0 running length 20 mapped 0.020 MiB" in text
    assert "plane 0 @0x000000000000: 4+1" in text
    assert "slot 1 running length 1 mapped 0.004 MiB" in text
    assert "slot 2" not in text


def test_from_config_and_hybrid_layouts():
    config = {
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
        "sliding_window": 8, "layer_types": ["full_attention", "sliding_attention"], "dtype": "float32",
    }  # fmt: skip
    cache = KVCache.from_config(config, max_len=1000, slots=1, granularity=PAGE, lookahead=1)
    sequence = cache.open()
    for _ in range(500):
        sequence.grow(1)
    full, local = cache.map()[0]["runs"]
    assert full["head"] == 0
    assert local["head"] > 400 * 256
    assert cache.stats().mapped < cache.layout.mapped_bytes(500) + full["tail"] // 16 + 4 * PAGE


def test_views_made_in_inference_mode_are_ordinary_tensors():
    with torch.inference_mode():
        cache = small()
    sequence = cache.open()
    sequence.grow(2)
    sequence.k(0).fill_(1)
    assert not cache.k(0).is_inference()


def test_a_layer_may_have_no_cache():
    shape = LayerShape(kv_heads=1, head_dim=8, dtype="float32")
    cache = KVCache(KVLayout([None, shape], max_len=8), slots=1)
    assert cache.k(1).shape == (1, 8, 1, 8)
    with pytest.raises(ValueError, match="layer 0 has no cache"):
        cache.v(0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_and_its_exit_harms_nobody():
    cache = small()
    sequence = cache.open()
    sequence.grow(5)
    sequence.k(0).fill_(7)
    child = os.fork()
    if child == 0:
        try:
            sequence.grow(400)
        except BackendUnavailable as error:
            del cache, sequence
            gc.collect()
            os._exit(0 if "make one in the child" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (sequence.k(0) == 7).all()
    sequence.grow(400)


@pytest.mark.gpu
def test_host_and_cuda_show_the_same_map_and_make_the_same_calls():
    def run(device):
        layout = KVLayout.uniform(layers=4, kv_heads=8, head_dim=128, max_len=10000)
        cache = KVCache(layout, slots=4, device=device, budget=400 << 20, mapper=False)
        for turn in range(3):
            rows = [cache.open() for _ in range(3)]
            for step in range(40):
                cache.grow_all(rows, 1 + step * (turn + 1) * 37, min_truncate_length=0)
            rows[1].truncate(100)
            for row in rows:
                row.close()
        cache.open().grow(5000)
        shown, calls = cache.show(), cache.stats().driver_calls
        calls.pop("wait")
        return shown, calls

    assert run("cpu") == run("cuda")


@pytest.mark.gpu
def test_memory_is_not_taken_away_under_a_running_kernel():
    cache = small(device="cuda", budget=2 << 20)
    other = torch.cuda.Stream()
    sequence = cache.open()
    sequence.grow(100)
    sequence.k(0).fill_(1)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(400_000_000)
        total = sequence.k(0).sum()
        sequence.close()
    # The other sequence needs the parked memory: it must wait for the sum.
    with torch.cuda.stream(torch.cuda.Stream()):
        replacement = cache.open(slot=1)
        replacement.grow(100)
        replacement.k(0).fill_(5)
    torch.cuda.synchronize()
    assert total.item() == 100 * 2 * 16


def test_every_statistic_of_the_core_is_a_field():
    """Every entry of the table in csrc/stats.hpp, and the counts of driver calls, are documented in ``CacheStats``."""
    names = [field.name for field in dataclasses.fields(CacheStats)]
    with KVCache(KVLayout.uniform(layers=1, kv_heads=1, head_dim=8, max_len=10), slots=1) as c:
        counted = [*c._arena.stats(), "driver_calls", "background_calls"]
    assert sorted(names) == sorted(counted)
    assert all(f" {name}: " in CacheStats.__doc__ for name in names)
