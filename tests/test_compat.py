"""Uses of a ``VirtualCache`` in place of a ``DynamicCache``: transformers rebuilds it, measures it and crops it."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
import transformers
from models import attentions, build, generated, prompt
from transformers import DynamicCache, EncoderDecoderCache, StoppingCriteria, StoppingCriteriaList

from vattn import CACHE_KEYWORD, VirtualCache
from vattn.hf.layers import tell_foreign
from vattn.hf.placement import Placement

HAS_T5GEMMA = hasattr(transformers, "T5GemmaConfig")


def t5gemma(device):
    from transformers.models.t5gemma import T5GemmaModuleConfig

    half = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8,
        "max_position_embeddings": 128,
    }  # fmt: skip
    config = transformers.T5GemmaConfig(
        encoder=T5GemmaModuleConfig(**half), decoder=T5GemmaModuleConfig(**half), vocab_size=100
    )
    torch.manual_seed(0)
    model = transformers.T5GemmaForConditionalGeneration(config).eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.skipif(not HAS_T5GEMMA, reason="this transformers has no T5Gemma")
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("made_with", ["model", "config"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_rebuilt_cross_attention_half_has_the_options_of_the_old_one(made_with, beams, device):
    """T5Gemma's ``generate`` makes a new cross-attention half: decoders have windows, cross-attention has none."""
    model = t5gemma(device)
    options = {"max_new_tokens": 20, "do_sample": False, "decoder_start_token_id": 1, "pad_token_id": 0}
    options["num_beams"] = beams
    ids = prompt(2, 30, device)["input_ids"]
    halves = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache())
    expected = model.generate(ids, **options, **{CACHE_KEYWORD: halves})
    of = model if made_with == "model" else model.config.decoder
    own, cross = (VirtualCache(of, max_len=100, slots=8, budget=1 << 26) for _ in range(2))
    halves = EncoderDecoderCache(own, cross)
    got = model.generate(ids, **options, **{CACHE_KEYWORD: halves})
    assert torch.equal(got, expected)
    now = halves.cross_attention_cache
    assert type(now) is VirtualCache
    assert now.stats().budget == 1 << 26
    assert now._store.options.slots == 8
    assert now.layers[0].keys.shape[2] == 30
    for cache in (own, now):
        cache.check()


@pytest.mark.skipif(not HAS_T5GEMMA, reason="this transformers has no T5Gemma")
@pytest.mark.usefixtures("small")
def test_a_cross_attention_half_has_no_windows(device):
    model = t5gemma(device)
    ids, target = (prompt(2, n, device)["input_ids"] for n in (30, 12))
    plain = EncoderDecoderCache(DynamicCache(config=model.config.decoder), DynamicCache())
    ours = EncoderDecoderCache(VirtualCache(model, max_len=100), VirtualCache(model, max_len=100))
    with torch.no_grad():
        for start in range(12):
            step = {"input_ids": ids, "decoder_input_ids": target[:, start : start + 1], "use_cache": True}
            expected, got = (model(**step, **{CACHE_KEYWORD: cache}).logits for cache in (plain, ours))
            torch.testing.assert_close(got, expected)
    assert ours.cross_attention_cache.layers[0].keys.shape[2] == 30


@pytest.mark.usefixtures("small")
def test_a_cache_is_rebuilt_from_tensors(device):
    """RAG's beam search calls ``type(cache)(layers)`` with K and V of each layer."""
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 10, device)["input_ids"]
    with torch.no_grad(), VirtualCache(model, max_len=77, slots=6) as cache:
        expected = model(ids, **{CACHE_KEYWORD: cache}, use_cache=True).logits
        order = torch.tensor([1, 0], device=device)
        layers = tuple((layer.keys[order], layer.values[order]) for layer in cache.layers)
        rebuilt = type(cache)(layers)
        assert type(rebuilt) is VirtualCache
        assert rebuilt._store.options.max_len == 77
        assert rebuilt._store.options.slots == 6
        for ours, (k, v) in zip(rebuilt.layers, layers, strict=True):
            assert torch.equal(ours.keys, k)
            assert torch.equal(ours.values, v)
        more = prompt(2, 3, device)["input_ids"]
        again = DynamicCache(config=model.config)
        model(ids[order.to(ids.device)], **{CACHE_KEYWORD: again}, use_cache=True)
        expected = model(more, **{CACHE_KEYWORD: again}, use_cache=True).logits
        got = model(more, **{CACHE_KEYWORD: rebuilt}, use_cache=True).logits
        torch.testing.assert_close(got, expected)
        rebuilt.close()


def test_max_len_is_what_the_configuration_allows():
    model = build("llama-gqa", "sdpa", "cpu")
    with VirtualCache(model) as cache, VirtualCache(model.config) as other:
        generated(model, cache)
        assert cache.kv_caches[0].layout.max_len == model.config.max_position_embeddings
        assert other._store.options.max_len == model.config.max_position_embeddings
    with pytest.raises(ValueError, match="max_len must be given"):
        VirtualCache(None)
    with pytest.raises(ValueError, match="offloading is not for a VirtualCache"):
        VirtualCache(model, max_len=10, offloading=True)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2"])
def test_the_longest_length_is_told(name):
    model = build(name, attentions(name)[0], "cpu")
    measure = "get_max_length" if hasattr(DynamicCache, "get_max_length") else "get_max_cache_shape"
    dynamic = DynamicCache(config=model.config)
    with VirtualCache(model, max_len=123) as cache:
        for layer, theirs in zip(cache.layers, dynamic.layers, strict=True):
            plain = getattr(theirs, measure)()
            assert getattr(layer, measure)() == (123 if plain == -1 else plain)


@pytest.mark.usefixtures("small")
def test_a_context_closes_it():
    model = build("llama-gqa", "sdpa", "cpu")
    with VirtualCache(model, max_len=100) as cache:
        generated(model, cache)
        assert cache.stats().mapped > 0
    assert cache.stats().physical == 0
    with contextlib.suppress(ZeroDivisionError), VirtualCache(model, max_len=100) as cache:
        generated(model, cache)
        raise ZeroDivisionError
    assert cache.stats().physical == 0


@pytest.mark.skipif(not hasattr(transformers, "FalconH1Config"), reason="this transformers has no Falcon-H1")
def test_layers_that_stay_transformers_own_are_told(caplog):
    kinds = {"FalconH1Config": "LinearAttentionAndFullAttentionLayer", "DeepseekV32Config": "DynamicIndexedLayer"}
    for name, kind in kinds.items():
        config = getattr(transformers, name, lambda **_: None)(num_hidden_layers=3)
        if config is None or type(DynamicCache(config=config).layers[0]).__name__ != kind:
            continue  # older versions of transformers keep layers of other kinds in caches of their own
        tell_foreign.cache_clear()
        with caplog.at_level(logging.WARNING, logger="vattn"):
            for _ in range(2):
                with VirtualCache(config, max_len=10) as cache:
                    assert cache.foreign_layers == {kind: [0, 1, 2]}
        said = [record.getMessage() for record in caplog.records if kind in record.getMessage()]
        assert len(said) == 1
        assert "3 of 3 layers" in said[0]
        assert "stay transformers' own" in said[0]
    with VirtualCache(build("gemma2", "eager", "cpu"), max_len=10) as cache:
        assert cache.foreign_layers == {}


def test_options_that_are_given_are_of_the_cache_that_is_made():
    """Only a cache that is made without options takes them from the cache that this thread used last.

    transformers makes one without options where it replaces a cache.
    """
    k = torch.randn(1, 2, 5, 16)
    with VirtualCache(None, max_len=77, layout="compact") as before:
        before.update(k, k, 0)
        with pytest.raises(ValueError, match="max_len must be given"):
            VirtualCache([(k, k)], slots=1)
        with VirtualCache([(k, k)]) as again:
            assert again._store.options.max_len == 77
            assert torch.equal(again.layers[0].keys, k)


class Cropping(StoppingCriteria):
    """Tries crops that are refused, in the middle of a generation."""

    def __init__(self, cache):
        self.cache, self.refused = cache, 0

    def __call__(self, ids, scores, **options):
        if ids.shape[1] > 30:
            lengths = list(self.cache._store.lengths)
            with pytest.raises((ValueError, RuntimeError)):
                self.cache.crop(-25)
            assert self.cache._store.lengths == lengths
            self.refused += 1
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("attention", [None, "auto"])
def test_a_generation_goes_on_behind_a_refused_crop(name, attention, monkeypatch):
    """Runs on the host with small granules, so that a window gives rows back."""
    monkeypatch.setattr(Placement, "granularity", 4096)
    model = build(name, attentions(name)[0], "cpu", sliding_window=8)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=40)
    with VirtualCache(model, max_len=100, attention=attention) as cache:
        cropping = Cropping(cache)
        criteria = StoppingCriteriaList([cropping])
        got = generated(model, cache, max_new_tokens=40, stopping_criteria=criteria)
        assert cropping.refused > 10
        assert torch.equal(got, expected)
        cache.check()
