"""Decode steps of Hugging Face models on slot tensors: an attention function, and steps captured into CUDA graphs.

A step appends one position to every sequence of a ``VirtualCache`` and attends by a stock kernel, with the lengths in
device memory. So it can be captured once and replayed while the sequences grow. Steps that are anything else run as
they do without it: prompts, several tokens at once, unusual arguments. The first step is computed both ways, and a
model whose own result is another one keeps running the old way; so does one that cannot be captured.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

try:
    from transformers.masking_utils import AttentionMaskInterface
except ImportError:  # pragma: no cover - all versions from 4.57 on have it
    AttentionMaskInterface = None

from vattn import kernels
from vattn.append import append
from vattn.cache import KVCache
from vattn.kernels import Kernel, Scores, Spans, Task
from vattn.store import Store

_LOG = logging.getLogger("vattn")
_NAME = "vattn"  # of the attention function
_MOST_GRAPHS = 8  # of one cache
_CACHE_KEYWORDS = ("cache", "past_key_values")
_running: contextvars.ContextVar[_Step | None] = contextvars.ContextVar("step", default=None)


class _Unsupported(Exception):
    """What keeps a model's steps from running on slot tensors."""


@dataclass(frozen=True)
class DecodeStats:
    """How the decode steps of a ``VirtualCache`` ran.

    Args:
        replayed: steps that were replays of a graph.
        eager: steps on slot tensors that were not.
        captures: graphs captured so far.
        graphs: graphs kept, at most 8: the least recently used goes first.
        graph_bytes: device memory that capturing them took.
        kernel: the attention kernels that steps use, by name.
        fallback: why steps run as without vattn's attention, or without a graph; None where they do not.
    """

    replayed: int
    eager: int
    captures: int
    graphs: int
    graph_bytes: int
    kernel: str | None
    fallback: str | None


class Decoder:
    """The decode steps of one ``VirtualCache``."""

    def __init__(self, attention: str, capture: bool, compiled: bool | dict[str, Any] = False) -> None:
        if attention != "auto" and attention not in kernels.KERNELS:
            raise ValueError(f"attention must be 'auto' or one of {', '.join(kernels.KERNELS)}, not {attention!r}")
        self._attention = attention
        self.capture = capture
        self._compiled = compiled
        self.enabled = True
        self._plans: OrderedDict[Any, _Plan] = OrderedDict()
        self._pool: Any = None
        self._fallback: str | None = None
        self._counts = {"replayed": 0, "eager": 0, "captures": 0}
        self._kernels: dict[str, None] = {}

    def room(self) -> dict[str, int]:
        """Rows beside a sequence's that the kernels load which it may come to use, as options of the store."""
        auto = self._attention == "auto"
        found = [k for k in kernels.KERNELS.values() if (not k.missing() if auto else k.name == self._attention)]
        return {name: max(getattr(kernel, name) for kernel in found) for name in ("head_rows", "tail_rows")}

    def stats(self) -> DecodeStats:
        return DecodeStats(
            **self._counts,
            graphs=sum(plan.graph is not None for plan in self._plans.values()),
            graph_bytes=sum(plan.graph_bytes for plan in self._plans.values()),
            kernel=", ".join(self._kernels) or None,
            fallback=self._fallback,
        )

    def clear(self) -> None:
        """Lets the graphs and their memory go."""
        self._plans.clear()
        self._pool = None

    def clone(self) -> Decoder:
        """One of the same settings, for another cache."""
        other = Decoder(self._attention, self.capture, self._compiled)
        other.enabled = self.enabled
        return other

    def step(self, store: Store, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a decode step, or None: then it is no such step, and nothing has changed."""
        if not self.enabled or torch.is_grad_enabled() or forward.model.training:
            return None
        if forward.refused:
            self._fallback = forward.refused
            return None
        call = _Call.of(forward.original, args, kwargs)
        if call is None:
            return None
        grown = store.grow_for_step(call.ids.shape[0], call.ids.device)
        if grown is None:
            return None
        cache, base, length = grown
        plan = self._plan(forward.model, call, cache, base, length)
        plan.step.mark()
        # Once the steps are replays the mask is looked at beside them.
        output, fits = None, plan.trusted < 2 and plan.step.starts_fit(call.mask, length)
        if fits or plan.trusted == 2:
            output = self._run(plan, forward, call, store, length)
            fits = fits or output is None or plan.step.starts_fit(call.mask, length)
        if not fits:
            if plan.step.set_starts(call.mask, length):
                output = self._run(plan, forward, call, store, length)
            else:
                output = None
                self._fall_back("the attention mask is no left padding")
        if output is not None and not forward.refused:
            self._counts["replayed" if plan.replayed else "eager"] += 1
        store.lengths = [length + (output is not None)] * len(store.lengths)
        return output

    def _plan(self, model: Any, call: _Call, cache: KVCache, base: int, length: int) -> _Plan:
        key = (id(model), id(cache), base, call.key)
        plan = self._plans.get(key)
        if plan is not None and length != plan.length + 1 and not plan.is_of(model):
            plan = None  # its weights have moved since
        if plan is None:
            plan = _Plan(_Step(cache, base, call.ids.shape[0], self._attention, self.capture), model, call)
            self._plans[key] = plan
            while len(self._plans) > _MOST_GRAPHS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        plan.length = length
        return plan

    def _run(self, plan: _Plan, forward: Forward, call: _Call, store: Store, length: int) -> Any:
        plan.fill(call, length)
        plan.replayed = False
        try:
            if plan.trusted < 1:
                return self._compare(plan, forward, call, store, length)
            if self.capture and call.ids.device.type == "cuda" and plan.graph is None and not plan.uncapturable:
                self._capture(plan, forward, store, length)
            if plan.graph is None:
                return plan.run(forward, store, length)
        except _Unsupported as reason:
            self._distrust(forward, str(reason))
            return None
        plan.graph.replay()
        plan.replayed = True
        output = plan.output()
        if plan.trusted < 2 and length != plan.captured_at:
            # What was a constant of the step that was captured shows in one that is longer.
            again = plan.run(forward, store, length)
            if difference := _difference(output, again):
                return self._untrust(plan, forward, difference)
            plan.trusted = 2
        return output

    def _untrust(self, plan: _Plan, forward: Forward, difference: str) -> Any:
        """After a replay that was not what the step gives: is it the compiler's or the capture's fault?"""
        if plan.compiled:
            plan.compiled, plan.graph = False, None
            self._fall_back(f"the step is not compiled: compiled it gives other logits ({difference})")
        else:
            self._distrust(forward, f"a replayed step gives other logits than one that is not ({difference})")
        return None

    def _compare(self, plan: _Plan, forward: Forward, call: _Call, store: Store, length: int) -> Any:
        """The first step, computed by transformers too."""
        try:
            with plan.beside():
                ours = plan.run(forward, store, length)
        except (_Unsupported, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _Unsupported(f"{type(error).__name__}: {error}") from error
        store.lengths = [length] * len(store.lengths)
        theirs = forward.original(**call.given)
        if difference := _difference(ours, theirs):
            self._distrust(forward, f"its attention is not what the kernels compute ({difference})")
            return theirs
        plan.trusted = 1
        self._kernels |= dict.fromkeys(plan.step.used)
        return theirs

    def _capture(self, plan: _Plan, forward: Forward, store: Store, length: int) -> None:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._compiled and plan.compiled is None:
            self._compile(plan, forward, store, length)
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_reserved(plan.step.ends.device)
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                plan.captured = plan.run(forward, store, length, compiled=bool(plan.compiled))
        except _Unsupported:
            raise
        except Exception as error:  # whatever the model does that a capture does not take
            plan.uncapturable = True
            _end_capture(plan.step.ends)
            _LOG.debug("a capture failed", exc_info=True)
            self._fall_back(f"the step cannot be captured: {_first_line(error)}")
            return
        finally:
            store.lengths = [length] * len(store.lengths)
        plan.graph, plan.captured_at = graph, length
        plan.graph_bytes = max(0, torch.cuda.memory_reserved(plan.step.ends.device) - before)
        self._counts["captures"] += 1

    def _compile(self, plan: _Plan, forward: Forward, store: Store, length: int) -> None:
        if plan.step.odd:
            self._fall_back("the step is not compiled: its layers share K and V")
            return
        options = self._compiled if isinstance(self._compiled, dict) else None
        plan.compiled = torch.compile(forward.original, fullgraph=True, dynamic=False, options=options)
        try:
            with plan.beside(), torch._dynamo.config.patch(recompile_limit=1024, accumulated_recompile_limit=1024):
                plan.run(forward, store, length, compiled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does that the compiler does not take
            plan.compiled = False
            self._fall_back(f"the step cannot be compiled: {_first_line(error)}")
        finally:
            store.lengths = [length] * len(store.lengths)

    def _distrust(self, forward: Forward, reason: str) -> None:
        forward.refused = f"{type(forward.model).__name__} decodes as transformers does: {reason}"
        self._fall_back(forward.refused)

    def _fall_back(self, reason: str) -> None:
        if self._fallback != reason:
            _LOG.warning("%s", reason)
        self._fallback = reason


@dataclass
class _Call:
    """A model's call as a decode step: its ids, its mask, the tensors and what else it was given."""

    ids: torch.Tensor  # [batch, 1]
    mask: torch.Tensor | None  # [batch, length + 1]
    tensors: dict[str, torch.Tensor | None]  # None: to be made up
    others: dict[str, Any]
    given: dict[str, Any]

    @property
    def key(self) -> Any:
        shapes = tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in self.tensors.items())
        return shapes, tuple(
            sorted((name, value) for name, value in self.others.items() if name not in _CACHE_KEYWORDS)
        )

    @classmethod
    def of(cls, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """None where it is none, or has arguments that are not known to be the same in every step."""
        known = _parameters(forward)
        given = dict(kwargs)
        if args:
            if len(args) > 1 or "input_ids" in kwargs or not known or known[0] != "input_ids":
                return None
            given["input_ids"] = args[0]
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or "position_ids" not in known:
            return None
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            return None
        tensors: dict[str, torch.Tensor | None] = {"input_ids": ids, "position_ids": None}
        if "cache_position" in known:
            tensors["cache_position"] = None
        others = {}
        for name, value in given.items():
            if name in ("input_ids", "attention_mask") or value is None:
                continue
            if name in ("position_ids", "cache_position") and isinstance(value, torch.Tensor):
                tensors[name] = value
            elif name in _CACHE_KEYWORDS or isinstance(value, (bool, int, float, str)):
                others[name] = value
            else:
                return None
        if others.get("output_attentions") or others.get("output_hidden_states") or others.get("return_dict") is False:
            return None
        return cls(ids, mask, tensors, others, given)


@functools.lru_cache(maxsize=64)
def _parameters_of(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    names = _parameters_of(getattr(forward, "__func__", forward))
    return names[1:] if hasattr(forward, "__func__") else names


class _Plan:
    """The steps of one batch size: what they are given in place, and their graph once there is one."""

    def __init__(self, step: _Step, model: Any, call: _Call) -> None:
        self.step = step
        self.length = -1  # at the last step
        self._model = weakref.ref(model)
        self._weights = _weights(model)
        self._configs = list(
            {
                id(c): c for m in model.modules() if hasattr(c := getattr(m, "config", None), "_attn_implementation")
            }.values()
        )
        device, batch = call.ids.device, call.ids.shape[0]
        with torch.inference_mode(False):
            made = {
                "position_ids": lambda: torch.zeros(batch, 1, dtype=torch.int64, device=device),
                "cache_position": lambda: torch.zeros(1, dtype=torch.int64, device=device),
            }
            self.tensors = {
                name: made[name]() if tensor is None else torch.empty_like(tensor)
                for name, tensor in call.tensors.items()
            }
        self._given = {**call.others, **self.tensors}
        self.replayed = False  # the last step
        self.captured_at = -1
        self.trusted = 0  # 1 when a step agreed with transformers', 2 when a replay agreed with a step
        self.uncapturable = False
        self.compiled: Any = None  # the model's forward; False when it could not be
        self.graph: torch.cuda.CUDAGraph | None = None
        self.graph_bytes = 0
        self.captured: Any = None

    def is_of(self, model: Any) -> bool:
        """Whether the model and its weights are where they were."""
        return self._model() is model and self._weights == _weights(model)

    def fill(self, call: _Call, length: int) -> None:
        for name, tensor in call.tensors.items():
            if tensor is None:
                self.tensors[name].fill_(length)
            else:
                self.tensors[name].copy_(tensor, non_blocking=True)
        self.step.ends.fill_(length + 1)
        for name in _CACHE_KEYWORDS:
            if name in call.others:
                self._given[name] = call.others[name]

    def run(self, forward: Forward, store: Store, length: int, *, compiled: bool = False) -> Any:
        self.step.begin(store, length)
        token = _running.set(self.step)
        try:
            with _attention_of(self._configs):
                if compiled:
                    outline = {name: _Outline(store.windows) for name in _CACHE_KEYWORDS if name in self._given}
                    output = self.compiled(**{**self._given, **outline})
                else:
                    output = forward.original(**self._given)
        finally:
            _running.reset(token)
        if not compiled:
            self.step.finish()
        if not isinstance(output, ModelOutput):
            raise _Unsupported("its output is no ModelOutput")
        for name, value in output.items():
            if not isinstance(value, (torch.Tensor, Cache)):
                raise _Unsupported(f"its output has {name}, which is no tensor")
        return output

    def output(self) -> Any:
        """That of the last replay, for the caller to keep."""
        # The cache goes by reference, and may be another one than when the graph was captured.
        caches = [self._given[name] for name in _CACHE_KEYWORDS if name in self._given]
        return type(self.captured)(
            **{n: v.clone() if isinstance(v, torch.Tensor) else caches[0] for n, v in self.captured.items()}
        )

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """On a stream of its own, as a capture is: libraries set themselves up there."""
        if self.step.ends.device.type != "cuda":
            yield
            return
        stream = torch.cuda.Stream(self.step.ends.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            yield
        torch.cuda.current_stream().wait_stream(stream)


class _Step:
    """A decode step of a batch on slot tensors: what ``VirtualCache.update`` and the attention function do in it."""

    def __init__(self, cache: KVCache, base: int, batch: int, attention: str, capture: bool) -> None:
        self._cache, self._base, self._batch = cache, base, batch
        self._attention = attention
        self._capture = capture and cache.device.type == "cuda"
        with torch.inference_mode(False):
            self.slots = torch.arange(batch, dtype=torch.int32, device=cache.device)
            self._rows = self.slots.long()
            self.starts, self.ends = torch.zeros_like(self.slots), torch.zeros_like(self.slots)
        self._padded = False
        self._side: torch.cuda.Stream | None = None
        if cache.device.type == "cuda":
            self._side = torch.cuda.Stream(cache.device)  # type: ignore[no-untyped-call]
            self._before = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._kernels: dict[Any, Kernel] = {}
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.odd = False  # whether a layer attends to another one's K and V
        self.used: dict[str, None] = {}

    def mark(self) -> None:
        """What the stream has to do now comes before the mask is looked at, and what comes later does not."""
        if self._side is not None:
            self._before.record()

    def starts_fit(self, mask: torch.Tensor | None, length: int) -> bool:
        """Whether a mask hides just what is before the starts."""
        if mask is None or mask.shape != (self._batch, length + 1):
            return mask is None and not self._padded
        with contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side):
            if self._side is not None:
                self._side.wait_event(self._before)
            columns = torch.arange(length + 1, device=self.ends.device)
            return bool(((mask.to(self.ends.device) != 0) == (columns >= self.starts[:, None])).all())

    def set_starts(self, mask: torch.Tensor | None, length: int) -> bool:
        """Takes the padding from a mask; False when it is anything else than on the left."""
        if mask is None:
            self.starts.zero_()
            self._padded = False
            return True
        if mask.shape != (self._batch, length + 1):
            return False
        visible = (mask != 0).to(self.ends.device)
        self.starts.copy_(length + 1 - visible.sum(1))
        columns = torch.arange(length + 1, device=self.ends.device)
        if not torch.equal(visible, columns >= self.starts[:, None]):
            self.starts.zero_()
            self._padded = False
            return False
        self._padded = bool(self.starts.any())
        return True

    def begin(self, store: Store, length: int) -> None:
        self._store, self._length = store, length
        self._seen: dict[int, tuple[int, torch.Tensor, torch.Tensor]] = {}
        self._waiting: set[int] = set()
        self._spans: dict[int | None, Spans] = {}

    def finish(self) -> None:
        if self._waiting:
            raise _Unsupported(f"the attention of layer {min(self._waiting)} takes no attention function")

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends ``[batch, kv_heads, 1, dim]``; what it returns is for the attention function to know the layer by."""
        mine = self.append(layer, k, v)
        window = self._store.windows[layer]
        first = 0 if window is None else max(self._length + 1 - window, 0)
        views = tuple(t[:, first : self._length + 1].transpose(1, 2) for t in mine)
        self._seen[id(views[0])] = layer, *views  # type: ignore[assignment]
        self._waiting.add(layer)
        self._store.lengths[layer] = self._length + 1
        return views  # type: ignore[return-value]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes ``[batch, kv_heads, 1, dim]`` to their place; returns the layer's slot tensors of the batch."""
        if k.shape[2] != 1 or k.shape[0] != self._batch:
            raise _Unsupported(f"layer {layer} is given {tuple(k.shape)}")
        if layer not in self._views:
            batch = slice(self._base, self._base + self._batch)
            self._views[layer] = self._cache.k(layer)[batch], self._cache.v(layer)[batch]
        mine = self._views[layer]
        append(k[:, :, 0], v[:, :, 0], *mine, self.ends, self._rows)
        return mine

    def attend(self, at: int | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, how: Scores) -> torch.Tensor:
        """Attention of the module at a layer, on what ``update`` returned, see ``attend_to``."""
        layer, keys, values = self._seen.get(id(k), (-1, None, None))
        if keys is not k or values is not v:
            raise _Unsupported("an attention function is given other K and V than the cache returned")
        self.odd = self.odd or layer != at or layer not in self._waiting
        self._waiting.discard(layer)
        return self.attend_to(layer, q, how)

    def attend_to(self, layer: int, q: torch.Tensor, how: Scores) -> torch.Tensor:
        """q ``[batch, query_heads, 1, head_dim]`` on the K and V of a layer; ``[batch, 1, query_heads, v_dim]``."""
        windows = [window for window in (self._store.windows[layer], how.window) if window is not None]
        mine = self._views[layer]
        window = min(windows, default=None)
        spans = self._spans_of(window)
        task = Task.of(
            q[:, :, 0], *mine, window=window is not None, softcap=how.softcap is not None, sinks=how.sinks is not None
        )
        if task not in self._kernels:
            try:
                self._kernels[task] = kernels.choose(task, name=self._attention, capturable=self._capture)
            except ValueError as error:
                raise _Unsupported(str(error)) from None
            self.used[self._kernels[task].name] = None
        return self._kernels[task].decode(q[:, :, 0], *mine, spans, how)[:, None]

    def _spans_of(self, window: int | None) -> Spans:
        if window not in self._spans:
            starts = self.starts if window is None else torch.maximum(self.starts, self.ends - window)
            longest = self._cache.layout.max_len if window is None else min(window, self._cache.layout.max_len)
            self._spans[window] = Spans(self.slots, starts, self.ends, longest=longest, adjacent=True)
        return self._spans[window]


def _end_capture(tensor: torch.Tensor) -> None:
    """After a capture that failed torch's random generators think that it goes on, until another one ends."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensor.add(0)


def running() -> _Step | None:
    """The step that a model is computing now, if it is one."""
    return _running.get()


def _difference(ours: Any, theirs: Any) -> str | None:
    """How the logits differ, if by more than rounding does in a whole model, of other kernels or fused ones."""
    a, b = ours[0].float(), theirs[0].float()
    if a.shape != b.shape:
        return f"{tuple(a.shape)} for {tuple(b.shape)}"
    relative = float((a - b).norm() / b.norm())
    return None if relative <= (1e-3 if theirs[0].dtype == torch.float32 else 0.2) else f"by {relative:.1%}"


def _first_line(error: BaseException) -> str:
    """Of the error that was first: the end of a capture or a compilation has another to tell."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


def _weights(model: Any) -> list[int]:
    return [t.data_ptr() for tensors in (model.parameters(), model.buffers()) for t in tensors]


@contextlib.contextmanager
def _attention_of(configs: list[Any]) -> Iterator[None]:
    """While it lasts the attention of a model with these configurations is ``vattn``'s."""
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in before:
            config._attn_implementation_internal = _NAME
        yield
    finally:
        for config, name in before:
            config._attn_implementation_internal = name


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        options = (module.layer_idx, scale, softcap or 0.0, sliding_window or 0, s_aux)
        return torch.ops.vattn.decode(query, key, value, *options), None
    step = running()
    if step is None:
        raise RuntimeError(f"the attention {_NAME!r} runs within the decode steps of a VirtualCache only")
    if attention_mask is not None:
        raise _Unsupported("it makes a mask of its own")
    if strange := [name for name in ("position_bias", "head_mask") if others.get(name) is not None]:
        raise _Unsupported(f"its attention takes {strange[0]}")
    if others.get("dropout"):
        raise _Unsupported("its attention drops out")
    how = Scores(scale=scale, softcap=softcap, sinks=s_aux, window=sliding_window)
    return step.attend(getattr(module, "layer_idx", None), query, key, value, how), None


@torch.library.custom_op("vattn::decode", mutates_args=())
def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: int,
    scale: float,
    softcap: float,
    window: int,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Appends K and V to a layer and attends to it, in the step that runs. Nothing else of a model sees the layer."""
    step = running()
    assert step is not None
    step.append(layer, k, v)
    return step.attend_to(layer, q, Scores(scale=scale, softcap=softcap or None, sinks=sinks, window=window or None))


@_decode.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, scale: Any, softcap: Any, window: Any, sinks: Any
) -> torch.Tensor:
    return q.new_empty(q.shape[0], 1, q.shape[1], v.shape[3])


class _Outline(Cache):  # type: ignore[misc]
    """Stands for the cache where a step is compiled: K and V go by the attention function alone."""

    is_compileable = False

    def __init__(self, windows: list[int | None]) -> None:
        self.layers: list[Any] = []
        self._sliding = [window is not None for window in windows]

    @property
    def is_sliding(self) -> list[bool]:
        return self._sliding

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self._sliding)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, *args: Any) -> int:
        return 1

    def get_query_offset(self, *args: Any) -> int:
        return 1

    def get_mask_sizes(self, *args: Any) -> tuple[int, int]:
        return 2, 0


def _mask(
    *args: Any, mask_function: Callable[..., Any], local_size: int | None = None, use_vmap: bool = False, **others: Any
) -> None:
    """No mask: a step sees all rows, or those of its window. What is neither is refused."""
    if torch.compiler.is_compiling():
        return  # it was looked at before
    if local_size == 0:
        return  # for layers that a model does not have
    if use_vmap:
        raise _Unsupported("it adds to the mask")
    zero = torch.zeros((), dtype=torch.int64)
    at = torch.tensor(3 if local_size is None else local_size + local_size // 2)
    rows = torch.arange(int(at) + 1)
    try:
        seen = torch.as_tensor(mask_function(zero, zero, at, rows)).expand(rows.shape)
    except Exception:
        raise _Unsupported("its mask depends on more than positions") from None
    if not torch.equal(seen, rows > at - (local_size or len(rows))):
        raise _Unsupported("its mask is neither causal nor a sliding window")


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


def attach(model: Any) -> None:
    """Lets the decode steps of a model go to the cache that it is called with."""
    if not isinstance(model.forward, Forward):
        model.forward = Forward(model, model.forward)


class Forward:
    """A model's forward, by which decode steps on a ``VirtualCache`` come to its ``Decoder``."""

    def __init__(self, model: Any, original: Callable[..., Any]) -> None:
        self.model, self.original = model, original
        self.refused: str | None = None  # why the model's steps are not computed on slot tensors
        functools.update_wrapper(self, original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and running() is None:
            for name in _CACHE_KEYWORDS:
                step = getattr(kwargs.get(name), "decode_step", None)
                if step is not None and (output := step(self, args, kwargs)) is not None:
                    return output
        return self.original(*args, **kwargs)
