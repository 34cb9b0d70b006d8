"""``RequestOutput``: what the engine gives back for a request. Names and meaning are those of vLLM. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace

Logprobs = dict[int, "Logprob"]
"""By token id: the chosen token, and the most likely ones."""


@dataclass(frozen=True)
class Logprob:
    """The log probability of a token, before temperature, penalties and what else changes the logits.

    Args:
        logprob: the natural logarithm of its probability.
        rank: how many tokens are at least as likely, itself included.
        decoded_token: its text; None where there is no tokenizer.
    """

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True)
class CompletionOutput:
    """One output of a request.

    Args:
        index: which of the request's outputs it is.
        text: its text; empty where ``detokenize`` is False.
        token_ids: its tokens.
        cumulative_logprob: the sum of their log probabilities; None where ``logprobs`` is None.
        logprobs: for each token; None where ``logprobs`` is None.
        finish_reason: ``"stop"``, ``"length"``, ``"abort"`` or ``"error"``; None while it goes on.
        stop_reason: the text or the token that ended it; None for an end token of the model, or another reason.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[Logprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestOutput:
    """What the engine gives back for a request.

    Args:
        request_id: names the request.
        prompt: its text; None where token ids were given.
        prompt_token_ids: its tokens.
        prompt_logprobs: for each token of the prompt, None for the first; None where ``prompt_logprobs`` is None.
        outputs: ``n`` of them, in order.
        finished: whether all of them have ended.
        num_cached_tokens: tokens of the prompt that other requests had computed already.
        error: what went wrong, where an output has ended with ``"error"``.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[Logprobs | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None


def since(before: RequestOutput | None, now: RequestOutput) -> RequestOutput:
    """What is new in an output since an earlier one: texts, tokens and log probabilities."""
    if before is None:
        return now
    outputs = []
    for was, each in zip(before.outputs, now.outputs, strict=True):
        tokens = len(was.token_ids)
        outputs.append(
            replace(
                each,
                text=each.text[len(was.text) :],
                token_ids=each.token_ids[tokens:],
                logprobs=None if each.logprobs is None else each.logprobs[tokens:],
            )
        )
    return replace(now, outputs=outputs)
