"""``Engine``: serves requests on one model, iteration by iteration."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch

from vattn import kernels
from vattn.arguments import integer
from vattn.engine.intake import Intake
from vattn.engine.launcher import Launcher
from vattn.engine.options import EngineOptions
from vattn.engine.outputs import RequestOutput
from vattn.engine.policy import policy_named
from vattn.engine.relief import Relief
from vattn.engine.request import Branch, FinishReason, Request, Status
from vattn.engine.sampler import Sampler
from vattn.engine.sampling_params import SamplingParams
from vattn.engine.scheduler import Iteration, Scheduler
from vattn.engine.startup import Startup
from vattn.engine.tier import tier_of
from vattn.engine.tracker import Tracker
from vattn.models.probe import probed
from vattn.models.rope import most_positions
from vattn.models.versions import VERSION
from vattn.models.weights import Weights
from vattn.transfer import Download, computing_on


class Engine:
    """Serves requests on one model, iteration by iteration.

    Args:
        model: a causal language model of transformers, in eval mode.
        tokenizer: of the model; None serves token ids without text.
        options: how it serves.

    Raises:
        RuntimeError: the installed transformers is older than 5.17.
        ValueError: the model is no causal language model.

    Attributes:
        intake: makes requests of what callers give.
        tier: by which means the model is computed, and why.
        weights: of the model.
        scheduler: decides what is computed next.
    """

    def __init__(self, model: Any, tokenizer: Any = None, options: EngineOptions | None = None) -> None:
        if VERSION < (5, 17):
            raise RuntimeError(
                f"the engine needs transformers 5.17 or newer, and {'.'.join(map(str, VERSION))} is here"
            )
        options = options or EngineOptions()
        self._options, self._model = options, model
        startup = Startup()
        with startup.part("probe"):
            probe = probed(model)
        allowed = most_positions(model.config.get_text_config(decoder=True))
        longest = options.max_model_len or allowed or 2048
        if allowed is not None and longest > allowed:
            raise ValueError(f"max_model_len is {longest}, and the model is made for {allowed} positions")
        if model.training:
            raise ValueError("model must be in eval mode: call model.eval()")
        kernels.named(options.attention)
        self.intake = Intake(tokenizer, probe.vocabulary, _end_tokens(model), longest, options.seed)
        with computing_on(probe.device):
            self.tier = tier_of(model, probe, options, longest, startup)
        self._tracked = Tracker()
        self.scheduler = Scheduler(
            self.tier.memory,
            policy_named(options.policy, self.tier.memory.cached_positions),
            clock=time.monotonic,
            stops=self._tracked.stops,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            waiting_served_ratio=options.waiting_served_ratio,
            whole_prompts=self.tier.whole_prompts,
        )
        slots = 2 * options.max_num_seqs  # also of outputs that have ended, and are still in flight
        with computing_on(probe.device):
            sampler = Sampler(probe.vocabulary, slots, probe.device)
        self._launcher = Launcher(self.tier.runner, sampler, self._tracked)
        self._flight: deque[tuple[Iteration, Download]] = deque()
        self._relief = Relief(self.scheduler, self.tier.give_back)
        self.weights = Weights(model)
        self._closed = False
        self._target: int | None = None  # the budget that running requests keep from being set
        if probe.device.type == "cuda":
            with startup.part("rehearse"):
                self._launcher.rehearse(options.max_num_batched_tokens, options.max_num_seqs)
            self.tier.fit(options)

    @property
    def max_model_len(self) -> int:
        """Positions of the longest sequence."""
        return self.tier.max_model_len

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.intake.tokenizer

    @property
    def generation_config(self) -> Any:
        """The model's generation configuration, or None."""
        return getattr(self._model, "generation_config", None)

    @property
    def sleeping(self) -> bool:
        """Whether ``sleep`` has put memory and weights away."""
        return self.weights.away

    # Requests.

    def add(
        self,
        request_id: str,
        prompt: str | Sequence[int] | dict[str, Any],
        params: SamplingParams,
        *,
        namespace: Hashable = None,
        tenant: str = "",
    ) -> int:
        """Lets a request wait for its turn, and returns how many tokens its prompt has.

        Args:
            request_id: names it.
            prompt: a text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``.
            params: how its tokens are chosen.
            namespace: prefixes are shared with requests of the same namespace only.
            tenant: on whose behalf, for the policy ``"fair"``.

        Raises:
            TypeError, ValueError: it cannot be served; the message says why. Nothing has changed.
        """
        tracked = self.intake.request(request_id, prompt, params, namespace=namespace, tenant=tenant)
        if request_id in self._tracked:
            raise ValueError(f"there is a request {request_id!r} already")
        if self._closed:
            raise RuntimeError("the engine is closed")
        self.weights.require_whole()
        try:
            self._tracked.add(tracked)
            self.scheduler.add(tracked.request)
        except BaseException:
            if self.scheduler.requests.find(request_id) is None:
                self._tracked.drop(request_id)
            raise
        return len(tracked.request.prompt)

    def abort(self, request_id: str) -> bool:
        """Ends a request; False where there is none of that id."""
        return self.scheduler.abort(request_id)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended, or whose end ``step`` has not given back yet."""
        return len(self._tracked)

    def resize(self, budget: int) -> bool:
        """Sets the memory for K and V, also while requests run.

        Where running requests need more they lose their memory, in the order of the policy, until they fit; that may
        take until the iterations in flight were read, see ``resizing``. A request that cannot fit any more ends with an
        error that says so.

        Args:
            budget: bytes.

        Returns:
            Whether it is done.
        """
        self._target = integer("budget", budget, 1)
        return self._resize()

    @property
    def resizing(self) -> bool:
        """Whether ``resize`` waits for running requests."""
        return self._target is not None

    def _resize(self) -> bool:
        while self._target is not None:
            if self.tier.memory.resize(self._target):
                self._target = None
            elif not self.scheduler.preempt_one():
                return False
        return True

    # Weights.

    def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """Forgets all that requests have computed, so that none begins behind a prefix: after weights have changed.

        Args:
            reset_running_requests: computes requests that run again from the start, with the tokens that they have.

        Returns:
            Whether it is done; False where a request has not ended, and nothing has changed.
        """
        if reset_running_requests:
            self.recover(everything=True)
        elif self.unfinished:
            return False
        self.tier.memory.reset_prefixes()
        return True

    def update_weights(self, weights: Any) -> None:
        """Gives weights of the model other values. Requests that run are computed again, with the tokens they have.

        Args:
            weights: see ``Weights.load``.

        Raises:
            TypeError, ValueError: they are not the model's. No weight has changed.
            RuntimeError: the engine sleeps.
        """
        try:
            self.weights.load(weights)
        finally:  # also after an error halfway
            self.reset_prefix_cache(reset_running_requests=True)

    def sleep(self, level: int = 1) -> None:
        """Gives the memory of K and V and of the weights to others, until ``wake_up``. Prefixes are forgotten.

        Args:
            level: 1 keeps the weights in host memory, 2 discards them: ``update_weights`` has to give others.

        Raises:
            RuntimeError: there are requests that have not ended.
        """
        integer("level", level, 1, 2)
        if self.unfinished:
            raise RuntimeError(f"{self.unfinished} requests have not ended: the engine cannot sleep")
        self.reset_prefix_cache()
        self.tier.runner.forget()
        self._launcher.forget()
        self.weights.put_away(discard=level == 2)

    def wake_up(self) -> None:
        """Brings back what ``sleep`` has put away.

        Raises:
            torch.OutOfMemoryError: there is no memory for the weights; the engine still sleeps.
        """
        self.weights.bring_back()

    # An iteration.

    def step(self, *, final_only: bool = False) -> list[RequestOutput]:
        """Computes an iteration, and returns the requests that it, or the last one, has brought forward.

        Args:
            final_only: whether only requests are returned that have ended.
        """
        try:
            with computing_on(self._launcher.device):
                progressed = self._iterate()
            requests = self.scheduler.requests
            ended = list(requests.ended)
            goes_on: dict[Request, None] = {}
            if not final_only:
                goes_on = {each.request: None for each in progressed if each.request.status is not Status.FINISHED}
            outputs = [self._tracked.output(request, requests) for request in (*goes_on, *ended)]
        except BaseException:
            self.recover()
            raise
        self._tracked.forget_ended(requests, ended)
        return outputs

    def _iterate(self) -> list[Branch]:
        """Computes an iteration, and reads the one before it; the outputs that have got a token."""
        self._resize()
        iteration = self.scheduler.schedule()
        if not iteration.empty:
            if (shortage := self._launch(iteration)) is not None:
                self.recover()
                self._relief.note_failure(iteration, shortage)
                return []
            self._relief.note_success()
        elif not self._flight:
            self._launcher.free()
        progressed: list[Branch] = []
        while len(self._flight) > self._options.depth or (self._flight and iteration.empty):
            progressed += self._read(*self._flight[0])
            self._flight.popleft()
        return progressed

    def _launch(self, iteration: Iteration) -> str | None:
        """Launches an iteration; what torch says where it finds no memory for it."""
        try:
            self._flight.append((iteration, self._launcher.launch(iteration)))
        except torch.OutOfMemoryError as error:
            return str(error).partition("\n")[0]
        return None

    def recover(self, *, everything: bool = False) -> None:
        """Makes the engine usable after an error in ``step``: what was in flight is computed again.

        Args:
            everything: whether requests in host memory are, too.
        """
        self._flight.clear()
        self.scheduler.recover(everything=everything)
        self._launcher.forget()

    def _read(self, iteration: Iteration, sampled: Download) -> list[Branch]:
        """Takes the tokens that an iteration has sampled."""
        tokens, *logprobs = sampled.lists() or [[]]
        if tokens and min(tokens) < 0:
            for branch, token in zip(iteration.into, tokens, strict=True):
                if token < 0 and branch.finish_reason is None:
                    self.scheduler.fail(branch.request.id, "the model's logits are no numbers")
        if logprobs and logprobs[0] is not None:
            for branch, *each in zip(iteration.into, *logprobs, strict=True):
                if branch.finish_reason is None:
                    self._tracked[branch.request.id].note_logprobs(branch, *each)
        return self.scheduler.read(iteration, tokens)

    def drain(self) -> None:
        """Reads what is in flight, and forgets the requests that have ended."""
        while self._flight:
            self._read(*self._flight[0])
            self._flight.popleft()
        self._tracked.forget_ended(self.scheduler.requests, list(self.scheduler.requests.ended))

    def cancel(self, request_ids: Iterable[str]) -> None:
        """Ends requests after an error or an interrupt, and forgets them; others are computed again."""
        self.recover()
        for request_id in request_ids:
            self.abort(request_id)
        self.drain()

    def close(self) -> None:
        """Ends all requests and gives all memory back. Weights that were put away come back, unless discarded."""
        self._closed = True
        for request in list(self.scheduler.requests):
            self.scheduler.requests.end(request, FinishReason.ABORT)
        self.drain()
        if self.tier.cache is not None:
            self.tier.cache.close()
        self.weights.bring_back()


def _end_tokens(model: Any) -> tuple[int, ...]:
    """The end tokens of a model's generation configuration."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if found is None:
        return ()
    return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)
