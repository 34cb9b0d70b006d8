"""``AsyncLLM``: answers requests as they come, and streams their outputs; names and meaning are vLLM's."""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from vattn.arguments import shown
from vattn.engine.commands import Commands
from vattn.engine.engine_args import EngineArgs
from vattn.engine.intake import content_of
from vattn.engine.outputs import RequestOutput, since
from vattn.engine.sampling_params import RequestOutputKind, SamplingParams, checked_params

_LOG = logging.getLogger("vattn")
_MOST_FAILURES = 3  # iterations that fail one after the other before the requests that run are ended


@dataclass
class _Stream:
    """Where the outputs of a request go.

    Args:
        loop: of the caller.
        outputs: outputs, or the error that ended it.
        kind: what outputs hold.
    """

    loop: asyncio.AbstractEventLoop
    outputs: asyncio.Queue[RequestOutput | BaseException]
    kind: RequestOutputKind

    def put(self, output: RequestOutput | BaseException) -> None:
        """Hands an output over from the engine's thread."""
        try:
            self.loop.call_soon_threadsafe(self.outputs.put_nowait, output)
        except RuntimeError:  # the loop is closed: nobody waits any more
            _LOG.debug("an output has no receiver")


class AsyncLLM:
    """Answers requests as they come, in a thread of its own, and streams their outputs.

    Args:
        model: a folder, the name of a model that is on the disk, or a model of transformers, which is not changed.
        tokenizer: a tokenizer, a folder or a name; None takes the model's. A model object needs one for texts.
        options: how it is served: the fields of ``EngineOptions``.
    """

    def __init__(self, model: Any, tokenizer: Any = None, **options: Any) -> None:
        self.engine = EngineArgs(model=model, tokenizer=tokenizer, **options).engine()
        self._commands, self._closing = Commands(), threading.Lock()
        self._streams: dict[str, _Stream] = {}  # by the id of the request; used in the engine's thread alone
        self._names = itertools.count()
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="vattn engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs) -> AsyncLLM:
        """Makes an engine from its arguments."""
        if not isinstance(engine_args, EngineArgs):
            raise TypeError(f"engine_args must be EngineArgs, not {shown(engine_args)}")
        return cls(**{field.name: getattr(engine_args, field.name) for field in fields(engine_args)})

    @property
    def errored(self) -> bool:
        """Whether the engine has stopped because of an error, and serves nothing any more."""
        return self._failure is not None

    def check_health(self) -> None:
        """Raises RuntimeError where the engine serves nothing any more."""
        if self._failure is not None:
            raise RuntimeError(f"the engine has stopped: {self._failure}") from self._failure
        if self._stopping or not self._thread.is_alive():
            raise RuntimeError("the engine is shut down")

    def get_tokenizer(self) -> Any:
        """The tokenizer, or None."""
        return self.engine.tokenizer

    async def generate(
        self,
        prompt: str | Sequence[int] | dict[str, Any],
        sampling_params: SamplingParams,
        request_id: str | None = None,
        *,
        namespace: Hashable = None,
        tenant: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Answers a prompt. A caller that stops to iterate ends the request.

        Args:
            prompt: a text, token ids, or a dict with ``prompt`` or ``prompt_token_ids``.
            sampling_params: how tokens are chosen; ``output_kind`` says what outputs hold.
            request_id: names the request; None takes a new name.
            namespace: prefixes are shared with requests of the same namespace only.
            tenant: on whose behalf, for the policy ``"fair"``.

        Yields:
            What there is of the outputs, as it comes; the last one is ``finished``.

        Raises:
            TypeError, ValueError: the request cannot be served.
            RuntimeError: the engine has stopped.
        """
        self.check_health()
        params = checked_params("sampling_params", sampling_params)
        prompt = content_of(prompt)
        prompt = list(prompt) if isinstance(prompt, list) else prompt  # the caller may change it
        name = f"request-{next(self._names)}" if request_id is None else request_id
        stream = _Stream(asyncio.get_running_loop(), asyncio.Queue(), params.output_kind)

        def begin() -> None:
            self.engine.add(name, prompt, params, namespace=namespace, tenant=tenant)
            self._streams[name] = stream

        before: RequestOutput | None = None
        finished = False
        begun = self._commands.put(begin)
        try:
            await asyncio.wrap_future(begun)
            while not finished:
                output = await stream.outputs.get()
                if isinstance(output, BaseException):
                    finished = True
                    raise output
                finished = output.finished
                if stream.kind is RequestOutputKind.DELTA:
                    yield since(before, output)
                elif finished or stream.kind is RequestOutputKind.CUMULATIVE:
                    yield output
                before = output
        finally:
            if not finished:
                self._commands.put(lambda: self._end(name, stream))

    async def reset_prefix_cache(self, *, reset_running_requests: bool = False) -> bool:
        """See ``Engine.reset_prefix_cache``."""
        done: bool = await self._ask(
            lambda: self.engine.reset_prefix_cache(reset_running_requests=reset_running_requests)
        )
        return done

    async def update_weights(self, weights: Any) -> None:
        """See ``Engine.update_weights``."""
        await self._ask(lambda: self.engine.update_weights(weights))

    async def sleep(self, level: int = 1) -> None:
        """See ``Engine.sleep``."""
        await self._ask(lambda: self.engine.sleep(level))

    async def wake_up(self) -> None:
        """See ``Engine.wake_up``."""
        await self._ask(self.engine.wake_up)

    async def is_sleeping(self) -> bool:
        """Whether the engine sleeps."""
        return self.engine.sleeping

    async def _ask(self, action: Callable[[], Any]) -> Any:
        """What an action returns, or raises, in the engine's thread between two iterations."""
        self.check_health()
        return await asyncio.wrap_future(self._commands.put(action))

    async def abort(self, request_id: str) -> None:
        """Ends a request; its stream gets a last output with the reason ``"abort"``."""
        await self._ask(lambda: self.engine.abort(request_id))

    def _end(self, request_id: str, stream: _Stream) -> None:
        """Ends a request that nobody reads any more; not another one of that id."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self.engine.abort(request_id)

    def shutdown(self) -> None:
        """Ends all requests, and gives the memory of K and V back."""
        self._stopping = True
        self._commands.put(lambda: None)
        self._thread.join()
        with self._closing:
            self.engine.close()

    def __enter__(self) -> AsyncLLM:
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()

    # The engine's thread.

    def _serve(self) -> None:
        try:
            failures = 0
            while not self._stopping:
                self._commands.obey(wait=not self.engine.unfinished)
                if self._stopping or not self.engine.unfinished:
                    continue
                try:
                    self._deliver(self.engine.step())
                    failures = 0
                except Exception as error:
                    failures += 1
                    self._recover(error, failures)
        except BaseException as error:
            _LOG.exception("the engine has stopped")
            self._failure = error
        finally:
            why = "the engine was shut down" if self._failure is None else f"the engine has stopped: {self._failure}"
            self._commands.end(why)
            for name, stream in self._streams.items():
                stream.put(RuntimeError(f"{why} while {name!r} ran"))
            self._streams.clear()

    def _recover(self, error: Exception, failures: int) -> None:
        """After an iteration that failed, and will be computed again: makes room, or ends the requests that ran."""
        _LOG.warning("an iteration failed: %s", error)
        if isinstance(error, torch.OutOfMemoryError):
            if self.engine.tier.cache is not None:
                self.engine.tier.cache.trim()  # memory of requests that have ended
            torch.cuda.empty_cache()
        if failures >= _MOST_FAILURES:
            for request_id in self.engine.scheduler.requests.interrupted:
                self.engine.scheduler.fail(request_id, f"{type(error).__name__}: {error}")

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is not None:
                stream.put(output)
            if output.finished:
                self._streams.pop(output.request_id, None)
