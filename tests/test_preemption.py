"""Requests that lose their memory to others, and budgets that are short."""

from __future__ import annotations

import random

import pytest
from serving import (
    HYBRIDS,
    ROWS,
    engine_of,
    generated,
    model_of,
    preempting,
    prompts_of,
    served,
    tokens,
)

from vattn import SwapCosts
from vattn.engine import tier
from vattn.engine.outputs import RequestOutput
from vattn.engine.request import Request
from vattn.engine.sampling_params import SamplingParams
from vattn.errors import BudgetExceeded
from vattn.models.probe import tensors_in
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


@pytest.mark.thorough(2)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt_oss", "deepseek_v3", "Qwen3Next", "Mamba2"])
def test_preempted_and_computed_again(name, depth, device):
    model = model_of(name, device)
    prompts = prompts_of((40, 12, 30))
    expected = generated(model, prompts, 30)
    with engine_of(model, depth=depth) as engine:
        assert preempting(engine, prompts, SamplingParams(temperature=0, max_tokens=30)) == expected


@pytest.mark.thorough(2)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt_oss"])
def test_preempted_and_swapped(name, depth, device):
    model = model_of(name, device)
    prompts = prompts_of((40, 12, 30))
    expected = generated(model, prompts, 30)
    with engine_of(model, depth=depth, preemption="swap") as engine:
        assert preempting(engine, prompts, SamplingParams(temperature=0, max_tokens=30)) == expected
        assert engine.tier.cache.stats().driver_calls["create_host"] > 0


@pytest.mark.parametrize(
    ("out_bytes", "swap_space", "swaps"), [(1e15, 4, True), (1e3, 4, False), (1e15, 0, False), (1e15, 1e-6, False)]
)
def test_requests_are_swapped_where_that_is_faster_and_there_is_room(monkeypatch, out_bytes, swap_space, swaps):
    costs = SwapCosts(out_bytes=out_bytes, in_bytes=1e15, flops=1e9)
    monkeypatch.setattr(tier, "_costs", lambda device, dtype: costs)
    model = model_of("llama-gqa")
    prompts = prompts_of((40, 12, 30))
    with engine_of(model, preemption="auto", swap_space=swap_space) as engine:
        found = preempting(engine, prompts, SamplingParams(temperature=0, max_tokens=30))
        assert found == generated(model, prompts, 30)
        assert (engine.tier.cache.stats().driver_calls["create_host"] > 0) == swaps


def test_the_cost_of_a_swap_is_measured_once(monkeypatch):
    measured = []

    def measure(*given, **options):
        measured.append(given)
        raise BudgetExceeded("none")

    monkeypatch.setattr(SwapCosts, "measure", measure)
    tier._costs.cache_clear()
    with engine_of(model_of("llama-gqa"), preemption="auto") as engine:  # computes again what it cannot compare
        assert preempting(engine, prompts_of((40, 12, 30)), SamplingParams(temperature=0, max_tokens=30))
        assert engine.tier.cache.stats().driver_calls["create_host"] == 0
    assert len(measured) == 1
    monkeypatch.undo()
    for _ in range(2):
        with engine_of(model_of("llama-gqa"), preemption="auto"):
            assert tier._costs.cache_info().misses == 2
    tier._costs.cache_clear()


@pytest.mark.parametrize("swaps", [False, True])
def test_samples_that_are_preempted_are_the_same(swaps, device):
    """Outputs of one request leave and come back together."""
    model = model_of("llama-gqa", device)
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=25)
    prompts = prompts_of((40, 20))
    with engine_of(model) as engine:
        expected = [[each.token_ids for each in output.outputs] for output in served(engine, prompts, params)]
    with engine_of(model, preemption="swap" if swaps else "recompute") as engine:
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, params)
        done: dict[str, RequestOutput] = {}
        steps = 0
        while engine.unfinished:
            done |= {output.request_id: output for output in engine.step()}
            steps += 1
            if steps % 4 == 0:
                engine.scheduler.preempt_one()
        assert engine.scheduler.requests.counters.preemptions > 2
        assert [[each.token_ids for each in done[name].outputs] for name in ("0", "1")] == expected


def test_under_a_budget_that_is_short():
    """Requests are preempted because there is no memory."""
    model = model_of("llama-gqa")
    prompts = prompts_of((40, 40, 40, 40, 40))
    expected = generated(model, prompts, 60)
    with engine_of(model) as engine:
        budget = 3 * engine.tier.cache.layout.mapped_bytes(100)
    with engine_of(model, kv_budget=budget) as engine:
        engine.scheduler._estimate._part = 0.0  # it expects short outputs, and lets too many begin
        assert tokens(served(engine, prompts, SamplingParams(temperature=0, max_tokens=60))) == expected
        assert engine.scheduler.requests.counters.preemptions > 0


@pytest.mark.thorough(1)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "deepseek_v3"])
def test_the_memory_is_resized_while_requests_run(name, depth, device):
    model = model_of(name, device)
    prompts = prompts_of((40, 40, 40, 40))
    expected = generated(model, prompts, 40)
    params = SamplingParams(temperature=0, max_tokens=40)
    with engine_of(model, depth=depth) as engine:
        flat = engine.tier.name == "flat"
        small = 2 * (engine.tier.cache.layout.mapped_bytes(80) if flat else 80 * engine.tier.memory._bytes)
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, params)
        done: dict[str, RequestOutput] = {}
        for steps in range(1000):
            done |= {output.request_id: output for output in engine.step()}
            if steps == 10:
                assert len(engine.scheduler.requests.running) == 4
                engine.resize(small)
            if steps == 14:
                assert not engine.resizing
                assert len(engine.scheduler.requests.running) < 4
                assert not flat or engine.tier.cache.stats().physical <= small
            if steps == 60:
                assert engine.resize(64 << 20)
            if not engine.unfinished:
                break
        assert tokens([done[str(number)] for number in range(4)]) == expected
        if flat and small <= 2 * engine.tier.cache.layout.granularity:
            return  # one granule, the least budget, is enough for a request of any length here
        engine.add("too long", prompts[0], SamplingParams(temperature=0, max_tokens=100))
        for _ in range(5):
            engine.step()
        engine.resize(small // 2)  # below what the request has already
        outputs = [output for _ in range(300) for output in engine.step()]
        assert outputs[-1].outputs[0].finish_reason == "error"
        assert "MiB" in outputs[-1].error


@pytest.mark.parametrize("name", [*ROWS, *HYBRIDS])
def test_what_caches_take_is_counted(name):
    """E4, where the caches are transformers' own."""
    model = model_of(name)
    with engine_of(model, max_num_batched_tokens=512) as engine:
        memory = engine.tier.memory
        for number, prompt in enumerate(prompts_of((40, 9))):
            engine.add(str(number), prompt, SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=20))
        most = 0
        while engine.unfinished:
            engine.step()
            layers = [layer for cache in memory.caches.values() for layer in cache.layers]
            held = sum(tensor.nbytes for layer in layers for tensor in tensors_in(vars(layer)))
            assert held <= memory.used
            if held > most:
                most, told = held, memory.used
        assert told <= 1.2 * most
        assert memory.used == 0
        request = Request("x", (1, 2), 3)
        memory.open(request, 5)
        assert (memory.used > 0) == (name in HYBRIDS)
        memory.close(request.trunk, 0)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("preemption", ["swap", "recompute"])
@pytest.mark.parametrize("depth", [0, 1])
def test_under_pressure_with_aborts_and_refusals(depth, preemption, device):
    """E1 to E9 on a budget far below the demand: all end once, and all memory comes back."""
    model = model_of("llama-gqa", device)
    chance = random.Random(depth)
    budget = 600_000 if device == "cpu" else 7 * 16 * (1 << 20)  # a sequence takes 16 MiB
    options = {"depth": depth, "preemption": preemption, "kv_budget": budget, "max_num_batched_tokens": 64}
    with engine_of(model, **options) as engine:
        cache = engine.tier.cache
        done: dict[str, RequestOutput] = {}
        names = [str(number) for number in range(150)]
        waiting = list(names)
        given: dict[str, list[int]] = {}
        while waiting or engine.unfinished:
            if waiting and chance.random() < 0.5:
                name = waiting.pop()
                given[name] = [chance.randrange(3, 99) for _ in range(chance.randrange(1, 60))]
                params = SamplingParams(
                    temperature=chance.choice([0, 1.0]), n=1, max_tokens=chance.randrange(1, 40), seed=3
                )
                engine.add(name, given[name], params)
            if chance.random() < 0.05 and given:
                engine.abort(chance.choice(list(given)))
            if chance.random() < 0.1:
                cache.driver.fail_at(chance.randrange(1, 4))
            for output in engine.step():
                if output.finished:
                    assert output.request_id not in done
                    done[output.request_id] = output
            cache.driver.fail_at(0)
            assert cache.stats().physical <= cache.stats().budget
        assert set(done) == set(names)
        assert {output.outputs[0].finish_reason for output in done.values()} <= {"stop", "length", "abort"}
        assert cache.stats().running_slots == 0
        counters = engine.scheduler.requests.counters
        assert counters.submitted == counters.finished + counters.aborted + counters.failed == 150
        cache.trim()


@pytest.mark.parametrize("k", range(1, 7))
def test_a_close_that_is_refused_once_holds_no_memory(k):
    """E1: what a request held is given back, also where no other one comes."""
    model = model_of("llama-gqa")
    with engine_of(model) as engine:
        engine.add("0", prompts_of((60,))[0], SamplingParams(temperature=0, max_tokens=60))
        for _ in range(5):
            engine.step()
        engine.abort("0")
        engine.tier.cache.driver.fail_at(k)
        while engine.unfinished:
            engine.step()
        engine.tier.cache.driver.fail_at(0)
        assert engine.tier.cache.stats().running_slots == 0


def test_a_close_that_the_driver_refuses_blocks_nobody():
    model = model_of("llama-gqa")
    prompts = prompts_of((40, 40))
    with engine_of(model) as engine:
        budget = 2 * engine.tier.cache.layout.mapped_bytes(80)
    with engine_of(model, kv_budget=budget) as engine:
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, SamplingParams(temperature=0, max_tokens=60))
        for _ in range(5):
            engine.step()
        engine.abort("0")
        engine.tier.cache.driver.fail_at(1, times=4)
        for _ in range(3):
            engine.step()
        engine.tier.cache.driver.fail_at(0)
        for _ in range(200):
            engine.step()
        assert engine.unfinished == 0


def test_a_request_alone_that_finds_no_memory_ends():
    """E7, where what a request needs was estimated too low."""
    model = model_of("llama-gqa")
    with engine_of(model, kv_budget=100_000) as engine:
        engine.tier.memory.shortage = lambda request: None
        engine.add("alone", prompts_of((60,))[0], SamplingParams(temperature=0, max_tokens=99))
        outputs = [output for _ in range(600) for output in engine.step()]
        assert engine.unfinished == 0
        assert outputs[-1].outputs[0].finish_reason == "error"
        assert "no memory was found for it" in outputs[-1].error
