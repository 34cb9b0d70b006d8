"""A call of a model that fails changes nothing, neither in layers of other kinds nor in other caches."""

from __future__ import annotations

import contextlib

import pytest
import torch
from models import HYBRIDS, build, hybrid, prompt
from transformers import DynamicCache, EncoderDecoderCache

from vattn import CACHE_KEYWORD, BudgetExceeded, VirtualCache
from vattn.hf.placement import Placement


@pytest.fixture(autouse=True)
def pages(request, monkeypatch):
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(Placement, "granularity", 4096)


def stepped(model, cache, parts):
    with torch.no_grad():
        return [model(part, **{CACHE_KEYWORD: cache}, use_cache=True).logits for part in parts]


@pytest.mark.parametrize("made_with", ["model", "config"])
@pytest.mark.parametrize("name", HYBRIDS)
def test_no_memory_in_a_hybrid(name, made_with):
    model = hybrid(name)
    ids = prompt(2, 60, "cpu")["input_ids"]
    parts = ids[:, :50], ids[:, 50:51], ids[:, 51:60]
    expected = stepped(model, DynamicCache(config=model.config), parts)
    given = model if made_with == "model" else model.config
    with contextlib.closing(VirtualCache(given, max_len=512, budget=2 * 4096, mapper=False)) as cache:
        with pytest.raises(BudgetExceeded):
            stepped(model, cache, parts[:1])
        cache.set_budget(64 << 20)
        if made_with == "config":
            with pytest.raises(ValueError, match=r"ended halfway \(BudgetExceeded\).*Call reset\(\)"):
                stepped(model, cache, parts[:1])
            cache.reset()
        got = stepped(model, cache, parts[:2])
        cache.set_budget(cache.stats().physical)
        if made_with == "model":
            with pytest.raises(BudgetExceeded):
                stepped(model, cache, [ids[:, 51:60].repeat(1, 20)])
            cache.set_budget(64 << 20)
            got += stepped(model, cache, parts[2:])
        for a, b in zip(got, expected, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        cache.check()


@pytest.mark.thorough(4)
@pytest.mark.parametrize("made_with", ["model", "config"])
@pytest.mark.parametrize("options", [{"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", [*HYBRIDS, "t5"])
def test_beams_behind_memory_that_was_reserved(name, options, made_with):
    """Beams begin as equal rows, of which only the first has memory, also where memory was reserved for all rows."""
    model = build("t5", "eager", "cpu") if name == "t5" else hybrid(name)
    inputs = prompt(2, 60, "cpu")
    given = model if made_with == "model" else model.config
    caches = [DynamicCache(config=model.config) for _ in range(2)], [VirtualCache(given, max_len=256) for _ in range(2)]
    expected, got = (
        model.generate(
            **inputs,
            max_new_tokens=30,
            do_sample=False,
            **options,
            **{CACHE_KEYWORD: EncoderDecoderCache(*pair) if name == "t5" else pair[0]},
        )
        for pair in caches
    )
    assert torch.equal(got, expected)
    for cache in caches[1]:
        cache.check()
        cache.close()


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_hybrids_call_that_ends_halfway_is_told(name, monkeypatch):
    model = hybrid(name)
    ids = prompt(2, 30, "cpu")["input_ids"]
    with contextlib.closing(VirtualCache(model, max_len=512)) as cache:
        stepped(model, cache, [ids[:, :20]])

        def broken(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(model.lm_head, "forward", broken)
            with pytest.raises(KeyboardInterrupt):
                stepped(model, cache, [ids[:, 20:21]])
        with pytest.raises(ValueError, match=r"ended halfway \(KeyboardInterrupt\).*Call reset\(\)"):
            stepped(model, cache, [ids[:, 20:21]])
        cache.reset()
        expected = stepped(model, DynamicCache(config=model.config), [ids])
        torch.testing.assert_close(stepped(model, cache, [ids]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", HYBRIDS)
def test_what_layers_of_other_kinds_refuse_changes_nothing(name):
    model = hybrid(name)
    ids = prompt(2, 24, "cpu")["input_ids"]
    expected = stepped(model, DynamicCache(config=model.config), [ids[:, :20], ids[:, 20:21]])
    with contextlib.closing(VirtualCache(model.config, max_len=512)) as cache:
        got = stepped(model, cache, [ids[:, :20]])
        before = [layer.keys.clone() for layer in cache.layers if hasattr(layer, "cropped_length")]
        refused = 0
        for method, argument in (
            ("crop", -4),
            ("batch_repeat_interleave", 2),
            ("batch_select_indices", torch.tensor([1])),
        ):
            try:
                getattr(type(cache), method)(cache, argument)
            except Exception:
                refused += 1
                after = [layer.keys for layer in cache.layers if hasattr(layer, "cropped_length")]
                assert all(map(torch.equal, before, after)), method
            else:
                pytest.skip(f"{method} is not refused by this transformers")
        assert refused == 3
        got += stepped(model, cache, [ids[:, 20:21]])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("made_with", ["model", "config"])
def test_no_memory_in_the_other_half_of_an_encoder_decoders(made_with):
    model = build("t5", "eager", "cpu")
    inputs = {"input_ids": prompt(2, 40, "cpu")["input_ids"], "decoder_input_ids": torch.tensor([[0], [0]])}
    given = model if made_with == "model" else model.config
    own, cross = VirtualCache(given, max_len=64), VirtualCache(given, max_len=64, budget=4096)
    both = EncoderDecoderCache(own, cross)
    expected = model(**inputs, use_cache=True)
    with torch.no_grad():
        with pytest.raises(BudgetExceeded):
            model(**inputs, **{CACHE_KEYWORD: both}, use_cache=True)
        cross.set_budget(64 << 20)
        if made_with == "config":
            with pytest.raises(ValueError, match=r"ended halfway \(BudgetExceeded\).*Call reset\(\)"):
                model(**inputs, **{CACHE_KEYWORD: both}, use_cache=True)
            both.reset()
        else:
            assert own.get_seq_length() == 0
        got = model(**inputs, **{CACHE_KEYWORD: both}, use_cache=True).logits
    torch.testing.assert_close(got, expected.logits, rtol=1e-4, atol=1e-4)
    own.close()
    cross.close()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_no_memory_on_one_of_two_devices():
    model = build("llama-gqa", "sdpa", "cuda:0")
    from accelerate import dispatch_model

    sharded = dispatch_model(
        model,
        {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
        | {f"model.layers.{i}": i // 2 for i in range(4)},
    )
    ids = prompt(2, 30, "cuda:0")["input_ids"]
    with contextlib.closing(VirtualCache(sharded, max_len=100_000, budget=2 << 21)) as cache, torch.no_grad():
        stepped(sharded, cache, [ids[:, :20]])
        lengths = list(cache._store.lengths)
        with pytest.raises(BudgetExceeded):
            stepped(sharded, cache, [ids.repeat(1, 3000)])
        assert cache._store.lengths == lengths
