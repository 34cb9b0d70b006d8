"""VirtualCache apart from tokens: copies, memory, misuse, failures, and what transformers expects of a cache object."""

from __future__ import annotations

import contextlib
import copy
import gc
import os

import pytest
import torch
from models import MODELS, build, prompt
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, MistralConfig, pipeline

import vattn
from vattn import (
    CACHE_KEYWORD,
    BackendUnavailable,
    BudgetExceeded,
    DriverError,
    KVCache,
    KVLayout,
    SequenceTooLong,
    VirtualCache,
)
from vattn.hf import placement
from vattn.memory import kv_cache

PAGE = 4096
CONFIG = LlamaConfig(num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, hidden_size=64)


@pytest.fixture(autouse=True)
def small_granules(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(placement.Placement, "granularity", PAGE)


@pytest.fixture(scope="module")
def llama():
    return build("llama-gqa", "sdpa", "cpu")


@pytest.fixture(scope="module")
def gemma():
    return build("gemma3", "sdpa", "cpu")


def kv(n=1, *, batch=1, heads=2, dim=16, dtype=torch.float32):
    return torch.randn(batch, heads, n, dim, dtype=dtype), torch.randn(batch, heads, n, dim, dtype=dtype)


def fill(cache, n=1, layers=4, **shape):
    pairs = [kv(n, **shape) for _ in range(layers)]
    return pairs, [cache.update(*pair, layer) for layer, pair in enumerate(pairs)]


def generate(model, cache, inputs, new):
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    return model.generate(**inputs, **{CACHE_KEYWORD: cache}, **options)


class CopyCounter(TorchDispatchMode):
    """Lists operations that return a new tensor of at least ``numel`` elements. Views of their inputs do not count."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel = numel
        self.large: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for out in result if isinstance(result, (tuple, list)) else [result]:
            if (
                isinstance(out, torch.Tensor)
                and out.numel() >= self.numel
                and out.untyped_storage().data_ptr() not in inputs
            ):
                self.large.append(str(func))
        return result


@pytest.mark.parametrize(("make", "copies"), [(VirtualCache, 0), (DynamicCache, 2)])
def test_a_decode_step_copies_no_kv(llama, make, copies, device):
    # In float32 CUDA has no fused kernel for grouped heads, and the kernel that is used instead copies K and V.
    model = llama if device == "cpu" else build("llama-gqa", "sdpa", device).to(torch.bfloat16)
    cache = make(config=model.config, **({"max_len": 2000} if make is VirtualCache else {}))
    inputs = prompt(1, 1000, device)["input_ids"]
    with torch.no_grad():
        model(inputs, **{CACHE_KEYWORD: cache}, use_cache=True)
        # A layer's K has 2 heads of 16 by 1001 tokens; everything else of a one-token step is far smaller.
        with CopyCounter(2 * 1000 * 16) as counter:
            model(inputs[:, :1], **{CACHE_KEYWORD: cache}, use_cache=True)
    assert len(counter.large) == copies * 4, counter.large


def test_addresses_never_change(llama):
    cache = VirtualCache(llama.config, max_len=300)
    inputs = prompt(2, 10, "cpu")
    generate(llama, cache, inputs, 2)
    before = [layer.keys.data_ptr() for layer in cache.layers]
    longer = inputs["input_ids"].repeat(1, 10)
    generate(llama, cache, {"input_ids": longer, "attention_mask": torch.ones_like(longer)}, 100)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert len(cache.kv_caches) == 1


def test_memory_follows_the_tokens_and_reset_keeps_it(llama):
    cache = VirtualCache(llama.config, max_len=300)
    inputs = prompt(2, 20, "cpu")
    generate(llama, cache, inputs, 80)
    row = 4 * 2 * 2 * 16 * 4
    tokens = 2 * cache.get_seq_length() * row
    assert tokens <= cache.stats().mapped <= tokens * (1 + 1 / 32) + 2 * PAGE
    mapped, calls = cache.stats().mapped, cache.stats().driver_calls
    cache.reset()
    assert cache.get_seq_length() == 0
    generate(llama, cache, inputs, 80)
    again = cache.stats().driver_calls
    assert cache.stats().mapped == mapped
    assert {name: again[name] for name in ("create", "map", "set_access", "unmap", "release")} == {
        name: calls[name] for name in ("create", "map", "set_access", "unmap", "release")
    }
    cache.reset()
    cache.trim()
    assert cache.stats().physical == 0


def test_a_window_gives_memory_back(gemma):
    cache = VirtualCache(gemma.config, max_len=2000)
    generate(gemma, cache, prompt(1, 10, "cpu"), 200)
    local, full = cache.kv_caches[0].map()[0]["runs"]
    assert full["head"] == 0
    assert local["head"] > 150 * 3 * 256  # three sliding layers of 256 bytes a row
    assert local["tail"] - local["head"] < (12 + 40) * 3 * 256


@pytest.mark.frees
def test_deleting_the_cache_frees_the_memory(llama):
    cache = VirtualCache(llama.config, max_len=300)
    generate(llama, cache, prompt(1, 10, "cpu"), 5)
    driver = cache.kv_caches[0]._arena.driver
    gc.disable()  # reference counts alone must free it: a GPU's memory cannot wait for the collector
    try:
        del cache
        counts = driver.counts()
        assert counts["create"] == counts["release"] > 0
        assert counts["free_address"] == 1
    finally:
        gc.enable()


def test_a_copy_is_independent(llama):
    cache = VirtualCache(CONFIG, max_len=100)
    (pairs, _) = fill(cache, 5)
    other = copy.deepcopy(cache)
    fill(other, 3)
    fill(cache, 1)
    assert (cache.get_seq_length(), other.get_seq_length()) == (6, 8)
    for layer, (k, v) in enumerate(pairs):
        for one in (cache, other):
            assert torch.equal(one.layers[layer].keys[:, :, :5], k)
            assert torch.equal(one.layers[layer].values[:, :, :5], v)
    assert other.layers[0].keys.data_ptr() != cache.layers[0].keys.data_ptr()
    other.check()


def test_keys_and_values_are_read_only_views():
    cache = VirtualCache(CONFIG, max_len=100)
    assert cache.layers[0].keys is None
    pairs, _ = fill(cache, 5)
    assert torch.equal(cache.layers[3].values, pairs[3][1])
    with pytest.raises(AttributeError, match="write through update"):
        cache.layers[0].keys = torch.zeros(1)
    for layer, item in enumerate(cache):
        assert torch.equal(item[0], pairs[layer][0])


@pytest.mark.parametrize(
    ("options", "update", "error", "message"),
    [
        ({"slots": 2}, {"batch": 3}, ValueError, "a batch of 3 rows does not fit 2 slots: make it with slots=3"),
        ({"max_len": 10}, {"n": 11}, SequenceTooLong, "11 positions are more than max_len, 10"),
        ({"dtype": torch.bfloat16}, {}, ValueError, "dtype=torch.bfloat16 and layer 0 computes in torch.float32"),
        ({"dtype": "float16"}, {}, ValueError, "made with dtype=torch.float16"),
        ({"budget": 100}, {}, ValueError, "budget of 100 bytes is below one granule"),
        ({"budget": PAGE}, {"n": 9}, BudgetExceeded, "the budget is spent"),
        ({}, {"dtype": torch.float64}, ValueError, "dtype 'float64' is not supported"),
    ],
)  # fmt: skip
def test_bad_input_is_told_and_loses_nothing(options, update, error, message):
    cache = VirtualCache(CONFIG, **{"max_len": 100, **options})
    with pytest.raises(error, match=message):
        cache.update(*kv(**update), 0)
    assert cache.get_seq_length() == 0
    good = {"dtype": cache._store.options.dtype or torch.float32}
    if options.get("budget") != 100:
        fill(cache, 1, **good)
        assert cache.get_seq_length() == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_len": 0}, "max_len must be at least 1"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"max_len": "64"}, "max_len must be an integer, not '64'"),
        ({"max_len": 64.5}, "max_len must be an integer, not 64.5"),
        ({"slots": True}, "slots must be an integer, not True"),
        ({"mapper": "no"}, "mapper must be True or False, not 'no'"),
        ({"budget": True}, "budget must be bytes"),
        ({"capture": "no"}, "capture must be True or False, not 'no'"),
        ({"run_ahead": 0}, "run_ahead must be True or False, not 0"),
        ({"compiled": 3}, "compiled must be True, False or torch.compile's options, not 3"),
        ({"compiled": True, "capture": False}, "compiled steps are captured"),
        ({"attention": ""}, "attention must be 'auto' or one of"),
        ({"device": "tpu"}, "device 'tpu' is not supported: use 'cuda' or 'cpu'"),
        ({"layout": "paged"}, "layout must be 'interleaved' or 'compact'"),
        ({"device": "meta"}, "device 'meta' is not supported: use 'cuda' or 'cpu'"),
    ],
)
def test_bad_options_are_told(options, message):
    with pytest.raises((TypeError, ValueError, BackendUnavailable), match=message):
        VirtualCache(CONFIG, **{"max_len": 10, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_cuda_without_a_gpu_says_what_to_do():
    with pytest.raises(BackendUnavailable, match="Use device='cpu' instead"):
        VirtualCache(CONFIG, max_len=10, device="cuda")


def test_two_models_are_told_apart():
    cache = VirtualCache(CONFIG, max_len=100)
    fill(cache, 3)
    with pytest.raises(
        ValueError,
        match=r"layer 0 holds 2 heads of 16 .* was given 4 heads of 16 .*one VirtualCache for each",
    ):
        cache.update(*kv(heads=4), 0)
    with pytest.raises(ValueError, match=r"layer 0 holds .* float32 .* bfloat16"):
        cache.update(*kv(dtype=torch.bfloat16), 0)
    with pytest.raises(ValueError, match="layer 4 does not exist: the cache was made for a model of 4 layers"):
        cache.update(*kv(), 4)
    with pytest.raises(ValueError, match="the cache holds 1 rows and was given a batch of 2"):
        cache.update(*kv(batch=2), 0)
    with pytest.raises(ValueError, match="equal batch, heads and tokens"):
        cache.update(kv(2)[0], kv(1)[1], 0)
    fill(cache, 1)
    assert cache.get_seq_length() == 4


def test_a_different_update_in_the_middle_of_a_step():
    """K and V that do not fit what the first layer of a step prepared for the others are checked, not broadcast."""
    cache = VirtualCache(CONFIG, max_len=100)
    fill(cache, 3)
    cache.update(*kv(5), 0)
    for shape in ({"n": 1}, {"n": 5, "heads": 1}):
        if "heads" in shape:
            with pytest.raises(ValueError, match="use one VirtualCache for each model"):
                cache.update(*kv(**shape), 1)
        else:
            k, v = kv(**shape)
            got = cache.update(k, v, 1)[0]
            assert got.shape[2] == 4
            assert torch.equal(got[:, :, 3:], k)


def test_a_closed_cache_is_told():
    cache = VirtualCache(CONFIG, max_len=100)
    fill(cache, 3)
    cache.close()
    with pytest.raises(ValueError, match="the cache is closed: make a new VirtualCache"):
        cache.update(*kv(), 0)
    assert cache.stats().physical == 0
    assert cache.layers[0].keys is None
    for use in (lambda: copy.deepcopy(cache), lambda: cache.reorder_cache(torch.tensor([0])), cache.reset):
        with pytest.raises(ValueError, match="the cache is closed"):
            use()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told():
    cache = VirtualCache(CONFIG, max_len=1000)
    fill(cache, 3)
    child = os.fork()
    if child == 0:
        for n in (1, 500):  # within the memory that is mapped in the parent as well, and beyond it
            try:
                fill(cache, n)
            except BackendUnavailable:
                continue
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    fill(cache, 500)


def test_out_of_pages_leaves_the_cache_as_it_was(llama):
    row = 4 * 2 * 2 * 16 * 4
    cache = VirtualCache(llama.config, max_len=300, budget=20 * row, lookahead=0)
    inputs = prompt(1, 8, "cpu")
    with torch.no_grad():
        llama(**inputs, **{CACHE_KEYWORD: cache}, use_cache=True)
        with pytest.raises(BudgetExceeded) as caught:
            llama(prompt(1, 40, "cpu")["input_ids"], **{CACHE_KEYWORD: cache}, use_cache=True)
        assert (caught.value.needed, caught.value.free) == (10 * PAGE, 3 * PAGE)
        assert cache.get_seq_length() == 8
        expected = llama(inputs["input_ids"].repeat(1, 2), use_cache=False).logits[:, -1]
        got = llama(inputs["input_ids"], **{CACHE_KEYWORD: cache}, use_cache=True).logits[:, -1]
    torch.testing.assert_close(got, expected)


@pytest.mark.thorough
@pytest.mark.parametrize("mapper", [False, True])
def test_every_driver_call_failing_once_in_a_generation(llama, monkeypatch, mapper):
    """For every k the exception is the right one, ``check()`` passes, and the next call works.

    When the mapper fails to map ahead, the generation fails only if it needs that memory at once.
    """
    inputs = prompt(2, 10, "cpu")

    def run(k):
        driver = vattn._core.host_driver(PAGE, capacity=1000 * PAGE)
        monkeypatch.setattr(kv_cache, "driver_of", lambda *args: driver)
        cache = VirtualCache(llama.config, max_len=200, mapper=mapper)
        driver.fail_at(k)
        with contextlib.suppress(DriverError):
            generate(llama, cache, inputs, 30)
        failed = cache._store.rows.batch > 0 and cache.get_seq_length() < 39
        driver.fail_at(0)
        cache.check()
        cache.reset()
        tokens = generate(llama, cache, inputs, 30)
        cache.check()
        cache.close()
        assert driver.memory_info()[0] == 1000 * PAGE
        return tokens, failed, sum(driver.counts().values())

    expected, _, calls = run(0)
    failures = 0
    for k in range(1, calls):
        tokens, failed, _ = run(k)
        assert torch.equal(tokens, expected)
        failures += failed
    assert failures > (0 if mapper else 20)


def test_sharded_models_and_layers_of_other_shapes():
    """The shapes expected of layers that are not yet seen are wrong twice here; rows already written are kept."""
    cache = VirtualCache(CONFIG, max_len=100, slots=2)
    shapes = [{}, {}, {"heads": 4}, {"heads": 4, "dtype": torch.bfloat16}]
    written = []
    for _ in range(3):
        step = []
        for layer, shape in enumerate(shapes):
            pair = kv(7, batch=2, **shape)
            step.append(pair)
            written_k = torch.cat([s[layer][0] for s in [*written, step]], dim=2)
            got_k, _ = cache.update(*pair, layer)
            assert torch.equal(got_k, written_k)
        written.append(step)
    for layer in range(4):
        assert torch.equal(cache.layers[layer].values, torch.cat([s[layer][1] for s in written], dim=2))
    (one,) = cache.kv_caches
    assert [group.layers for group in one.layout.groups] == [(0, 1), (2,), (3,)]


@pytest.mark.gpu
def test_a_wrong_device_is_told():
    cache = VirtualCache(CONFIG, max_len=100, device="cuda")
    with pytest.raises(ValueError, match="made with device=cuda:0 and layer 0 computes in cpu"):
        cache.update(*kv(), 0)


@pytest.mark.gpu
def test_layers_on_two_devices():
    cache = VirtualCache(CONFIG, max_len=100)
    devices = ["cpu", "cpu", "cuda", "cuda"]
    for step in range(1, 4):
        for layer, device in enumerate(devices):
            k, v = (tensor.to(device) for tensor in kv(5))
            got, _ = cache.update(k, v, layer)
            assert got.device.type == device
            assert got.shape[2] == 5 * step
            assert torch.equal(got[:, :, -5:], k)
    assert sorted(len(one.layout.groups[0].layers) for one in cache.kv_caches) == [2, 2]


@pytest.mark.frees
def test_views_outlive_a_rebuild():
    """A layer of another shape, or a larger batch, rebuilds the cache. What ``update`` has returned stays valid."""
    cache = VirtualCache(CONFIG, max_len=100)
    k, v = kv(3)
    kept, _ = cache.update(k, v, 0)
    cache.update(*kv(3, heads=4), 1)
    assert torch.equal(kept, k)
    cache.batch_repeat_interleave(200)
    assert torch.equal(kept, k)
    assert torch.equal(cache.layers[0].keys, k.repeat_interleave(200, dim=0))


def test_what_was_prepared_does_not_survive_a_rebuild():
    cache = VirtualCache(CONFIG, max_len=100)
    cache.update(*kv(3), 0)
    first = kv(3)
    cache.update(*first, 1)
    cache.update(*kv(1), 0)  # prepares layer 1
    cache.update(*kv(3, heads=4), 2)  # rebuilds the cache
    second = kv(1)
    cache.update(*second, 1)
    assert torch.equal(cache.layers[1].keys, torch.cat([first[0], second[0]], dim=2))
    with pytest.raises(ValueError, match="the cache holds 1 rows and was given a batch of 200"):
        cache.update(*kv(1, batch=200), 1)
    cache.update(*kv(1), 1)
    assert cache.get_seq_length(1) == 5


def test_layers_of_unequal_length(gemma):
    cache = VirtualCache(CONFIG, max_len=5000)
    for layer in range(4):
        cache.update(*kv(4000 if layer < 3 else 3), layer)
    keys = [layer.keys.clone() for layer in cache.layers]
    cache.batch_repeat_interleave(2)
    for layer in range(4):
        assert torch.equal(cache.layers[layer].keys, keys[layer].repeat_interleave(2, dim=0))
    hybrid = VirtualCache(gemma.config, max_len=500)  # layer 2 sees all positions, the others 12
    first = [kv(5) for _ in range(4)]
    for layer in range(4):
        hybrid.update(*first[layer], layer)
    hybrid.update(*kv(300), 2)
    hybrid.update(*kv(1), 2)
    got, _ = hybrid.update(*kv(1), 0)
    assert torch.equal(got[:, :, :5], first[0][0])


def test_a_wrong_guess_is_forgotten_with_the_failure_that_met_it():
    cache = VirtualCache(CONFIG, max_len=100)
    with pytest.raises(SequenceTooLong):
        cache.update(*kv(200, dtype=torch.bfloat16), 0)
    fill(cache, 3)
    cache.reset()
    assert cache.layers[0].keys is None
    assert not cache.layers[0].is_initialized
    fill(cache, 2, dtype=torch.bfloat16, heads=4)
    assert cache.layers[3].keys.dtype == torch.bfloat16
    assert all(layer.is_initialized for layer in cache.layers)


def test_crop_means_what_transformers_means():
    for argument in (-2, -9, 0, 3, 9):
        outcomes = []
        for cache in (DynamicCache(config=CONFIG), VirtualCache(CONFIG, max_len=100)):
            fill(cache, 5)
            try:
                cache.crop(argument)
                outcomes.append([cache.get_seq_length(layer) for layer in range(4)])
            except ValueError:
                outcomes.append("refused")
        if argument != -9:  # this removes more than there is, and DynamicCache keeps what a negative slice leaves
            assert outcomes[0] == outcomes[1], argument
        else:
            assert outcomes[1] == [0] * 4


def test_autocast(llama):
    inputs = prompt(2, 10, "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(llama, DynamicCache(config=llama.config), inputs, 20)
        assert torch.equal(generate(llama, VirtualCache(llama.config, max_len=100), inputs, 20), expected)


def test_odd_batches():
    cache = VirtualCache(CONFIG, max_len=100)
    assert cache.update(*kv(3, batch=0), 0)[0].shape == (0, 2, 3, 16)
    cache = VirtualCache(CONFIG, max_len=100)
    pairs, _ = fill(cache, 3, batch=3)
    cache.batch_select_indices([2, 0])
    assert torch.equal(cache.layers[1].keys, pairs[1][0][[2, 0]])
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    assert cache.get_seq_length() == 0
    fill(cache, 3, batch=2)


def test_enormous_models_reserve_fewer_slots():
    config = LlamaConfig(num_hidden_layers=60, num_attention_heads=2, num_key_value_heads=2, hidden_size=64)
    cache = VirtualCache(config, max_len=200_000_000)
    k, v = kv(2, dim=32)
    assert torch.equal(cache.update(k, v, 0)[0], k)
    assert 1 <= cache.kv_caches[0].slots < 64


def test_install_does_not_nest():
    with vattn.install(max_len=10):
        with pytest.raises(RuntimeError, match="active already"), vattn.install(max_len=20):
            pass
        assert type(DynamicCache(config=CONFIG)) is VirtualCache
    assert type(DynamicCache(config=CONFIG)) is DynamicCache


def test_more_rows_than_were_reserved():
    cache = VirtualCache(CONFIG, max_len=100)
    pairs, _ = fill(cache, 3, batch=2)
    cache.batch_repeat_interleave(100)
    assert torch.equal(cache.layers[2].keys, pairs[2][0].repeat_interleave(100, dim=0))
    fill(cache, 1, batch=200)
    limited = VirtualCache(CONFIG, max_len=100, slots=3)
    fill(limited, 3, batch=2)
    with pytest.raises(ValueError, match="a batch of 4 rows does not fit 3 slots"):
        limited.batch_repeat_interleave(2)
    assert limited.layers[0].keys.shape[0] == 2


def test_a_mask_selects_rows_and_the_others_are_parked():
    cache = VirtualCache(CONFIG, max_len=100)
    pairs, _ = fill(cache, 3, batch=4)
    cache.batch_select_indices(torch.tensor([False, True, False, True]))
    assert torch.equal(cache.layers[1].keys, pairs[1][0][[1, 3]])
    assert cache.stats().running_slots == 2
    assert cache.stats().parked_slots == 2


def test_one_layer_alone_can_be_cropped_but_not_reordered():
    cache = VirtualCache(CONFIG, max_len=100)
    fill(cache, 5)
    cache.layers[1].crop(-2)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [5, 3, 5, 5]
    got, _ = cache.update(*kv(1), 1)
    assert got.shape[2] == 4
    with pytest.raises(NotImplementedError, match="call it on the cache"):
        cache.layers[0].reorder_cache(torch.tensor([0]))


def test_a_crop_that_a_window_forbids_changes_nothing(gemma):
    cache = VirtualCache(gemma.config, max_len=500)
    generate(gemma, cache, prompt(1, 10, "cpu"), 200)
    length = cache.get_seq_length()
    with pytest.raises(ValueError, match="the window of 12 has moved on"):
        cache.crop(-150)
    assert [cache.get_seq_length(layer) for layer in range(4)] == [length] * 4
    fill(cache, 1, dim=16)
    cache.check()


@pytest.mark.parametrize(("layout", "v_dim"), [("interleaved", 16), ("compact", 64)])
def test_copied_rows_of_a_window_are_those_that_every_row_still_has(layout, v_dim):
    config = MistralConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, sliding_window=256)

    def append(batch, n):
        for layer in range(2):
            cache.update(kv(n, batch=batch)[0], kv(n, batch=batch, dim=v_dim)[1], layer)

    cache = VirtualCache(config, max_len=2000, layout=layout)
    append(1, 200)  # slot 0 gets the large extents of a prompt, slot 1 grows token by token
    cache.reset()
    heads = {0}
    while len(heads) == 1:
        append(2, 1)
        heads = {run["head"] for slot in cache.kv_caches[0].map()[:2] for run in slot["runs"]}
    length = cache.get_seq_length()

    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    copied = copy.deepcopy(cache)
    cache.reorder_cache(torch.tensor([1, 0]))
    for (k, v), layer, other in zip(before, cache.layers, copied.layers, strict=True):
        assert torch.equal(layer.keys, k[[1, 0]])
        assert torch.equal(layer.values, v[[1, 0]])
        assert torch.equal(other.keys, k)
        assert torch.equal(other.values, v)
    for one in (cache, copied):
        with pytest.raises(ValueError, match="cannot truncate to 100 positions: the window of 256 has moved on"):
            one.crop(100 - length)
        assert one.get_seq_length() == length
        one.reset()


def test_what_a_window_has_forgotten_cannot_be_installed():
    config = MistralConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, sliding_window=16)
    with vattn.install(max_len=100), pytest.raises(ValueError, match="layer 0 has seen 50 positions and keeps 15"):
        DynamicCache([kv(50)], config=config)


def test_a_step_is_prepared_once_also_where_gradients_are_on(monkeypatch):
    grown = []
    original = KVCache.grow_all
    monkeypatch.setattr(
        KVCache, "grow_all", lambda self, *args, **options: (grown.append(1), original(self, *args, **options))
    )
    with contextlib.closing(VirtualCache(CONFIG, max_len=10)) as cache:
        fill(cache)
        grown.clear()
        for layer in range(4):
            k, v = kv()
            cache.update(k.requires_grad_(), v, layer)
        assert grown == [1]


def test_another_dtype_in_the_middle_of_a_step_is_told():
    with contextlib.closing(VirtualCache(CONFIG, max_len=10, dtype="bfloat16")) as cache:
        fill(cache, dtype=torch.bfloat16)
        cache.update(*kv(dtype=torch.bfloat16), 0)
        with pytest.raises(ValueError, match=r"layer 1 holds 2 heads of 16 in bfloat16 .* given .* float32"):
            cache.update(*kv(), 1)
        cache.update(*kv(dtype=torch.bfloat16), 1)
        assert [layer.get_seq_length() for layer in cache.layers] == [2, 2, 1, 1]


def test_a_budget_is_one_for_all_layers():
    cache = VirtualCache(None, max_len=10)
    with pytest.raises(ValueError, match="budget needs a cache that is made with the model's config"):
        cache.set_budget(1 << 20)
    for budget in (-3, 7.5, "4GiB"):
        with pytest.raises((TypeError, ValueError), match="budget"):
            VirtualCache(CONFIG, max_len=10, budget=budget)
    cache = VirtualCache(CONFIG, max_len=1000, budget=0.5)
    fill(cache, 500)
    (before,) = cache.kv_caches
    cache.batch_repeat_interleave(100)  # more rows than were reserved
    (after,) = cache.kv_caches
    assert after is not before
    assert after.stats().budget == before.stats().budget


def test_gradients_are_refused_not_lost(llama):
    cache = VirtualCache(llama.config, max_len=100)
    inputs = prompt(1, 10, "cpu")
    logits = llama(**inputs, **{CACHE_KEYWORD: cache}, use_cache=True).logits
    torch.testing.assert_close(logits, llama(**inputs, use_cache=False).logits)
    assert llama(inputs["input_ids"][:, :1], **{CACHE_KEYWORD: cache}, use_cache=True).logits.requires_grad
    with pytest.raises(RuntimeError, match="VirtualCache keeps no gradients"):
        logits.sum().backward()
    llama.zero_grad()


def test_inference_mode_and_ordinary_mode_mix(llama):
    cache = VirtualCache(llama.config, max_len=100)
    inputs = prompt(1, 10, "cpu")["input_ids"]
    with torch.inference_mode():
        llama(inputs, **{CACHE_KEYWORD: cache}, use_cache=True)
    with torch.no_grad():
        llama(inputs[:, :1], **{CACHE_KEYWORD: cache}, use_cache=True)
        llama(inputs[:, :1], **{CACHE_KEYWORD: cache}, use_cache=True)
    with torch.inference_mode():
        got = llama(inputs[:, :2], **{CACHE_KEYWORD: cache}, use_cache=True).logits[:, -1]
        whole = torch.cat([inputs, inputs[:, :1], inputs[:, :1], inputs[:, :2]], dim=1)
        torch.testing.assert_close(got, llama(whole, use_cache=False).logits[:, -1])


def test_a_pipeline(llama):
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"w{i}": i for i in range(101)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0")
    generate = pipeline("text-generation", model=llama, tokenizer=tokenizer, device="cpu")
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    text = "w5 w17 w33 w80"
    cache = VirtualCache(llama.config, max_len=100)
    assert generate(text, **{CACHE_KEYWORD: cache}, **options) == generate(text, **options)
    assert cache.get_seq_length() == 4 + 11


def test_the_package_loads_transformers_only_when_asked():
    import subprocess
    import sys

    script = "import sys, vattn; loaded = sys.modules.keys; assert 'transformers' not in loaded(); "
    script += "vattn.VirtualCache; assert 'transformers' in loaded()"
    subprocess.run([sys.executable, "-c", script], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Virtual'"):
        _ = vattn.Virtual
    assert {"LLM", "VirtualCache", "KVCache", "__version__"} <= set(dir(vattn))


def test_the_package_without_transformers():
    import subprocess
    import sys

    script = """
import sys
sys.modules["transformers"] = None  # as if it were not installed
from vattn import *
KVCache, KVLayout
assert "VirtualCache" not in globals()
for name in ("VirtualCache", "LLM"):
    try:
        exec(f"from vattn import {name}")
    except ImportError as error:
        assert str(error) == f"vattn.{name} needs transformers, which is not installed: pip install 'vattn[hf]'", error
    else:
        raise AssertionError(name)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in ("t5", "gpt2")])
def test_configurations_tell_what_models_cache(name):
    model = build(name, "eager", "cpu")
    cache = VirtualCache(model.config, max_len=100)
    model(torch.tensor([[5, 17, 9]]), **{CACHE_KEYWORD: cache})
    told = KVLayout.from_config(model.config, max_len=100, dtype="float32")
    assert told.layers == cache.kv_caches[0].layout.layers


def test_kv_caches_are_kv_caches(llama):
    cache = VirtualCache(llama.config, max_len=100)
    assert cache.kv_caches == []
    assert cache.stats().physical == 0
    fill(cache, 2)
    assert isinstance(cache.kv_caches[0], KVCache)
    assert cache.is_compileable is False
    assert "VirtualCache" in repr(cache)
