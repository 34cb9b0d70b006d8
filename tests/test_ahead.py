"""Speculative decode steps: steps that are started before they are called for."""

from __future__ import annotations

import copy
import unittest.mock

import pytest
import torch
from models import At, build, generated, virtual_of
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vattn import CACHE_KEYWORD, BudgetExceeded, KVCache, SequenceTooLong
from vattn.graphs.runner import GraphRunner
from vattn.hf import rows
from vattn.hf.decode_graph import DecodeGraph

pytestmark = pytest.mark.usefixtures("graphs")


def committed(cache):
    """Returns whether every row is as long as the cache says, so that no speculative step has left a row behind."""
    [rows] = cache._store.placement.rows.values()
    return all(row.length == cache.get_seq_length() for row in rows.sequences)


@pytest.mark.parametrize("batch", [1, 3])
def test_greedy_steps_begin_before_their_calls(batch, device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 24, "batch": batch}
    expected = generated(model, DynamicCache(config=model.config), **options)
    for run_ahead in (True, False):
        with virtual_of(model, run_ahead=run_ahead) as cache:
            for _ in range(2):
                assert torch.equal(generated(model, cache, **options), expected)
                assert committed(cache)
                cache.reset()
            stats = cache.decode_stats()
            assert stats.eager + stats.replayed == 2 * 23
            assert stats.speculative == (
                23 + 23 - 4 if run_ahead else 0
            )  # all but the first step of each call and the first two replays


class Banned(LogitsProcessor):
    """Forbids the most likely token in every ``every``-th step."""

    def __init__(self, every):
        self.every, self.calls = every, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores.scatter(1, scores.argmax(1, keepdim=True), -1e9) if self.calls % self.every == 0 else scores


@pytest.mark.parametrize(("every", "least"), [(12, 20), (2, 0)])
def test_steps_that_began_with_other_tokens_are_computed_again(every, least, device):
    model = build("mistral", "sdpa", device)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 40}

    def run(cache):
        return generated(model, cache, logits_processor=LogitsProcessorList([Banned(every)]), **options)

    expected = run(DynamicCache(config=model.config))
    with virtual_of(model) as cache:
        assert torch.equal(run(cache), expected)
        assert committed(cache)
        assert least <= cache.decode_stats().speculative <= 36
        assert cache.decode_stats().replayed >= 36


def test_what_is_done_to_a_cache_in_between_ends_what_has_begun(device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    copies = []

    class Copying(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            if input_ids.shape[1] % 5 == 0:
                copies.append((copy.deepcopy(cache), input_ids))
                assert committed(cache)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=30)
    with virtual_of(model) as cache:
        criteria = StoppingCriteriaList([Copying()])
        assert torch.equal(generated(model, cache, max_new_tokens=30, stopping_criteria=criteria), expected)
        assert cache.decode_stats().speculative >= 18
        for other, ids in copies:
            more = {"max_new_tokens": 40 - ids.shape[1], "do_sample": False} if ids.shape[1] < 40 else None
            if more is not None:
                assert torch.equal(model.generate(ids, **more, **{CACHE_KEYWORD: other}), expected)
            other.close()


class Until(StoppingCriteria):
    """Stops at a length that no option of ``generate`` tells the cache beforehand."""

    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **options):
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_what_is_written_through_a_view_is_seen(name, device):
    model = build(name, "sdpa", device)
    model.generation_config.eos_token_id = None

    def run(cache):
        criteria = StoppingCriteriaList([At(20, lambda: cache.layers[1].values.mul_(-3))])
        return generated(model, cache, max_new_tokens=24, stopping_criteria=criteria)

    with virtual_of(model) as cache:
        assert torch.equal(run(cache), run(DynamicCache(config=model.config)))
        assert committed(cache)
        assert cache.decode_stats().speculative >= 15


def test_rows_that_have_ended_do_not_hinder_the_others(device):
    model = build("llama-gqa", "sdpa", device)
    options = {"batch": 3, "max_new_tokens": 40, "repetition_penalty": 1.0}
    model.generation_config.eos_token_id = None
    free = generated(model, DynamicCache(config=model.config), **options)
    # A token that exactly one of the rows generates.
    ends = next(
        token
        for token in free[0, -38:].tolist() + free[1, -38:].tolist() + free[2, -38:].tolist()
        if sum(token in row for row in free[:, -38:].tolist()) == 1
    )
    model.generation_config.eos_token_id = ends
    for pad in (ends, 0):
        model.generation_config.pad_token_id = pad
        expected = generated(model, DynamicCache(config=model.config), **options)
        with virtual_of(model) as cache:
            assert torch.equal(generated(model, cache, **options), expected)
            assert committed(cache)
            stats = cache.decode_stats()
            # Steps are speculative also while a row that has ended is padded.
            assert stats.speculative == expected.shape[1] - free.shape[1] + 39 - 3


@pytest.mark.parametrize("where", ["was_given", "start_speculative", "grow_speculatively"])
def test_an_error_around_a_step_that_begins_leaves_nothing_of_it(where, device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=30)
    with virtual_of(model) as cache:
        owner = {"was_given": GraphRunner, "start_speculative": DecodeGraph, "grow_speculatively": rows.Rows}[where]
        original, calls = getattr(owner, where), []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 9:
                if where == "start_speculative":
                    original(*args)
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generated(model, cache, max_new_tokens=30)
        assert len(calls) == 9
        assert committed(cache)
        assert cache._store.speculative is None
        # Where the interrupt came before a step was started, the last step can still be repeated.
        assert (cache.decoder.again() is None) == (where != "grow_speculatively")
        cache.reset()
        assert torch.equal(generated(model, cache, max_new_tokens=30), expected)


def test_no_memory_for_a_step_before_its_call_is_no_error(device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    grow_speculatively = rows.Rows.grow_speculatively

    def refusing(self, length):
        with monkeypatch.context() as full:
            if length > 20:
                full.setattr(KVCache, "grow_all", unittest.mock.Mock(side_effect=BudgetExceeded("no")))
            return grow_speculatively(self, length)

    monkeypatch.setattr(rows.Rows, "grow_speculatively", refusing)
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache, max_new_tokens=24), expected)
        assert 0 < cache.decode_stats().speculative < 10


def test_the_last_step_is_not_repeated_once_another_has_begun_behind_it(device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    with virtual_of(model) as cache:
        generated(model, cache)
        assert cache.decoder.again() is not None
        seen = cache.layers[0].keys.clone()
        with torch.no_grad():
            cache.decoder.again()()
        assert torch.equal(cache.layers[0].keys, seen)
        cache.reset()
        generated(model, cache, stopping_criteria=StoppingCriteriaList([Until(20)]), max_new_tokens=24)
        assert cache.decoder.again() is None


def test_no_step_begins_where_the_cache_ends(device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    with virtual_of(model, max_len=33) as cache:
        options = {"max_length": 34, "max_new_tokens": None}
        assert torch.equal(generated(model, cache, **options), expected)
        assert committed(cache)
    with virtual_of(model, max_len=30) as cache, pytest.raises(SequenceTooLong):
        generated(model, cache, **options)
