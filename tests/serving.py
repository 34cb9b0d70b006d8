"""Engines on small models, the prompts that they are given, and what ``generate`` makes of these."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import torch
from models import build, hybrid
from transformers import DynamicCache

from vattn.engine.engine import Engine
from vattn.engine.llm import LLM
from vattn.engine.options import EngineOptions
from vattn.engine.outputs import RequestOutput
from vattn.engine.sampling_params import SamplingParams
from vattn.models.versions import cache_keyword

FLAT = [
    *("llama-gqa", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi3", "gpt_oss"),
    *("qwen3_moe", "mixtral", "olmo2", "cohere2", "opt", "gemma3n", "gemma4"),
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


def require_likely(model: Any, prompts: list[list[int]], found: list[list[int]]) -> None:
    """Asserts that each token is the model's behind those before it, or as likely but for what halves round."""
    with torch.no_grad():
        for prompt, got in zip(prompts, found, strict=True):
            ids = torch.tensor([[*prompt, *got[:-1]]], device=model.device)
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 :].float()
            chosen = logits.gather(1, torch.tensor(got, device=model.device)[:, None])[:, 0]
            may = 0.1 * logits.norm(dim=1) / logits.shape[1] ** 0.5
            assert bool((chosen >= logits.amax(1) - may).all())


GREEDY = SamplingParams(temperature=0, max_tokens=NEW)

LENGTHS = (30, 7, 1, 45, 16, 33)

MODES: dict[str, dict[str, Any]] = {
    "batched": {"max_num_batched_tokens": 512},
    "chunked": {"max_num_batched_tokens": 20},
    "read at once": {"max_num_batched_tokens": 40, "depth": 0},
    "without prefixes": {"enable_prefix_caching": False},
}


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
    assert engine.scheduler.requests.counters.preemptions > 2
    return tokens([done[str(number)] for number in range(len(prompts))])


def llm_of(model: Any, **options: Any) -> LLM:
    placed = CUDA if model.device.type == "cuda" else {}
    return LLM(model, **{**OPTIONS, **placed, **options})
