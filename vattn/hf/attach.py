"""Replaces a model's ``forward`` and ``generate``, so that its decode steps reach the cache that it is called with."""

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
from transformers import GenerationMixin

from vattn.models.versions import CACHE_KEYWORDS

_calling_model: contextvars.ContextVar[bool] = contextvars.ContextVar("calling_model", default=False)
"""Whether calls in this context go to the model itself, as if it were not attached."""
replaced: contextvars.ContextVar[Any] = contextvars.ContextVar("replaced", default=None)
"""The ``VirtualCache`` that was given to the ``generate`` that runs in this context.

Encoder-decoder models may replace it by a new cache, which then gets its options.
"""
_greedy: contextvars.ContextVar[Greedy | None] = contextvars.ContextVar("greedy", default=None)
"""The greedy ``generate`` that runs in this context."""


@contextlib.contextmanager
def calling_model() -> Iterator[None]:
    """Within this context calls of models go to the models themselves, as if no model were attached."""
    token = _calling_model.set(True)
    try:
        yield
    finally:
        _calling_model.reset(token)


def attach(model: Any, cache: Any) -> None:
    """Routes the calls of a model to the cache that each call is given, until the last cache of the model is gone.

    The ``forward`` and ``generate`` of the model's class are replaced by functions that check whether the model is
    attached. So bound methods stay bound methods, and no attribute is added to the model. A method that is stored on
    the instance itself, as accelerate's hooks are, is replaced on the instance.

    Args:
        model: a model of transformers, or a PEFT model around one.
        cache: the ``VirtualCache`` that was made with the model.
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
    """Removes a cache from a model, and restores the model's methods when that was its last cache."""
    model = adapted(model)
    with _changing:
        forward_of(model).caches.discard(cache)
    _let_go(weakref.ref(model))


def adapted(model: Any) -> Any:
    """Returns the model itself, or the model inside a PEFT model, which PEFT's ``generate`` calls."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def forward_of(model: Any) -> Forward:
    """Returns the ``Forward`` of a model. It is kept as long as the model lives, also while the model is detached."""
    with _changing:
        if model not in _forwards:
            _forwards[model] = Forward(model)
            weakref.finalize(model, _restore, type(model)).atexit = False
        return _forwards[model]


_changing = threading.RLock()
_forwards: weakref.WeakKeyDictionary[Any, Forward] = weakref.WeakKeyDictionary()
# By class and method name: the replacement, the original, and whether the class itself, not a base, defines it.
_replaced: dict[tuple[type, str], tuple[Any, Any, bool]] = {}
_entered: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("entered", default=())
"""The calls of models that run in this context, as (Forward, method name)."""


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
    """Restores the methods of a class when no model of this class is attached any more."""
    with _changing:
        if any(type(model) is kind and forward.attached for model, forward in list(_forwards.items())):
            return
        for name in ("forward", "generate"):
            method, original, own = _replaced.get((kind, name), (None, None, False))
            if method is None or vars(kind).get(name) is not method:
                continue  # not replaced by vattn, or replaced again by other code since
            del _replaced[kind, name]
            if own:
                setattr(kind, name, original)
            else:
                delattr(kind, name)


def _let_go(model: weakref.ref[Any]) -> None:
    """Restores the methods of a model if none of its caches is left."""
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
    """Makes ``generate`` of every model claim the ``VirtualCache``s that it is given for the calling thread.

    ``GenerationMixin.generate`` is replaced once for the whole process, so models without an attached cache are
    included.
    """
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
    """Replaces a method that is stored on a model instance rather than on its class."""

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
        # A copy of the model gets the original method, since no cache is attached to the copy.
        return _itself, (self.original,)


def _itself(method: Any) -> Any:
    return method


class Greedy:
    """A running ``generate`` call whose next token is most likely the one with the highest logit.

    Args:
        model: the model that generates.
        steps: the most decode steps that the call runs; None where that is not known.
        ends: tokens that end a row; in a batch of several rows an ended row goes on with ``pad``.
        pad: the padding token.
    """

    def __init__(self, model: Any, steps: int | None, ends: tuple[int, ...], pad: int) -> None:
        self.model = model
        self.ends, self.pad = ends, pad
        self._steps = steps
        self._right = self._wrong = 0
        self._stores: weakref.WeakSet[Any] = weakref.WeakSet()

    @classmethod
    def of(cls, model: Any, options: dict[str, Any]) -> Greedy | None:
        """Returns the run for a ``generate`` call with these keyword arguments.

        None where it samples, searches beams, or drafts several tokens at once.
        """
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
        """Counts a speculative step whose call has come.

        Args:
            right: whether the step was computed with the inputs that the call gives.
        """
        self._right, self._wrong = self._right + right, self._wrong + (not right)

    def goes_on(self, store: Any) -> bool:
        """Counts a step, and returns whether the next step may be started speculatively.

        Where it returns True, ``end`` must be called when the ``generate`` is over.

        Args:
            store: the ``Store`` of the cache that the step appends to.
        """
        if self._steps is not None:
            self._steps -= 1
            if self._steps <= 0:
                return False
        self._stores.add(store)
        # A wrong speculative step costs the time of a step; a right one saves a tenth of that or less.
        return self._right + 16 >= 8 * self._wrong

    def end(self) -> None:
        """Cancels speculative steps that still run, and lets none start any more."""
        self._steps = 0  # a copy of the context may still refer to this object
        with contextlib.ExitStack() as each:
            for store in self._stores:
                each.callback(store.cancel_speculative)


def greedy(model: Any) -> Greedy | None:
    """Returns the greedy ``generate`` of a model that runs in this context; None where none does."""
    run = _greedy.get()
    return run if run is not None and run.model is model else None


class Forward:
    """Computes the calls of a model that has caches, and keeps what was found out about the model.

    Args:
        model: the model, which is not kept alive.

    Attributes:
        caches: the caches that were made with the model, as weak references.
        attached: whether the methods of the model are replaced.
        parameters: the names of the parameters of the model's ``forward``.
        refused: why the model's steps are not computed on slot tensors; None where they may be.
        verified: the state of the model (see ``verify.attends_by``) in which a step agreed with what transformers
            computes while each layer attended to its own K and V; None where no step has.
        prompts: False where prompts must not run on kernels, True once a prompt on kernels agreed, None before.
        prompt_kinds: the kinds of prompts of which one agreed.
        moves: how often the weights were moved to other addresses.
    """

    def __init__(self, model: Any) -> None:
        self._model = weakref.ref(model)
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()
        self.attached = False
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.refused: str | None = None
        self.verified: Any = None
        self.prompts: bool | None = None
        self.prompt_kinds: set[Any] = set()
        self.moves = 0
        self._lock = threading.RLock()
        self._calls = 0  # calls of the model's own forward that run now
        self._steps = 0  # decode steps on slot tensors that run now

    @property
    def model(self) -> Any:
        """The model; None when it no longer exists."""
        return self._model()

    @property
    def original(self) -> Callable[..., Any]:
        """The model's own ``forward``, as it is without vattn."""
        model = self.model
        if isinstance(method := vars(model).get("forward"), _OwnMethod):
            return method.original
        _, original, _ = _replaced.get((type(model), "forward"), (None, type(model).forward, True))
        return types.MethodType(original, model)

    @contextlib.contextmanager
    def alone(self) -> Iterator[bool]:
        """Within this context no other thread begins a call or a step of the model.

        Yields:
            Whether no call of the model's own ``forward`` is running.
        """
        with self._lock:
            yield self._calls == 0

    def move(self, change: Callable[[Any], bool]) -> None:
        """Moves the model's weights from within a step, if no other call or step of the model is running.

        Args:
            change: is called with the model, and returns whether it has moved weights.
        """
        with self.alone() as alone:
            if alone and self._steps == 1 and change(self.model):
                self.moves += 1

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Within this context a step runs, so that no other thread's ``move`` moves the weights."""
        with self._lock:
            self._steps += 1
        try:
            yield
        finally:
            with self._lock:
                self._steps -= 1

    @contextlib.contextmanager
    def _entering(self, name: str, kwargs: dict[str, Any]) -> Iterator[list[tuple[str, Any]] | None]:
        """Within this context a method of the model runs, and the caches that it is given belong to this thread.

        Yields:
            The caches, as ``_halves_in`` yields them. None where the same method already runs in this context, as when
            a replaced method calls the replaced method of a base class.
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
        """Computes a call of ``forward``, as a decode step of the cache that it is given where it is one."""
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
        """Computes a call by the model's own ``forward``; the attention of prompts runs on kernels where possible."""
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
        """Runs a call of ``generate``. Where it is greedy, steps within it may be started speculatively."""
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
    """Yields the ``VirtualCache``s among the keyword arguments of a call, each with the part that it is.

    The part is ``"whole"``, or ``"self"`` or ``"cross"`` for a half of an ``EncoderDecoderCache``.
    """
    for name in CACHE_KEYWORDS:
        cache = kwargs.get(name)
        if hasattr(cache, "claimed"):
            yield "whole", cache
        for half in ("self", "cross"):
            if hasattr(part := getattr(cache, f"{half}_attention_cache", None), "claimed"):
                yield half, part
