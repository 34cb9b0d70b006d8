"""Rows of a VirtualCache that share memory: beams and return sequences, copies, and rows that change places."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from models import build, prompt
from transformers import DynamicCache, LlamaConfig

from vattn import CACHE_KEYWORD, BudgetExceeded, DriverError, VirtualCache
from vattn.hf import layer_views, placement
from vattn.hf.layers import CROP_POSITIVE_KEEPS

PAGE = 4096
CONFIG = LlamaConfig(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)
CROPS_REMOVE = CROP_POSITIVE_KEEPS is False  # whether crop takes only a number to remove, as a negative integer
TOKEN = 4 * 2 * 2 * 16 * 4  # bytes of a row: layers, K and V, heads, dim, float32


@pytest.fixture(autouse=True)
def small_granules(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(placement.Placement, "granularity", PAGE)


@pytest.fixture
def llama(device):
    return build("llama-gqa", "sdpa", device)


def kv(n, batch):
    return torch.randn(batch, 2, n, 16), torch.randn(batch, 2, n, 16)


def append(cache, n, *, batch=1, repeats=1, like=None):
    """Appends random K and V, each row ``repeats`` times. With a DynamicCache ``like``, appends them there too.

    Both caches must then return the same.
    """
    for layer in range(4):
        pair = [t.repeat_interleave(repeats, 0) for t in kv(n, batch)]
        got = cache.update(*pair, layer)
        if like is not None:
            for one, other in zip(got, like.update(*pair, layer), strict=True):
                assert torch.equal(one, other)


def same(cache, like):
    for ours, theirs in zip(cache.layers, like.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


def generate(model, cache, inputs, **options):
    return model.generate(**inputs, **{CACHE_KEYWORD: cache}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4, "num_return_sequences": 4},
        {"num_return_sequences": 4, "do_sample": True},
        {"num_beams": 4, "prefill_chunk_size": 40},
    ],
    ids=["beams", "samples", "beams in chunks"],
)
def test_rows_of_one_prompt_share_it(llama, device, options):
    inputs = prompt(1, 120, device)
    options = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False, **options}
    alone = VirtualCache(llama.config, max_len=200)
    generate(llama, alone, inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    cache = VirtualCache(llama.config, max_len=200)
    torch.manual_seed(0)
    got = generate(llama, cache, inputs, **options)
    torch.manual_seed(0)
    assert torch.equal(got, generate(llama, DynamicCache(config=llama.config), inputs, **options))
    if device == "cpu":
        # Each row of the batch has memory of its own for the last positions of the prompt, for what it has added, and
        # for what is mapped ahead.
        row = cache.kv_caches[0].layout.bytes_per_token
        own = -(-(16 + PAGE // row) * row // PAGE) * PAGE + 4 * PAGE
        assert cache.stats().peak <= alone.stats().peak + 4 * own
        assert cache.stats().shared > 0
    cache.check()


def test_beams_of_several_prompts(llama, device):
    inputs = prompt(3, 60, device)
    options = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False}
    cache = VirtualCache(llama.config, max_len=200)
    for _ in range(2):
        expected = generate(llama, DynamicCache(config=llama.config), inputs, **options)
        assert torch.equal(generate(llama, cache, inputs, **options), expected)
        cache.check()
        cache.reset()


def test_a_beam_step_copies_what_the_rows_have_added():
    cache, like = VirtualCache(CONFIG, max_len=500), DynamicCache(config=CONFIG)
    append(cache, 200, repeats=4, like=like)
    for order in ([0, 0, 0, 0], [1, 0, 3, 3], [2, 2, 1, 0], [0, 1, 2, 3], [3, 3, 3, 0]):
        append(cache, 1, batch=4, like=like)
        moved = []
        original = layer_views.LayerGroupViews.move

        def move(self, sources, targets, batch, first, end, original=original, moved=moved):
            moved.append(end - first)
            original(self, sources, targets, batch, first, end)

        before = cache.stats()
        layer_views.LayerGroupViews.move = move
        try:
            cache.reorder_cache(torch.tensor(order))
        finally:
            layer_views.LayerGroupViews.move = original
        like.reorder_cache(torch.tensor(order))
        same(cache, like)
        assert cache.stats().copied == before.copied
        assert all(count <= cache.get_seq_length() - 200 for count in moved)
        cache.check()


@pytest.mark.parametrize(
    "order", [[1, 0, 2], [2, 0, 1], [1, 1, 1], [2, 2, 0], [1, 2], [2], [0, 0, 1, 1, 2, 2], [2, 1, 0, 2]]
)
def test_rows_of_different_prompts_change_places(order):
    cache, like = VirtualCache(CONFIG, max_len=500), DynamicCache(config=CONFIG)
    append(cache, 50, batch=3, like=like)
    cache.batch_select_indices(torch.tensor(order))
    like.batch_select_indices(torch.tensor(order))
    same(cache, like)
    append(cache, 30, batch=len(order), like=like)
    same(cache, like)
    cache.check()
    cache.crop(-40)
    like.crop(-40)
    append(cache, 10, batch=len(order), like=like)
    same(cache, like)
    cache.check()


def test_rows_that_only_look_the_same_at_first_go_their_own_way():
    cache, like = VirtualCache(CONFIG, max_len=500), DynamicCache(config=CONFIG)
    for layer in range(4):
        k, v = kv(50, 1)
        pair = k.repeat_interleave(3, 0), v.repeat_interleave(3, 0)
        if layer == 2:  # a mask may make rows differ in a later layer
            pair[1][1, 0, 7, 3] += 1
        for one, other in zip(cache.update(*pair, layer), like.update(*pair, layer), strict=True):
            assert torch.equal(one, other)
    same(cache, like)
    append(cache, 1, batch=3, like=like)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    like.reorder_cache(torch.tensor([2, 0, 1]))
    same(cache, like)
    cache.check()


@pytest.mark.parametrize("then", ["look", "crop", "repeat", "copy", "reorder", "chunk", "reset"])
def test_whatever_follows_a_prompt_of_equal_rows(then):
    cache, like = VirtualCache(CONFIG, max_len=500), DynamicCache(config=CONFIG)
    append(cache, 50, batch=2, repeats=3, like=like)
    if then == "crop":
        cache.crop(-20)
        like.crop(-20)
    elif then == "repeat":
        cache.batch_repeat_interleave(2)
        like.batch_repeat_interleave(2)
    elif then == "copy":
        other = copy.deepcopy(cache)
        append(cache, 1, batch=6)
        cache = other
    elif then == "reorder":
        cache.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        like.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
    elif then == "chunk":
        append(cache, 30, batch=2, repeats=3, like=like)
    elif then == "reset":
        cache.reset()
        like = DynamicCache(config=CONFIG)
        append(cache, 40, batch=2, like=like)
    same(cache, like)
    append(cache, 3, batch=like.layers[0].keys.shape[0], like=like)
    same(cache, like)
    cache.check()


def test_a_copy_is_a_fork():
    cache = VirtualCache(CONFIG, max_len=500)
    like = DynamicCache(config=CONFIG)
    append(cache, 200, batch=2, like=like)
    cache.kv_caches[0].wait_idle()  # the mapper has mapped ahead of both rows
    before = cache.stats()
    other, also = copy.deepcopy(cache), copy.deepcopy(like)
    assert other.kv_caches == cache.kv_caches
    assert cache.stats().shared >= 2 * 190 * TOKEN
    assert cache.stats().physical - before.physical <= 4 * PAGE
    append(other, 10, batch=2, like=also)
    append(cache, 5, batch=2, like=like)
    same(other, also)
    same(cache, like)
    cache.check()
    cache.close()
    same(other, also)
    append(other, 40, batch=2, like=also)
    same(other, also)
    kv_cache = other.kv_caches[0]
    other.close()
    kv_cache.wait_idle()
    assert kv_cache.stats().physical == 0


def test_a_copy_that_is_dropped_leaves_nothing():
    cache = VirtualCache(CONFIG, max_len=500)
    append(cache, 200)
    for _ in range(200):  # more than there are slots
        other = copy.deepcopy(cache)
        append(other, 1)
        assert cache.stats().running_slots == 2
        del other
        assert cache.stats().running_slots == 1
    first = copy.deepcopy(cache)
    del cache
    assert first.get_seq_length() == 200
    append(first, 1)
    assert first.stats().running_slots == 1
    first.check()


def test_a_copy_for_which_there_is_no_memory_is_told():
    cache = VirtualCache(CONFIG, max_len=500, budget=54 * PAGE, lookahead=0)
    like = DynamicCache(config=CONFIG)
    append(cache, 199, like=like)  # fills 50 pages
    held = [copy.deepcopy(cache) for _ in range(2)]
    with pytest.raises(BudgetExceeded):
        copy.deepcopy(cache)
    same(cache, like)
    held.clear()
    copy.deepcopy(cache)
    cache.check()


def test_a_batch_that_grows_where_a_copy_is_in_the_way_moves():
    cache, like = VirtualCache(CONFIG, max_len=500), DynamicCache(config=CONFIG)
    append(cache, 20, batch=2, like=like)
    copies = [copy.deepcopy(cache) for _ in range(33)]
    cache.batch_repeat_interleave(8)
    like.batch_repeat_interleave(8)
    same(cache, like)
    for one in copies:
        assert one.get_seq_length() == 20
        one.check()
    append(cache, 3, batch=16, like=like)
    same(cache, like)
    cache.check()


def both(**options):
    return VirtualCache(CONFIG, max_len=500, **options), DynamicCache(config=CONFIG)


def update(pair, layer, n, *, batch=1, repeats=1):
    k, v = (t.repeat_interleave(repeats, 0) for t in kv(n, batch))
    for one, other in zip(*(cache.update(k, v, layer) for cache in pair), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("order", [[2, 0, 1, 1], [1, 2, 0], [2, 1, 0, 0, 1, 2], [1, 0]])
def test_rows_that_are_moved_and_read_at_once(order):
    cache, like = both()
    append(cache, 60, repeats=3, like=like)
    for _ in range(21):
        append(cache, 1, batch=3, like=like)
    other, also = copy.deepcopy(cache), copy.deepcopy(like)
    for one in (cache, like):
        one.batch_select_indices(torch.tensor(order))
    same(cache, like)
    same(other, also)
    append(cache, 5, batch=len(order), like=like)
    same(cache, like)
    same(other, also)
    cache.check()


def test_layers_that_differ_where_others_have_been_looked_at():
    pair = both()
    update(pair, 0, 60, repeats=3)
    assert pair[0].layers[0].keys.shape[0] == 3
    for layer in range(1, 4):
        update(pair, layer, 60, batch=3)
    same(*pair)
    pair[0].check()


@pytest.mark.parametrize("then", ["copy", "copy and crop", "select"])
def test_layers_of_unequal_length_write_where_nobody_else_reads(then):
    cache, like = both()
    append(cache, 60, batch=2, like=like)
    if then == "copy and crop":
        other, also = copy.deepcopy(cache), copy.deepcopy(like)
    cropped = -40 if CROPS_REMOVE else 20
    for one in (cache, like):
        one.layers[1].crop(cropped)
    if then == "copy":
        other, also = copy.deepcopy(cache), copy.deepcopy(like)
    elif then == "select":
        other, also = cache, like
        for one in (cache, like):
            one.batch_select_indices(torch.tensor([0, 0]))
    update((other, also), 1, 40, batch=2)
    update((cache, like), 1, 40, batch=2) if other is not cache else None
    for one in (cache, like):
        one.reorder_cache(torch.tensor([1, 0]))
    same(cache, like)
    same(other, also)
    cache.check()


def test_a_layer_that_is_first_seen_in_the_second_step():
    pair = both()
    for layer in (0, 1, 3):
        update(pair, layer, 40, repeats=3)
    for layer in (0, 1, 3):
        update(pair, layer, 1, batch=3)
    update(pair, 2, 41, batch=3)
    for one in pair:
        one.reorder_cache(torch.tensor([2, 0, 0]))
    same(*pair)


@pytest.mark.parametrize("order", [[1, 0, 2], [2, 2, 0], [0, 0, 1, 1, 2, 2]])
def test_a_move_for_which_there_is_no_memory_changes_nothing(order):
    cache, like = both(lookahead=0)
    append(cache, 51, repeats=3, like=like)
    append(cache, 9, batch=3, like=like)
    other = copy.deepcopy(cache)
    cache.trim()
    cache.set_budget(cache.stats().physical)
    try:
        cache.batch_select_indices(torch.tensor(order))
    except BudgetExceeded:
        cache.trim()
        same(cache, like)
    else:
        like.batch_select_indices(torch.tensor(order))
        same(cache, like)
    assert other.get_seq_length() == 60
    cache.check()


def test_rows_of_one_prompt_can_be_looked_at_without_memory():
    cache, like = both(lookahead=0)
    append(cache, 51, repeats=6, like=like)
    cache.trim()
    cache.set_budget(cache.stats().physical)
    same(cache, like)


def test_a_closed_cache_leaves_its_memory_to_its_copy():
    cache, like = both()
    append(cache, 51, like=like)
    other = copy.deepcopy(cache)
    kv_cache = cache.kv_caches[0]
    cache.close()
    same(other, like)
    other.close()
    assert kv_cache.stats().physical == 0


SLIDING = {"sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"] * 2, "head_dim": 16}


@pytest.mark.parametrize("how", ["reset", "crop", "late"])
def test_a_layer_behind_a_window_that_has_moved_on_is_an_error(how):
    """Layers of one group share a window: its rows were given back for the longest of them."""
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, **SLIDING
    )
    cache = VirtualCache(config, max_len=600, mapper=False, lookahead=0)
    layers = range(1 if how == "late" else 0, 4)
    for n in (200, 1, 1, 1):
        for layer in layers:
            cache.update(*kv(n, 1), layer)
    if how == "crop":
        with pytest.raises(ValueError, match="the window of 12 has moved on"):
            cache.layers[0].crop(-100)
    else:
        if how == "reset":
            cache.layers[0].reset()
        cache.trim()
        with pytest.raises(ValueError, match="layer 0 holds 0 positions, and the window of 12 of longer layers"):
            cache.update(*kv(1, 1), 0)
    cache.reset()
    like = DynamicCache(config=config)
    for layer in range(4):
        pair = kv(20, 1)
        cache.update(*pair, layer)
        like.update(*pair, layer)
    same(cache, like)
    cache.check()


def test_rows_that_part_in_a_layer_that_comes_late():
    """What rows have in common in the layers so far says nothing of one that is added."""
    cache, like = VirtualCache(None, max_len=300), DynamicCache()
    for layer, alike in ((0, True), (1, False), (2, False)):
        pair = kv(40, 1 if alike else 2)
        pair = [t.expand(2, -1, -1, -1).clone() for t in pair] if alike else pair
        for one in (cache, like):
            one.update(*pair, layer)
        if layer == 0:
            assert cache.layers[0].keys is not None
            cache._store.rows.materialize()
    for one in (cache, like):
        one.reorder_cache(torch.tensor([1, 0]))
    same(cache, like)


def test_a_close_that_the_driver_refuses_leaves_nothing_to_read():
    cache = VirtualCache(CONFIG, max_len=300, mapper=False, lookahead=0)
    append(cache, 40, batch=2)
    cache.kv_caches[0].driver.fail_at(5)
    with pytest.raises(DriverError, match="injected fault"):
        cache.close()
    assert cache.layers[0].keys is None
    cache.close()


def test_a_torn_cache_without_rows_is_whole():
    cache = VirtualCache(CONFIG, max_len=300)
    append(cache, 40, batch=2)
    cache._store.guard.torn = "a call has ended halfway"
    cache.batch_select_indices(torch.tensor([], dtype=torch.int64))
    append(cache, 10, like=DynamicCache(config=CONFIG))


@pytest.mark.frees  # destructors report what the driver refuses
@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_driver_that_keeps_failing_while_rows_change_places(out_of_memory):
    """The rows are as they were, or the cache says that they are lost; nothing without memory is read."""
    lost = 0
    for k in range(1, 40):
        cache, like = both(lookahead=0)
        append(cache, 51, repeats=3, like=like)
        append(cache, 9, batch=3, like=like)
        other = copy.deepcopy(cache)
        driver = cache.kv_caches[0].driver
        driver.fail_at(k, times=100, out_of_memory=out_of_memory)
        try:
            cache.reorder_cache(torch.tensor([1, 0, 2]))
        except DriverError:
            pass
        else:
            like.reorder_cache(torch.tensor([1, 0, 2]))
        driver.fail_at(0)
        try:
            same(cache, like)
        except ValueError as error:
            assert "rows were lost" in str(error)
            with pytest.raises(ValueError, match="rows were lost"):
                append(cache, 1, batch=3)
            cache.reset()
            append(cache, 20, like=DynamicCache(config=CONFIG))
            lost += 1
        other.close()
        cache.check()
    assert lost < 30
