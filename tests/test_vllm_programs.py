"""Programs that were written for vLLM's offline interface, which run with another import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import saved
from transformers import AutoModelForCausalLM

from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")

# What is imported from vLLM, and what is imported in its place.
IMPORTS = {
    "from vllm import": "from vattn import",
    "from vllm.sampling_params import RequestOutputKind": "from vattn import RequestOutputKind",
    "from vllm.engine.arg_utils import AsyncEngineArgs": "from vattn import EngineArgs as AsyncEngineArgs",
    "from vllm.v1.engine.async_llm import AsyncLLM": "from vattn import AsyncLLM",
}

BASIC = """
from vllm import LLM, SamplingParams

prompts = ["w5 w17 w33", "w80", "w9 w9 w4 w7", "w11 w12"]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95, max_tokens=8, seed=3)
llm = LLM(model=MODEL, gpu_memory_utilization=0.9, max_model_len=128, enforce_eager=True, dtype="float")
outputs = llm.generate(prompts, sampling_params)
results = []
for output in outputs:
    prompt = output.prompt
    generated_text = output.outputs[0].text
    results.append((prompt, generated_text))
    print(f"Prompt: {prompt!r}, Generated text: {generated_text!r}")
"""

CHAT = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, tensor_parallel_size=1, trust_remote_code=False, max_num_seqs=4)
sampling_params = llm.get_default_sampling_params()
sampling_params.temperature = 0.0
sampling_params.max_tokens = 6
conversation = [
    {"role": "system", "content": "w20 w21"},
    {"role": "user", "content": "w30"},
    {"role": "assistant", "content": "w40 w41"},
    {"role": "user", "content": "w50"},
]
outputs = llm.chat(conversation, sampling_params, use_tqdm=False)
several = llm.chat([conversation, conversation[:2]], sampling_params=sampling_params, use_tqdm=True)
own_template = llm.chat(conversation, sampling_params, chat_template="{{ messages[-1].content }}")
results = [output.outputs[0].text for output in [*outputs, *several, *own_template]]
lengths = [len(output.prompt_token_ids) for output in [*outputs, *several, *own_template]]
"""

PREFIXES = """
from vllm import LLM, SamplingParams

prefix = " ".join(f"w{3 + 7 * i % 90}" for i in range(60)) + " "
generating_prompts = [prefix + prompt for prompt in ["w5 w17 w33", "w80", "w9 w9 w4 w7"]]
sampling_params = SamplingParams(temperature=0.0, max_tokens=10)

regular_llm = LLM(model=MODEL, gpu_memory_utilization=0.8, enable_prefix_caching=False)
regular = [output.outputs[0].text for output in regular_llm.generate(generating_prompts, sampling_params)]
del regular_llm

prefix_cached_llm = LLM(model=MODEL, enable_prefix_caching=True, gpu_memory_utilization=0.8)
prefix_cached_llm.generate(generating_prompts[0], sampling_params)  # computes the prefix
outputs = prefix_cached_llm.generate(generating_prompts, sampling_params)
cached = [output.outputs[0].text for output in outputs]
tokens = [output.num_cached_tokens for output in outputs]
assert prefix_cached_llm.reset_prefix_cache()
[again] = prefix_cached_llm.generate(generating_prompts[:1], sampling_params)
tokens.append(again.num_cached_tokens)
"""

SAMPLES = """
from vllm import LLM, SamplingParams

llm = LLM(MODEL, max_num_seqs=16, kv_cache_dtype="auto", seed=0)
params = SamplingParams(
    n=3, temperature=1.0, top_k=50, min_p=0.01, seed=42, max_tokens=12, min_tokens=2, logprobs=2, prompt_logprobs=1,
    presence_penalty=0.1, frequency_penalty=0.1, repetition_penalty=1.05, stop=["w7"], stop_token_ids=[8],
    logit_bias={9: -100.0}, bad_words=["w11"], ignore_eos=True, include_stop_str_in_output=False,
)
[output] = llm.generate("w5 w17 w33", params)
texts = [completion.text for completion in output.outputs]
reasons = [(completion.finish_reason, completion.stop_reason) for completion in output.outputs]
ranks = [position[token].rank for position, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids)]
told = [None if entry is None else max(each.logprob for each in entry.values()) for entry in output.prompt_logprobs]
"""

MIXED = """
from vllm import LLM, SamplingParams

llm = LLM(model=MODEL, skip_tokenizer_init=True, max_num_batched_tokens=64, enable_chunked_prefill=True)
prompts = [{"prompt_token_ids": [5, 17, 33]}, {"prompt_token_ids": [80] * 70}, {"prompt_token_ids": [9]}]
params = [
    SamplingParams(temperature=0.0, max_tokens=4, detokenize=False),
    SamplingParams(temperature=0.0, max_tokens=9, detokenize=False),
    SamplingParams(temperature=0.0, max_tokens=1, detokenize=False, allowed_token_ids=[10, 20]),
]
outputs = llm.generate(prompts, params, priority=[2, 0, 1], use_tqdm=False)
results = [output.outputs[0].token_ids for output in outputs]
"""

STREAMS = """
import asyncio
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

results = {}

async def stream_response(engine, prompt, request_id):
    sampling_params = SamplingParams(
        max_tokens=10, temperature=0.0, seed=42, output_kind=RequestOutputKind.DELTA,
    )
    parts = []
    async for output in engine.generate(request_id=request_id, prompt=prompt, sampling_params=sampling_params):
        for completion in output.outputs:
            if new_text := completion.text:
                parts.append(new_text)
        if output.finished:
            break
    results[request_id] = parts

async def main():
    engine_args = AsyncEngineArgs(model=MODEL, enforce_eager=True)
    engine = AsyncLLM.from_engine_args(engine_args)
    try:
        prompts = ["w5 w17 w33", "w80", "w9 w9 w4 w7"]
        await asyncio.gather(*(stream_response(engine, p, f"stream-example-{i}") for i, p in enumerate(prompts)))
    finally:
        engine.shutdown()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return saved(tmp_path_factory.mktemp("model"))


def run(program: str, folder: Path) -> dict[str, Any]:
    """The names that a program has defined, after it has run with vattn's imports."""
    for theirs, ours in sorted(IMPORTS.items(), key=lambda each: -len(each[0])):
        program = program.replace(theirs, ours)
    assert "vllm" not in program
    names: dict[str, Any] = {"MODEL": str(folder)}
    exec(program, names)
    return names


def greedy(folder: Path, prompts: list[list[int]], new: int) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [
        model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=new, eos_token_id=None)[
            0, len(ids) :
        ].tolist()
        for ids in prompts
    ]


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def test_basic(folder):
    once, again = (run(BASIC, folder)["results"] for _ in range(2))
    assert once == again
    assert [prompt for prompt, _ in once] == ["w5 w17 w33", "w80", "w9 w9 w4 w7", "w11 w12"]
    assert [len(ids_of(text)) for _, text in once] == [8] * 4


def test_chat(folder):
    names = run(CHAT, folder)
    prompts = ["w1 w20 w21 w1 w30 w1 w40 w41 w1 w50 w2", "w1 w20 w21 w1 w30 w2", "w50"]
    first, short, own = greedy(folder, [ids_of(prompt) for prompt in prompts], 6)
    assert [ids_of(text) for text in names["results"]] == [first, first, short, own]
    assert names["lengths"] == [11, 11, 6, 1]


def test_prefixes(folder):
    names = run(PREFIXES, folder)
    assert names["cached"] == names["regular"]
    assert all(tokens >= 60 for tokens in names["tokens"][:-1])
    assert names["tokens"][-1] == 0


def test_samples(folder):
    names = run(SAMPLES, folder)
    assert names["texts"] == run(SAMPLES, folder)["texts"]
    assert len(set(names["texts"])) == 3
    for text, (reason, stop) in zip(names["texts"], names["reasons"], strict=True):
        tokens = ids_of(text)
        assert not {9, 11} & set(tokens)
        assert 7 not in tokens[2:]  # before that nothing stops
        assert (reason, stop) == ("length", None) if len(tokens) == 12 else reason == "stop" and stop in ("w7", 8)
    assert all(rank >= 1 for rank in names["ranks"])
    assert names["told"][0] is None
    assert all(told < 0 for told in names["told"][1:])


def test_mixed(folder):
    results = run(MIXED, folder)["results"]
    first, second = greedy(folder, [[5, 17, 33], [80] * 70], 9)
    assert results[:2] == [first[:4], second]
    assert results[2][0] in (10, 20)


def test_streams(folder):
    results = run(STREAMS, folder)["results"]
    expected = greedy(folder, [[5, 17, 33], [80], [9, 9, 4, 7]], 10)
    assert [ids_of("".join(results[f"stream-example-{i}"])) for i in range(3)] == expected
    assert all(len(parts) > 1 for parts in results.values())
