"""Iterations of one position each are replays of CUDA graphs. On the host ``Again`` stands in for these."""

from __future__ import annotations

import functools

import pytest
import torch
from serving import (
    FLAT,
    GREEDY,
    LENGTHS,
    NEW,
    engine_of,
    generated,
    model_of,
    prompts_of,
    require_likely,
    served,
    tokens,
)

from vattn.engine.llm import LLM
from vattn.engine.sampling_params import SamplingParams
from vattn.graphs.batch_graphs import BatchGraphs
from vattn.graphs.capture import unowned
from vattn.graphs.runner import rows_of_graph
from vattn.kernels import KERNELS
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


@pytest.mark.thorough(3)
@pytest.mark.parametrize(("name", "attention"), [*((name, "auto") for name in FLAT), ("llama-gqa", "reference")])
def test_replays_give_the_same_tokens(name, attention, batch_graphs_on_cpu):
    model = model_of(name)
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with engine_of(model, max_num_batched_tokens=64, attention=attention) as engine:
        assert tokens(served(engine, prompts, GREEDY)) == expected
        runner = engine.tier.runner
        assert runner.uncaptured is None
        captured, replays = runner.graphs, batch_graphs_on_cpu.replays
        # Of 1, 2, 4 and 8 rows; where a kernel computes prompts and decodes at once, also of 32 and of
        # 64 tokens, each with and without decodes.
        mixes = engine.tier.runner.kernels == ["reference"]
        assert (5 if mixes else 1) <= captured <= (8 if mixes else 4)
        assert replays > captured
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert mixes or runner.graphs == captured  # behind prefixes, prompts have other sizes
        assert batch_graphs_on_cpu.replays > replays


def test_a_model_that_gives_all_logits(batch_graphs_on_cpu):
    """Of 31 tokens of 20 prompts the logits of 20 are wanted, and not the first ones."""
    model = model_of("llama-gqa")
    prompts = prompts_of((2,) * 11 + (1,) * 9)
    expected = generated(model, prompts, 4)
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, logits_to_keep=0, **options):
        return plain(*args, **options)

    model.forward = forward
    params = SamplingParams(temperature=0, max_tokens=4)
    with engine_of(model, max_num_seqs=32, max_num_batched_tokens=512, attention="reference") as engine:
        assert tokens(served(engine, prompts, params)) == expected
        assert engine.tier.runner.graphs > 1


def test_a_graph_serves_all_batches_up_to_its_rows(batch_graphs_on_cpu):
    model = model_of("llama-gqa")
    prompts = prompts_of((5, 6, 7, 8, 9, 10, 11))
    params = [SamplingParams(temperature=0, max_tokens=4 + 3 * number) for number in range(len(prompts))]
    expected = generated(model, prompts, 4 + 3 * 6)
    with engine_of(model, max_num_batched_tokens=512) as engine:
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            engine.add(str(number), prompt, each)
        done = {}
        while engine.unfinished:
            done |= {output.request_id: output for output in engine.step()}
        for number, each in enumerate(expected):
            assert done[str(number)].outputs[0].token_ids == each[: 4 + 3 * number]
        assert engine.tier.runner.graphs == 4  # of 8, 4, 2 and 1 rows


@pytest.mark.parametrize("how", ["fails", "deviates", "finds no memory"])
def test_a_capture_that_is_of_no_use_changes_no_token(how, monkeypatch, batch_graphs_on_cpu, caplog):
    model = model_of("llama-gqa")
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    decoded, calls = BatchGraphs._run, []

    def run(self, graph):
        calls.append(graph.runner.rows)
        if how == "fails":
            raise RuntimeError("operation not permitted when stream is capturing")
        if how == "finds no memory" and graph.runner.rows == 2:
            raise torch.OutOfMemoryError("no")
        decoded(self, graph)
        graph.outputs[0].mul_(1.1 if how == "deviates" else 1.0)

    monkeypatch.setattr(BatchGraphs, "_run", run)
    with engine_of(model) as engine:
        assert tokens(served(engine, prompts, GREEDY)) == expected
        uncaptured, graphs = engine.tier.runner.uncaptured, engine.tier.runner.graphs
        served(engine, prompts[:1], GREEDY)
        assert engine.tier.runner.graphs == (1 if how == "finds no memory" else 0)  # of one row
    warnings = [record.message for record in caplog.records if "not captured" in record.message]
    if how == "fails":
        assert "not permitted" in uncaptured
        assert (len(calls), len(warnings)) == (1, 1)
    elif how == "deviates":
        assert (uncaptured, graphs) == (None, 0)
        assert "iterations of 2 rows are not captured: a replay gives something else" in warnings[0]
        assert calls.count(2) == 2  # the capture, and its replay
    else:
        assert (uncaptured, graphs, warnings) == (None, 0, [])
        assert calls.count(2) == 3


def test_an_engine_may_be_called_in_inference_mode(batch_graphs_on_cpu):
    model = model_of("llama-gqa")
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    params = SamplingParams(temperature=0, max_tokens=18, frequency_penalty=1e-9)
    with torch.inference_mode(), engine_of(model) as engine:
        assert tokens(served(engine, prompts, GREEDY)) == expected
        with torch.inference_mode(False):
            assert tokens(served(engine, prompts, params)) == expected
        assert tokens(served(engine, prompts, params)) == expected
        assert engine.tier.runner.graphs > 0


def test_weights_that_move_are_captured_anew(batch_graphs_on_cpu):
    model = model_of("llama-gqa")
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    with engine_of(model) as engine:
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert engine.tier.runner.graphs > 0
        engine.sleep()
        assert engine.tier.runner.graphs == 0
        engine.wake_up()
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert engine.tier.runner.graphs > 0


@pytest.mark.parametrize(
    "more",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"logit_bias": {5: 1e-9}},
        {"frequency_penalty": 0.5},
        {"logprobs": 2},
        {"min_p": 0.1},
    ],
)
def test_graphs_draw_what_is_drawn_without_them(more, batch_graphs_on_cpu):
    """Where an output asks for more than plain sampling, its token is chosen anew from the logits of the graph."""
    model, prompts = model_of("llama-gqa"), prompts_of((12, 20))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=18, **more)
    found = []
    for eager in (False, True):
        with engine_of(model, enforce_eager=eager) as engine:
            found.append(tokens(served(engine, prompts, params)))
            assert (engine.tier.runner.graphs > 0) != eager
    assert found[0] == found[1]


def test_enforce_eager_captures_nothing(batch_graphs_on_cpu):
    with LLM(model_of("llama-gqa"), max_model_len=160, kv_budget=64 << 20, granularity=4096, enforce_eager=True) as llm:
        llm.generate(prompts_of((12, 20)), GREEDY, use_tqdm=False)
        report = llm.report()
        assert (report["graphs"], report["uncaptured"]) == (0, "enforce_eager is set")
    assert batch_graphs_on_cpu.replays == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_outputs_of_graphs_are_not_owned(dtype, device):
    tensor = torch.arange(24, device=device).to(dtype).view(4, 6)
    same = unowned(tensor)
    assert (same.data_ptr(), same.dtype, same.shape, same.device) == (
        tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.device,
    )  # fmt: skip
    tensor[1, 2] = 77
    assert torch.equal(same, tensor)


def test_rows_of_graphs():
    assert [rows_of_graph(batch) for batch in (1, 2, 3, 5, 8, 9, 16, 17, 255)] == [1, 2, 4, 8, 8, 16, 16, 24, 256]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_iterations_are_captured_on_a_gpu(name, dtype):
    """In float32 no kernel can be captured, and iterations stay eager."""
    model = model_of(name, "cuda", dtype)
    prompts = prompts_of(LENGTHS)
    with engine_of(model, max_num_batched_tokens=512) as engine:
        found = tokens(served(engine, prompts, GREEDY))
        if dtype == torch.float32:
            assert found == generated(model, prompts)
        else:  # experts are added up in any order
            assert [len(each) for each in found] == [NEW] * len(prompts)
            require_likely(model, prompts, found)
        assert (engine.tier.runner.graphs > 0) == (engine.tier.runner.uncaptured is None)
        if dtype == torch.bfloat16 and name in ("llama-gqa", "mistral"):
            assert engine.tier.runner.graphs > 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2"])
@pytest.mark.parametrize("hidden", [("fa3",), ("fa3", "flashinfer"), ("fa3", "flashinfer", "fa2")])
def test_iterations_without_some_kernels(name, hidden, monkeypatch):
    """As on other devices than Hopper's, or where a package is not installed."""
    for kernel in hidden:
        monkeypatch.setattr(type(KERNELS[kernel]), "missing", lambda self: "it is hidden")
    model = model_of(name, "cuda", torch.bfloat16)
    prompts = prompts_of(LENGTHS)
    with engine_of(model, max_num_batched_tokens=512) as engine:
        assert engine.tier.name == "flat", engine.tier.reason
        found = tokens(served(engine, prompts, GREEDY))
        assert [len(each) for each in found] == [NEW] * len(prompts)
        require_likely(model, prompts, found)
        assert not set(engine.tier.runner.kernels) & set(hidden)
        assert (engine.tier.runner.graphs > 0) == (engine.tier.runner.uncaptured is None)
