"""``LLM``: answers many prompts at once; names and meaning are those of vLLM's offline interface."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from tqdm.auto import tqdm

from vattn.arguments import flag, shown
from vattn.engine.engine_args import EngineArgs
from vattn.engine.outputs import RequestOutput
from vattn.engine.sampling_params import SamplingParams

Prompt = str | Sequence[int] | dict[str, Any]
"""A text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``."""


class LLM:
    """Answers many prompts at once on one model.

    Args:
        model: a folder, the name of a model that is on the disk, or a model of transformers, which is not changed.
        tokenizer: a tokenizer, a folder or a name; None takes the model's. A model object needs one for texts.
        options: how it is served: the fields of ``EngineOptions``.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range, or the model is none that can be served.
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self._args = EngineArgs(model=model, tokenizer=tokenizer, **options)
        self.engine = self._args.engine()
        self._names = itertools.count()

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What requests without parameters get: the temperature, ``top_k`` and so on of the model's configuration."""
        return self._args.default_sampling_params(self.engine.generation_config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts, and returns when all are answered.

        An exception or Ctrl-C ends the requests of this call, and leaves the engine usable.

        Args:
            prompts: one prompt or several: texts, token ids, or dicts with ``prompt`` or ``prompt_token_ids``.
            sampling_params: for all prompts, or one for each; None is ``get_default_sampling_params``.
            use_tqdm: whether a bar shows how far it is.
            priority: of each prompt, for the policy ``"priority"``; None is that of its parameters.

        Returns:
            An output for each prompt, in their order.

        Raises:
            TypeError, ValueError: a prompt cannot be served; then none is answered.
        """
        flag("use_tqdm", use_tqdm)
        given = _listed(prompts)
        params = self._params(sampling_params, len(given))
        if priority is not None:
            if not isinstance(priority, (list, tuple)):
                raise TypeError(f"priority must be a list of numbers, not {shown(priority)}")
            if len(priority) != len(given):
                raise ValueError(f"priority are {len(priority)}, and there are {len(given)} prompts")
            params = [replace(each, priority=rank) for each, rank in zip(params, priority, strict=True)]
        names = dict.fromkeys(f"llm-{next(self._names)}" for _ in given)
        done: dict[str, RequestOutput] = {}
        # The device begins as soon as there is enough for an iteration, unless a later request may come first.
        left = self._args.max_num_batched_tokens if self._args.policy == "fcfs" else math.inf
        try:
            for name, prompt, each in zip(names, given, params, strict=True):
                left -= self.engine.add(name, prompt, each)
                if left <= 0:
                    self._step(names, done)
                    left = math.inf
            with tqdm(total=len(given), desc="requests", dynamic_ncols=True, disable=not use_tqdm) as bar:
                while len(done) < len(given):
                    self._step(names, done)
                    bar.update(len(done) - bar.n)
        except BaseException:
            self.engine.cancel(names)
            raise
        return [done[name] for name in names]

    def _step(self, names: Collection[str], done: dict[str, RequestOutput]) -> None:
        """Computes an iteration, and adds those of some requests that have ended to ``done``."""
        for output in self.engine.step(final_only=True):
            if output.request_id in names:
                done[output.request_id] = output

    def chat(
        self,
        messages: Sequence[Any],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers conversations.

        Args:
            messages: one conversation, a list of dicts with ``role`` and ``content``; or a list of several.
            sampling_params: as in ``generate``.
            use_tqdm: as in ``generate``.
            chat_template: a template in the place of the tokenizer's.
            add_generation_prompt: whether the model is asked for an answer.
            continue_final_message: whether the answer goes on with the last message; without ``add_generation_prompt``.
            tools: descriptions of functions that the model may ask for, where its template knows them.
            chat_template_kwargs: other arguments of the tokenizer's ``apply_chat_template``.
        """
        several = bool(messages) and not isinstance(messages[0], dict)
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            **{name: value for name, value in {"chat_template": chat_template, "tools": tools}.items() if value},
            **(chat_template_kwargs or {}),
        }
        ids = [chat_token_ids(self.get_tokenizer(), each, **options) for each in (messages if several else [messages])]
        return self.generate(ids, sampling_params, use_tqdm=use_tqdm)

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        if given is None:
            given = self.get_default_sampling_params()
        if isinstance(given, SamplingParams):
            return [given] * count
        if not isinstance(given, (list, tuple)) or not all(isinstance(each, SamplingParams) for each in given):
            raise TypeError(f"sampling_params must be SamplingParams, or a list of them, not {shown(given)}")
        if len(given) != count:
            raise ValueError(f"sampling_params are {len(given)}, and there are {count} prompts")
        return list(given)

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """See ``Engine.reset_prefix_cache``."""
        return self.engine.reset_prefix_cache(reset_running_requests=reset_running_requests)

    def update_weights(self, weights: Any) -> None:
        """See ``Engine.update_weights``."""
        self.engine.update_weights(weights)

    def sleep(self, level: int = 1) -> None:
        """See ``Engine.sleep``."""
        self.engine.sleep(level)

    def wake_up(self) -> None:
        """See ``Engine.wake_up``."""
        self.engine.wake_up()

    def report(self) -> dict[str, Any]:
        """By which means and kernels the model is computed, why not in a faster way, and how long the start took."""
        tier = self.engine.tier
        return {
            "tier": tier.name,
            "reason": tier.reason,
            "kernels": tier.runner.kernels,
            "graphs": tier.runner.graphs,
            "uncaptured": tier.runner.uncaptured,
            "uncompiled": tier.uncompiled,
            "max_model_len": self.engine.max_model_len,
            "startup s": {name: round(seconds, 3) for name, seconds in tier.startup.seconds.items()},
        }

    def close(self) -> None:
        """Ends all requests and gives the memory of K and V back."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def chat_token_ids(tokenizer: Any, messages: Any, *, add_generation_prompt: bool = True, **options: Any) -> list[int]:
    """The token ids of a conversation, as the tokenizer's chat template writes it.

    Args:
        tokenizer: has a chat template.
        messages: a list of dicts with ``role`` and ``content``.
        add_generation_prompt: whether the model is asked for an answer.
        options: other arguments of the template.

    Raises:
        ValueError: there is no tokenizer, it has no template, or the template refuses the messages.
    """
    if tokenizer is None:
        raise ValueError("chat needs a tokenizer, and the engine has none")
    options = {"add_generation_prompt": add_generation_prompt, **options, "tokenize": False}
    try:
        text = tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # whatever a template raises
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    # The template has written the special tokens already.
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[no-any-return]


def _listed(prompts: Any) -> list[Any]:
    if isinstance(prompts, (str, dict)):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(f"prompts must be a text, token ids or a list of them, not {shown(prompts)}")
    is_token = bool(prompts) and hasattr(prompts[0], "__index__") and getattr(prompts[0], "ndim", 0) == 0
    return [prompts] if is_token else list(prompts)
