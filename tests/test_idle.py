"""Batches of different sizes that share a decode graph, some of whose rows are then idle."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import unittest.mock

import pytest
import torch
import transformers
from models import At, adaptable, build, generated, prompt, virtual_of
from transformers import (
    DynamicCache,
    StoppingCriteriaList,
)

from vattn import CACHE_KEYWORD
from vattn.hf import decode_graph, placement, step_rows
from vattn.hf.attach import forward_of
from vattn.models.attention import attending
from vattn.models.state import configs_of

pytestmark = pytest.mark.usefixtures("graphs")


@pytest.mark.thorough(2)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "qwen3", "gpt2"])
def test_batches_of_other_sizes_share_a_graph(name, padded, device):
    model = build(name, "sdpa", device)
    with virtual_of(model) as cache:
        for batch in (5, 8, 7, 3, 4, 6, 11, 16, 9):
            options = {"batch": batch, "padded": padded, "length": 10 + 3 * batch}
            expected = generated(model, DynamicCache(config=model.config), **options)
            assert torch.equal(generated(model, cache, **options), expected)
            cache.check()
            cache.reset()
        stats = cache.decode_stats()
        assert stats.captures == stats.graphs == 3  # of 4, 8 and 16 rows
        assert stats.speculative


def goes_on(model, cache, whole, upto):
    """Continues a greedy generation from the positions that a cache holds, and returns the tokens of all positions.

    Args:
        model: the model.
        cache: holds rows of the first tokens of ``whole``.
        whole: the tokens of each row, of which one more than the cache holds is given to ``generate``.
        upto: the length to generate to.
    """
    ids = whole[:, : cache.get_seq_length() + 1]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": upto - ids.shape[1], "do_sample": False}
    return model.generate(ids, **options, **{CACHE_KEYWORD: cache})


def test_rows_that_leave_a_batch(device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    whole = generated(model, DynamicCache(config=model.config), 7, 20, max_new_tokens=30)
    with virtual_of(model) as cache:
        generated(model, cache, 7, 20, max_new_tokens=10)
        for keep, upto in (([0, 2, 3, 5, 6], 40), ([1, 3, 4], 50)):
            kept = torch.tensor(keep, device=device)
            whole = whole[kept]
            cache.batch_select_indices(kept)
            assert torch.equal(goes_on(model, cache, whole, upto), whole[:, :upto])
            cache.check()
        assert cache.decode_stats().captures == 2


def test_graphs_have_no_more_rows_than_there_are_slots(device, monkeypatch):
    """The rows of a copy lie in the last slots, behind which there are no slots for further rows of a graph."""
    monkeypatch.setattr(placement, "_SPARE_SLOTS", 0)
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    whole = generated(model, DynamicCache(config=model.config), 6, 20, max_new_tokens=30)
    with virtual_of(model, slots=13) as cache:
        generated(model, cache, 6, 20, max_new_tokens=3)
        with contextlib.closing(copy.deepcopy(cache)) as other:
            assert torch.equal(goes_on(model, other, whole, 35), whole[:, :35])
            other.batch_select_indices(torch.arange(1, 6, device=device))
            assert torch.equal(goes_on(model, other, whole[1:], 50), whole[1:])
            assert other.decode_stats().captures == 1
            assert [graph.runner.rows for graph in other.decoder.graphs.all()] == [6]
            cache.check()


def dependent(model, part=1.0):
    """Makes the rows of a batch depend on each other, as in models that round by the largest value of all rows."""
    mlp = model.model.layers[1].mlp
    alone = mlp.forward
    mlp.forward = lambda x: alone(x - part * x.mean(0))


@pytest.mark.thorough(2)
@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 1.0), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("batches", [(3, 5, 3), (4, 3), (8, 5, 7)])
def test_rows_that_depend_on_each_other_have_graphs_of_their_own(batches, dtype, part, device):
    model = build("llama-gqa", "sdpa", device).to(dtype)
    dependent(model, part)
    with virtual_of(model) as cache:
        for batch in batches:
            expected = generated(model, DynamicCache(config=model.config), batch)
            got = generated(model, cache, batch)
            assert torch.equal(got, expected) or dtype == torch.bfloat16  # two kernels may give different tokens
            cache.reset()
        assert forward_of(model).refused is None
        assert cache.decode_stats().captures == len(set(batches))


def test_a_change_in_the_middle_where_no_rows_are_idle(device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    dependent(model)
    layer = adaptable(model)
    flip = StoppingCriteriaList([At(20, lambda: setattr(layer, "active_adapter", "b"))])
    expected = generated(model, DynamicCache(config=model.config), 5, max_new_tokens=40, stopping_criteria=flip)
    layer.active_adapter = "a"
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache, 5, max_new_tokens=40, stopping_criteria=flip), expected)
        stats = cache.decode_stats()
        assert stats.captures == 2
        assert stats.replayed + stats.eager == 39
        assert stats.eager <= 6


def test_an_error_where_a_plan_is_made_anew_leaves_no_step(device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    layer = adaptable(model)
    lengths = []
    with virtual_of(model) as cache, monkeypatch.context() as full:

        def flip():
            layer.active_adapter = "b"
            lengths.append(cache.get_seq_length())
            full.setattr(decode_graph.DecodeGraph, "__init__", unittest.mock.Mock(side_effect=torch.OutOfMemoryError))

        with pytest.raises(torch.OutOfMemoryError):
            generated(model, cache, max_new_tokens=40, stopping_criteria=StoppingCriteriaList([At(20, flip)]))
        assert cache.get_seq_length() == lengths[0]
        cache.check()


def test_plans_without_a_graph_take_none_from_others(device):
    model = build("llama-gqa", "sdpa", device)
    dependent(model)
    with virtual_of(model, slots=48) as cache:
        for _ in range(2):
            for batch in (3, 5, 6, 9, 10, 17, 18):
                generated(model, cache, batch)
                cache.reset()
        stats = cache.decode_stats()
        assert stats.captures == stats.graphs == 7


def test_an_interrupt_while_rows_become_idle(device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), 5)
    with virtual_of(model) as cache:
        for batch in (8, 5, 8):
            generated(model, cache, batch)
            cache.reset()
        with monkeypatch.context() as broken:
            broken.setattr(step_rows.StepRows, "set_live", unittest.mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                generated(model, cache, 5)
        cache.reset()
        assert torch.equal(generated(model, cache, 5), expected)
        [shared] = cache.decoder.graphs.all()
        assert shared.runner.live == 5
        assert shared.context.rows.ends[5:].tolist() == [0, 0, 0]


def test_other_threads_in_a_prompt_change_nothing(device):
    model = build("llama-gqa", "sdpa", device)
    entered, done = threading.Event(), threading.Event()

    def beside():
        with attending(object(), configs_of(model)):
            entered.set()
            done.wait()

    with virtual_of(model) as cache:
        for call in range(6):
            if call == 3:
                thread = threading.Thread(target=beside)
                thread.start()
                entered.wait()
            generated(model, cache)
            cache.reset()
            if call == 4:
                done.set()
                thread.join()
        assert cache.decode_stats().captures == 1


def test_idle_rows_know_nothing_of_an_earlier_batch(device):
    """Longrope chooses its factors by the highest position of all rows in a batch."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [40.0] * 8, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, **factors}
    name = "rope_parameters" if transformers.__version__ >= "5" else "rope_scaling"
    model = build("llama-gqa", "sdpa", device, max_position_embeddings=256, **{name: rope})
    model.generation_config.eos_token_id = None
    with virtual_of(model) as cache:
        for batch, length in ((8, 70), (5, 10), (8, 10), (5, 70), (5, 10)):
            expected = generated(model, DynamicCache(config=model.config), batch, length)
            assert torch.equal(generated(model, cache, batch, length), expected)
            cache.reset()
        if device == "cpu":  # on CUDA, longrope waits for the device, which a capture does not allow
            assert [graph.runner.rows for graph in cache.decoder.graphs.all()] == [8]


def test_hooks_see_no_idle_rows(device):
    model = build("llama-gqa", "sdpa", device)
    seen = set()
    model.model.norm.register_forward_hook(lambda module, args, output: seen.add(len(output)))
    with virtual_of(model) as cache:
        for batch in (5, 8, 7):
            expected = generated(model, DynamicCache(config=model.config), batch)
            seen.clear()
            assert torch.equal(generated(model, cache, batch), expected)
            assert seen == {batch}
            cache.reset()
        assert "forward hooks" in cache.decode_stats().fallback


@pytest.mark.parametrize("batches", [(3, 4), (4, 3)])
def test_what_is_not_of_rows_has_a_graph_all_the_same(batches, device):
    model = build("llama-gqa", "sdpa", device)
    original = model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        output["hidden_states"] = output.logits.sum((0, 1))
        return output

    model.forward = functools.wraps(original)(forward)
    with virtual_of(model) as cache:
        for batch in batches:
            expected = generated(model, DynamicCache(config=model.config), batch, padded=True)
            assert torch.equal(generated(model, cache, batch, padded=True), expected)
            assert cache._store.rows.format.padding.rows == [3 * row for row in range(batch)]
            cache.reset()
        stats = cache.decode_stats()
        assert stats.replayed + stats.eager == 2 * 11
        assert stats.captures == 2
        assert stats.fallback is None


def test_experts_whose_weights_are_copied_have_no_idle_rows(device):
    model = build("mixtral", "sdpa", device)
    model.generation_config.eos_token_id = None
    with virtual_of(model) as cache:
        for batch in (3, 4):
            model.config._experts_implementation = "grouped_mm"
            # A generate that continues from one token takes its first step before it chooses this implementation.
            copies = At(13, lambda: setattr(model.config, "_experts_implementation", "batched_mm"))
            expected = generated(model, DynamicCache(config=model.config), batch)
            got = generated(model, cache, batch, stopping_criteria=StoppingCriteriaList([copies]))
            assert torch.equal(got, expected)
            cache.reset()
        assert sorted(graph.runner.rows for graph in cache.decoder.graphs.all() if graph.runner.captured) == [3, 4]


@pytest.mark.skipif(transformers.__version__ < "5", reason="its older version makes a mask of its own")
def test_positions_that_are_not_given_keep_no_other_steps_from_kernels(device):
    """OPT computes positions from the mask if it is given none."""
    model = build("opt", "sdpa", device)
    inputs = prompt(2, 10, device, padded=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    expected = generated(model, DynamicCache(config=model.config))
    with torch.no_grad(), virtual_of(model) as cache:
        logits = []
        for other in (cache, DynamicCache(config=model.config)):
            options = {CACHE_KEYWORD: other, "use_cache": True}
            last = model(**inputs, **options).logits[:, -1:].argmax(-1)
            logits.append(model(last, attention_mask=mask, **options).logits)
        torch.testing.assert_close(*logits)
        assert "positions of padded rows" in cache.decode_stats().fallback
        assert forward_of(model).refused is None
        cache.reset()
        assert torch.equal(generated(model, cache), expected)
        assert cache.decode_stats().captures == 1
