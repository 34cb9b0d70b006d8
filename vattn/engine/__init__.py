"""Continuous batching: requests, scheduler, sampler and runner for unmodified Hugging Face models."""

from vattn.engine.async_llm import AsyncLLM
from vattn.engine.engine_args import EngineArgs
from vattn.engine.llm import LLM
from vattn.engine.outputs import CompletionOutput, Logprob, RequestOutput
from vattn.engine.sampling_params import RequestOutputKind, SamplingParams

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineArgs",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
]
