"""``vattn bench throughput`` and ``vattn bench latency``: how fast ``LLM`` serves a model on this machine."""

from __future__ import annotations

import time
from argparse import Namespace
from typing import Any

from vattn.bench import mixes, serving
from vattn.engine.llm import LLM

Rows = dict[str, list[dict[str, Any]]]


def throughput(options: Namespace, model: Any) -> Rows:
    """Tokens per second of a mix, or of requests in a file; each round has other tokens, and the first one warms up."""
    start = time.perf_counter()
    with _llm_of(options, model) as llm:
        vocabulary = _vocabulary(llm)
        ready = serving.ready(llm, start, min(options.max_num_seqs, 256), vocabulary)
        if options.trace:
            works = mixes.read(options.trace)
            rounds = [serving.others(works, number, vocabulary) for number in range(options.rounds)]
        else:
            given = {"count": options.requests}
            rounds = [mixes.mix(options.mix, vocabulary, seed=seed, **given) for seed in range(options.rounds)]
        return {
            "throughput": list(serving.throughput(llm, rounds)),
            "ready": [ready],
            "host": [serving.host_work(llm, options.max_num_seqs, vocabulary)],
        }


def latency(options: Namespace, model: Any) -> Rows:
    """Milliseconds of the first token and of each further one, of one request at a time."""
    with _llm_of(options, model) as llm:
        return {"latency": serving.latency(llm, options.prompt_tokens, options.steps, _vocabulary(llm))}


def _llm_of(options: Namespace, model: Any) -> LLM:
    names = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_budget", "enforce_eager")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return LLM(model, device=options.device, **given) if isinstance(model, str) else LLM(model, **given)


def _vocabulary(llm: LLM) -> int:
    return llm.engine.intake.vocabulary
