"""Ranges in the timelines of profilers: they are there when they are asked for, and cost nothing otherwise."""

from __future__ import annotations

import pytest
import torch
from models import build, generated, virtual_of

import vattn
from vattn import KVCache, Sequence
from vattn.hf.decode_graphs import DecodeGraphs
from vattn.hf.decoder import Decoder

METHODS = [
    (Sequence, "grow"),
    (Sequence, "swap_in"),
    (KVCache, "grow_all"),
    (Decoder, "step"),
    (DecodeGraphs, "capture"),
]


LAYOUT = vattn.KVLayout([vattn.LayerShape(kv_heads=1, head_dim=8, dtype="float32")], max_len=4096)


def profiled():
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True)


def functions():
    return [vars(owner)[name] for owner, name in METHODS]


@pytest.fixture
def ranges():
    before = functions()
    vattn.set_profiler_ranges("torch")
    yield
    vattn.set_profiler_ranges(None)
    assert functions() == before  # the original methods are back, without wrappers


def names(profile):
    return {event.name for event in profile.events() if event.name.startswith("vattn::")}


@pytest.mark.usefixtures("graphs", "ranges")
def test_steps_and_growth_are_ranges(device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    with virtual_of(model) as cache, profiled() as profile:
        for _ in range(2):
            generated(model, cache, max_new_tokens=12)
            cache.reset()
    assert names(profile) == {"vattn::grow", "vattn::step", "vattn::capture", "vattn::prompt"}


@pytest.mark.usefixtures("ranges")
def test_what_is_done_to_sequences_is_a_range():
    with KVCache(LAYOUT, slots=4, device="cpu") as cache, profiled() as profile:
        sequence = cache.open()
        sequence.grow(10)
        sequence.swap_out()
        sequence.swap_in()
        [fork] = sequence.fork()
        fork.close()
        sequence.close()
    assert names(profile) == {"vattn::grow", "vattn::fork", "vattn::swap_out", "vattn::swap_in"}


def test_without_ranges_there_are_none():
    with KVCache(LAYOUT, slots=1, device="cpu") as cache, profiled() as profile, cache.open() as sequence:
        sequence.grow(10)
    assert names(profile) == set()


@pytest.mark.parametrize("kind", ["nsight", 3, True])
def test_another_kind_is_an_error(kind):
    before = functions()
    with pytest.raises((TypeError, ValueError), match="kind must be"):
        vattn.set_profiler_ranges(kind)
    assert functions() == before


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this PyTorch has NVTX")
def test_no_nvtx_without_cuda():
    with pytest.raises(ValueError, match="built without CUDA"):
        vattn.set_profiler_ranges("nvtx")
