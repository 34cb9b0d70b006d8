"""Decode steps as replays of a graph: captured once, while sequences grow and calls follow each other."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
import unittest.mock

import pytest
import torch
import transformers
from models import adaptable, build, generated, prompt, virtual_of
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from vattn import CACHE_KEYWORD, KVCache, OutOfPages, SequenceTooLong, VirtualCache, decode, plan, step, store


class Retold:
    """Stands for a graph where there is no GPU: it computes the step anew, with what the capture knew of the host."""

    def __init__(self, run):
        self.run, self.output = run, run()
        # What a capture would keep of the model.
        self.kept = [(m, m.active_adapter) for m in run.args[0].forward.model.modules() if hasattr(m, "active_adapter")]

    def replay(self):
        store = self.run.args[0].store
        lengths = list(store.lengths)
        now = [m.active_adapter for m, _ in self.kept]
        for module, adapter in self.kept:
            module.active_adapter = adapter
        again = self.run()
        for (module, _), adapter in zip(self.kept, now, strict=True):
            module.active_adapter = adapter
        store.lengths = lengths
        self.output.logits.copy_(again.logits)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)], autouse=True)
def device(request, monkeypatch):
    if request.param == "cpu":
        if request.node.get_closest_marker("gpu"):
            pytest.skip("it is of graphs themselves")
        monkeypatch.setattr(store.Store, "granularity", 4096)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *device: 0)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(decode, "record", lambda run, pool, stream: (graph := Retold(run), graph.output))
        for module in (plan, decode):
            monkeypatch.setattr(module, "capturable", lambda device: True)
    return request.param


class Watch(StoppingCriteria):
    def __init__(self, cache):
        self.cache, self.seen = cache, []

    def __call__(self, input_ids, scores, **options):
        self.seen.append(self.cache.decode_stats())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


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
            if call == 1:
                reserved = torch.cuda.memory_reserved()
            cache.reset()
        assert stats.replayed + stats.eager == 20 * 119
        assert stats.eager <= 2
        assert torch.cuda.memory_reserved() == reserved


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
        assert stats.ahead


def goes_on(model, cache, whole, upto):
    """The tokens that a cache goes on to from those that it has, of rows whose tokens are these."""
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
    """Copies come to lie at the end of them."""
    monkeypatch.setattr(store, "_SPARE_SLOTS", 0)
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
            assert [plan.rows for plan in other.decoder._plans.values()] == [6]
            cache.check()


def dependent(model, part=1.0):
    """A model whose rows depend on each other, as where they are rounded by what is the largest of all."""
    mlp = model.model.layers[1].mlp
    alone = mlp.forward
    mlp.forward = lambda x: alone(x - part * x.mean(0))


@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 1.0), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("batches", [(3, 5, 3), (4, 3), (8, 5, 7)])
def test_rows_that_depend_on_each_other_have_graphs_of_their_own(batches, dtype, part, device):
    model = build("llama-gqa", "sdpa", device).to(dtype)
    dependent(model, part)
    with virtual_of(model) as cache:
        for batch in batches:
            expected = generated(model, DynamicCache(config=model.config), batch)
            got = generated(model, cache, batch)
            assert torch.equal(got, expected) or dtype == torch.bfloat16  # where two kernels may part
            cache.reset()
        assert model.forward.refused is None
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
            full.setattr(plan.Plan, "__init__", unittest.mock.Mock(side_effect=torch.OutOfMemoryError))

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
            broken.setattr(step.Step, "set_live", unittest.mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                generated(model, cache, 5)
        cache.reset()
        assert torch.equal(generated(model, cache, 5), expected)
        [shared] = cache.decoder._plans.values()
        assert shared.step.live == 5
        assert shared.step.ends[5:].tolist() == [0, 0, 0]


def test_other_threads_in_a_prompt_change_nothing(device):
    model = build("llama-gqa", "sdpa", device)
    entered, done = threading.Event(), threading.Event()

    def beside():
        with step.attending(object(), plan.configs_of(model)):
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
    """The longest position of all rows decides how longrope turns them."""
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
        if device == "cpu":  # where nothing is captured that waits for the device
            assert [plan.rows for plan in cache.decoder._plans.values()] == [8]


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
            assert cache._store.padding.rows == [3 * row for row in range(batch)]
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
            # A generate that goes on from one token is at its first step before it lets experts be computed so.
            copies = At(13, lambda: setattr(model.config, "_experts_implementation", "batched_mm"))
            expected = generated(model, DynamicCache(config=model.config), batch)
            got = generated(model, cache, batch, stopping_criteria=StoppingCriteriaList([copies]))
            assert torch.equal(got, expected)
            cache.reset()
        assert sorted(plan.rows for plan in cache.decoder._plans.values() if plan.graph) == [3, 4]


@pytest.mark.skipif(transformers.__version__ < "5", reason="its older version makes a mask of its own")
def test_positions_that_are_not_given_keep_no_other_steps_from_kernels(device):
    """Those of OPT come from the mask."""
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
        assert model.forward.refused is None
        cache.reset()
        assert torch.equal(generated(model, cache), expected)
        assert cache.decode_stats().captures == 1


def test_a_kernel_that_is_not_there_takes_no_graph_from_others(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache, virtual_of(model, attention="flashinfer") as other:
        for batch in (8, 5, 6):
            generated(model, cache, batch)
            generated(model, other, batch)
            cache.reset()
            other.reset()
        assert cache.decode_stats().captures == 1
        assert "flashinfer: it" in other.decode_stats().fallback


def test_weights_that_move_are_noticed(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache:
        generated(model, cache)
        cache.reset()
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
        assert torch.equal(generated(model, cache), generated(model, DynamicCache(config=model.config)))
        assert cache.decode_stats().captures == 2


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
    torch.rand(3, device="cuda")  # the generators know that the capture is over


def test_a_constant_in_a_captured_step_is_found_out(device):
    model = build("llama-gqa", "sdpa", device)
    kept = {}

    forward = model.model.norm.forward

    def shift(states):
        return forward(states) + 0.01 * kept["cache"].get_seq_length()  # a number of the host's, fixed by a capture

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
        layer.active_adapter = "b"  # the next call goes on where the last one ended
        more = {"input_ids": first, "max_new_tokens": 8, "do_sample": False}
        with torch.no_grad():  # K and V of the first call are those of the other adapter
            dynamic = DynamicCache(config=model.config)
            layer.active_adapter = "a"
            generated(model, dynamic)
            layer.active_adapter = "b"
        expected = model.generate(**more, **{CACHE_KEYWORD: dynamic})
        assert torch.equal(model.generate(**more, **{CACHE_KEYWORD: cache}), expected)
        assert cache.decode_stats().captures == 2


def committed(cache):
    """Whether no row holds more than the cache says that it does."""
    [rows] = cache._store.rows.values()
    return all(row.length == cache.get_seq_length() for row in rows)


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
            assert stats.ahead == (23 + 23 - 4 if run_ahead else 0)  # not the first of a call, nor those before a graph


class Banned(LogitsProcessor):
    """Forbids the highest token of every so many-th step."""

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
        assert least <= cache.decode_stats().ahead <= 36
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
        assert cache.decode_stats().ahead >= 18
        for other, ids in copies:
            more = {"max_new_tokens": 40 - ids.shape[1], "do_sample": False} if ids.shape[1] < 40 else None
            if more is not None:
                assert torch.equal(model.generate(ids, **more, **{CACHE_KEYWORD: other}), expected)
            other.close()


class At(StoppingCriteria):
    """Does something once, at a length."""

    def __init__(self, length, do):
        self.length, self.do = length, do

    def __call__(self, input_ids, scores, **options):
        if input_ids.shape[1] == self.length:
            self.do()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Until(StoppingCriteria):
    """Stops at a length, as no option of generate foresees."""

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
        assert cache.decode_stats().ahead >= 15


def test_rows_that_have_ended_do_not_hinder_the_others(device):
    model = build("llama-gqa", "sdpa", device)
    options = {"batch": 3, "max_new_tokens": 40, "repetition_penalty": 1.0}
    model.generation_config.eos_token_id = None
    free = generated(model, DynamicCache(config=model.config), **options)
    # A token that one row comes to early and not all of them do.
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
            assert stats.ahead == expected.shape[1] - free.shape[1] + 39 - 3  # also while a row takes padding


@pytest.mark.parametrize("where", ["fits", "begin", "grow_ahead"])
def test_an_error_around_a_step_that_begins_leaves_nothing_of_it(where, device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=30)
    with virtual_of(model) as cache:
        owner = store.Store if where == "grow_ahead" else plan.Plan
        original, calls = getattr(owner, where), []

        def interrupted(*args):
            calls.append(1)
            if len(calls) == 9:
                if where == "begin":
                    original(*args)
                raise KeyboardInterrupt
            return original(*args)

        monkeypatch.setattr(owner, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            generated(model, cache, max_new_tokens=30)
        assert len(calls) == 9
        assert committed(cache)
        assert cache._store.ahead is None
        assert (cache.decoder.again() is None) == (where != "grow_ahead")  # where nothing has begun
        cache.reset()
        assert torch.equal(generated(model, cache, max_new_tokens=30), expected)


def test_no_memory_for_a_step_before_its_call_is_no_error(device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    grow_ahead = store.Store.grow_ahead

    def refusing(self, length):
        with monkeypatch.context() as full:
            if length > 20:
                full.setattr(KVCache, "grow_all", unittest.mock.Mock(side_effect=OutOfPages("no")))
            return grow_ahead(self, length)

    monkeypatch.setattr(store.Store, "grow_ahead", refusing)
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache, max_new_tokens=24), expected)
        assert 0 < cache.decode_stats().ahead < 10


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


def test_weights_laid_elsewhere_by_another_cache_are_noticed_before_a_replay(device, monkeypatch):
    monkeypatch.setattr(decode.compiled, "compiled", lambda forward, options: forward)
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    with virtual_of(model) as cache, virtual_of(model, compiled=True) as other:
        replays, replay = [], plan.Plan.replay
        monkeypatch.setattr(plan.Plan, "replay", lambda self: (replays.append(self.stayed()), replay(self)))
        criteria = StoppingCriteriaList([At(20, lambda: generated(model, other, max_new_tokens=4))])
        got = generated(model, cache, max_new_tokens=24, stopping_criteria=criteria)
        assert torch.equal(got, expected)
        assert model.forward.moves == 1
        assert all(replays)
        assert cache.decode_stats().captures == 2


def test_where_weights_find_no_memory_side_by_side_they_stay(device, monkeypatch, caplog):
    def full(model):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(decode.compiled, "compiled", lambda forward, options: forward)
    monkeypatch.setattr(decode.compiled, "lay_side_by_side", full)
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model, compiled=True) as cache:
        assert torch.equal(generated(model, cache), expected)
        assert cache.decode_stats().captures == 1
    assert "weights stay where they are" in caplog.records[0].message


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


def test_weights_that_change_between_calls_are_seen(device):
    """Also where the next call goes on with the token that the last one ended with."""
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
