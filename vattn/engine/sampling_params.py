"""``SamplingParams``: how the tokens of a request are chosen, and when its outputs end. No torch.

Names, defaults and meaning are those of vLLM, where vLLM has the parameter.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from vattn.arguments import flag, integer, optional_integer, seconds, shown, token_ids

_LOG = logging.getLogger("vattn")
_GREEDY_BELOW = 1e-5  # temperatures below it choose the most likely token
_LOWEST_TEMPERATURE = 1e-2  # a lower one, but for greedy, would overflow the logits
_MOST_BIAS = 100.0


class RequestOutputKind(Enum):
    """What a ``RequestOutput`` of a stream holds."""

    CUMULATIVE = 0  # all of the output so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # one output, when the request has ended


@dataclass(kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen, and when its outputs end.

    Args:
        n: outputs of the request; with more than one ``temperature`` must be above 0.
        temperature: logits are divided by it, at most 2; 0 chooses the most likely token.
        top_p: only the fewest most likely tokens are considered whose probabilities add up to it, in (0, 1].
        top_k: only so many most likely tokens are considered; 0 or -1 is all.
        min_p: only tokens are considered that have at least this part of the highest probability, in [0, 1].
        repetition_penalty: logits of tokens in the prompt or the output are divided by it where they are positive, and
            multiplied where they are negative; above 0.
        presence_penalty: is taken from the logits of tokens in the output, in [-2, 2].
        frequency_penalty: is taken from the logits of tokens as often as they are in the output, in [-2, 2].
        seed: outputs with the same seed, prompt and parameters are the same, whatever runs beside them; None draws one.
        stop: texts that end an output. The output does not hold them, see ``include_stop_str_in_output``.
        stop_token_ids: tokens that end an output.
        include_stop_str_in_output: whether the output holds the text that ended it.
        ignore_eos: whether outputs go on behind the model's end tokens.
        max_tokens: tokens of each output at most; None is as many as the model's longest sequence allows.
        min_tokens: tokens before which neither an end token nor one of ``stop_token_ids`` is chosen.
        logprobs: how many of the most likely tokens are given with their log probability, beside the chosen one; -1 is
            all; None gives none.
        prompt_logprobs: the same for the tokens of the prompt.
        truncate_prompt_tokens: only so many tokens at the end of the prompt are used; -1 is as many as the longest
            sequence of the model leaves beside ``max_tokens``. None uses all of them, and refuses a prompt that is too
            long.
        logit_bias: is added to the logits of tokens, by token id; each is limited to [-100, 100].
        allowed_token_ids: only these tokens are considered.
        bad_words: texts that are not generated: the last token of each is not chosen behind the others.
        detokenize: whether outputs have a text; needed for ``stop``.
        skip_special_tokens: whether special tokens are left out of the text.
        spaces_between_special_tokens: whether special tokens in the text are set apart by spaces.
        output_kind: what the outputs of a stream hold.
        skip_reading_prefix_cache: whether to compute all of the prompt; None is True with ``prompt_logprobs``, which
            need the logits of all of it.
        priority: requests with a lower number are served first, under the policy ``"priority"``.
        deadline: seconds after its arrival at which the request is aborted; None is never.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range; the message names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Iterable[str] | None = None
    stop_token_ids: Iterable[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Iterable[int] | None = None
    bad_words: Iterable[str] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_reading_prefix_cache: bool | None = None
    priority: int = 0
    deadline: float | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            setattr(self, name, check(name, getattr(self, name)))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens must be at most max_tokens={self.max_tokens}, not {self.min_tokens}")
        if self.stop and not self.detokenize:
            raise ValueError("stop needs detokenize: a text is looked for in the text of the output")
        if self.greedy:
            if self.n > 1:
                raise ValueError(f"n must be 1 where temperature is 0, since all outputs were the same, not {self.n}")
            self.temperature = 0.0
        elif self.temperature < _LOWEST_TEMPERATURE:
            _LOG.warning("temperature %g is taken for %g: it would overflow", self.temperature, _LOWEST_TEMPERATURE)
            self.temperature = _LOWEST_TEMPERATURE

    @property
    def reads_prefixes(self) -> bool:
        """Whether a request may begin behind rows that others have computed."""
        skips = self.skip_reading_prefix_cache
        return self.prompt_logprobs is None if skips is None else not skips

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature < _GREEDY_BELOW


def checked_params(name: str, given: Any) -> SamplingParams:
    """A copy of an argument that must be ``SamplingParams``. It is checked again, since it may have been changed.

    Args:
        name: of the argument.
        given: the argument.

    Raises:
        TypeError, ValueError: it is something else, or a parameter is wrong.
    """
    if not isinstance(given, SamplingParams):
        raise TypeError(f"{name} must be SamplingParams, not {shown(given)}")
    return replace(given)


def _number(least: float, most: float, *, above: bool = False) -> Callable[[str, Any], float]:
    """A check of a number in [least, most], or with ``above`` in (least, most]."""

    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, not {shown(value)}")
        if not (least < value if above else least <= value) or value > most:  # also where it is no number
            start = "(" if above else "["
            end = f"{most:g}]" if math.isfinite(most) else "infinity)"
            raise ValueError(f"{name} must be in {start}{least:g}, {end}, not {shown(value)}")
        if math.isinf(value):
            raise ValueError(f"{name} must be finite, not {shown(value)}")
        return float(value)

    return check


def _count(least: int) -> Callable[[str, Any], int]:
    return lambda name, value: integer(name, value, least)


def _optional_count(least: int) -> Callable[[str, Any], int | None]:
    return lambda name, value: optional_integer(name, value, least)


def _top_k(name: str, value: Any) -> int:
    return max(integer(name, value, -1), 0)


def _truncation(name: str, value: Any) -> int | None:
    count = optional_integer(name, value, -1)
    if count == 0:
        raise ValueError(f"{name} must be -1 or at least 1, not 0: a prompt has at least one token")
    return count


def _seed(name: str, value: Any) -> int | None:
    return None if value is None or value == -1 else integer(name, value, -(2**63))


def _texts(name: str, value: Any) -> tuple[str, ...]:
    """Texts, none of them empty, without repetitions."""
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Iterable) or isinstance(texts, (bytes, Mapping)):
        raise TypeError(f"{name} must be a text or a list of texts, not {shown(value)}")
    texts = tuple(dict.fromkeys(texts))
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} must be a text or a list of texts, not one of {shown(text)}")
        if not text:
            raise ValueError(f"{name} must not have an empty text")
    return texts


def _ids(name: str, value: Any) -> tuple[int, ...]:
    """Token ids without repetitions."""
    ids = () if value is None else tuple(dict.fromkeys(token_ids(name, value)))
    for token in ids:
        integer(name, token)
    return ids


def _allowed(name: str, value: Any) -> tuple[int, ...] | None:
    if value is None:
        return None
    if not (ids := _ids(name, value)):
        raise ValueError(f"{name} must have at least one token, or be None for all of them")
    return ids


def _bias(name: str, value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a dict of numbers by token id, not {shown(value)}")
    any_number = _number(-math.inf, math.inf)
    return {
        integer(f"a token of {name}", token): min(max(any_number(f"a value of {name}", bias), -_MOST_BIAS), _MOST_BIAS)
        for token, bias in value.items()
    }


def _kind(name: str, value: Any) -> RequestOutputKind:
    if not isinstance(value, RequestOutputKind):
        raise TypeError(f"{name} must be a RequestOutputKind, not {shown(value)}")
    return value


def _optional_flag(name: str, value: Any) -> bool | None:
    return None if value is None else flag(name, value)


def _optional_seconds(name: str, value: Any) -> float | None:
    return None if value is None else seconds(name, value)


def _logprobs(name: str, value: Any) -> int | None:
    return 1 if value is True else optional_integer(name, value, -1)


_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    "n": _count(1),
    "temperature": _number(0.0, 2.0),
    "top_p": _number(0.0, 1.0, above=True),
    "top_k": _top_k,
    "min_p": _number(0.0, 1.0),
    "repetition_penalty": _number(0.0, math.inf, above=True),
    "presence_penalty": _number(-2.0, 2.0),
    "frequency_penalty": _number(-2.0, 2.0),
    "seed": _seed,
    "stop": _texts,
    "stop_token_ids": _ids,
    "include_stop_str_in_output": flag,
    "ignore_eos": flag,
    "max_tokens": _optional_count(1),
    "min_tokens": _count(0),
    "logprobs": _logprobs,
    "prompt_logprobs": _logprobs,
    "truncate_prompt_tokens": _truncation,
    "logit_bias": _bias,
    "allowed_token_ids": _allowed,
    "bad_words": _texts,
    "detokenize": flag,
    "skip_special_tokens": flag,
    "spaces_between_special_tokens": flag,
    "output_kind": _kind,
    "skip_reading_prefix_cache": _optional_flag,
    "priority": lambda name, value: integer(name, value, -(2**63)),
    "deadline": _optional_seconds,
}
