"""Decode steps as replays of a graph: captured once, while sequences grow and calls follow each other."""

from __future__ import annotations

import contextlib
import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from models import At, adaptable, build, generated, prompt, virtual_of
from transformers import (
    DynamicCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import vattn
from vattn import CACHE_KEYWORD, VirtualCache
from vattn.graphs.runner import GraphRunner
from vattn.hf import decode_graphs
from vattn.hf.attach import forward_of

pytestmark = pytest.mark.usefixtures("graphs")


class Watch(StoppingCriteria):
    def __init__(self, cache):
        self.cache, self.seen = cache, []

    def __call__(self, input_ids, scores, **options):
        self.seen.append(self.cache.decode_stats())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_one_capture_serves_growth_and_every_later_call(name, device):
    model = build(name, "sdpa", device)
    model.generation_config.eos_token_id = None
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=120)
    with virtual_of(model) as cache:
        for call in range(20):
            watch = Watch(cache)
            got = generated(model, cache, max_new_tokens=120, stopping_criteria=StoppingCriteriaList([watch]))
            assert torch.equal(got, expected)
            stats = watch.seen[-1]
            assert stats.captures == 1
            if call == 1 and device == "cuda":
                reserved = torch.cuda.memory_reserved()
            cache.reset()
        assert stats.replayed + stats.eager == 20 * 119
        assert stats.eager <= 2
        assert device == "cpu" or torch.cuda.memory_reserved() == reserved


def test_graphs_are_bounded(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model, slots=48) as cache:
        for batch in (1, 2, 4, 8, 16, 24, 32, 40, 48):
            expected = generated(model, DynamicCache(config=model.config), batch=batch)
            assert torch.equal(generated(model, cache, batch=batch), expected)
            cache.reset()
        stats = cache.decode_stats()
        assert stats.captures == 9
        assert stats.graphs == 8


def test_a_kernel_that_is_not_there_takes_no_graph_from_others(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache, virtual_of(model, attention="flashinfer") as other:
        for batch in (8, 5, 6):
            generated(model, cache, batch)
            generated(model, other, batch)
            cache.reset()
            other.reset()
        assert cache.decode_stats().captures == 1
        assert "flashinfer: " in other.decode_stats().fallback


def test_weights_that_move_are_noticed(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache:
        generated(model, cache)
        cache.reset()
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
        assert torch.equal(generated(model, cache), generated(model, DynamicCache(config=model.config)))
        assert cache.decode_stats().captures == 2


def test_first_rows_that_a_window_has_given_back(device):
    """Steps are captured also where the memory of a slot's first rows has been given back."""
    wide = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 256} if device == "cuda" else {}
    model = build("mistral", "sdpa", device, **wide)
    model.generation_config.eos_token_id = None
    options = {"length": 150, "max_new_tokens": 70}
    expected = generated(model, DynamicCache(config=model.config), **options)
    with virtual_of(model, max_len=256) as cache:
        got = generated(model, cache, **options)
        assert torch.equal(got, expected)
        [kv] = cache.kv_caches
        assert all(kv.first_row(slot, 0) > 0 for slot in range(2))
        stats = cache.decode_stats()
        assert stats.fallback is None
        assert stats.replayed > 50


def refused(states):
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("not here")
    return 1


@pytest.mark.gpu
@pytest.mark.parametrize("factor", [lambda states: states.any().item(), refused])
def test_a_step_that_cannot_be_captured_runs_eagerly(factor, caplog):
    model = build("llama-gqa", "sdpa", "cuda")
    forward = model.model.norm.forward
    model.model.norm.forward = lambda states: forward(states) * factor(states)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache), expected)
        stats = cache.decode_stats()
        assert stats.eager == 11
        assert stats.fallback.startswith("the step cannot be captured: ")
    assert [record.name for record in caplog.records if record.name == "vattn"] == ["vattn"]
    torch.rand(3, device="cuda")  # fails if torch's random generators still assume that a capture is under way


@pytest.mark.gpu
@pytest.mark.parametrize("cleared", ["by a graph that ends", "by torch.compile"])
def test_a_graph_has_workspaces_of_its_own(cleared):
    """torch frees those that cuBLAS has for a stream, although graphs that were captured there may use them."""
    model = build("llama-gqa", "sdpa", "cuda", hidden_size=2048, intermediate_size=8192).bfloat16()
    model.generation_config.eos_token_id = None
    with virtual_of(model) as cache:
        other = VirtualCache(model, max_len=160, attention="auto")
        expected = generated(model, cache, batch=1, max_new_tokens=40)
        generated(model, other, batch=1)
        other.close()
        del other
        gc.collect()
        if cleared == "by torch.compile":
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        filled = [torch.full((1 << 20,), 7, dtype=torch.uint8, device="cuda") for _ in range(256)]
        cache.reset()
        before = cache.decode_stats()
        assert torch.equal(generated(model, cache, batch=1, max_new_tokens=40), expected)
        stats = cache.decode_stats()
        assert (stats.captures, stats.replayed) == (before.captures, before.replayed + 39)
        assert all(bool((each == 7).all()) for each in filled)


@pytest.mark.gpu
def test_memory_of_a_verified_step_is_given_back():
    """transformers' own step copies K and V of the whole batch, and torch would keep the memory of these copies."""
    model = build("llama-gqa", "sdpa", "cuda", hidden_size=512, num_attention_heads=8, num_key_value_heads=4).bfloat16()
    model.generation_config.eos_token_id = None
    inputs = prompt(32, 4000, "cuda", padded=True)
    with VirtualCache(model, max_len=4100, attention="fa2") as cache:
        torch.cuda.reset_peak_memory_stats()
        model.generate(**inputs, **{CACHE_KEYWORD: cache}, max_new_tokens=12, do_sample=False)
        assert cache.decode_stats().replayed > 4
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_allocated()
        assert torch.cuda.max_memory_allocated() - allocated > 256 << 20
        assert torch.cuda.memory_reserved() - allocated < 64 << 20


@pytest.mark.gpu
def test_garbage_waits_for_a_capture_to_end():
    """A cache that is collected during a capture would wait for the device, which invalidates the capture."""
    model = build("llama-gqa", "sdpa", "cuda")
    forward, enabled = model.model.norm.forward, {}

    def watched(states):
        enabled.setdefault(torch.cuda.is_current_stream_capturing(), set()).add(gc.isenabled())
        return forward(states)

    model.model.norm.forward = watched
    with virtual_of(model) as cache:
        generated(model, cache)
        assert cache.decode_stats().captures == 1
    assert enabled == {False: {True}, True: {False}}
    assert gc.isenabled()


def test_a_constant_in_a_captured_step_is_found_out(device):
    model = build("llama-gqa", "sdpa", device)
    kept = {}

    forward = model.model.norm.forward

    def shift(states):
        return forward(states) + 0.01 * kept["cache"].get_seq_length()  # a host value, which becomes a constant

    model.model.norm.forward = shift
    kept["cache"] = DynamicCache(config=model.config)
    expected = generated(model, kept["cache"])
    with virtual_of(model) as cache:
        kept["cache"] = cache
        assert torch.equal(generated(model, cache), expected)
        assert "a replayed step gives other logits" in cache.decode_stats().fallback


def test_adapters_and_hooks_that_change_are_noticed(device):
    model = build("llama-gqa", "sdpa", device)
    layer = adaptable(model)
    with virtual_of(model) as cache:
        for adapter in ("a", "b"):
            layer.active_adapter = adapter
            expected = generated(model, DynamicCache(config=model.config))
            assert torch.equal(generated(model, cache), expected)
            cache.reset()
        assert cache.decode_stats().captures == 2
        seen = []
        model.model.norm.register_forward_hook(lambda *_: seen.append(1))
        assert torch.equal(generated(model, cache), expected)
        assert len(seen) >= 12
        assert "the model has forward hooks" in cache.decode_stats().fallback


def test_adapters_that_change_between_steps_are_noticed(device):
    model = build("llama-gqa", "sdpa", device)
    layer = adaptable(model)
    with virtual_of(model) as cache:
        first = generated(model, cache)
        layer.active_adapter = "b"  # before a call that continues the text of the last one
        more = {"input_ids": first, "max_new_tokens": 8, "do_sample": False}
        with torch.no_grad():  # K and V of the first call are computed with adapter "a"
            dynamic = DynamicCache(config=model.config)
            layer.active_adapter = "a"
            generated(model, dynamic)
            layer.active_adapter = "b"
        expected = model.generate(**more, **{CACHE_KEYWORD: dynamic})
        assert torch.equal(model.generate(**more, **{CACHE_KEYWORD: cache}), expected)
        assert cache.decode_stats().captures == 2


def test_settings_in_dicts_are_noticed(device):
    """PEFT keeps the scale of each adapter in a dict. A change is noticed also where a call continues the last one."""
    model = build("llama-gqa", "sdpa", device)
    layer = model.model.layers[1].mlp
    forward, layer.scaling = layer.forward, {"default": 1.0}
    layer.forward = lambda states: forward(states) * layer.scaling["default"]
    texts = []
    for dynamic in (True, False):
        layer.scaling["default"] = 1.0
        with contextlib.ExitStack() as caches:
            cache = DynamicCache(config=model.config) if dynamic else caches.enter_context(virtual_of(model))
            texts.append([generated(model, cache)])
            for scale in (3.0, 2.0):
                layer.scaling["default"] = scale
                more = {"attention_mask": torch.ones_like(texts[-1][-1]), "max_new_tokens": 8, "do_sample": False}
                texts[-1].append(model.generate(texts[-1][-1], **more, **{CACHE_KEYWORD: cache}))
            if not dynamic:
                assert cache.decode_stats().captures == 3
    assert all(map(torch.equal, *texts))


@pytest.mark.parametrize("every_call", [True, False])
def test_weights_that_are_assigned_are_noticed(every_call, device):
    """The weights are assigned before a ``generate`` that continues the last one, or before direct calls of a model."""
    model = build("llama-gqa", "sdpa", device)
    head, other = model.lm_head.weight, torch.nn.Parameter(-model.lm_head.weight.detach())
    texts = []
    for dynamic in (True, False):
        model.lm_head.weight = head
        with contextlib.ExitStack() as caches, torch.no_grad():
            cache = DynamicCache(config=model.config) if dynamic else caches.enter_context(virtual_of(model))
            text = generated(model, cache)
            model.lm_head.weight = other
            if every_call:
                more = {"attention_mask": torch.ones_like(text), "max_new_tokens": 8, "do_sample": False}
                text = model.generate(text, **more, **{CACHE_KEYWORD: cache})
            for _ in range(4):
                text = torch.cat([text, model(text[:, -1:], **{CACHE_KEYWORD: cache}).logits[:, -1:].argmax(-1)], 1)
            texts.append(text)
    assert torch.equal(*texts)


def test_hooks_that_transformers_leaves_do_no_harm(device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model) as cache:
        for _ in range(2):
            assert torch.equal(generated(model, cache), expected)
            cache.reset()
            with torch.no_grad():
                model(**prompt(1, 5, device), output_hidden_states=True)
        stats = cache.decode_stats()
        assert stats.fallback is None
        assert stats.replayed == 20


def test_global_hooks_are_noticed(device):
    model = build("llama-gqa", "sdpa", device)
    seen = []
    with virtual_of(model) as cache:
        generated(model, cache)
        cache.reset()
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: seen.append(1))
        try:
            generated(model, cache)
        finally:
            hook.remove()
        assert "the model has forward hooks" in cache.decode_stats().fallback
        assert len(seen) >= 12 * len(list(model.modules()))


def test_weights_go_with_their_model(device):
    model = build("llama-gqa", "sdpa", device)
    model.rope_deltas = None  # some vision-language models have this attribute
    cache = VirtualCache(model, max_len=160, attention="auto")
    generated(model, cache)
    assert cache.decode_stats().captures == 1
    weight = weakref.ref(model.lm_head.weight)
    del model
    cache.reset()
    gc.collect()
    assert weight() is None


def test_weights_laid_elsewhere_by_another_cache_are_noticed_before_a_replay(device, monkeypatch):
    monkeypatch.setattr(decode_graphs.compilation, "compiled", lambda forward, options: forward)
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    with virtual_of(model) as cache, virtual_of(model, compiled=True) as other:
        replays, replay = [], GraphRunner.replay

        def replaying(self):
            every = [*cache.decoder.graphs.all(), *other.decoder.graphs.all()]
            replays.extend(graph.model_state.stayed() for graph in every if graph.runner is self)
            replay(self)

        monkeypatch.setattr(GraphRunner, "replay", replaying)
        criteria = StoppingCriteriaList([At(20, lambda: generated(model, other, max_new_tokens=4))])
        got = generated(model, cache, max_new_tokens=24, stopping_criteria=criteria)
        assert torch.equal(got, expected)
        assert forward_of(model).moves == 1
        assert len(replays) > 5
        assert all(replays)
        assert cache.decode_stats().captures == 2


def test_where_weights_find_no_memory_side_by_side_they_stay(device, monkeypatch, caplog):
    def full(model):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode_graphs.compilation, "compiled", lambda forward, options: forward)
    monkeypatch.setattr(decode_graphs.compilation, "lay_side_by_side", full)
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model, compiled=True) as cache:
        assert torch.equal(generated(model, cache), expected)
        assert cache.decode_stats().captures == 1
    assert "weights stay where they are" in caplog.records[0].message


def test_weights_that_change_between_calls_are_seen(device):
    """Changes are seen also where the next call continues from the last token of the one before."""
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    results = []
    for make in (lambda: DynamicCache(config=model.config), lambda: VirtualCache(model, max_len=160, attention="auto")):
        torch.manual_seed(0)
        changed, cache = copy.deepcopy(model), make()
        if isinstance(cache, VirtualCache):
            cache = VirtualCache(changed, max_len=160, attention="auto")
        ids = generated(changed, cache, max_new_tokens=None, max_length=20)
        for parameter in changed.parameters():
            parameter.data.mul_(0.7)
        more = {"max_new_tokens": 8, "do_sample": False, CACHE_KEYWORD: cache}
        results.append(changed.generate(ids, attention_mask=torch.ones_like(ids), **more))
    assert torch.equal(*results)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt2"])
def test_compiled(name):
    model = build(name, "sdpa" if name != "gemma2" else "eager", "cuda")
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    with virtual_of(model, compiled=True) as cache:
        assert torch.equal(generated(model, cache, max_new_tokens=24), expected)
        stats = cache.decode_stats()
        assert stats.fallback is None
        assert stats.replayed >= 21


def test_a_replay_is_at_most_six_calls_deep(device, monkeypatch):
    """From ``model.forward`` to ``GraphRunner.replay`` there are the six calls that docs/design.md lists."""
    paths = []
    replay = GraphRunner.replay

    def traced(self):
        frames, frame = [], sys._getframe(1)
        while frame is not None:
            frames.append(frame.f_code.co_filename)
            frame = frame.f_back
        package = str(Path(vattn.__file__).parent)
        paths.append([str(Path(name).relative_to(package)) for name in reversed(frames) if name.startswith(package)])
        replay(self)

    monkeypatch.setattr(GraphRunner, "replay", traced)
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    with virtual_of(model, run_ahead=False) as cache:
        generated(model, cache, max_new_tokens=24)
    assert len(paths) > 10
    # Frames of attach.py that belong to generate come first and are left out. The replay itself is the sixth call.
    steps = [path[path.index("hf/decoder.py") - 2 :] for path in paths[2:]]
    expected = ["hf/attach.py"] * 2 + ["hf/decoder.py"] * 2 + ["hf/decode_graph.py"]
    assert all(step == expected for step in steps)
