"""When torch finds no memory for an iteration: less is computed at once, and one request is ended at last."""

from __future__ import annotations

import pytest
import torch
from serving import GREEDY, LENGTHS, engine_of, generated, model_of, prompts_of, served, tokens

from vattn.engine.request import FinishReason
from vattn.engine.runner import FlatRunner
from vattn.engine.sampling_params import SamplingParams
from vattn.models.flat import Margins
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


class Device:
    """A device on which an iteration finds memory for a limited number of positions and of outputs."""

    def __init__(self, monkeypatch, positions: int, outputs: int = 1000, failures: int = 1000) -> None:
        self.failed, self.largest, self.left = 0, 0, failures
        plain = FlatRunner.run

        def run(runner, decodes, rows, tokens, keep):
            outputs_here = (0 if decodes is None else len(decodes.branches)) + len(rows)
            count = outputs_here + sum(row.count - 1 for row in rows)
            if (count > positions or outputs_here > outputs) and self.left:
                self.failed += 1
                self.left -= 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nmore")
            self.largest = max(self.largest, count)
            return plain(runner, decodes, rows, tokens, keep)

        monkeypatch.setattr(FlatRunner, "run", run)


def all_at_rest(engine) -> None:
    counters = engine.scheduler.requests.counters
    assert counters.submitted == counters.finished + counters.failed + counters.aborted
    assert engine.tier.cache.stats().running_slots == 0


@pytest.mark.thorough(2)
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("positions", "outputs"), [(40, 1000), (16, 1000), (1000, 3), (20, 2)])
def test_fewer_positions_are_computed_at_once(positions, outputs, depth, monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with engine_of(model, max_num_batched_tokens=128, depth=depth) as engine:
        device = Device(monkeypatch, positions, outputs)
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert device.failed > 1
        assert device.largest <= positions
        all_at_rest(engine)


def test_a_failure_that_passes_changes_nothing(monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    trims = []
    with engine_of(model, max_num_batched_tokens=128) as engine:
        monkeypatch.setattr(engine.tier.cache, "trim", lambda: trims.append(1))
        device = Device(monkeypatch, 30, failures=1)
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert (device.failed, len(trims)) == (1, 1)
        assert device.largest > 30


def test_a_request_without_memory_ends_alone(monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of((40, 9, 12))
    expected = generated(model, prompts)
    with engine_of(model, max_num_batched_tokens=64, max_num_seqs=4) as engine:
        plain = FlatRunner.run

        def run(runner, decodes, rows, tokens, keep):
            branches = [*(decodes.branches if decodes else ()), *(row.branch for row in rows)]
            if any(branch.request.id == "0" for branch in branches):
                raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
            return plain(runner, decodes, rows, tokens, keep)

        monkeypatch.setattr(FlatRunner, "run", run)
        first, *others = served(engine, prompts, GREEDY)
        assert first.outputs[0].finish_reason == FinishReason.ERROR
        assert "the device has no memory to compute it: CUDA out of memory." in first.error
        assert tokens(others) == expected[1:]
        all_at_rest(engine)


def test_outputs_that_are_more_than_run_at_once_still_begin(monkeypatch):
    model = model_of("llama-gqa")
    [prompt] = prompts_of((12,))
    params = SamplingParams(n=4, temperature=1.0, seed=3, max_tokens=6)
    with engine_of(model) as engine:
        [expected] = served(engine, [prompt], params)
    with engine_of(model, max_num_batched_tokens=16) as engine:
        device = Device(monkeypatch, 1000, outputs=0, failures=3)  # which leaves two outputs at once
        [got] = served(engine, [prompt], params)
        assert device.failed == 3
        assert [each.token_ids for each in got.outputs] == [each.token_ids for each in expected.outputs]


def test_more_is_computed_again_after_a_while():
    model = model_of("llama-gqa")
    with engine_of(model, max_num_batched_tokens=128) as engine:
        limits = engine.scheduler.limits
        while limits.narrow():
            pass
        assert (limits.seqs, limits.tokens) == (1, 16)
        served(engine, prompts_of((3,)), SamplingParams(max_tokens=155, ignore_eos=True))
        assert (limits.seqs, limits.tokens) == (1, 16)
        served(engine, prompts_of((3,)), SamplingParams(max_tokens=155, ignore_eos=True))  # 256 iterations
        assert (limits.seqs, limits.tokens) == (2, 16)
        for _ in range(5):
            limits.widen()
        assert (limits.seqs, limits.tokens) == (8, 128)
        limits.widen()
        assert (limits.seqs, limits.tokens) == (8, 128)


@pytest.mark.parametrize("options", [{}, {"kv_budget": 0.01}, {"kv_budget": 40 * 4096, "max_num_batched_tokens": 600}])
def test_the_largest_iteration_is_rehearsed(options, monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 9))
    expected = generated(model, prompts)
    counted = []
    with engine_of(model, **options) as engine:
        plain = FlatRunner._computed
        monkeypatch.setattr(
            FlatRunner, "_computed", lambda self, ids, *args: counted.append(len(ids)) or plain(self, ids, *args)
        )
        before = engine.tier.cache.stats().budget
        monkeypatch.setattr("vattn._core.host_memory", lambda: (10 << 30, 20 << 30))
        engine._launcher.rehearse(engine._options.max_num_batched_tokens, 8)
        engine.tier.fit(engine._options)
        stats = engine.tier.cache.stats()
        assert stats.running_slots == 0
        if options.get("kv_budget") == 0.01:
            assert stats.budget == int(0.01 * (10 << 30))
        else:
            assert stats.budget == before
        if "max_num_batched_tokens" in options:
            assert 16 <= counted[0] < 600
        else:
            assert counted == [2048]
        assert tokens(served(engine, prompts, GREEDY)) == expected


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("late", [False, True])
def test_failures_after_iterations_that_succeed(late, depth, monkeypatch):
    """A later chunk of a prompt, or more outputs than come at first, find no memory each time they are computed."""
    model = model_of("llama-gqa")
    prompts = prompts_of((120,) if late else (100,) * 6)
    params = SamplingParams(temperature=0, max_tokens=12)
    expected = generated(model, prompts, 12)
    plain, failed = FlatRunner.run, []

    def run(runner, decodes, rows, tokens, keep):
        outputs = (0 if decodes is None else len(decodes.branches)) + len(rows)
        chunk = any(row.start >= 60 for row in rows) and sum(row.count for row in rows) > 16
        if chunk if late else outputs > 3:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(runner, decodes, rows, tokens, keep)

    monkeypatch.setattr(FlatRunner, "run", run)
    with engine_of(model, max_num_batched_tokens=32 if late else 110, depth=depth) as engine:
        assert tokens(served(engine, prompts, params)) == expected
        assert 1 < len(failed) < 10
        all_at_rest(engine)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_failure_changes_no_token_of_samples(depth, monkeypatch):
    """The tokens that samples have are on the host only when they are computed again."""
    model = model_of("llama-gqa")
    [prompt] = prompts_of((12,))
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=8)
    plain, calls, failing = FlatRunner.run, [], [0]

    def run(*given):
        calls.append(1)
        if len(calls) == failing[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*given)

    monkeypatch.setattr(FlatRunner, "run", run)
    found = []
    for failing[0] in range(7):
        with engine_of(model, depth=depth) as engine:
            served(engine, prompts_of((40,)), SamplingParams(temperature=0, max_tokens=20))  # leaves other tokens
            calls.clear()  # the first time none fails
            [output] = served(engine, [prompt], params)
            found.append([each.token_ids for each in output.outputs])
    assert all(each == found[0] for each in found)


@pytest.mark.parametrize("budget", [8, 12])
def test_samples_that_are_computed_again_in_chunks(budget):
    model = model_of("llama-gqa")
    [prompt] = prompts_of((12,))
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=10)
    found = []
    for again in (None, 4, 7, 9, 11, 13):
        with engine_of(model, max_num_batched_tokens=budget) as engine:
            served(engine, prompts_of((40,)), SamplingParams(temperature=0, max_tokens=20))
            engine.add("samples", prompt, params)
            steps, done = 0, {}
            while engine.unfinished:
                done |= {output.request_id: output for output in engine.step()}
                steps += 1
                if steps == again:
                    engine.recover()
            found.append([each.token_ids for each in done["samples"].outputs])
    assert all(each == found[0] for each in found)


def test_a_request_that_was_admitted_has_memory_when_it_is_computed_again(monkeypatch):
    """Rows behind prompts are there, too, where what was sampled is computed as a prompt is."""
    monkeypatch.setattr("vattn.engine.tier._widest_margins", lambda *args: Margins(0, 70, 70))
    monkeypatch.setattr("vattn.engine.tier._expected_margins", lambda *args: Margins(0, 0, 70))
    model = model_of("llama-gqa")
    prompts = prompts_of((20,))
    params = SamplingParams(temperature=0, max_tokens=130, ignore_eos=True)
    pages = 45
    while True:
        with engine_of(model, kv_budget=pages * 4096) as engine:
            try:
                engine.add("0", prompts[0], params)
            except ValueError:
                pages += 1
                continue
            for _ in range(110):
                engine.step()
            engine.recover()
            done = {}
            while engine.unfinished:
                done |= {output.request_id: output for output in engine.step()}
            assert done["0"].outputs[0].finish_reason == FinishReason.LENGTH
            break


def test_no_position_beyond_the_longest_is_rehearsed(monkeypatch):
    """Models with a table of positions have no others."""
    monkeypatch.setattr("vattn.engine.tier._widest_margins", lambda *args: Margins(0, 70, 70))
    monkeypatch.setattr("vattn.engine.tier._expected_margins", lambda *args: Margins(0, 70, 70))
    model = model_of("gpt2")
    with engine_of(model, max_model_len=None) as engine:
        assert engine.max_model_len == model.config.max_position_embeddings
        engine._launcher.rehearse(2048, 8)


@pytest.mark.gpu
def test_memory_that_others_take_is_found_missing_and_given_back():
    """E9: a device whose memory others hold while requests run."""
    model = model_of("llama-gqa", "cuda", torch.bfloat16)
    prompts = prompts_of(LENGTHS)
    with engine_of(model, max_num_batched_tokens=512) as engine:
        expected = tokens(served(engine, prompts, GREEDY))
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        held = torch.empty(free - (8 << 20), dtype=torch.uint8, device="cuda")
        found = served(engine, prompts, GREEDY)
        del held
        torch.cuda.empty_cache()
        for output, right in zip(found, expected, strict=True):
            assert output.outputs[0].token_ids == right or output.outputs[0].finish_reason == FinishReason.ERROR
        assert tokens(served(engine, prompts, GREEDY)) == expected
        all_at_rest(engine)
