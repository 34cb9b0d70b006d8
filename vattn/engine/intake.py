"""``Intake``: makes a request of what a caller gives, or says what is wrong with it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Hashable, Sequence
from typing import Any

from vattn.arguments import hashable, integer, shown, token_ids
from vattn.engine.request import Request
from vattn.engine.sampler import MOST_BAD_TOKENS
from vattn.engine.sampling_params import SamplingParams, checked_params
from vattn.engine.tracked import Tracked


class Intake:
    """Makes requests of what callers give.

    Args:
        tokenizer: of the model; None takes token ids alone.
        vocabulary: tokens that the model gives logits for.
        ends: its end tokens.
        max_model_len: positions of the longest sequence.
        seed: of requests that give none; None draws one for each.

    Attributes:
        tokenizer, vocabulary: as given.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: int, ends: tuple[int, ...], max_model_len: int, seed: int | None
    ) -> None:
        self.tokenizer = tokenizer
        self.vocabulary, self._max_model_len, self._seed = vocabulary, max_model_len, seed
        self._ends = tuple(token for token in ends if 0 <= token < vocabulary)

    def request(
        self,
        request_id: str,
        prompt: str | Sequence[int] | dict[str, Any],
        params: SamplingParams,
        *,
        namespace: Hashable = None,
        tenant: str = "",
    ) -> Tracked:
        """Makes a request; arguments as in ``Engine.add``.

        Raises:
            TypeError, ValueError: it cannot be served; the message says why.
        """
        params = checked_params("params", params)
        content = content_of(prompt)
        text = content if isinstance(content, str) else None
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a text, not {shown(request_id)}")
        hashable("namespace", namespace)
        if self.tokenizer is None and (text is not None or params.stop or params.bad_words):
            raise ValueError("a text as prompt, stop and bad_words need a tokenizer, and the engine has none")
        ids = token_ids("prompt", content if text is None else self._encoded(text))
        ids = self._truncated(ids, params)
        given = {"prompt": ids, "logit_bias": params.logit_bias or (), "stop_token_ids": params.stop_token_ids or ()}
        for name, tokens in {**given, "allowed_token_ids": params.allowed_token_ids or ()}.items():
            if tokens:
                integer(f"a token of {name}", min(tokens), 0, self.vocabulary - 1)
                integer(f"a token of {name}", max(tokens), 0, self.vocabulary - 1)
        if len(ids) >= self._max_model_len:
            raise ValueError(f"prompt has {len(ids)} tokens, and max_model_len is {self._max_model_len}")
        most = self._max_model_len - len(ids)
        now = time.monotonic()
        request = Request(
            request_id,
            ids,
            most if params.max_tokens is None else min(params.max_tokens, most),
            n=params.n,
            priority=params.priority,
            tenant=tenant,
            namespace=namespace,
            reuse_prefix=params.reads_prefixes,
            arrival=now,
            deadline=None if params.deadline is None else now + params.deadline,
        )
        seed = self._seed if params.seed is None else params.seed
        seed = secrets.randbits(62) if seed is None else seed
        tracked = Tracked(request, params, text, seed, self._ends, self.tokenizer)
        stop_tokens = None if tracked.watched else frozenset(tracked.stop_tokens)
        for branch in request.branches:
            branch.stop_tokens = stop_tokens
        for word in tracked.bad_words:
            if len(word) > MOST_BAD_TOKENS or not all(0 <= token < self.vocabulary for token in word):
                raise ValueError(
                    f"bad_words has a text of the tokens {word}: at most {MOST_BAD_TOKENS}, all the model's"
                )
        return tracked

    def _encoded(self, text: str) -> Any:
        try:
            return self.tokenizer(text)["input_ids"]
        except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # tokenizers that are written in Rust have such errors
            raise ValueError(f"prompt cannot be encoded: {error}") from error

    def _truncated(self, ids: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
        """The tokens of a prompt that ``truncate_prompt_tokens`` leaves."""
        count = params.truncate_prompt_tokens
        if count == -1:
            count = self._max_model_len - (params.max_tokens or 1)
            if count < 1:
                raise ValueError(
                    f"truncate_prompt_tokens leaves nothing of the prompt: max_tokens is {params.max_tokens}, and "
                    f"max_model_len is {self._max_model_len}"
                )
        return ids if count is None else ids[-count:]


def content_of(prompt: str | Sequence[int] | dict[str, Any]) -> str | Sequence[int]:
    """The text or the token ids of a prompt.

    Raises:
        ValueError: it is a dict that has neither.
    """
    if not isinstance(prompt, dict):
        return prompt
    for name in ("prompt_token_ids", "prompt"):
        if prompt.get(name) is not None:
            return prompt[name]  # type: ignore[no-any-return]
    raise ValueError(f"a prompt must have prompt or prompt_token_ids, not {shown(prompt)}")
