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
from typing import Any

import torch
import transformers
from transformers import GenerationMixin

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE_KEYWORD = "cache" if VERSION >= (5, 24) else "past_key_values"
"""By what keyword models of the installed transformers take a cache, for programs that run with several versions."""
CACHE_KEYWORDS = ("cache", "past_key_values")
_calling_model: contextvars.ContextVar[bool] = contextvars.ContextVar("calling_model", default=False)
"""Whether calls here go to the model itself."""
replaced: contextvars.ContextVar[Any] = contextvars.ContextVar("replaced", default=None)
"""The ``VirtualCache`` of the ``generate`` that runs here, which models of encoders and decoders replace by another."""
_greedy: contextvars.ContextVar[Greedy | None] = contextvars.ContextVar("greedy", default=None)


@contextlib.contextmanager
def calling_model() -> Iterator[None]:
    """Within this context calls of models go to the models themselves, as if they were not attached."""
    token = _calling_model.set(True)
    try:
        yield
    finally:
        _calling_model.reset(token)


def attach(model: Any, cache: Any) -> None:
    """Lets the calls of a model come to the caches that it is called with, as long as one of its caches is there.

    The methods of the model's class are replaced by ones that look whether a model is attached: bound methods stay
    bound methods, and nothing is added to the model. A method that the instance has of its own, as accelerate's hooks
    are, is replaced there.
    """
    model = adapted(model)
    with _changing:
        forward = forward_of(model)
        forward.caches.add(cache)
        if not forward.attached:
            forward.attached = True
            for name in ("forward", "generate"):
                if name in vars(model):
                    vars(model)[name] = _OwnMethod(model, name, vars(model)[name])
                elif hasattr(type(model), name):
                    _replace(type(model), name)
    weakref.finalize(cache, _let_go, weakref.ref(model)).atexit = False


def detach(model: Any, cache: Any) -> None:
    """Makes a model what it was once none of its caches is left."""
    model = adapted(model)
    with _changing:
        forward_of(model).caches.discard(cache)
    _let_go(weakref.ref(model))


def adapted(model: Any) -> Any:
    """The model itself, or the one that it adapts: PEFT's models hand ``generate`` on to that."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_of(model: Any) -> Forward:
    """What is known of a model, which stays known when it is detached."""
    with _changing:
        if model not in _forwards:
            _forwards[model] = Forward(model)
            weakref.finalize(model, _restore, type(model)).atexit = False
        return _forwards[model]


_changing = threading.RLock()
_forwards: weakref.WeakKeyDictionary[Any, Forward] = weakref.WeakKeyDictionary()
# By class and name: the method that stands there, the one it stands for, and whether that is the class's own.
_replaced: dict[tuple[type, str], tuple[Any, Any, bool]] = {}
_entered: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("entered", default=())
"""The calls of models that are under way here, as (Forward, name)."""


def _replace(kind: type, name: str) -> None:
    if (kind, name) in _replaced:
        return
    original = getattr(kind, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _calling_model.get():
            return original(self, *args, **kwargs)
        forward = _forwards.get(self)
        if forward is None or not forward.attached:
            return original(self, *args, **kwargs)
        called = forward.forward if name == "forward" else forward.generate
        return called(types.MethodType(original, self), args, kwargs)

    _replaced[kind, name] = method, original, name in vars(kind)
    setattr(kind, name, method)


def _restore(kind: type) -> None:
    """Gives a class its methods back when no model of it is attached any more."""
    with _changing:
        if any(type(model) is kind and forward.attached for model, forward in list(_forwards.items())):
            return
        for name in ("forward", "generate"):
            method, original, own = _replaced.get((kind, name), (None, None, False))
            if method is None or vars(kind).get(name) is not method:
                continue  # or somebody else has replaced it since
            del _replaced[kind, name]
            if own:
                setattr(kind, name, original)
            else:
                delattr(kind, name)


def _let_go(model: weakref.ref[Any]) -> None:
    """Makes a model what it was if none of its caches is left."""
    with _changing:
        if (
            (found := model()) is None
            or not (forward := forward_of(found)).attached
            or any(True for _ in forward.caches)
        ):
            return
        forward.attached = False
        for name in ("forward", "generate"):
            if isinstance(method := vars(found).get(name), _OwnMethod):
                vars(found)[name] = method.original
        _restore(type(found))


@functools.cache
def claim_in_generate() -> None:
    """Has ``generate`` of all models take the caches that it is given for its thread, from now on."""
    original = GenerationMixin.generate

    @functools.wraps(original)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as claims:
            last = None
            for half, last in _halves_in(kwargs):
                claims.enter_context(last.claimed())
                if half == "cross":
                    last.serve_as_cross()
            token = replaced.set(last)
            claims.callback(replaced.reset, token)
            return original(self, *args, **kwargs)

    GenerationMixin.generate = generate


class _OwnMethod:
    """Stands for a method that an instance has of its own."""

    def __init__(self, model: Any, name: str, original: Callable[..., Any]) -> None:
        functools.update_wrapper(self, original, updated=())
        self.original = original
        self._name = name
        self._model = weakref.ref(model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        if torch.compiler.is_compiling() or _calling_model.get() or model is None or not forward_of(model).attached:
            return self.original(*args, **kwargs)
        forward = forward_of(model)
        called = forward.forward if self._name == "forward" else forward.generate
        return called(self.original, args, kwargs)

    def __reduce__(self) -> Any:
        # A copy's is the method itself: nothing is attached to it.
        return _itself, (self.original,)


def _itself(method: Any) -> Any:
    return method


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
                each.callback(store.cancel_speculative)


def greedy(model: Any) -> Greedy | None:
    """The ``generate`` of a model that this thread runs, if it is a greedy one."""
    run = _greedy.get()
    return run if run is not None and run.model is model else None


class Forward:
    """What is known of a model whose calls come to ``VirtualCache``s, and the way that they take."""

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.attached = False
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.refused: str | None = None  # why the model's steps are not computed on slot tensors
        self.verified: Any = None  # in what state one was what transformers computes, each layer on its own K and V
        self.prompts: bool | None = None  # whether prompts on kernels are, where one was tried
        self.prompt_kinds: set[Any] = set()  # those of which one was
        self.moves = 0  # how often the weights were laid elsewhere
        self._lock = threading.RLock()
        self._calls = 0  # of the model itself, that run now
        self._steps = 0  # on slot tensors, that run now

    @property
    def model(self) -> Any:
        return self._model()

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own forward."""
        model = self.model
        if isinstance(method := vars(model).get("forward"), _OwnMethod):
            return method.original
        _, original, _ = _replaced.get((type(model), "forward"), (None, type(model).forward, True))
        return types.MethodType(original, model)

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

    @contextlib.contextmanager
    def _entering(self, name: str, kwargs: dict[str, Any]) -> Iterator[list[tuple[str, Any]] | None]:
        """Within this context a method of the model runs, and its caches belong to this thread.

        Yields:
            The caches that it is given, see ``_halves_in``; None where a method calls the one that it stands for.
        """
        entered = _entered.get()
        if (self, name) in entered:
            yield None
            return
        token = _entered.set((*entered, (self, name)))
        try:
            with contextlib.ExitStack() as claims:
                halves = list(_halves_in(kwargs))
                for _, cache in halves:
                    claims.enter_context(cache.claimed())
                yield halves
        finally:
            _entered.reset(token)

    def forward(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``forward``: a decode step of the cache that it is given, or what the model itself computes."""
        with self._entering("forward", kwargs) as halves:
            if halves is None:
                return original(*args, **kwargs)
            for half, cache in halves:
                if half == "whole" and cache.decoder is not None:
                    if (output := cache.decoder.step(self, args, kwargs)) is not None:
                        return output
                    cache.decoder.graphs.interrupt()
            return self._compute(halves, original, args, kwargs)

    def _compute(
        self, halves: list[tuple[str, Any]], original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """What the model itself computes, or for a prompt the model with its attention on kernels."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        with contextlib.ExitStack() as around:
            compute = None
            for half, cache in halves:
                if half == "whole" and cache.decoder is not None:
                    compute = around.enter_context(cache.prompt(self, given))
            for half, cache in halves:
                around.enter_context(cache.in_call(self.model, given, half))
            if compute is not None and (output := compute(lambda: original(*args, **kwargs))) is not None:
                return output
            with self._lock:
                self._calls += 1
            try:
                return original(*args, **kwargs)
            finally:
                with self._lock:
                    self._calls -= 1

    def generate(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of ``generate``: tells where a step may begin before its call, and ends what has begun."""
        with self._entering("generate", kwargs) as halves:
            if halves is None:
                return original(*args, **kwargs)
            for _, cache in halves:
                if cache.decoder is not None:
                    cache.decoder.graphs.interrupt()
            run = Greedy.of(self.model, kwargs) if len(args) < 2 else None
            token = _greedy.set(run)
            try:
                return original(*args, **kwargs)
            finally:
                _greedy.reset(token)
                if run is not None:
                    run.end()


def _halves_in(kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The ``VirtualCache``s that a call is given, and whether each is the whole or a half of an encoder-decoder's."""
    for name in CACHE_KEYWORDS:
        cache = kwargs.get(name)
        if hasattr(cache, "claimed"):
            yield "whole", cache
        for half in ("self", "cross"):
            if hasattr(part := getattr(cache, f"{half}_attention_cache", None), "claimed"):
                yield half, part
