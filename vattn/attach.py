"""What is put in the place of a model's methods, so that its decode steps come to the cache that it is called with."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

CACHE_KEYWORDS = ("cache", "past_key_values")
deciding: contextvars.ContextVar[bool] = contextvars.ContextVar("deciding", default=False)
"""Whether what is called is the model itself, for a step."""
_greedy: contextvars.ContextVar[Greedy | None] = contextvars.ContextVar("greedy", default=None)


def attach(model: Any) -> None:
    """Lets the decode steps of a model go to the cache that it is called with."""
    if hasattr(model, "get_base_model"):  # PEFT's models hand generate on to the one that they adapt
        model = model.get_base_model()
    if not isinstance(model.forward, Forward):
        model.forward = Forward(model, model.forward)
    if hasattr(model, "generate") and not isinstance(model.generate, Generate):
        model.generate = Generate(model, model.generate)


class Greedy:
    """A ``generate`` that runs, whose next token most likely is that of the highest logit.

    Args:
        model: whose it is.
        steps: at most so many; None where that is not known.
        ends: tokens behind which a row of several has come to its end.
        pad: the token that such a row goes on with.
    """

    def __init__(self, model: Any, steps: int | None, ends: tuple[int, ...], pad: int) -> None:
        self.model = model
        self.ends, self.pad = ends, pad
        self._steps = steps
        self._right = self._wrong = 0
        self._stores: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def of(cls, model: Any, options: dict[str, Any]) -> Greedy | None:
        config = options.get("generation_config") or getattr(model, "generation_config", None)

        def option(name: str) -> Any:
            given = options.get(name)
            return getattr(config, name, None) if given is None else given

        others = ("do_sample", "prompt_lookup_num_tokens", "assistant_early_exit", "penalty_alpha", "dola_layers")
        if any(map(option, others)) or (option("num_beams") or 1) > 1 or options.get("assistant_model") is not None:
            return None
        tokens, end, pad = map(option, ("max_new_tokens", "eos_token_id", "pad_token_id"))
        ends = () if end is None else tuple(map(int, torch.as_tensor(end).reshape(-1)))
        pad = ends[0] if pad is None and ends else pad
        return cls(model, None if tokens is None else tokens - 1, () if pad is None else ends, pad or 0)

    def note(self, right: bool) -> None:
        """After a step that had begun before its call."""
        self._right, self._wrong = self._right + right, self._wrong + (not right)

    def goes_on(self, store: Any) -> bool:
        """After each step: whether the next one may begin before its call, which then must be ended with ``end``."""
        if self._steps is not None:
            self._steps -= 1
            if self._steps <= 0:
                return False
        self._stores.add(store)
        return self._right + 16 >= 8 * self._wrong  # a wrong one costs a step and a right one a tenth or less

    def end(self) -> None:
        self._steps = 0  # also where a copy of the context lives on
        with contextlib.ExitStack() as each:
            for store in self._stores:
                each.callback(store.land)


def greedy(model: Any) -> Greedy | None:
    """The ``generate`` of a model that this thread runs, if it is a greedy one."""
    run = _greedy.get()
    return run if run is not None and run.model is model else None


class _Method:
    """Stands for a model's method as an attribute of the model, which with a bound method would be a cycle."""

    def __init__(self, model: Any, original: Callable[..., Any]) -> None:
        self._bound = getattr(original, "__self__", None) is model
        self._set(model, original.__func__ if self._bound else original)  # type: ignore[attr-defined]

    def _set(self, model: Any, function: Any) -> None:
        functools.update_wrapper(cast(Any, self), function, updated=())
        self._function = function
        self._model = weakref.ref(model)

    @property
    def model(self) -> Any:
        return self._model()

    @property
    def original(self) -> Callable[..., Any]:
        return types.MethodType(self._function, self.model) if self._bound else self._function

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    def __getstate__(self) -> dict[str, Any]:
        return {"_bound": self._bound, "function": self._function, "model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._bound = state["_bound"]
        self._set(state["model"], state["function"])


class Forward(_Method):
    """A model's forward, by which decode steps on a ``VirtualCache`` come to its ``Decoder``."""

    def _set(self, model: Any, function: Any) -> None:
        super()._set(model, function)
        self.parameters = tuple(inspect.signature(self.original).parameters)
        self.refused: str | None = None  # why the model's steps are not computed on slot tensors
        self.trusted: Any = None  # in what state one was what transformers computes, each layer on its own K and V
        self.prompts: bool | None = None  # whether prompts on kernels are, where one was tried
        self.prompt_kinds: set[Any] = set()  # those of which one was
        self.moves = 0  # how often the weights were laid elsewhere
        self._lock = threading.RLock()
        self._calls = 0  # of the model itself, that run now
        self._steps = 0  # on slot tensors, that run now

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """While it lasts no other call begins; yields whether none is under way."""
        with self._lock:
            yield self._calls == 0

    def move(self, change: Callable[[Any], bool]) -> None:
        """Lets ``change`` lay the model's weights elsewhere in a step, where nobody else is at them.

        Args:
            change: is called with the model, and says whether it has done so.
        """
        with self.alone() as alone:
            if alone and self._steps == 1 and change(self.model):
                self.moves += 1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """While it lasts a step runs, on the weights where they are."""
        with self._lock:
            self._steps += 1
        try:
            yield
        finally:
            with self._lock:
                self._steps -= 1

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or deciding.get():
            return self.original(*args, **kwargs)
        prompt: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        for name in CACHE_KEYWORDS:
            cache: Any = kwargs.get(name)
            if getattr(cache, "decoder", None) is not None:
                if (output := cache.decode_step(self, args, kwargs)) is not None:
                    return output
                cache.decoder.interrupt()
                prompt = cache.prompt(self, {**dict(zip(self.parameters, args, strict=False)), **kwargs})
        with prompt as on_kernels:
            if on_kernels is not None:
                output = on_kernels(lambda: self.original(*args, **kwargs))
                if output is not None:
                    return output
            with self._lock:
                self._calls += 1
            try:
                return self.original(*args, **kwargs)
            finally:
                with self._lock:
                    self._calls -= 1


class Generate(_Method):
    """A model's ``generate``, which tells where a step may begin before its call, and ends what has begun."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for name in CACHE_KEYWORDS:
            if (decoder := getattr(kwargs.get(name), "decoder", None)) is not None:
                decoder.interrupt()
        run = Greedy.of(self.model, kwargs) if len(args) < 2 else None
        token = _greedy.set(run)
        try:
            return self.original(*args, **kwargs)
        finally:
            _greedy.reset(token)
            if run is not None:
                run.end()
