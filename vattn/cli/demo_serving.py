"""The second part of ``vattn demo``: eight questions, answered at once by ``LLM`` and one by one."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vattn.engine.llm import LLM
from vattn.engine.sampling_params import SamplingParams

QUESTIONS = (
    "What is the capital of France?",
    "Why do leaves fall in autumn?",
    "Name three planets.",
    "What is a prime number?",
    "How does a bicycle stay upright?",
    "Write a sentence about the sea.",
    "What do bees do in winter?",
    "How many days has a leap year?",
)


@dataclass(frozen=True)
class ServingResult:
    """The measurements of the demo's second part; sizes in bytes.

    Attributes:
        answers: for each of ``QUESTIONS``.
        tokens_per_second: of all answers, at once.
        one_by_one_tokens_per_second: of all answers, one by one.
        same_tokens: whether both gave the same tokens.
        max_len: positions of the longest sequence.
        tokens: of all prompts and answers.
        used: the rows of K and V of these tokens; 0, as the next two, where K and V are not in a ``KVCache``.
        mapped: physical memory of K and V at its peak, while all ran at once.
        reservations: what as many reservations for the longest sequence take.
    """

    answers: list[str]
    tokens_per_second: float
    one_by_one_tokens_per_second: float
    same_tokens: bool
    max_len: int
    tokens: int
    used: int
    mapped: int
    reservations: int


def run(model: Any, tokenizer: Any, *, max_new_tokens: int, max_len: int, progress: bool = True) -> ServingResult:
    """Answers ``QUESTIONS`` greedily, at once and one by one.

    Args:
        model: of transformers.
        tokenizer: of the model, with a chat template.
        max_new_tokens: the most tokens of an answer.
        max_len: positions of the longest sequence.
        progress: whether to show progress bars.
    """
    params = SamplingParams(temperature=0, max_tokens=max_new_tokens)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    max_len = min(max_len, model.config.max_position_embeddings)
    with LLM(model, tokenizer, max_model_len=max_len, max_num_seqs=len(chats), enable_prefix_caching=False) as llm:
        cache = llm.engine.tier.cache
        llm.chat(chats, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)  # warms up
        start = time.perf_counter()
        outputs = llm.chat(chats, params, use_tqdm=progress)
        at_once = time.perf_counter() - start
        mapped = 0 if cache is None else cache.stats().peak
        start = time.perf_counter()
        alone = [llm.chat(chat, params, use_tqdm=False)[0] for chat in chats]
        one_by_one = time.perf_counter() - start
    new = sum(len(output.outputs[0].token_ids) for output in outputs)
    tokens = new + sum(len(output.prompt_token_ids) for output in outputs)
    return ServingResult(
        answers=[output.outputs[0].text.strip() for output in outputs],
        tokens_per_second=new / at_once,
        one_by_one_tokens_per_second=new / one_by_one,
        same_tokens=[each.outputs[0].token_ids for each in outputs] == [each.outputs[0].token_ids for each in alone],
        max_len=max_len,
        tokens=tokens,
        used=0 if cache is None else cache.layout.bytes_per_token * tokens,
        mapped=mapped,
        reservations=0 if cache is None else cache.layout.static_bytes * len(chats),
    )
