"""VirtualCache is token-exact with DynamicCache: every mode of generate, every architecture, sdpa and eager."""

from __future__ import annotations

import pytest
import torch
from models import CASES, MODES, SPECULATIVE, attentions, build
from transformers import DynamicCache, EncoderDecoderCache

import vattn
from vattn import VirtualCache

MAX_LEN = 160


@pytest.fixture(scope="module")
def models():
    built = {}

    def get(name, attention, device):
        key = name, attention, device
        if key not in built:
            built[key] = build(*key)
        return built[key]

    return get


def dynamic(model):
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    return DynamicCache(config=model.config)


def virtual(model, **options):
    if model.config.is_encoder_decoder:
        return EncoderDecoderCache(*(VirtualCache(model.config, max_len=MAX_LEN, **options) for _ in range(2)))
    return VirtualCache(model.config, max_len=MAX_LEN, **options)


def outcome(run, model, make):
    """Returns the tokens of a run, or the error that transformers raised."""
    try:
        return run(model, make)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return error


@pytest.mark.thorough(24)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "attention", "mode"), CASES)
def test_exact(models, name, attention, device, mode):
    model = models(name, attention, device)
    made = []

    def make(model):
        made.append(virtual(model))
        return made[-1]

    expected = outcome(MODES[mode], model, dynamic)
    got = outcome(MODES[mode], model, make)
    if isinstance(expected, Exception):
        # Where DynamicCache fails in this version, VirtualCache may fail in the same way, or give the right tokens.
        assert mode in SPECULATIVE
        if not isinstance(got, Exception):
            expected = MODES[mode](model, lambda model: DynamicCache())  # without windows, so that it can crop
    if isinstance(expected, Exception):
        assert (type(got), str(got)) == (type(expected), str(expected))
    else:
        assert isinstance(got, list), got
        for a, b in zip(expected, got, strict=True):
            assert torch.equal(a, b)
    for cache in made:
        for part in (
            (cache.self_attention_cache, cache.cross_attention_cache)
            if hasattr(cache, "cross_attention_cache")
            else (cache,)
        ):
            part.check()


@pytest.mark.thorough(3)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("mode", ["greedy", "beams returned", "reset", "repeat and select", "copied prefix"])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "deepseek_v3"])
def test_exact_compact(models, name, mode, device):
    model = models(name, "sdpa", device)
    got = MODES[mode](model, lambda model: virtual(model, layout="compact"))
    for a, b in zip(MODES[mode](model, dynamic), got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "t5"])
def test_installed_for_a_whole_process(models, name):
    model = models(name, attentions(name)[0], "cpu")
    before = DynamicCache.__init__
    expected = MODES["greedy"](model, lambda model: None)
    with vattn.install(max_len=MAX_LEN):
        assert type(DynamicCache(config=model.config)) is VirtualCache
        got = MODES["greedy"](model, lambda model: None)
        made = DynamicCache()
        k = torch.randn(1, 2, 3, 8)
        for layer in range(3):
            made.update(k, k, layer)
        assert torch.equal(made.layers[2].keys, k)
    assert torch.equal(expected[0], got[0])
    assert type(DynamicCache(config=model.config)) is DynamicCache
    assert DynamicCache.__init__ is before


@pytest.mark.gpu
def test_a_cache_that_is_offloaded_stays_transformers_own(models):
    config = models("llama-gqa", "sdpa", "cuda").config
    with vattn.install(max_len=MAX_LEN):
        assert type(DynamicCache(config=config)) is VirtualCache
        assert type(DynamicCache(config=config, offloading=True)) is DynamicCache
