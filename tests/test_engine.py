"""What requests may ask of an engine, and what goes wrong with them or with it."""

from __future__ import annotations

import contextlib

import pytest
from serving import (
    GREEDY,
    engine_of,
    generated,
    llm_of,
    model_of,
    prompts_of,
    served,
    tokens,
)

from vattn.engine.outputs import RequestOutput
from vattn.engine.request import Status
from vattn.engine.runner import Computed
from vattn.engine.sampling_params import SamplingParams
from vattn.engine.scheduler import Scheduler
from vattn.engine.tracked import Tracked
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


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


def test_what_one_request_does_wrong_ends_it_alone(device):
    """E5: a row whose logits are no numbers."""
    model = model_of("llama-gqa", device)
    prompts = prompts_of((20, 21, 22))
    expected = generated(model, prompts)
    with engine_of(model) as engine:
        run = engine.tier.runner.run

        def broken(decodes, rows, *given):
            computed = run(decodes, rows, *given)
            assert computed.tokens is None  # no graph, which would have chosen tokens already
            for number, branch in enumerate([] if decodes is None else decodes.branches):
                if branch.request.id == "1" and branch.launched > 26:
                    computed.logits[number] = float("nan")
            return computed

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


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", ["llama-gqa", "Qwen3Next"])
def test_an_iteration_that_fails_is_computed_again(name, depth, device):
    """E9: what the device refuses once ends nobody's request, and changes no token."""
    model = model_of(name, device)
    prompts = prompts_of((20, 31, 7))
    expected = generated(model, prompts)
    with engine_of(model, depth=depth) as engine:
        run, calls = engine.tier.runner.run, []

        def failing(*given):
            calls.append(1)
            logits = run(*given)
            if len(calls) % 7 == 3:
                raise RuntimeError("no")
            return logits

        engine.tier.runner.run = failing
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, GREEDY)
        done: dict[str, RequestOutput] = {}
        failed = 0
        while engine.unfinished:
            try:
                done |= {output.request_id: output for output in engine.step()}
            except RuntimeError:
                failed += 1
        assert failed > 2
        assert tokens([done[str(number)] for number in range(3)]) == expected


@pytest.mark.parametrize("depth", [0, 1])
def test_rows_that_were_not_computed_are_nobodys_prefix(depth, device):
    """E2 and E9: an iteration that fails before it computes anything, in the middle of a prompt or behind it."""
    model = model_of("llama-gqa", device)
    [prompt] = prompts_of((100,))
    [expected] = generated(model, [prompt])
    for fails in range(1, 9):
        with engine_of(model, depth=depth, max_num_batched_tokens=30) as engine:
            run, calls = engine.tier.runner.run, []

            def failing(*given, run=run, calls=calls, fails=fails):
                calls.append(1)
                if len(calls) == fails:
                    raise RuntimeError("no")
                return run(*given)

            engine.tier.runner.run = failing
            engine.add("0", prompt, GREEDY)
            done: list[RequestOutput] = []
            while engine.unfinished:
                with contextlib.suppress(RuntimeError):
                    done += engine.step(final_only=True)
            assert tokens(done) == [expected]
            engine.tier.runner.run = run
            assert tokens(served(engine, [prompt], GREEDY)) == [expected]


def test_a_request_that_was_to_lose_its_memory_when_an_iteration_failed():
    """It neither waits for ever nor is swapped without its rows (E9)."""
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 31))
    expected = generated(model, prompts)
    with engine_of(model, depth=1, preemption="swap") as engine:
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, GREEDY)
        for _ in range(5):
            engine.step()
        run = engine.tier.runner.run
        assert engine.scheduler.preempt_one()
        assert engine.scheduler.requests.leaving

        def failing(*given):
            raise RuntimeError("no")

        engine.tier.runner.run = failing
        with pytest.raises(RuntimeError, match="no"):
            engine.step()
        engine.tier.runner.run = run
        done = {}
        for _ in range(200):
            done |= {output.request_id: output for output in engine.step(final_only=True)}
        assert tokens([done[str(number)] for number in range(2)]) == expected


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


def test_rows_of_a_request_that_failed_are_nobodys_prefix():
    model = model_of("llama-gqa")
    [prompt] = prompts_of((30,))
    with engine_of(model) as engine:
        expected = served(engine, [prompt], GREEDY, namespace="other")
        run = engine.tier.runner.run
        engine.tier.runner.run = lambda *given: Computed(run(*given).logits * float("nan"))
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


def test_an_interrupt_while_outputs_are_made_loses_none(monkeypatch):
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 9))
    expected = generated(model, prompts)
    with engine_of(model) as engine:
        for number, prompt in enumerate(prompts):
            engine.add(str(number), prompt, GREEDY)
        output, calls = Tracked.output, []

        def interrupted(self):
            calls.append(self.request.status)
            if calls.count(Status.FINISHED) == 2:
                raise KeyboardInterrupt
            return output(self)

        monkeypatch.setattr(Tracked, "output", interrupted)
        done: dict[str, RequestOutput] = {}
        interrupts = 0
        while engine.unfinished:
            try:
                done |= {each.request_id: each for each in engine.step()}
            except KeyboardInterrupt:
                interrupts += 1
        assert interrupts == 1
        assert tokens([done["0"], done["1"]]) == expected


def test_an_interrupt_while_a_request_is_added(monkeypatch):
    model = model_of("llama-gqa")
    with engine_of(model) as engine:
        add = Scheduler.add

        def interrupted(self, request):
            if request.id == "behind":
                add(self, request)
            raise KeyboardInterrupt

        with monkeypatch.context() as patched:
            patched.setattr(Scheduler, "add", interrupted)
            for name in ("before", "behind"):
                with pytest.raises(KeyboardInterrupt):
                    engine.add(name, [3, 4], GREEDY)
        assert engine.unfinished == 1
        engine.abort("behind")
        assert [output.request_id for output in engine.step()] == ["behind"]
        assert engine.unfinished == 0


def test_a_text_whose_end_cannot_be_decoded():
    """E5."""
    model = model_of("llama-gqa")

    class Tokenizer:
        def decode(self, given, **options):
            return "".join(chr(97 + token % 26) for token in given)

    with engine_of(model, Tokenizer()) as engine:
        engine.add("bad", [3, 4], SamplingParams(temperature=0, max_tokens=3))
        engine.add("good", [3, 4], SamplingParams(temperature=0, max_tokens=3))

        def finish():
            raise ValueError("no end")

        engine._tracked["bad"]._texts[0].finish = finish
        done: dict[str, RequestOutput] = {}
        while engine.unfinished:
            done |= {output.request_id: output for output in engine.step()}
        assert (done["bad"].error, done["bad"].outputs[0].finish_reason) == ("ValueError: no end", "error")
        assert len(done["good"].outputs[0].text) == 3
