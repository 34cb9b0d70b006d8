"""The engine beside ``model.generate``: the same tokens alone, batched, chunked, behind a prefix, preempted, forked."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import build, hybrid
from transformers import DynamicCache

from vattn import SwapCosts
from vattn.cli import demo
from vattn.engine import tier
from vattn.engine.engine import Engine
from vattn.engine.llm import LLM
from vattn.engine.options import KV_DTYPES, EngineOptions
from vattn.engine.outputs import RequestOutput
from vattn.engine.request import Request
from vattn.engine.sampling_params import SamplingParams
from vattn.engine.scheduler import Scheduler
from vattn.errors import BudgetExceeded
from vattn.kernels import KERNELS, Reference
from vattn.models import rope
from vattn.models.flat_verify import RoundingCache
from vattn.models.probe import tensors_in
from vattn.models.versions import VERSION, cache_keyword

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")

FLAT = [
    *("llama-gqa", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "gpt_oss"),
    *("qwen3_moe", "mixtral", "olmo2", "cohere2", "opt"),
]
ROWS = ["deepseek_v3", "falcon", "bloom"]
HYBRIDS = ["Qwen3Next", "Lfm2", "Mamba2"]
NEW = 18


def model_of(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    model = hybrid(name) if name in HYBRIDS else build(name, "eager", device)
    model = model.to(device, dtype)
    model.generation_config.eos_token_id = None
    return model


OPTIONS: dict[str, Any] = {
    "max_model_len": 160,
    "max_num_seqs": 8,
    "granularity": 4096,
    "kv_budget": 64 << 20,
    "preemption": "recompute",  # the other way is chosen by a measurement, which differs from run to run
}


# A granule of a GPU holds more than the longest sequence.
CUDA: dict[str, Any] = {"granularity": 2 << 20, "kv_budget": 1 << 30}


@contextlib.contextmanager
def engine_of(model: Any, tokenizer: Any = None, **options: Any) -> Iterator[Engine]:
    placed = CUDA if model.device.type == "cuda" else {}
    engine = Engine(model, tokenizer, EngineOptions(**{**OPTIONS, **placed, **options}))
    yield engine
    if engine.tier.cache is not None:
        engine.tier.cache.check()
    engine.close()


def served(engine: Engine, prompts: list[list[int]], params: SamplingParams, **options: Any) -> list[RequestOutput]:
    """The outputs of requests that come at once, in their order."""
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params, **options)
    done: dict[str, RequestOutput] = {}
    while engine.unfinished:
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
    assert engine.scheduler.requests.counters.submitted >= len(prompts)
    return [done[str(number)] for number in range(len(prompts))]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def prompts_of(lengths: tuple[int, ...]) -> list[list[int]]:
    chance = random.Random(5)
    return [[chance.randrange(3, 99) for _ in range(length)] for length in lengths]


def generated(model: Any, prompts: list[list[int]], new: int = NEW, cache: Any = None) -> list[list[int]]:
    """What ``model.generate`` gives for each prompt alone."""
    found = []
    for prompt in prompts:
        own = DynamicCache(config=model.config) if cache is None else cache()
        options = {"max_new_tokens": new, "do_sample": False, cache_keyword(model): own}
        ids = torch.tensor([prompt], device=model.device)
        found.append(model.generate(input_ids=ids, **options)[0, len(prompt) :].tolist())
    return found


GREEDY = SamplingParams(temperature=0, max_tokens=NEW)
LENGTHS = (30, 7, 1, 45, 16, 33)
MODES: dict[str, dict[str, Any]] = {
    "batched": {"max_num_batched_tokens": 512},
    "chunked": {"max_num_batched_tokens": 20},
    "read at once": {"max_num_batched_tokens": 40, "depth": 0},
    "without prefixes": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("name", [*FLAT, *ROWS, *HYBRIDS])
def test_the_tokens_are_those_of_generate(name, device):
    model = model_of(name, device)
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    for mode, options in MODES.items():
        with engine_of(model, **options) as engine:
            assert engine.tier.name == ("flat" if name in FLAT else "rows"), engine.tier.reason
            assert tokens(served(engine, prompts, GREEDY)) == expected, mode
            if engine.tier.cache is not None:
                assert engine.tier.cache.stats().running_slots == 0
            # One after the other, behind what the first round has left.
            for prompt, tokens_of_prompt in zip(prompts, expected, strict=True):
                assert tokens(served(engine, [prompt], GREEDY)) == [tokens_of_prompt], mode


@pytest.mark.gpu
@pytest.mark.parametrize("name", FLAT)
def test_halves_are_served_flat(name):
    """What they round differently is within what verification allows, and the tokens are the model's at first."""
    model = model_of(name, "cuda", torch.bfloat16)
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts, 1)
    with engine_of(model) as engine:
        assert engine.tier.name == "flat", engine.tier.reason
        found = tokens(served(engine, prompts, GREEDY))
    assert [len(each) for each in found] == [NEW] * len(prompts)
    with torch.no_grad():
        for prompt, [first], [got, *_] in zip(prompts, expected, found, strict=True):
            logits = model(input_ids=torch.tensor([prompt], device="cuda")).logits[0, -1].float()
            assert logits[got] >= logits[first] - 0.05 * logits.norm() / logits.shape[0] ** 0.5


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma3", "gpt_oss"])
def test_behind_a_prefix(name, device):
    model = model_of(name, device)
    [system] = prompts_of((40,))
    prompts = [[*system, *more] for more in prompts_of((9, 1, 20))]
    expected = generated(model, prompts)
    with engine_of(model) as engine:
        served(engine, [[*system, 5]], GREEDY)
        outputs = served(engine, prompts, GREEDY)
        assert tokens(outputs) == expected
        if name == "llama-gqa":  # a sliding window may have given back the rows
            assert all(output.num_cached_tokens >= len(system) for output in outputs)
        apart = served(engine, prompts, GREEDY, namespace="another tenant")
        assert tokens(apart) == expected
        assert apart[0].num_cached_tokens == 0


@pytest.mark.parametrize("name", ["llama-gqa", "Mamba2"])
def test_prefixes_are_forgotten_on_demand(name):
    """What was computed with other weights is never used again."""
    model = model_of(name)
    prompts = prompts_of((40, 9))
    with llm_of(model) as llm:
        for _ in range(2):
            before = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert before[0].num_cached_tokens == (39 if name == "llama-gqa" else 0)
        llm.engine.add("runs", prompts[1], GREEDY)
        for _ in range(3):
            llm.engine.step()
            assert not llm.reset_prefix_cache()
        llm.engine.abort("runs")
        while llm.engine.unfinished:
            llm.engine.step()
        model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()})
        assert llm.reset_prefix_cache()
        after = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [output.num_cached_tokens for output in after] == [0, 0]
        assert tokens(after) == generated(model, prompts) != tokens(before)


ROPES = {
    "dynamic": ("llama-gqa", {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 24,
            "short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * i for i in range(8)],
        },
    ),
}  # fmt: skip


def model_of_rope(kind: str) -> Any:
    """A model whose rotary embeddings change beyond 24 positions."""
    name, parameters = ROPES[kind]
    most = 24 if kind == "dynamic" else 256
    more = {} if kind == "dynamic" else {"original_max_position_embeddings": 24}
    model = build(name, "eager", "cpu", rope_parameters=parameters, max_position_embeddings=most, **more)
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("kind", ROPES)
def test_rotary_embeddings_that_depend_on_the_call(kind):
    """Sequences that are longer or shorter than others, and that grow beyond the length at which frequencies change."""
    model = model_of_rope(kind)
    prompts = prompts_of((30, 7, 1, 45, 16, 33, 22))
    params = SamplingParams(temperature=0, max_tokens=20)
    expected = []
    for prompt in prompts:
        rope.reset(model)
        expected += generated(model, [prompt], 20)
    for options in MODES.values():
        with engine_of(model, **options) as engine:
            assert engine.tier.name == "rows"
            assert f"its rotary embeddings ({kind}) depend on the longest position" in engine.tier.reason
            for _ in range(2):
                assert tokens(served(engine, prompts, params)) == expected
    with engine_of(model) as engine:
        assert preempting(engine, prompts, params) == expected
    with engine_of(model, max_model_len=24) as engine:  # which never comes that far
        assert engine.tier.name == "flat", engine.tier.reason
        assert tokens(served(engine, prompts[1:2], SamplingParams(temperature=0, max_tokens=9))) == [expected[1][:9]]


@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt2", "qwen3_moe"])
def test_k_and_v_in_8_bits(name, kv_cache_dtype, device):
    """The tokens are those of a model that rounds K and V, however they are computed."""
    model = model_of(name, device)
    prompts = prompts_of(LENGTHS)
    stored = getattr(torch, KV_DTYPES[kv_cache_dtype])
    expected = generated(model, prompts, cache=lambda: RoundingCache(model.config, stored))
    assert expected != generated(model, prompts)
    for mode, options in MODES.items():
        with engine_of(model, kv_cache_dtype=kv_cache_dtype, preemption="swap", **options) as engine:
            assert {shape.dtype for shape in engine.tier.cache.layout.layers} == {str(stored).removeprefix("torch.")}
            assert tokens(served(engine, prompts, GREEDY)) == expected, mode
            assert tokens(served(engine, prompts, GREEDY)) == expected, mode
            assert preempting(engine, prompts, GREEDY) == expected, mode


@pytest.mark.parametrize("name", ["llama-gqa", "Mamba2"])
def test_weights_change_between_requests(name, tmp_path):
    model = model_of(name)
    prompts = prompts_of((40, 9))
    before = generated(model, prompts)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path / "before")
    with llm_of(model) as llm:
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == before
        llm.update_weights((key, 1.1 * value) for key, value in values.items())
        changed = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert tokens(changed) == generated(model, prompts) != before
        assert [output.num_cached_tokens for output in changed] == [0, 0]
        llm.update_weights(tmp_path / "before")
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == before
        key = next(iter(values))
        for bad, error in [
            ({"nothing": torch.zeros(1)}, "weights has 'nothing', which the model does not have"),
            ({key: torch.zeros(3)}, f"weights has '{key}' of the shape .3., and the model of"),
            ({key: 3}, f"weights has 3 as '{key}', which must be a tensor"),
            (3, "weights must be tensors by name, pairs of both or a folder, not 3"),
            ([3], "weights must be tensors by name, pairs of both or a folder"),
        ]:
            with pytest.raises((TypeError, ValueError), match=error):
                llm.update_weights(bad)
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == before


@pytest.mark.parametrize("level", [1, 2])
def test_an_engine_that_sleeps_holds_no_memory(level, device):
    model = model_of("llama-gqa", device)
    prompts = prompts_of((40, 9))
    expected = generated(model, prompts)
    values = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    with llm_of(model) as llm:
        llm.engine.add("runs", prompts[0], GREEDY)
        with pytest.raises(RuntimeError, match="1 requests have not ended"):
            llm.sleep()
        llm.engine.abort("runs")
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        for _ in range(2):
            llm.sleep(level)
        assert llm.engine.tier.cache.stats().physical == 0
        held = sum(parameter.untyped_storage().nbytes() for parameter in parameters)
        assert (held > 0) == (level == 1 and device == "cpu")
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            llm.update_weights(values)
        llm.wake_up()
        if level == 2:
            some, *others = values
            llm.update_weights({some: values[some]})
            with pytest.raises(RuntimeError, match="weights were discarded: call update_weights"):
                llm.generate(prompts, GREEDY, use_tqdm=False)
            llm.update_weights({name: values[name] for name in others})
        assert list(model.parameters()) == parameters
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        with pytest.raises(ValueError, match="level must be"):
            llm.sleep(3)


@pytest.mark.parametrize("name", ["llama-gqa", "deepseek_v3"])
def test_prefixes_are_forgotten_while_requests_run(name):
    """Requests that run or are in host memory are computed again, with the weights that the model has now."""
    model = model_of(name)
    prompts = prompts_of((40, 12, 30))
    params = SamplingParams(temperature=0, max_tokens=30)
    with engine_of(model, preemption="swap") as engine:
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, params)
        for _ in range(6):
            engine.step()
        engine.scheduler.preempt_one()
        for _ in range(3):
            engine.step()
            if engine.scheduler.requests.swapped:
                break
        assert bool(engine.scheduler.requests.swapped) == (name == "llama-gqa")
        model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()})
        assert engine.reset_prefix_cache(reset_running_requests=True)
        assert not engine.scheduler.requests.swapped
        had = {request.id: list(request.trunk.output) for request in engine.scheduler.requests}
        assert any(had.values())
        done: dict[str, RequestOutput] = {}
        while engine.unfinished:
            done |= {output.request_id: output for output in engine.step()}
    for number, prompt in enumerate(prompts):
        kept = had[str(number)]
        goes_on = generated(model, [[*prompt, *kept]], 30 - len(kept))[0]
        assert done[str(number)].outputs[0].token_ids == [*kept, *goes_on]


def preempting(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """The tokens of requests, of which the last one loses its memory after every fifth iteration."""
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, params)
    done: dict[str, RequestOutput] = {}
    steps = 0
    while engine.unfinished:
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
        steps += 1
        if steps % 5 == 0:
            engine.scheduler.preempt_one()
    assert engine.scheduler.requests.counters.preemptions > 1
    return tokens([done[str(number)] for number in range(len(prompts))])


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "gemma3", "gpt_oss", "deepseek_v3", "Qwen3Next", "Mamba2"])
def test_preempted_and_computed_again(name, depth, device):
    model = model_of(name, device)
    prompts = prompts_of((40, 12, 30))
    expected = generated(model, prompts, 30)
    with engine_of(model, depth=depth) as engine:
        assert preempting(engine, prompts, SamplingParams(temperature=0, max_tokens=30)) == expected


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


def test_a_model_with_quantized_weights(device):
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of("llama-gqa", device)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with llm_of(model) as llm:
        assert llm.report()["tier"] == "flat"
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        llm.sleep()
        llm.wake_up()
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


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


class Greedy(Reference):
    """A kernel that loads rows around those that its queries see."""

    name = "greedy"
    head_rows, tail_rows = 20, 70

    def __init__(self):
        self.cache, self.calls, self.unmapped = None, 0, []

    def decode(self, q, k, v, spans, scores):
        if self.cache is not None:
            self.calls += 1
            self.unmapped += self.missing_rows(spans.tolist())
        return super().decode(q, k, v, spans, scores)

    def missing_rows(self, spans):
        found, planes = self.cache.map(), self.cache.layout.planes
        for slot, start, end in spans:
            for plane, run in zip(planes, found[slot]["runs"], strict=True):
                if run["head"] > max(0, start - self.head_rows) * plane.row_bytes:
                    yield "before", slot, start, end
                if run["tail"] < (end + self.tail_rows) * plane.row_bytes:
                    yield "behind", slot, start, end


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_rows_that_a_kernel_loads_are_mapped(name, monkeypatch):
    """E3, also of the rows that a kernel loads without using them."""
    greedy = Greedy()
    monkeypatch.setitem(KERNELS, "greedy", greedy)
    model = model_of(name)
    prompts = prompts_of(LENGTHS)
    with engine_of(model, attention="greedy") as engine:
        assert engine.tier.name == "flat", engine.tier.reason
        greedy.cache = engine.tier.cache
        assert tokens(served(engine, prompts, GREEDY)) == generated(model, prompts)
        assert (greedy.calls > 0, greedy.unmapped) == (True, [])


def test_a_kernel_that_is_wrong_serves_nobody(monkeypatch):
    """Flat calls are compared with the model's own when an engine is made."""

    class Wrong(Reference):
        name = "wrong"

        def decode(self, q, k, v, spans, scores):
            return super().decode(q, k, v, spans, replace(scores, scale=1.25 * scores.scale))

    monkeypatch.setitem(KERNELS, "wrong", Wrong())
    model = model_of("llama-gqa")
    prompts = prompts_of(LENGTHS)
    with engine_of(model, attention="wrong") as engine:
        assert engine.tier.name == "rows"
        assert "wrong in layer 0 differs from its definition" in engine.tier.reason
        assert tokens(served(engine, prompts, GREEDY)) == generated(model, prompts)


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
        engine.add("too long", prompts[0], SamplingParams(temperature=0, max_tokens=100))
        for _ in range(5):
            engine.step()
        engine.resize(small // (2 if device == "cpu" else 4))  # below what the request has already
        outputs = [output for _ in range(300) for output in engine.step()]
        assert outputs[-1].outputs[0].finish_reason == "error"
        assert "MiB" in outputs[-1].error


@pytest.mark.model
def test_the_real_model_in_every_mode(folder):
    model, tokenizer = demo.load(folder)
    model.generation_config.eos_token_id = None
    texts = ["The capital of France is Paris, and that of Italy is", "Once upon a time"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    expected = generated(model, prompts, 12)
    params = SamplingParams(temperature=0, max_tokens=12)
    sampled = SamplingParams(n=3, temperature=0.8, seed=3, max_tokens=8)
    options = {"kv_budget": 512 << 20, "granularity": 65536}
    samples = []
    for mode, others in {**MODES, "chunked": {"max_num_batched_tokens": 5}}.items():
        with engine_of(model, **options, **others) as engine:
            assert engine.tier.name == "flat", engine.tier.reason
            assert tokens(served(engine, prompts, params)) == expected, mode
            assert tokens(served(engine, prompts[:1], params)) == expected[:1], mode  # alone, behind a prefix
            [output] = served(engine, prompts[:1], sampled)
            samples.append([each.token_ids for each in output.outputs])
    assert samples == samples[:1] * len(MODES)
    for preemption in ("swap", "recompute"):
        with engine_of(model, preemption=preemption, **options) as engine:
            assert preempting(engine, prompts, params) == expected


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
        memory.open(request)
        assert (memory.used > 0) == (name in HYBRIDS)
        memory.close(request.trunk, 0)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "deepseek_v3", "Lfm2"])
def test_seeds_give_the_same_tokens_alone_and_among_others(name, device):
    """E2 of sampled tokens: they follow from the seed, the index and the position."""
    model = model_of(name, device)
    [prompt] = prompts_of((25,))
    params = SamplingParams(n=3, temperature=0.9, top_k=40, top_p=0.95, seed=11, max_tokens=NEW)
    others = [SamplingParams(temperature=1.2, seed=number, max_tokens=NEW, n=1 + number % 2) for number in range(30)]
    with engine_of(model, max_num_seqs=40) as engine:
        [alone] = served(engine, [prompt], params)
        assert len({tuple(output.token_ids) for output in alone.outputs}) == 3
        for number, other in enumerate(others):
            engine.add(f"other {number}", prompts_of((3 + number,))[0], other)
        for _ in range(3):
            engine.step()
        engine.add("again", prompt, params)
        again = None
        while engine.unfinished:
            for output in engine.step():
                if output.request_id == "again" and output.finished:
                    again = output
        assert again is not None
        assert [output.token_ids for output in again.outputs] == [output.token_ids for output in alone.outputs]


def test_samples_of_one_prompt_share_it():
    model = model_of("llama-gqa")
    [prompt] = prompts_of((100,))
    with engine_of(model) as engine:
        engine.add("four", prompt, SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=4))
        while not any(len(request.branches[0].output) > 1 for request in engine.scheduler.requests):
            engine.step()
        stats = engine.tier.cache.stats()
        assert stats.shared > 2 * 100 * engine.tier.cache.layout.bytes_per_token
        while engine.unfinished:
            engine.step()


def test_the_end_token_and_others_end_an_output():
    model = model_of("llama-gqa")
    [prompt] = prompts_of((12,))
    [expected] = generated(model, [prompt], 40)
    # Tokens that come for the first time behind some others.
    firsts = [place for place, token in enumerate(expected) if expected.index(token) == place and place > 3]
    end, other = expected[firsts[0]], expected[firsts[1]]
    model.generation_config.eos_token_id = [end, 1000]
    with engine_of(model) as engine:
        params = {"temperature": 0, "max_tokens": 40}
        [stopped] = served(engine, [prompt], SamplingParams(**params))
        assert stopped.outputs[0].token_ids == expected[: firsts[0] + 1]
        assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", None)
        [goes_on] = served(engine, [prompt], SamplingParams(**params, ignore_eos=True, stop_token_ids=[other]))
        assert goes_on.outputs[0].token_ids == expected[: firsts[1] + 1]
        assert goes_on.outputs[0].stop_reason == other
        [long] = served(engine, [prompt], SamplingParams(**params, ignore_eos=True))
        assert (long.outputs[0].token_ids, long.outputs[0].finish_reason) == (expected, "length")
        [late] = served(engine, [prompt], SamplingParams(**params, min_tokens=firsts[0] + 3))
        assert end not in late.outputs[0].token_ids[: firsts[0] + 3]


def test_logprobs_are_those_of_the_model(device):
    model = model_of("llama-gqa", device)
    [prompt] = prompts_of((12,))
    with engine_of(model) as engine:
        [output] = served(engine, [prompt], SamplingParams(temperature=0, max_tokens=5, logprobs=3))
    ids = [*prompt, *output.outputs[0].token_ids]
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([ids], device=device)).logits[0].double().log_softmax(-1)
    for place, (token, entries) in enumerate(zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)):
        row = expected[len(prompt) - 1 + place]
        assert set(entries) == set(row.topk(3).indices.tolist())
        assert entries[token].rank == 1
        for each, logprob in entries.items():
            assert logprob.logprob == pytest.approx(float(row[each]), abs=1e-3)
    pairs = zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    total = sum(entries[token].logprob for token, entries in pairs)
    assert output.outputs[0].cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "deepseek_v3", "Qwen3Next"])
@pytest.mark.parametrize("budget", [8, 512])
def test_logprobs_of_the_prompt_are_those_of_the_model(name, budget, device):
    model = model_of(name, device)
    prompts = prompts_of((21, 1, 2))
    with engine_of(model, max_num_batched_tokens=budget) as engine:
        served(engine, prompts, GREEDY)  # whose rows are not read: all of the prompt is computed
        outputs = served(engine, prompts, SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([prompt], device=device)).logits[0].double().log_softmax(-1)
        assert output.num_cached_tokens == 0
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for position, entries in enumerate(output.prompt_logprobs[1:], 1):
            row, token = expected[position - 1], prompt[position]
            assert set(entries) == {token, *row.topk(2).indices.tolist()}
            assert entries[token].rank == int((row >= row[token]).sum())
            for each, logprob in entries.items():
                assert logprob.logprob == pytest.approx(float(row[each]), abs=2e-3)


def test_what_one_request_does_wrong_ends_it_alone(device):
    """E5: a row whose logits are no numbers."""
    model = model_of("llama-gqa", device)
    prompts = prompts_of((20, 21, 22))
    expected = generated(model, prompts)
    with engine_of(model) as engine:
        run = engine.tier.runner.run

        def broken(rows, given, keep):
            logits = run(rows, given, keep)
            for number, row in enumerate(rows):
                if row.branch.request.id == "1" and row.start > 25:
                    logits[number] = torch.full_like(logits[number], float("nan"))
            return logits

        engine.tier.runner.run = broken
        outputs = served(engine, prompts, GREEDY)
        assert tokens(outputs)[::2] == expected[::2]
        assert outputs[1].outputs[0].finish_reason == "error"
        assert outputs[1].error == "the model's logits are no numbers"
        assert outputs[1].outputs[0].token_ids == expected[1][: len(outputs[1].outputs[0].token_ids)]


def test_bad_requests_are_refused_and_lose_nothing():
    model = model_of("llama-gqa")
    with engine_of(model, kv_budget=400_000) as engine:
        for prompt, params, error in [
            ([], SamplingParams(), "prompt must have at least one token"),
            ([101], SamplingParams(), "a token of prompt must be at most 100"),
            ([3], SamplingParams(logit_bias={101: 1.0}), "a token of logit_bias must be at most 100"),
            ([3] * 160, SamplingParams(max_tokens=30), "prompt has 160 tokens, and max_model_len is 160"),
            ([3], SamplingParams(stop="x"), "need a tokenizer"),
            ("text", SamplingParams(), "need a tokenizer"),
            ([3], SamplingParams(max_tokens=160, truncate_prompt_tokens=-1), "leaves nothing of the prompt"),
            ([3] * 100, SamplingParams(n=8, max_tokens=50, temperature=1), "MiB of K and V, and the budget is 0.4 MiB"),
        ]:
            with pytest.raises((TypeError, ValueError), match=error):
                engine.add("one", prompt, params)
        assert engine.unfinished == 0
        assert len(served(engine, [[3, 4]], GREEDY)) == 1


def test_the_beginning_of_a_prompt_that_is_too_long_is_left_out():
    model = model_of("llama-gqa")
    [prompt] = prompts_of((200,))
    with engine_of(model) as engine:
        for count, used in ((7, 7), (-1, 160 - 12)):
            params = SamplingParams(temperature=0, max_tokens=12, truncate_prompt_tokens=count)
            outputs = served(engine, [prompt], params)
            assert outputs[0].prompt_token_ids == prompt[-used:]
            assert tokens(outputs) == generated(model, [prompt[-used:]], 12)
        for count in (None, 180):
            with pytest.raises(ValueError, match=f"prompt has {count or 200} tokens, and max_model_len is 160"):
                engine.add("0", prompt, SamplingParams(truncate_prompt_tokens=count))


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


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "Qwen3Next"])
def test_an_iteration_that_fails_is_computed_again(name, depth, device):
    """E9: what the device refuses once ends nobody's request, and changes no token."""
    model = model_of(name, device)
    prompts = prompts_of((20, 31, 7))
    expected = generated(model, prompts)
    with engine_of(model, depth=depth) as engine:
        run, calls = engine.tier.runner.run, []

        def failing(rows, given, keep):
            calls.append(len(rows))
            logits = run(rows, given, keep)
            if len(calls) % 7 == 3:
                raise torch.OutOfMemoryError("no")
            return logits

        engine.tier.runner.run = failing
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, GREEDY)
        done: dict[str, RequestOutput] = {}
        failed = 0
        while engine.unfinished:
            try:
                done |= {output.request_id: output for output in engine.step()}
            except torch.OutOfMemoryError:
                failed += 1
        assert failed > 2
        assert tokens([done[str(number)] for number in range(3)]) == expected


def llm_of(model: Any, **options: Any) -> LLM:
    placed = CUDA if model.device.type == "cuda" else {}
    return LLM(model, **{**OPTIONS, **placed, **options})


def test_llm_answers_in_the_order_of_the_prompts():
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3, 31))
    expected = generated(model, prompts)
    with llm_of(model) as llm:
        assert llm.report() == {"tier": "flat", "reason": None, "max_model_len": 160}
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        assert tokens(llm.generate(prompts[0], GREEDY, use_tqdm=False)) == expected[:1]
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        each = [SamplingParams(temperature=0, max_tokens=number) for number in (1, 5, 9)]
        outputs = llm.generate(given, each, use_tqdm=False)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 5, 9]
        assert llm.generate([], GREEDY, use_tqdm=False) == []


def test_llm_is_usable_after_an_interrupt_or_a_bad_prompt():
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3, 31))
    with llm_of(model) as llm:
        expected = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
        run, calls = llm.engine.tier.runner.run, []

        def interrupted(rows, given, keep):
            calls.append(1)
            if len(calls) == 5:
                raise KeyboardInterrupt
            return run(rows, given, keep)

        llm.engine.tier.runner.run = interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.engine.unfinished == 0
        assert llm.engine.tier.cache.stats().running_slots == 0
        with pytest.raises(ValueError, match="a token of prompt must be at most 100"):
            llm.generate([*prompts, [500]], GREEDY, use_tqdm=False)
        assert llm.engine.unfinished == 0
        for bad, error in [(3, "prompts must be"), ([{"text": "x"}], "prompt must have prompt or prompt_token_ids")]:
            with pytest.raises((TypeError, ValueError), match=error):
                llm.generate(bad, GREEDY, use_tqdm=False)
        with pytest.raises(ValueError, match="sampling_params are 1, and there are 3 prompts"):
            llm.generate(prompts, [GREEDY], use_tqdm=False)
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"policy": "best"}, "policy must be"),
        ({"kv_budget": 2.0}, "budget"),
        ({"depth": 2}, "depth"),
        ({"preemption": "never"}, "preemption must be"),
        ({"swap_space": -1}, "swap_space"),
        ({"swap_space": "4"}, "swap_space"),
        ({"nothing": 1}, "nothing"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be"),
        ({"gpu_memory_utilization": 0.0, "kv_budget": None}, "gpu_memory_utilization must be in"),
        ({"gpu_memory_utilization": 1e-9, "kv_budget": None}, "gpu_memory_utilization is 1e-09, and 0.* is in use"),
        ({"gpu_memory_utilization": 0.5}, "kv_budget and gpu_memory_utilization say the same"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill must be True"),
        ({"tensor_parallel_size": 2}, "one GPU is all"),
        ({"quantization": "awq"}, "quantization is 'awq', and the model's is None"),
        ({"generation_config": "mine"}, "generation_config must be"),
    ],
)
def test_bad_options_are_named(options, error):
    with pytest.raises((TypeError, ValueError), match=error):
        llm_of(model_of("llama-gqa"), **options)


@pytest.mark.parametrize("name", ["/nowhere", "nobody/has-this-model", "../x y"])
def test_a_model_that_is_not_on_the_disk_is_named(name):
    with pytest.raises(FileNotFoundError, match=r"model .* is not on this machine"):
        LLM(name)
    with pytest.raises(FileNotFoundError, match=r"tokenizer .* is not on this machine"):
        LLM(model_of("llama-gqa"), name)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="has an encoder"):
        llm_of(build("t5", "eager", "cpu"))
    with pytest.raises(TypeError, match="model must be a folder, a name or a model"):
        LLM(3)


def test_an_interrupt_while_tokens_are_read(monkeypatch):
    """What was in flight is computed again, and the engine serves others."""
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3, 31))
    with llm_of(model) as llm:
        expected = tokens(llm.generate(prompts, GREEDY, use_tqdm=False))
        read, calls = Scheduler.read, []

        def interrupted(self, iteration, sampled):
            calls.append(1)
            if len(calls) % 5 == 4:
                raise KeyboardInterrupt
            return read(self, iteration, sampled)

        monkeypatch.setattr(Scheduler, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.engine.unfinished == 0
        for number, prompt in enumerate(prompts):
            llm.engine.add(str(number), prompt, GREEDY)
        done: dict[str, RequestOutput] = {}
        while llm.engine.unfinished:
            with contextlib.suppress(KeyboardInterrupt):
                done |= {output.request_id: output for output in llm.engine.step()}
        assert tokens([done[str(number)] for number in range(3)]) == expected


def test_a_text_that_cannot_be_decoded_ends_its_request_alone():
    """E5."""
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3))
    expected = generated(model, prompts)

    class Tokenizer:
        def decode(self, given, **options):
            if len(given) and given[-1] == expected[0][4]:
                raise ValueError("no text")
            return "".join(chr(97 + token % 26) for token in given)

    with engine_of(model, Tokenizer()) as engine:
        outputs = served(engine, prompts, GREEDY)
        assert outputs[0].outputs[0].finish_reason == "error"
        assert outputs[0].error == "ValueError: no text"
        assert outputs[1].outputs[0].token_ids == expected[1] or expected[0][4] in expected[1]


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


def test_rows_of_a_request_that_failed_are_nobodys_prefix():
    model = model_of("llama-gqa")
    [prompt] = prompts_of((30,))
    with engine_of(model) as engine:
        expected = served(engine, [prompt], GREEDY, namespace="other")
        run = engine.tier.runner.run
        engine.tier.runner.run = lambda rows, given, keep: [each * float("nan") for each in run(rows, given, keep)]
        [failed] = served(engine, [prompt], GREEDY)
        assert failed.outputs[0].finish_reason == "error"
        engine.tier.runner.run = run
        [after] = served(engine, [prompt], GREEDY)
        assert after.num_cached_tokens == 0
        assert tokens([after]) == tokens(expected)


def test_more_bad_requests():
    model = model_of("llama-gqa")
    with engine_of(model) as engine:
        engine.add("a", [3, 4], GREEDY)
        for options, error in [
            ({"request_id": "a"}, "there is a request 'a' already"),
            ({"request_id": 3}, "request_id must be a text"),
            ({"request_id": "b", "namespace": ["x"]}, "namespace must be hashable"),
        ]:
            with pytest.raises((TypeError, ValueError), match=error):
                engine.add(**{"prompt": [3], "params": GREEDY, **options})
        engine.abort("a")
        with pytest.raises(ValueError, match="there is a request 'a' already"):
            engine.add("a", [3, 4], GREEDY)
        assert [output.finished for output in engine.step()] == [True]
        engine.add("a", [3, 4], GREEDY)
        assert not engine.scheduler.fail("nobody", "x")
        assert engine.scheduler.fail("a", "broken")
        assert not engine.scheduler.abort("a")
        [output] = engine.step()
        assert (output.outputs[0].finish_reason, output.error) == ("error", "broken")
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.add("b", [3, 4], GREEDY)


def test_outputs_end_where_the_model_does():
    """vLLM's way: ``max_tokens`` beyond the longest sequence is cut."""
    model = model_of("llama-gqa")
    with engine_of(model, max_model_len=30) as engine:
        for max_tokens in (None, 500):
            [output] = served(engine, prompts_of((20,)), SamplingParams(temperature=0, max_tokens=max_tokens))
            assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (10, "length")
    with pytest.raises(ValueError, match="max_model_len is 300, and the model is made for 256 positions"):
        llm_of(model, max_model_len=300)
    with pytest.raises(ValueError, match=r"call model\.eval"):
        llm_of(model.train())
