"""The model that a command serves, and how it chooses tokens, from the command's options."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from vattn.engine.llm import LLM
from vattn.engine.sampling_params import SamplingParams


def llm_of(options: Namespace) -> LLM:
    """The model of a command's options."""
    names = ("device", "dtype", "max_model_len", "max_num_seqs", "trust_remote_code", "kv_budget")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return LLM(options.model, **given)


def params_of(options: Namespace, llm: LLM) -> SamplingParams:
    """How tokens are chosen: the model's defaults, and what the options say."""
    names = ("temperature", "top_p", "seed", "n", "max_tokens")
    wanted = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return replace(llm.get_default_sampling_params(), **wanted)
