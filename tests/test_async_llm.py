"""Requests that come and go while others run, each streamed to its caller."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest
import torch
from serving import GREEDY, NEW, generated, model_of, prompts_of

from vattn.engine.async_llm import AsyncLLM
from vattn.engine.sampling_params import RequestOutputKind, SamplingParams
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


def engine_of(model: Any, **options: Any) -> AsyncLLM:
    given = {"max_model_len": 160, "max_num_seqs": 8, "granularity": 4096, "kv_budget": 64 << 20, **options}
    return AsyncLLM(model, **given)


async def last(stream: Any) -> Any:
    return [output async for output in stream][-1]


@pytest.fixture
def llm():
    with engine_of(model_of("llama-gqa")) as engine:
        yield engine
        assert not engine.errored
    assert engine.engine.unfinished == 0


def test_requests_at_once_are_answered_each_to_its_caller(llm):
    prompts = prompts_of((20, 3, 31, 8, 40))
    expected = generated(model_of("llama-gqa"), prompts)

    async def main():
        return await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in prompts))

    assert [output.outputs[0].token_ids for output in asyncio.run(main())] == expected


@pytest.mark.parametrize("kind", list(RequestOutputKind))
def test_what_a_stream_holds(kind, llm):
    [prompt] = prompts_of((20,))
    [expected] = generated(model_of("llama-gqa"), [prompt])
    params = SamplingParams(temperature=0, max_tokens=NEW, output_kind=kind, logprobs=1)

    async def main():
        return [output async for output in llm.generate(prompt, params)]

    outputs = asyncio.run(main())
    assert outputs[-1].finished
    assert not any(output.finished for output in outputs[:-1])
    tokens = [output.outputs[0].token_ids for output in outputs]
    if kind is RequestOutputKind.FINAL_ONLY:
        assert tokens == [expected]
    elif kind is RequestOutputKind.DELTA:
        assert [token for each in tokens for token in each] == expected
        assert all(len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids) for output in outputs)
    else:
        assert tokens[-1] == expected
        assert [len(each) for each in tokens] == sorted(len(each) for each in tokens)
        assert len(tokens) >= NEW - 1


def test_a_caller_that_stops_to_read_ends_its_request(llm):
    [prompt] = prompts_of((20,))

    async def main():
        stream = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=130))
        async for output in stream:
            if len(output.outputs[0].token_ids) > 2:
                break
        await stream.aclose()
        other = await last(llm.generate(prompt, GREEDY))
        for _ in range(500):
            if llm.engine.scheduler.requests.counters.aborted:
                break
            await asyncio.sleep(0.01)
        return other

    assert len(asyncio.run(main()).outputs[0].token_ids) == NEW
    assert llm.engine.scheduler.requests.counters.aborted == 1


def test_an_aborted_request_gets_its_last_output(llm):
    [prompt] = prompts_of((20,))

    async def main():
        output = None
        async for output in llm.generate(prompt, SamplingParams(temperature=0, max_tokens=130), "mine"):
            if len(output.outputs[0].token_ids) == 3:
                await llm.abort("mine")
        return output

    output = asyncio.run(main())
    assert output.finished
    assert output.outputs[0].finish_reason == "abort"
    assert 3 <= len(output.outputs[0].token_ids) < 130


def test_bad_requests_are_told_to_their_caller_alone(llm):
    prompts = prompts_of((20, 9))

    async def main():
        good = asyncio.create_task(last(llm.generate(prompts[0], GREEDY, "same")))
        with pytest.raises(ValueError, match="a token of prompt must be at most 100"):
            await last(llm.generate([1000], GREEDY))
        with pytest.raises(ValueError, match="need a tokenizer"):
            await last(llm.generate("text", GREEDY))
        return await good

    assert len(asyncio.run(main()).outputs[0].token_ids) == NEW


def test_iterations_that_fail_are_computed_again_or_end_what_runs(llm, caplog):
    """E9: once is no harm; again and again ends the requests with the error, and the engine goes on."""
    [prompt] = prompts_of((20,))
    [expected] = generated(model_of("llama-gqa"), [prompt])
    run, broken, calls = llm.engine.tier.runner.run, threading.Event(), []

    def failing(*given):
        calls.append(1)
        if broken.is_set() or len(calls) == 4:
            raise RuntimeError("the device is lost")
        return run(*given)

    llm.engine.tier.runner.run = failing

    async def main():
        once = await last(llm.generate(prompt, GREEDY))
        broken.set()
        always = await last(llm.generate(prompt, GREEDY))
        broken.clear()
        return once, always, await last(llm.generate(prompt, GREEDY))

    once, always, after = asyncio.run(main())
    assert once.outputs[0].token_ids == after.outputs[0].token_ids == expected
    assert always.outputs[0].finish_reason == "error"
    assert always.error == "RuntimeError: the device is lost"
    llm.check_health()


def test_a_request_that_is_refused_ends_no_other_of_its_id(llm):
    [prompt] = prompts_of((20,))
    [expected] = generated(model_of("llama-gqa"), [prompt])

    async def main():
        first = llm.generate(prompt, GREEDY, "same")
        begun = await anext(first)
        with pytest.raises(ValueError, match="there is a request 'same' already"):
            await last(llm.generate(prompt, GREEDY, "same"))
        return begun, await last(first)

    begun, output = asyncio.run(main())
    assert not begun.finished
    assert output.outputs[0].token_ids == expected


def test_weights_change_while_requests_run():
    """What runs is computed again with the new weights, and the tokens before stay."""
    model = model_of("llama-gqa")
    [prompt, other] = prompts_of((20, 9))
    [before] = generated(model, [prompt])
    weights = {name: 1.1 * value for name, value in model.state_dict().items()}
    llm = engine_of(model)

    async def main():
        stream = llm.generate(prompt, GREEDY)
        for _ in range(5):
            output = await anext(stream)
        assert not await llm.reset_prefix_cache()
        await llm.update_weights(weights)
        kept = len(output.outputs[0].token_ids)
        changed = (await last(stream)).outputs[0].token_ids
        with pytest.raises(ValueError, match="weights has 'nothing'"):
            await llm.update_weights({"nothing": torch.zeros(1)})
        assert await llm.reset_prefix_cache()
        await llm.sleep()
        assert await llm.is_sleeping()
        with pytest.raises(RuntimeError, match="the engine sleeps"):
            await last(llm.generate(prompt, GREEDY))
        await llm.wake_up()
        return kept, changed, (await last(llm.generate(other, GREEDY))).outputs[0].token_ids

    kept, changed, after = asyncio.run(main())
    assert changed[:kept] == before[:kept]
    same = next((at for at, (a, b) in enumerate(zip(changed, before, strict=True)) if a != b), None)
    assert same is not None
    assert same >= kept
    assert changed[same:] == generated(model, [[*prompt, *changed[:same]]], NEW - same)[0]
    assert after == generated(model, [other])[0]
    llm.shutdown()


def test_what_is_asked_of_an_engine_that_ends_is_refused():
    llm = engine_of(model_of("llama-gqa"))

    async def main():
        asked = [asyncio.ensure_future(llm.reset_prefix_cache()) for _ in range(50)]
        await asyncio.sleep(0)
        await asyncio.get_running_loop().run_in_executor(None, llm.shutdown)
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20)

    for answer in asyncio.run(main()):
        assert answer is True or "shut down" in str(answer)


def test_what_fails_again_and_again_ends_alone():
    """E5: a request whose iterations fail, and others that wait behind it."""
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 9, 12))
    expected = generated(model, prompts)
    llm = engine_of(model, max_num_seqs=1)
    run = llm.engine.tier.runner.run

    def failing(decodes, rows, *given):
        if any(row.branch.request.prompt == tuple(prompts[0]) for row in rows):
            raise RuntimeError("bad one")
        return run(decodes, rows, *given)

    llm.engine.tier.runner.run = failing

    async def main():
        return await asyncio.gather(*(last(llm.generate(prompt, GREEDY)) for prompt in prompts))

    bad, *others = asyncio.run(main())
    assert bad.error == "RuntimeError: bad one"
    assert [output.outputs[0].token_ids for output in others] == expected[1:]
    llm.shutdown()


class Panic(BaseException):
    """What tokenizers raise that are written in Rust."""


def test_a_text_that_no_tokenizer_takes_is_refused(llm, monkeypatch):
    def panics(text):
        raise Panic("no")

    monkeypatch.setattr(llm.engine.intake, "tokenizer", panics)

    async def main():
        with pytest.raises(ValueError, match="prompt cannot be encoded: no"):
            await asyncio.wait_for(last(llm.generate("text", GREEDY)), 20)
        for params in (None, {"n": 1}):
            with pytest.raises(TypeError, match="sampling_params must be SamplingParams, not"):
                await last(llm.generate([3], params))

    asyncio.run(main())


def test_a_command_that_ends_the_thread_answers_its_caller():
    llm = engine_of(model_of("llama-gqa"))

    def dies():
        raise SystemExit("gone")

    llm.engine.wake_up = dies

    async def main():
        with pytest.raises(SystemExit):
            await asyncio.wait_for(llm.wake_up(), 20)
        with pytest.raises(RuntimeError, match="the engine has stopped: gone"):
            await llm.sleep()

    with contextlib.suppress(SystemExit):  # asyncio lets it through
        asyncio.run(main())
    assert llm.errored
    llm.shutdown()


@pytest.mark.parametrize("wrapped", [False, True])
def test_parameters_are_those_of_the_call(llm, wrapped):
    params = SamplingParams(temperature=0, max_tokens=3)
    prompt = [5, 6, 7]

    async def main():
        stream = llm.generate({"prompt_token_ids": prompt} if wrapped else prompt, params)
        begun = asyncio.ensure_future(last(stream))
        await asyncio.sleep(0)
        params.max_tokens = 9
        prompt.append(101)
        return await begun

    output = asyncio.run(main())
    assert (len(output.outputs[0].token_ids), output.prompt_token_ids) == (3, [5, 6, 7])


def test_a_shutdown_that_is_interrupted_goes_on(monkeypatch):
    llm = engine_of(model_of("llama-gqa"))

    def interrupted(timeout=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(llm._thread, "join", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.shutdown()
    assert not llm.engine.tier.cache.closed
    for _ in range(2):
        llm.shutdown()
    assert llm.engine.tier.cache.closed


def test_an_engine_that_dies_says_so():
    engine = engine_of(model_of("llama-gqa"))

    def dies(*given):
        raise SystemExit("gone")

    engine.engine.tier.runner.run = dies

    async def main():
        with pytest.raises(RuntimeError, match="the engine has stopped: gone"):
            await last(engine.generate([3, 4], GREEDY))
        with pytest.raises(RuntimeError, match="the engine has stopped"):
            await last(engine.generate([3, 4], GREEDY))

    asyncio.run(main())
    assert engine.errored
    with pytest.raises(RuntimeError, match="the engine has stopped: gone"):
        engine.check_health()
    engine.shutdown()


def test_a_shutdown_ends_what_runs():
    engine = engine_of(model_of("llama-gqa"))

    async def main():
        stream = engine.generate(prompts_of((20,))[0], SamplingParams(temperature=0, max_tokens=130), "mine")
        await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, engine.shutdown)
        with pytest.raises(RuntimeError, match="the engine was shut down while 'mine' ran"):
            async for _ in stream:
                pass
        with pytest.raises(RuntimeError, match="the engine is shut down"):
            await anext(engine.generate([3], GREEDY))

    asyncio.run(main())
    engine.shutdown()
