"""The engine beside ``model.generate``: the same tokens alone, batched, chunked, behind a prefix, forked, in 8 bits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import build
from serving import (
    FLAT,
    GREEDY,
    HYBRIDS,
    LENGTHS,
    MODES,
    NEW,
    OPTIONS,
    ROWS,
    engine_of,
    generated,
    llm_of,
    model_of,
    preempting,
    prompts_of,
    require_likely,
    served,
    tokens,
)

from vattn.cli import demo
from vattn.engine.engine import Engine
from vattn.engine.options import KV_DTYPES, EngineOptions
from vattn.engine.outputs import RequestOutput
from vattn.engine.sampling_params import SamplingParams
from vattn.kernels import KERNELS, Reference, measure
from vattn.kernels.sdpa import Sdpa
from vattn.models import rope
from vattn.models.flat import Margins
from vattn.models.flat_verify import RoundingCache
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


@pytest.mark.thorough(4)
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
    with engine_of(model) as engine:
        assert engine.tier.name == "flat", engine.tier.reason
        found = tokens(served(engine, prompts, GREEDY))
    assert [len(each) for each in found] == [NEW] * len(prompts)
    require_likely(model, prompts, [each[:1] for each in found])


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


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("depth", [0, 1])
def test_behind_a_prompt_whose_request_still_runs(name, depth, device):
    model = model_of(name, device)
    [system] = prompts_of((40,))
    prompts = [[*system, *more] for more in prompts_of((9, 1, 20))]
    expected = generated(model, prompts)
    done: dict[str, RequestOutput] = {}
    with engine_of(model, depth=depth) as engine:
        engine.add("0", prompts[0], GREEDY)
        for _ in range(4):
            done |= {output.request_id: output for output in engine.step()}
        assert not done["0"].finished
        for number, prompt in enumerate(prompts[1:], 1):
            engine.add(str(number), prompt, GREEDY)
        while engine.unfinished:
            done |= {output.request_id: output for output in engine.step()}
    assert tokens([done[str(number)] for number in range(3)]) == expected
    if name == "llama-gqa":  # a sliding window may have given back the rows
        assert [done[str(number)].num_cached_tokens for number in range(3)] == [0, 40, 40]


@pytest.mark.parametrize(("name", "waits"), [("llama-gqa", True), ("mistral", False), ("gemma3", False)])
def test_requests_that_come_at_once_compute_their_prefix_once(name, waits, device):
    """Unless a sliding window gives back its rows, so that nobody can begin behind them."""
    model = model_of(name, device)
    [system] = prompts_of((90,))
    prompts = [[*system, *more] for more in prompts_of((9, 1, 20))]
    expected = generated(model, prompts)
    with engine_of(model) as engine:
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, GREEDY)
        done = {output.request_id: output for output in engine.step()}
        assert len(engine.scheduler.requests.running) == (1 if waits else 3)
        while engine.unfinished:
            done |= {output.request_id: output for output in engine.step()}
    assert tokens([done[str(number)] for number in range(3)]) == expected
    assert [done[str(number)].num_cached_tokens for number in range(3)] == ([0, 90, 90] if waits else [0, 0, 0])


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


@pytest.mark.thorough(1)
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
    told = []
    asked = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=1)
    with engine_of(model) as engine:
        assert preempting(engine, prompts, params) == expected
        for preempts in (False, True):  # behind the prompt, which a model that begins anew computes again
            engine.add("told", prompts[6], asked)
            while engine.unfinished:
                outputs = engine.step()
                if preempts and outputs and len(outputs[0].outputs[0].token_ids) == 8:
                    engine.scheduler.preempt_one()
            told.append([max(p.logprob for p in each.values()) for each in outputs[0].prompt_logprobs[1:]])
    assert told[0] == pytest.approx(told[1], abs=1e-5)
    with engine_of(model, max_model_len=24) as engine:  # which never comes that far
        assert engine.tier.name == "flat", engine.tier.reason
        assert tokens(served(engine, prompts[1:2], SamplingParams(temperature=0, max_tokens=9))) == [expected[1][:9]]


@pytest.mark.thorough(2)
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


@pytest.mark.thorough(1)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_with_quantized_weights(compiled, device):
    quantization = pytest.importorskip("torchao.quantization")
    model = model_of("llama-gqa", device)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with llm_of(model, compile=compiled) as llm:
        assert llm.report()["tier"] == "flat"
        assert bool(llm.report()["uncompiled"]) != compiled
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected
        llm.sleep()
        llm.wake_up()
        assert tokens(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


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


class GreedyForPrompts(Greedy):
    """A kernel that loads such rows of prompts, and decodes nothing."""

    name = "greedy for prompts"
    head_rows = 0

    def refuses(self, task):
        return "it decodes nothing" if task.queries == "one" else None

    def prefill(self, q, k, v, spans, counts, scores):
        if self.cache is not None and len(counts) > 1:
            self.calls += 1
            self.unmapped += self.missing_rows(spans.tolist())
        return super().prefill(q, k, v, spans, counts, scores)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_rows_behind_prompts_alone_are_mapped(mode, captured, monkeypatch, request):
    """E3; behind sequences that only decode no memory is taken."""
    if captured:
        request.getfixturevalue("batch_graphs_on_cpu")
    greedy = GreedyForPrompts()
    monkeypatch.setattr("vattn.kernels.registry.KERNELS", {"greedy for prompts": greedy, "sdpa": KERNELS["sdpa"]})
    model = model_of("llama-gqa")
    prompts = prompts_of((*LENGTHS, 20, 21, 22))
    expected = generated(model, prompts)
    with engine_of(model, **MODES[mode]) as engine:
        assert engine.tier.name == "flat", engine.tier.reason
        assert engine.tier.runner.kernels == ["greedy for prompts", "sdpa"]
        assert engine.tier.memory._margins == Margins(0, 0, 70)
        greedy.cache = engine.tier.cache
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert (greedy.calls > 0, greedy.unmapped) == (True, [])
        assert tokens(served(engine, [prompt[:-1] for prompt in prompts if len(prompt) > 1], GREEDY))
        assert greedy.unmapped == []
        greedy.cache = None
        engine.add("long", prompts_of((150,))[0], SamplingParams(temperature=0, max_tokens=9))
        while engine.unfinished:
            engine.step()


class GreedyForFew(Greedy):
    """A kernel that loads such rows behind sequences, and computes no prompts."""

    name = "greedy for few"
    head_rows = 0

    def refuses(self, task):
        return None if task.queries == "one" else "it computes no prompts"

    def missing_rows(self, spans):
        return super().missing_rows([span for span in spans if span[1] < span[2]])  # without idle rows of graphs


@pytest.fixture
def greedy_for_few(monkeypatch):
    """The kernel, which decodes few sequences, while SDPA computes prompts and decodes more."""
    greedy = GreedyForFew()
    monkeypatch.setattr("vattn.kernels.registry.KERNELS", {"sdpa": KERNELS["sdpa"], "greedy for few": greedy})
    monkeypatch.setattr(measure, "fastest", lambda task, *, name, few: greedy if few else KERNELS["sdpa"])
    return greedy


@pytest.mark.thorough(1)
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_rows_behind_few_sequences_alone_are_mapped(mode, captured, greedy_for_few, monkeypatch, request):
    """E3; with more sequences than a few another kernel decodes, and needs no memory behind them."""
    if captured:
        request.getfixturevalue("batch_graphs_on_cpu")
    greedy = greedy_for_few
    for module in ("vattn.models.flat", "vattn.engine.kv_memory"):
        monkeypatch.setattr(f"{module}.FEW", 4)
    monkeypatch.setattr("vattn.engine.tier._MOST_UNUSED", 1.0)
    model = model_of("llama-gqa")
    prompts = prompts_of((*LENGTHS, 20, 21, 22))
    expected = generated(model, prompts)
    params = [SamplingParams(temperature=0, max_tokens=1 + number % NEW) for number in range(len(prompts))]
    with engine_of(model, **MODES[mode]) as engine:
        assert engine.tier.name == "flat", engine.tier.reason
        assert engine.tier.runner.kernels == ["greedy for few", "sdpa"]
        assert engine.tier.memory._margins == Margins(0, 0, 0, 70)
        greedy.cache = engine.tier.cache
        assert tokens(served(engine, prompts, GREEDY)) == expected
        calls = greedy.calls
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            engine.add(str(number), prompt, each)
        done = {}
        while engine.unfinished:
            done |= {output.request_id: output.outputs[0].token_ids for output in engine.step()}
        assert all(done[str(number)] == each[: 1 + number % NEW] for number, each in enumerate(expected))
        assert greedy.calls > calls
        assert greedy.unmapped == []
        greedy.cache = None


@pytest.mark.usefixtures("greedy_for_few")
def test_few_sequences_have_no_kernel_of_their_own_where_memory_is_short():
    with engine_of(model_of("llama-gqa"), kv_budget=1 << 20) as engine:
        assert engine.tier.runner.kernels == ["sdpa"]
        assert engine.tier.memory._margins == Margins(0, 0, 0, 0)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_each_layer_has_a_plane_of_its_own(name, monkeypatch):
    """As on a GPU, where a granule holds too few positions of all layers."""
    monkeypatch.setattr("vattn.engine.tier._layers_per_plane", lambda *args: 1)
    model = model_of(name)
    prompts = prompts_of(LENGTHS)
    with engine_of(model) as engine:
        assert len(engine.tier.cache.layout.planes) == model.config.num_hidden_layers > 1
        assert tokens(served(engine, prompts, GREEDY)) == generated(model, prompts)


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
        layout = engine.tier.cache.layout
    if name != "llama-gqa":
        return
    budget = layout.mapped_bytes(159) + 2 * layout.growth_step_bytes  # enough without rows behind the longest sequence
    with engine_of(model, attention="greedy", kv_budget=budget) as engine:
        with pytest.raises(ValueError, match="MiB of K and V, and the budget is"):
            engine.add("long", prompts[0], SamplingParams(temperature=0, max_tokens=150))
        assert tokens(served(engine, prompts[:1], GREEDY)) == generated(model, prompts[:1])


def test_a_kernel_that_is_wrong_serves_nobody(monkeypatch):
    """Flat calls are compared with the model's own when an engine is made."""
    decode = Sdpa.decode

    def wrong(self, q, k, v, spans, scores):
        return decode(self, q, k, v, spans, replace(scores, scale=1.25 * scores.scale))

    monkeypatch.setattr(Sdpa, "decode", wrong)
    model = model_of("llama-gqa")
    prompts = prompts_of(LENGTHS)
    with engine_of(model) as engine:
        assert engine.tier.name == "rows"
        assert "sdpa in layer 0 differs from its definition" in engine.tier.reason
        assert tokens(served(engine, prompts, GREEDY)) == generated(model, prompts)
    for name, error in (("sdpa", "sdpa in layer 0 differs"), ("fa2", "fa2: it")):
        with pytest.raises(ValueError, match=f"attention must be 'auto': .*{error}"):
            Engine(model, None, EngineOptions(**OPTIONS, attention=name))


@pytest.mark.thorough
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
        with engine_of(model, preemption=preemption, max_num_batched_tokens=5, **options) as engine:
            assert preempting(engine, prompts, params) == expected


@pytest.mark.thorough(1)
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
