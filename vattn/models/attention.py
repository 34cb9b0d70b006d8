"""The attention and mask functions that vattn registers with transformers, and the context in which models use them."""

from __future__ import annotations

import contextlib
import contextvars
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vattn.kernels import AttentionParams

_NAME = "vattn"  # the name of the attention function in transformers' registry
_running: contextvars.ContextVar[_Running | None] = contextvars.ContextVar("running", default=None)


class UnsupportedError(Exception):
    """A reason for which a step cannot be computed on slot tensors.

    Args:
        reason: the reason, for messages.
        of_model: whether the reason lies in the model, so that it holds for all of its steps.
    """

    def __init__(self, reason: str, *, of_model: bool = False) -> None:
        super().__init__(reason)
        self.of_model = of_model


@contextlib.contextmanager
def attending(to: Any, configs: list[Any]) -> Iterator[None]:
    """Within this context ``to`` computes the attention of a model, in this thread only.

    The model's configurations name vattn's attention to code that runs in this context. To other threads they name the
    same attention as always.

    Args:
        to: computes the attention by its method ``attend``, or by ``attend_own`` where its ``own_attention`` is true.
        configs: the configurations of the model, see ``configs_of``.
    """
    for config in configs:
        _name_by_context(type(config))
    token = _running.set(_Running(to, frozenset(map(id, configs))))
    try:
        yield
    finally:
        _running.reset(token)


@dataclass(frozen=True)
class _Running:
    """The object that computes a model's attention in this context, and the ``id`` of each of its configurations."""

    to: Any
    configs: frozenset[int]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_running() -> bool:
    return _running.get() is not None


def _name_by_context(kind: type) -> None:
    """Replaces a property of a configuration class, so that it names vattn's attention within ``attending``."""
    owner = next((c for c in kind.__mro__ if isinstance(vars(c).get("_attn_implementation"), property)), None)
    if owner is None:
        return
    plain: Any = vars(owner)["_attn_implementation"]
    if hasattr(plain.fget, "_vattn"):
        return

    def name(self: Any) -> Any:
        if torch.compiler.is_compiling():  # while a step is compiled, no other model reads its configuration here
            named = _is_running()
        else:
            running = _running.get()
            named = running is not None and id(self) in running.configs
        return _NAME if named else plain.fget(self)

    name._vattn = True  # type: ignore[attr-defined]
    owner._attn_implementation = property(name, plain.fset)  # type: ignore[attr-defined]


def attention_of(config: Any) -> str:
    """The name of a model's own attention implementation, also within ``attending``."""
    token = _running.set(None)
    try:
        name: str = config._attn_implementation
    finally:
        _running.reset(token)
    return name


def own_attention(module: Any, *args: Any, **options: Any) -> Any:
    """Computes a module's attention by the function that the module would call without vattn."""
    name = attention_of(module.config)
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name](module, *args, **options)
    return sys.modules[type(module).__module__].eager_attention_forward(module, *args, **options)


def running() -> Any:
    """The object that ``attending`` was given in this context, e.g. the decode step that runs; None outside of it."""
    found = _running.get()
    return None if found is None else found.to


def _require_running() -> Any:
    if (found := running()) is None:
        raise RuntimeError(f"the attention {_NAME!r} runs within the decode steps of a VirtualCache only")
    return found


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> Any:
    """The attention function of ``attending``, with the arguments that transformers gives to such functions.

    Raises:
        UnsupportedError: the step cannot be computed on slot tensors.
        RuntimeError: the call is not within ``attending``.
    """
    names = ("scaling", "sliding_window", "softcap", "s_aux")
    scaling, sliding_window, softcap, s_aux = map(options.get, names)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.compiler.is_compiling():
        plain = (module.layer_idx, scale, softcap or 0.0, sliding_window or 0, s_aux)
        return torch.ops.vattn.decode(query, key, value, *plain), None
    step = _require_running()
    if step.own_attention:
        return step.attend_own(module, query, key, value, attention_mask, **options)
    others = {name: value for name, value in options.items() if name not in names}
    if attention_mask is not None:
        raise UnsupportedError("it makes a mask of its own", of_model=True)
    if strange := [name for name in ("position_bias", "head_mask") if others.get(name) is not None]:
        raise UnsupportedError(f"its attention takes {strange[0]}", of_model=True)
    if others.get("dropout"):
        raise UnsupportedError("its attention drops out")
    causal = others.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal) and query.shape[2] > 1:
        raise UnsupportedError("its attention is not causal", of_model=True)
    how = AttentionParams(scale=scale, softcap=softcap, sinks=s_aux, window=sliding_window)
    out: torch.Tensor = step.attend(getattr(module, "layer_idx", None), query, key, value, how)
    return out, None


def _mask(*args: Any, **options: Any) -> Any:
    """The mask function of ``attending``: it makes no mask, since kernels are told which rows a query sees.

    Where the model's own attention is computed, it returns the mask of the model's own mask function.

    Raises:
        UnsupportedError: the model's mask is neither causal nor a sliding window.
    """
    if torch.compiler.is_compiling():
        return None  # the mask was checked in steps that were not compiled
    step = _require_running()
    if step.own_attention:
        return ALL_MASK_ATTENTION_FUNCTIONS[attention_of(options["config"])](*args, **options)
    local_size, mask_function = options.get("local_size"), options["mask_function"]
    if local_size == 0:
        return None  # a mask for layers that the model does not have
    # What a model adds to a causal mask, e.g. that the tokens of an image see each other, changes nothing for the only
    # token of a decode step. A prompt, which has no store, may have several tokens and is refused.
    several = step.store is None
    if options.get("use_vmap") or (several and options.get("allow_is_causal_skip") is False):
        raise UnsupportedError("it adds to the mask", of_model=True)
    with torch.device("cpu"):
        zero = torch.zeros((), dtype=torch.int64)
        last = 3 if local_size is None else local_size + local_size // 2
        rows = torch.arange(last + 1)
        try:
            seen = [torch.as_tensor(mask_function(zero, zero, at, rows)).expand(rows.shape) for at in rows[[1, -1]]]
        except Exception:
            raise UnsupportedError("its mask depends on more than positions", of_model=True) from None
    expected = [(rows <= at) & (rows > at - (local_size or len(rows))) for at in rows[[1, -1]]]
    if not all(map(torch.equal, seen, expected)):
        raise UnsupportedError("its mask is neither causal nor a sliding window", of_model=True)
    return None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


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
    """Appends K and V to a layer of the step that runs, and attends to it.

    The operator declares no tensor that it mutates: nothing else in a model reads the layer's slot tensors.
    """
    step = running()
    step.append(layer, k, v)
    how = AttentionParams(scale=scale, softcap=softcap or None, sinks=sinks, window=window or None)
    out: torch.Tensor = step.attend_to(layer, q, how)
    return out


def _decode_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, scale: Any, softcap: Any, window: Any, sinks: Any
) -> torch.Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


# A call of an operator that ``torch.library.custom_op`` makes takes some 0.1 ms more of the host's time.
torch.library.define(
    "vattn::decode",
    "(Tensor q, Tensor k, Tensor v, SymInt layer, float scale, float softcap, SymInt window, Tensor? sinks) -> Tensor",
)
torch.library.impl("vattn::decode", ("cpu", "cuda"), _decode)
torch.library.register_fake("vattn::decode", _decode_shape)


class PassthroughCache(Cache):  # type: ignore[misc]
    """Takes the place of the cache where a step is compiled: it returns K and V, which the attention function appends.

    Args:
        windows: the sliding window of each layer, or None.
    """

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
