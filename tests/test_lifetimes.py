"""Caches and sequences that are forgotten, copied, saved, printed, inherited by a forked child, or detached."""

from __future__ import annotations

import copy
import functools
import gc
import io
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time

import numpy
import pytest
import torch
from models import build, generated, prompt, virtual_of
from transformers import DynamicCache

from vattn import CACHE_KEYWORD, KVCache, KVLayout, VirtualCache

PAGE = 4096


def small_cache(**options) -> KVCache:
    layout = KVLayout.uniform(layers=2, kv_heads=2, head_dim=16, max_len=1000, granularity=PAGE, dtype="float32")
    return KVCache(layout, slots=4, **options)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 warns of a fork with several threads
@pytest.mark.parametrize("mapper", [True, False])
def test_a_forked_child_drops_what_is_its_parents(mapper):
    """The parent has a sequence that is swapped out and, with a mapper, a thread that waits."""
    cache = small_cache(mapper=mapper)
    sequence, other = cache.open(), cache.open()
    sequence.grow(100)
    other.grow(50)
    other.swap_out()
    cache.wait_idle()
    child = os.fork()
    if child == 0:
        del sequence, other, cache
        gc.collect()
        os._exit(7)
    until = time.monotonic() + 30
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(ended[1]) == 7
    assert sequence.grow(1) == 101


def test_a_bound_method_keeps_its_model(device):
    def loaded():
        model = build("llama-gqa", "sdpa", device)
        caches.append(VirtualCache(model, max_len=64, attention="auto"))
        return model.generate, model.forward

    caches = []
    generate, forward = loaded()
    gc.collect()
    inputs = prompt(1, 10, device)
    assert generate(**inputs, max_new_tokens=4, do_sample=False, **{CACHE_KEYWORD: caches[0]}).shape == (1, 14)
    assert forward(**inputs).logits.shape == (1, 10, 101)
    caches[0].close()


@pytest.mark.parametrize("way", ["detach", "close", "forget"])
def test_a_model_is_what_it_was_without_its_caches(way, device):
    model = build("llama-gqa", "sdpa", device)
    kind, names = type(model), set(vars(model))
    before = kind.forward, kind.generate, model.forward, model.generate, pickle.dumps(model)
    caches = [VirtualCache(model, max_len=64, attention="auto") for _ in range(2)]
    assert kind.forward is not before[0]
    assert set(vars(model)) == names
    for cache in caches:
        generated(model, cache)
        assert cache.decode_stats().eager
    caches.append(copy.deepcopy(caches[0]))
    while caches:
        assert kind.forward is not before[0]
        cache = caches.pop()
        if way != "forget":
            getattr(cache, way)()
        del cache
    assert (kind.forward, kind.generate, model.forward, model.generate, pickle.dumps(model)) == before
    assert set(vars(model)) == names


def test_a_detached_cache_goes_on_without_steps(device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    with virtual_of(model) as cache:
        first = generated(model, cache)
        cache.detach()
        cache.detach()
        more = {"input_ids": first, "max_new_tokens": 12, "do_sample": False, CACHE_KEYWORD: cache}
        assert torch.equal(model.generate(**more), expected)
        assert cache.decode_stats() is None


def test_methods_that_an_instance_has_of_its_own(device):
    """accelerate's hooks set such methods on instances."""
    model = build("llama-gqa", "sdpa", device)
    inner, calls = model.forward, []

    @functools.wraps(inner)
    def hooked(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = hooked
    with virtual_of(model) as cache:
        generated(model, cache)
        stats = cache.decode_stats()
        assert stats.eager + stats.replayed == 11
        assert calls
    assert model.forward is hooked


def test_a_sequence_that_is_forgotten_gives_its_slot_back():
    cache = small_cache()

    def forgetful():
        sequence = cache.open()
        sequence.grow(10)
        assert cache.stats().running_slots == 1

    with pytest.warns(ResourceWarning, match=rf"opened at {__file__}:\d+ was never closed"):
        forgetful()
    assert cache.stats().running_slots == 0
    with pytest.warns(ResourceWarning, match="was never closed"):
        cache.open().fork(n=2)
    assert cache.stats().running_slots == 0


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_what_is_closed_or_a_models_is_not_warned_of(device):
    with small_cache() as cache:
        with cache.open() as sequence:
            sequence.grow(5)
        left = cache.open(expected=3)
    del left  # its cache is closed
    model = build("llama-gqa", "sdpa", device)
    generated(model, VirtualCache(model.config, max_len=64))
    gc.collect()


def test_rows_of_a_sequence_are_saved_copied_and_printed(device):
    granularity = PAGE if device == "cpu" else 2 << 20
    layout = KVLayout.uniform(layers=2, kv_heads=2, head_dim=16, max_len=100_000, granularity=granularity)
    with KVCache(layout, slots=3, device=device) as cache, cache.open() as _, cache.open() as sequence:
        sequence.grow(7)
        for layer in (0, 1):
            for rows in (sequence.k(layer), sequence.v(layer)):
                rows.fill_(layer + 1)
                file = io.BytesIO()
                torch.save(rows, file)
                assert file.tell() < 10_000
                file.seek(0)
                for copied in (torch.load(file), pickle.loads(pickle.dumps(rows)), copy.deepcopy(rows)):
                    assert torch.equal(copied, rows)
                assert "tensor(" in repr(rows)
        assert torch.equal(sequence.k(1), cache.k(1)[1, :7])


def looks(tensor):
    return (
        lambda: repr(tensor),
        lambda: f"{tensor}",
        lambda: print(tensor, file=io.StringIO()),
        lambda: torch.save(tensor, io.BytesIO()),
        lambda: pickle.dumps(tensor),
        lambda: copy.deepcopy(tensor),
        lambda: tensor.cpu(),
        lambda: numpy.asarray(tensor.cpu()) if tensor.is_cuda else numpy.asarray(tensor),
        lambda: tensor.cpu().numpy() if tensor.is_cuda else tensor.numpy(),
        lambda: tensor.tolist(),
    )


def test_addresses_without_memory_are_told(device):
    granularity = PAGE if device == "cpu" else 2 << 20
    layout = KVLayout.uniform(
        layers=2, kv_heads=2, head_dim=16, max_len=100_000, granularity=granularity, dtype="float32"
    )
    with KVCache(layout, slots=3, device=device) as cache, cache.open() as sequence:
        sequence.grow(7)
        k, v, heads = cache.grouped(0)
        assert heads is not None
        for whole in (cache.k(0), cache.v(1), cache.k(0)[sequence.slot], cache.k(0)[2, :1], k, v, heads):
            for look in looks(whole):
                with pytest.raises(RuntimeError, match="has no memory behind all of them"):
                    look()
        mine = cache.k(0)[sequence.slot, :7]
        mine.fill_(3)
        for look in looks(mine):
            look()
        assert mine.tolist()[6][1][15] == 3
        assert type(mine + 1) is torch.Tensor
        assert type(mine.clone()) is torch.Tensor
        empty = cache.k(0)[1, :0]
        assert empty.tolist() == []
    with pytest.raises(RuntimeError, match="has no memory"):
        repr(mine)


def test_what_a_model_has_cached_is_saved_and_copied(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model.config) as cache:
        generated(model, cache)
        keys = cache.layers[1].keys
        file = io.BytesIO()
        torch.save(keys, file)
        file.seek(0)
        assert torch.equal(torch.load(file), keys)
        assert torch.equal(copy.deepcopy(keys), keys)
        assert "tensor(" in repr(keys)


def test_what_cannot_be_copied_says_what_to_do():
    cache = small_cache()
    with cache.open() as sequence:
        for copied in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"fork\(\)|export\(\)"):
                copied(sequence)
            with pytest.raises(TypeError, match="fork its sequences"):
                copied(cache)
        assert sequence.grow(3) == 3
    virtual = VirtualCache(build("llama-gqa", "sdpa", "cpu").config, max_len=64)
    for copied in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="save clones of its layers"):
            copied(virtual)


def test_the_interpreter_ends_with_everything_open():
    program = """
        import vattn
        layout = vattn.KVLayout.uniform(layers=1, kv_heads=1, head_dim=16, max_len=1000)
        cache = vattn.KVCache(layout, slots=2)
        sequence = cache.open()
        sequence.grow(10)
        other = cache.open()
        other.swap_out()
    """
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
