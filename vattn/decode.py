"""``Decoder``: which calls of a model are decode steps, whether they are trusted, and their capture into CUDA graphs.

A step appends one position to every sequence of a ``VirtualCache`` and attends by a stock kernel, with the lengths in
device memory. So it can be captured once and replayed while the sequences grow. Calls that are anything else run as
they do without it: prompts, several tokens at once, unusual arguments. The first step is computed both ways, and a
model whose own result is another one keeps running the old way; what cannot be captured runs step by step.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from vattn import compiled, kernels
from vattn.attach import CACHE_KEYWORDS, Forward, Greedy, deciding, greedy
from vattn.cache import KVCache
from vattn.errors import Error
from vattn.padding import hidden
from vattn.prompt import Prompt
from vattn.step import Outline, Step, UnsupportedError
from vattn.store import Store

_LOG = logging.getLogger("vattn")
_MOST_GRAPHS = 8  # of one cache
_capturing = threading.RLock()


@dataclass(frozen=True)
class DecodeStats:
    """How the decode steps of a ``VirtualCache`` ran.

    Args:
        replayed: steps that were replays of a graph.
        eager: steps on slot tensors that were not, among them those that transformers computed too, to compare.
        ahead: of the replayed ones, those that had begun before they were called for.
        prompts: calls with several tokens for each row whose attention was a kernel's of vattn.
        captures: graphs captured so far.
        graphs: graphs kept, at most 8: the least recently used goes first.
        graph_bytes: device memory that capturing them took.
        kernel: the attention kernels that steps use, by name.
        fallback: the last reason why a step ran without vattn's attention, or without a graph; None where all did.
    """

    replayed: int
    eager: int
    ahead: int
    prompts: int
    captures: int
    graphs: int
    graph_bytes: int
    kernel: str | None
    fallback: str | None


class Decoder:
    """The decode steps of one ``VirtualCache``."""

    def __init__(
        self,
        attention: str | None,
        capture: bool,
        compiled: bool | dict[str, Any] = False,
        run_ahead: bool = True,
    ) -> None:
        self._named = attention
        self._attention = attention or "auto"
        kernels.named(self._attention)
        self._compiled = compiled
        self._run_ahead = run_ahead
        self.capture = capture
        self.enabled = True
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._pool: Any = None
        self._ahead: torch.cuda.Stream | None = None  # where steps begin before their calls
        self._fallback: str | None = None
        self._counts = {"replayed": 0, "eager": 0, "ahead": 0, "prompts": 0, "captures": 0}
        self._kernels: dict[str, None] = {}
        self._slower: set[tuple[int, str]] = set()  # models and kinds of prompts that no kernel is faster for

    def kernels(self) -> tuple[kernels.Kernel, ...]:
        """Those that steps may come to use."""
        auto = self._attention == "auto"
        return tuple(kernel for kernel in kernels.named(self._attention) if not (auto and kernel.missing()))

    def stats(self) -> DecodeStats:
        return DecodeStats(
            **self._counts,
            graphs=sum(plan.graph is not None for plan in self._plans.values()),
            graph_bytes=sum(plan.graph_bytes for plan in self._plans.values()),
            kernel=", ".join(self._kernels) or None,
            fallback=self._fallback,
        )

    def again(self) -> Callable[[], None] | None:
        """Replays the last step, where it was a replay and its sequences have not changed, e.g. to be timed."""
        plan = next(reversed(self._plans.values()), None)
        return plan.again if plan is not None and plan.replayed else None

    def interrupt(self) -> None:
        """The next step is none that follows the last."""
        for plan in self._plans.values():
            plan.length = -2

    def clear(self) -> None:
        """Lets the graphs and their memory go."""
        self._plans.clear()
        self._pool = None

    def clone(self) -> Decoder:
        """One of the same settings, for another cache."""
        return Decoder(self._named, self.capture, self._compiled, self._run_ahead)

    def takes(self, forward: Forward, device: torch.device) -> bool:
        """Whether steps of a model on a device are computed on slot tensors, as far as can be said before one."""
        if not self.enabled or torch.is_grad_enabled() or forward.model.training:
            return False
        config = getattr(forward.model, "config", None)
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return False
        if forward.refused:
            self._fallback = forward.refused
            return False
        # Where nothing is to be captured transformers' own way is as good. Autocast keeps copies of weights for as long
        # as it lasts: they are no part of a step.
        return (self._named is not None or device.type == "cuda") and not torch.is_autocast_enabled(device.type)

    def step(self, store: Store, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a decode step, or None: then it is no such step, and nothing has changed."""
        call = _Call.of(forward, store, args, kwargs)
        return self._step(call) if call is not None and self.takes(forward, call.ids.device) else None

    def prompt(self, store: Store, forward: Forward, given: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """The output of a call with several tokens for each row, on kernels; or None, and nothing has changed.

        Args:
            store: of the cache.
            forward: of the model, which takes steps.
            given: its arguments by name, ``input_ids`` or ``inputs_embeds`` among them.
            compute: the call of the model itself.
        """
        tokens, mask, lengths = tokens_of(given), given.get("attention_mask"), list(store.lengths)
        (batch, n), start = tokens.shape[:2], lengths[0] if lengths else 0
        if n < 2 or len(set(lengths)) != 1 or given.get("labels") is not None:
            return None
        if given.get("output_attentions") or given.get("return_dict") is False:
            return None
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (batch, start + n)):
            return None
        configs = configs_of(forward.model)
        if forward.trusted is None or forward.prompts is False or forward.trusted != _state(forward.model, configs):
            return None
        if (hides := [0] * batch if mask is None else hidden(mask)) is None:
            return None
        prompt = Prompt(hides, start, n, store.windows, self._attention)
        if (id(forward), prompt.kind) in self._slower:
            return None
        token = deciding.set(True)
        try:
            return self._prompt(prompt, configs, store, forward, compute)
        except UnsupportedError as reason:
            _LOG.debug("a prompt runs as transformers runs it: %s", reason)
            if reason.of_model:
                forward.prompts = False
            if prompt.slower:
                self._slower.add((id(forward), prompt.kind))
            store.lengths = lengths
            return None
        finally:
            deciding.reset(token)

    def _prompt(
        self, prompt: Prompt, configs: list[Any], store: Store, forward: Forward, compute: Callable[[], Any]
    ) -> Any:
        """The first that a model computes is computed by transformers too, whose result is the one."""
        lengths = list(store.lengths)
        try:
            with prompt.run(configs):
                ours = compute()
        except UnsupportedError:
            raise
        except Exception as error:
            if forward.prompts:
                raise
            ours_alone = not isinstance(error, (Error, torch.OutOfMemoryError))
            raise UnsupportedError(f"{type(error).__name__}: {error}", of_model=ours_alone) from error
        if forward.prompts is None:
            last = ours[0][:, -1:].clone()
            del ours
            store.lengths = lengths
            ours = compute()
            if not torch.isnan(ours[0][:, -1:]).any():  # which tells nothing
                difference = _difference(last, ours[0][:, -1:], rounded=store.options.scales is not None)
                forward.prompts = difference is None
            if forward.prompts is False:
                _LOG.warning("prompts run as transformers runs them: kernels give other logits (%s)", difference)
                return ours
        self._counts["prompts"] += 1
        return ours

    def _step(self, call: _Call) -> Any:
        store, forward = call.store, call.forward
        grown = store.grow_for_step(call.ids.shape[0], call.ids.device)
        if grown is None:
            return None
        cache, base, call.length = grown
        output = None
        on_device = call.ids.is_cuda
        with torch.cuda.device(call.ids.device) if on_device else contextlib.nullcontext(), forward.step():
            plan = self._plan(call, cache, base)
            token = deciding.set(True)  # what is called meanwhile is the model itself
            try:
                if not plan.refused:
                    output = self._try(plan, call)
                if output is not None and plan.replayed and not plan.stayed():
                    plan = self._plan(call, cache, base, anew=True)
                    output = self._try(plan, call)
            finally:
                deciding.reset(token)
                store.lengths = [call.length + (output is not None)] * len(store.lengths)
            if output is not None:
                self._begin(plan, call)
        if output is not None and not forward.refused:
            self._counts["replayed" if plan.replayed else "eager"] += 1
            self._counts["ahead"] += plan.early
        return output

    def _plan(self, call: _Call, cache: KVCache, base: int, *, anew: bool = False) -> _Plan:
        forward, store, length = call.forward, call.store, call.length
        for key in [key for key, plan in self._plans.items() if plan.step.cache is not cache]:
            del self._plans[key]  # it was built anew
        key = (id(forward.model), base, call.key)
        plan = None if anew else self._plans.get(key)
        if plan is not None and not plan.is_of(forward, everything=length != plan.length + 1):
            plan = None
        if plan is None:
            windows = sorted({window for window in store.windows if window is not None})
            stream, side = _streams(call.ids.device) if call.ids.is_cuda else (None, None)
            if call.ids.is_cuda and self._ahead is None:
                self._ahead = torch.cuda.Stream(call.ids.device)  # type: ignore[no-untyped-call]
            if self._compiled:
                self._lay_side_by_side(forward)
            step = Step(cache, base, call.ids.shape[0], self._attention, self.capture, side)
            plan = self._plans[key] = _Plan(step, call, windows, stream, self._ahead)
            while len(self._plans) > _MOST_GRAPHS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan.length = length
        plan.set_padding(store, length)
        return plan

    def _lay_side_by_side(self, forward: Forward) -> None:
        try:
            forward.move(compiled.lay_side_by_side)
        except torch.OutOfMemoryError:
            forward.moves += 1  # some may lie elsewhere
            self._fall_back("weights stay where they are: there is no memory to lay them side by side")

    def _try(self, plan: _Plan, call: _Call) -> Any:
        step, length = plan.step, call.length
        step.mark()
        # Once the steps are replays the mask is looked at beside them.
        steady = plan.steady(length)
        fits = not steady and step.starts_fit(call.mask, length)
        if steady or fits:
            output = self._run(plan, call)
            if fits or output is None or step.starts_fit(call.mask, length):
                return output
        call.store.require_hidden(call.mask)
        if not step.set_starts(call.mask, length):
            self._fall_back("the attention mask is no left padding")
            return None
        return self._run(plan, call)

    def _run(self, plan: _Plan, call: _Call) -> Any:
        if self._has_begun(plan, call):
            return plan.output(call)
        plan.fill(call)
        if plan.steady(call.length):
            plan.replay()
            output = plan.output(call)
            plan.set_length(call.length + 1)  # most likely the next, which then need not wait for it
            return output
        with call.forward.alone() as alone:
            # The model's configuration changes for a moment, and other threads would see it.
            return self._run_alone(plan, call) if alone else None

    def _begin(self, plan: _Plan, call: _Call) -> None:
        """Replays the step behind a call with the most likely tokens, where they are most likely the next ones."""
        store, length = call.store, call.length + 1
        run = greedy(call.forward.model) if self._run_ahead else None
        if run is None or not run.goes_on(store) or not plan.replayed or not plan.steady(length):
            return
        if plan.guesses and store.grow_ahead(length):
            store.ahead = plan.wait
            plan.begin(length, run)

    def _has_begun(self, plan: _Plan, call: _Call) -> bool:
        """Whether this step runs already, on what it is called with; waits for what runs."""
        store, length = call.store, call.length
        begun = plan.begun == length and plan.steady(length)
        right = begun and plan.fits(call)  # an error here leaves what has begun to who lands it
        wait, store.ahead = store.ahead, None
        if wait is not None:
            wait()
        if begun and (run := greedy(call.forward.model)):
            run.note(right)
        plan.replayed = plan.early = right
        return right

    def _run_alone(self, plan: _Plan, call: _Call) -> Any:
        """A step that is no plain replay: compared, captured, or eager."""
        try:
            if not plan.tested(call.length):
                return self._compare(plan, call)
            if self.capture and plan.capturable and plan.graph is None:
                self._capture(plan, call)
            if plan.graph is None:
                return plan.run(call)
            plan.replay()
            output = plan.output(call)
            if call.length != plan.captured_at:
                # What was a constant of the step that was captured shows in one that is longer.
                difference = _difference(output[0], plan.run(call)[0], rounded=call.rounded)
                if difference:
                    return self._untrust(plan, call.forward, difference)
                plan.replays_tested = True
            return output
        except UnsupportedError as reason:
            if reason.of_model:
                self._refuse(call.forward, str(reason))
            else:
                plan.refused = True
                self._fall_back(f"decodes as transformers does: {reason}")
            return None

    def _compare(self, plan: _Plan, call: _Call) -> Any:
        """A step that transformers computes too, whose result is the one."""
        try:
            with plan.beside():
                ours = plan.run(call)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(f"{type(error).__name__}: {error}") from error
        theirs = call.forward.original(**call.given)
        if torch.isnan(theirs[0]).any():
            return theirs  # which tells nothing
        if difference := _difference(ours[0], theirs[0], rounded=call.rounded):
            self._refuse(call.forward, f"its attention is not what the kernels compute ({difference})")
            return theirs
        plan.note_tested(call.length)
        if not plan.step.odd and (state := _state(call.forward.model, plan.configs)) != call.forward.trusted:
            call.forward.trusted, call.forward.prompts = state, None
        self._kernels |= dict.fromkeys(plan.step.used)
        return theirs

    def _capture(self, plan: _Plan, call: _Call) -> None:
        if reason := plan.obstacle():
            plan.capturable = False
            self._fall_back(f"the step is not captured: {reason}")
            return
        if self._pool is None or not any(other.graph for other in self._plans.values()):
            self._pool = torch.cuda.graph_pool_handle()  # one that no graph uses any more takes no other
        if self._compiled and plan.compiled is None:
            self._compile(plan, call)
        torch.cuda.empty_cache()  # as the capture begins with; else its memory could not be told
        before = torch.cuda.memory_reserved(plan.step.ends.device)
        run = functools.partial(plan.run, call, compiled=bool(plan.compiled))
        try:
            graph, output = record(run, self._pool, plan.stream)
        except UnsupportedError:
            self._pool = None
            raise
        except Exception as error:  # whatever the model does that a capture does not take
            plan.capturable = False
            self._pool = None
            _LOG.debug("a capture failed", exc_info=True)
            self._fall_back(f"the step cannot be captured: {_first_line(error)}")
            return
        plan.note_captured(graph, output, call.length)
        plan.graph_bytes = max(0, torch.cuda.memory_reserved(plan.step.ends.device) - before)
        self._counts["captures"] += 1

    def _compile(self, plan: _Plan, call: _Call) -> None:
        plan.compiled = False
        if plan.step.odd:
            self._fall_back("the step is not compiled: its layers share K and V")
            return
        options = self._compiled if isinstance(self._compiled, dict) else None
        plan.compiled = compiled.compiled(call.forward.original, options)
        try:
            with plan.beside(), kernels.many_shapes():
                plan.run(call, compiled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does that the compiler does not take
            plan.compiled = False
            _LOG.debug("a compilation failed", exc_info=True)
            self._fall_back(f"the step cannot be compiled: {_first_line(error)}")

    def _untrust(self, plan: _Plan, forward: Forward, difference: str) -> None:
        """After a replay that was not what the step gives: is it the compiler's or the capture's fault?"""
        if plan.compiled:
            plan.compiled, plan.graph, plan.captured = False, None, None
            self._fall_back(f"the step is not compiled: compiled it gives other logits ({difference})")
        else:
            self._refuse(forward, f"a replayed step gives other logits than one that is not ({difference})")

    def _refuse(self, forward: Forward, reason: str) -> None:
        forward.refused = f"{type(forward.model).__name__} decodes as transformers does: {reason}"
        self._fall_back(forward.refused)

    def _fall_back(self, reason: str) -> None:
        if self._fallback != reason:
            _LOG.warning("%s", reason)
        self._fallback = reason


@dataclass
class _Call:
    """A model's call as a decode step: its ids, its mask, the tensors and what else it was given."""

    forward: Forward
    store: Store
    ids: torch.Tensor  # [batch, 1]
    mask: torch.Tensor | None  # [batch, length + 1]
    tensors: dict[str, torch.Tensor | None]  # None: to be made up
    caches: dict[str, Any]  # by keyword
    others: dict[str, Any]
    given: dict[str, Any]
    length: int = -1  # of the sequences before it

    @property
    def rounded(self) -> bool:
        return self.store.options.scales is not None

    @property
    def key(self) -> Any:
        shapes = tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in self.tensors.items())
        return shapes, tuple(self.caches), tuple(sorted(self.others.items()))

    @classmethod
    def of(cls, forward: Forward, store: Store, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """None where it is none, or has arguments that are not known to be the same in every step."""
        parameters = forward.parameters
        given = dict(kwargs)
        if args:
            if len(args) > 1 or "input_ids" in kwargs or parameters[:1] != ("input_ids",):
                return None
            given["input_ids"] = args[0]
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or "position_ids" not in parameters:
            return None
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return None
        tensors: dict[str, torch.Tensor | None] = {"input_ids": ids, "position_ids": None}
        if "cache_position" in parameters:
            tensors["cache_position"] = None
        caches, others = {}, {}
        for name, value in given.items():
            if name in ("input_ids", "attention_mask") or value is None:
                continue
            if name in ("position_ids", "cache_position") and isinstance(value, torch.Tensor):
                tensors[name] = value
            elif name in CACHE_KEYWORDS:
                caches[name] = value
            elif isinstance(value, (bool, int, float, str)):
                others[name] = value
            else:
                return None
        if others.get("output_attentions") or others.get("output_hidden_states") or others.get("return_dict") is False:
            return None
        return cls(forward, store, ids, mask, tensors, caches, others, given)


class _Plan:
    """The steps of one batch size: what they are given in place, and their graph once there is one."""

    def __init__(
        self,
        step: Step,
        call: _Call,
        windows: list[int],
        stream: torch.cuda.Stream | None,
        ahead: torch.cuda.Stream | None,
    ) -> None:
        self.step = step
        self.length = -1  # at the last step
        model = call.forward.model
        self._model = weakref.ref(model)
        self._moves = call.forward.moves
        modules = list(model.modules())
        self.configs = configs_of(model)
        self._weights = _weights(model)
        self._addresses = _addresses(self._weights)
        self._state = _state(model, self.configs)
        self._hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._adapters = [
            (vars(module), name, copy.copy(value))
            for module in modules
            for name, value in vars(module).items()
            if "adapter" in name and isinstance(value, (bool, str, list))
        ]
        device, batch = call.ids.device, call.ids.shape[0]
        shapes = {"position_ids": (batch, 1), "cache_position": (1,)}
        with torch.inference_mode(False):
            self._tensors = {
                name: torch.zeros(shapes[name], dtype=torch.int64, device=device)
                if tensor is None
                else torch.empty_like(tensor)
                for name, tensor in call.tensors.items()
            }
        self._made_up = [name for name, tensor in call.tensors.items() if tensor is None]
        self._set_length = -1
        self.refused = False
        self._tested: set[bool] = set()  # steps with padding or without that agreed with transformers'
        self._windows = windows  # that no step so far has been long enough for
        self.replays_tested = False
        self.replayed = False  # the last step, which nothing has been computed behind
        self.early = False  # the last step, before its call
        self.compiled: Any = None  # the model's forward; False when it is not
        self.graph: Any = None
        self.graph_bytes = 0
        self.captured_at = -1
        self.captured: tuple[type, dict[str, Any]] | None = None  # the class of the output and its fields
        self.stream = stream
        self.begun = -1  # the length of a step that has begun before its call
        self._ahead = ahead
        if ahead is not None:
            self._guessed, self._done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]
        self.capturable = device.type == "cuda"

    def is_of(self, forward: Forward, *, everything: bool) -> bool:
        """Whether the model is the one, as far as can be said at once, or with ``everything`` in all it computes by."""
        model = forward.model
        if self._model() is not model or self._moves != forward.moves:
            return False
        if _addresses(self._weights[:1]) != self._addresses[:1]:
            return False
        if not everything:
            return True
        return _addresses(_weights(model)) == self._addresses and _state(model, self.configs) == self._state

    def stayed(self) -> bool:
        """Whether the weights are where they were, the adapters too, and there still are no hooks."""
        return (
            _addresses(self._weights) == self._addresses
            and not any(self._hooks)
            and all(settings[name] == value for settings, name, value in self._adapters)
        )

    def obstacle(self) -> str | None:
        """What of the model a graph would leave out."""
        if any(self._hooks):
            return "the model has forward hooks, which a replay does not call"
        if any(t.numel() and not t.data_ptr() for t in self._weights):
            return "the model's weights have no address"
        return None

    def tested(self, length: int) -> bool:
        """Whether steps like one at this length have agreed with transformers'."""
        return self.step.padded in self._tested and not any(window <= length for window in self._windows)

    def note_tested(self, length: int) -> None:
        self._tested.add(self.step.padded)
        self._windows = [window for window in self._windows if window > length]

    def note_captured(self, graph: Any, output: Any, length: int) -> None:
        self.graph, self.captured_at, self.replays_tested = graph, length, False
        self.captured = type(output), {n: v if isinstance(v, torch.Tensor) else None for n, v in output.items()}

    def fill(self, call: _Call) -> None:
        given = self._given(call)
        torch._foreach_copy_([mine for mine, _ in given], [theirs for _, theirs in given], non_blocking=True)
        self.set_length(call.length)

    def set_padding(self, store: Store, length: int) -> None:
        if self.step.set_padding(store.padding, store.blank, length):
            self._set_length = -1

    def set_length(self, length: int) -> None:
        """Brings what is made up of the length to it."""
        if length != self._set_length:
            for name in self._made_up:
                self._tensors[name].fill_(length)
            self.step.set_length(length)
            self._set_length = length

    def run(self, call: _Call, *, compiled: bool = False) -> Any:
        caches = {name: Outline(call.store.windows) for name in call.caches} if compiled else call.caches
        with self.step.run(call.store, call.length, self.configs):
            output = (self.compiled if compiled else call.forward.original)(**call.others, **caches, **self._tensors)
        if not isinstance(output, ModelOutput):
            raise UnsupportedError("its output is no ModelOutput")
        for name, value in output.items():
            if not isinstance(value, (torch.Tensor, Cache)):
                raise UnsupportedError(f"its output has {name}, which is no tensor")
        return output

    def steady(self, length: int) -> bool:
        """Whether a step at this length is a replay, and nothing of it is left to be tested."""
        return self.graph is not None and self.replays_tested and self.tested(length)

    def replay(self) -> None:
        self.graph.replay()
        self.replayed = True

    def output(self, call: _Call) -> Any:
        """Of the last replay, for the caller to keep."""
        assert self.captured is not None
        kind, fields = self.captured
        cache = next(iter(call.caches.values()))
        return kind(**{name: cache if value is None else value.clone() for name, value in fields.items()})

    def again(self) -> None:
        self.set_length(self.length)
        self.graph.replay()

    @property
    def guesses(self) -> bool:
        """Whether the tokens and positions of the next step can be told from this one's."""
        logits = self.captured and self.captured[1].get("logits")
        ids = self._tensors["input_ids"]
        return logits is not None and logits.dim() == 3 and len(logits) == len(ids) and ids.dtype == torch.int64

    def begin(self, length: int, run: Greedy) -> None:
        """Replays the step at this length behind the one before, with the tokens of its highest logits."""
        assert self.captured is not None
        ids, logits = self._tensors["input_ids"], self.captured[1]["logits"][:, -1]
        with self._ahead_of_call():
            if len(ids) > 1 and run.ends:
                ended = functools.reduce(torch.logical_or, (ids == end for end in {run.pad, *run.ends}))
                ids.copy_(torch.where(ended, run.pad, logits.argmax(-1, keepdim=True)))
            else:
                torch.argmax(logits, dim=-1, keepdim=True, out=ids)
            for name, tensor in self._tensors.items():
                if name != "input_ids" and name not in self._made_up:
                    tensor.add_(1)
            self.set_length(length)
            if self._ahead is not None:
                self._guessed.record()
            self.graph.replay()
        self.begun = length

    @contextlib.contextmanager
    def _ahead_of_call(self) -> Iterator[None]:
        """On a stream where what the caller does with the last step is not waited for."""
        if self._ahead is None:
            yield
            return
        self._ahead.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._ahead):
            try:
                yield
            finally:
                self._done.record()

    def fits(self, call: _Call) -> bool:
        """Whether the step that has begun is the one that is called for."""
        if self._ahead is not None:
            torch.cuda.current_stream().wait_event(self._guessed)
        return all(torch.equal(mine, theirs) for mine, theirs in self._given(call))

    def _given(self, call: _Call) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the graph reads and what a call gives for it."""
        return [(self._tensors[name], tensor) for name, tensor in call.tensors.items() if tensor is not None]

    def wait(self) -> None:
        """What the stream does from now on comes behind the step that has begun."""
        self.begun = -1
        self.replayed = False
        if self._ahead is not None:
            torch.cuda.current_stream(self._ahead.device).wait_event(self._done)

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """On a stream of its own, as a capture is: libraries set themselves up there."""
        if self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self.stream)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For captures, and for what is looked at beside replays: few, since cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def record(run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Any, Any]:
    """A graph of what is launched, which is not run, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    # A process captures one at a time. A capture that fails leaves its stream the current one.
    with _capturing, torch.cuda.stream(torch.cuda.current_stream()):
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
        except BaseException:
            _end_capture(graph, pool, stream)
            raise
    return graph, output


def _end_capture(graph: Any, pool: Any, stream: torch.cuda.Stream) -> None:
    """After a capture that failed: torch's allocator and its random generators may think that it goes on."""
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # all but what is captured went well, and the graph lets the pool go
    for forget in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):  # where the capture came so far itself
            forget(stream.device.index, pool)
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros((), device=stream.device)


def tokens_of(given: dict[str, Any]) -> Any:
    """The tokens of a model's call, ``[batch, n, ...]``, or None."""
    found = (given.get(name) for name in ("input_ids", "inputs_embeds"))
    return next((t for t in found if isinstance(t, torch.Tensor) and t.dim() >= 2), None)


def configs_of(model: Any) -> list[Any]:
    """The configurations by which a model's modules choose their attention."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def _weights(model: Any) -> list[torch.Tensor]:
    """The tensors that hold a model's weights."""
    found: list[torch.Tensor] = []

    def add(tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                add(getattr(tensor, name))
        else:
            found.append(tensor)

    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            add(tensor)
    return found


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _state(model: Any, configs: list[Any]) -> list[Any]:
    """What a model's computation may depend on beside its weights, e.g. which adapter is active."""

    def settings(of: Any) -> tuple[Any, ...]:
        return tuple(
            (name, tuple(map(str, value)) if isinstance(value, list) else value)
            for name, value in vars(of).items()
            if isinstance(value, (bool, int, float, str, list)) and name != "_attn_implementation_internal"
        )

    modules = [
        (id(module), tuple(module._forward_hooks), tuple(module._forward_pre_hooks), id(vars(module).get("forward")))
        for module in model.modules()
    ]
    names = [config._attn_implementation for config in configs]
    return [modules, names, *map(settings, model.modules()), *map(settings, configs)]


def _difference(ours: torch.Tensor, theirs: torch.Tensor, *, rounded: bool = False) -> str | None:
    """How the logits of any row differ, if by more than rounding does in a whole model, of other or fused kernels.

    Where K and V are ``rounded`` to fewer bits, one of them that is rounded otherwise is a difference of its own.
    """
    a, b = ours.float(), theirs.float()
    if a.shape != b.shape:
        return f"{tuple(a.shape)} for {tuple(b.shape)}"
    worst = float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-30)).max())
    bound = 0.25 if theirs.dtype != torch.float32 else 2e-2 if rounded else 1e-3
    return None if worst <= bound else f"by {worst:.1%}"


def _first_line(error: BaseException) -> str:
    """Of the error that was first: the end of a capture or a compilation has another to tell."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]
