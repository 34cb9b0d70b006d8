"""``Tier``: by which means a model is computed: flat on the slots of a ``KVCache``, or row by row; and why."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from vattn import _core, kernels
from vattn.engine.kv_memory import KVMemory, lookahead
from vattn.engine.memory import Memory
from vattn.engine.options import KV_DTYPES, EngineOptions
from vattn.engine.row_memory import RowMemory
from vattn.engine.runner import FlatRunner, RowRunner, Runner
from vattn.engine.startup import Startup
from vattn.errors import Error
from vattn.graphs import artifacts, compilation
from vattn.kernels import AttentionSpec
from vattn.kernels.measure import FEW, decode_kernel
from vattn.memory.device import checked_budget
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import KVLayout
from vattn.memory.shape import LayerShape
from vattn.memory.swap_costs import SwapCosts
from vattn.models import rope
from vattn.models.flat import FlatContext, Margins
from vattn.models.flat_verify import verified
from vattn.models.private import private_copy
from vattn.models.probe import Probe
from vattn.models.row_cache import row_caches
from vattn.models.state import configs_of
from vattn.models.versions import VERSION

_LOG = logging.getLogger("vattn")
_TUNED_TOKENS = 2048  # of the first call of compiled layers, for which torch chooses the sizes of blocks
_SWAPPED_BYTES = 64 << 20  # that are swapped to measure how fast it is
_POSITIONS = 64  # that a granule has room for, about, where there is memory enough
_MOST_UNUSED = 0.025  # of the memory for K and V, about, so that kernels are faster


@dataclass(frozen=True)
class Tier:
    """By which means a model is computed.

    Args:
        name: ``"flat"`` where all rows of an iteration are computed in one call of the model, else ``"rows"``.
        reason: why it is not ``"flat"``; None where it is.
        memory: holds K and V.
        runner: computes iterations.
        cache: that holds the rows; None in ``"rows"``.
        max_model_len: positions of the longest sequence.
        startup: how long the parts of the engine's start took.
        whole_prompts: whether a prompt has to be computed at once.
        uncompiled: why layers of the model are not compiled; None where they are.
    """

    name: str
    reason: str | None
    memory: Memory
    runner: Runner
    cache: KVCache | None
    max_model_len: int
    startup: Startup
    whole_prompts: bool = False
    uncompiled: str | None = "rows are computed one by one"

    def fit(self, options: EngineOptions) -> None:
        """Fits the memory for K and V to what is free now. A budget that was given in bytes stays what it is.

        Raises:
            ValueError: there is nothing left for K and V.
        """
        if self.cache is not None and not isinstance(options.kv_budget, int):
            self.memory.resize(_budget(options, self.cache.device, self.cache.stats().physical))

    def give_back(self) -> None:
        """Gives memory back to the device that no request needs."""
        if self.cache is not None:
            with contextlib.suppress(Error):  # of the driver
                self.cache.trim()
            if self.cache.device.type == "cuda":
                torch.cuda.empty_cache()


def tier_of(model: Any, probe: Probe, options: EngineOptions, max_model_len: int, startup: Startup) -> Tier:
    """Chooses the means, and makes the memory.

    Args:
        model: the model.
        probe: what it is like.
        options: how the engine serves.
        max_model_len: positions of the longest sequence.
        startup: is told how long the parts of this take.
    """
    config = model.config.get_text_config(decoder=True)
    as_generate = rope.depends_on_call(config, max_model_len)
    reason = _obstacle(probe) or as_generate
    if reason is None:
        context, reason = _verified(model, probe, options, max_model_len, startup)
        if reason is None:
            with startup.part("swap cost"):
                swap_is_faster = _swap_is_faster(model, context.cache.layout, probe.device, options.preemption)
            memory = KVMemory(
                context.cache,
                context.margins,
                max_model_len,
                swap_is_faster=swap_is_faster,
                reuse_prefixes=options.enable_prefix_caching,
            )
            with startup.part("compile"):
                compiled, uncompiled = _compiled(model, memory, context, probe, options)
            captures = not options.enforce_eager
            runner = FlatRunner(model, memory, context, options.max_num_seqs, captures=captures, compiled=compiled)
            return Tier("flat", None, memory, runner, context.cache, max_model_len, startup, uncompiled=uncompiled)
    for name in ("kv_cache_dtype", "attention"):
        if getattr(options, name) != "auto":
            raise ValueError(f"{name} must be 'auto': the model cannot be computed with it ({reason})")
    rows = RowMemory(
        row_caches(model),
        sum(shape.kv_heads * (shape.head_dim + shape.v_head_dim) * shape.itemsize for shape in probe.layers if shape),
        probe.state_bytes,
        max_model_len,
        _budget(options, probe.device),
    )
    row_runner = RowRunner(model, rows, recurrent=bool(probe.others), as_generate=as_generate is not None)
    whole = as_generate is not None
    return Tier("rows", reason, rows, row_runner, None, max_model_len, startup, whole_prompts=whole)


def _verified(
    model: Any, probe: Probe, options: EngineOptions, max_model_len: int, startup: Startup
) -> tuple[FlatContext, str | None]:
    """What computes the attention of flat calls, and why it cannot; else None. The rows around sequences are mapped."""
    widest = _widest_margins(model, probe, options)
    # Rows behind the longest sequence are rows of its slot, too.
    stored = _stored(probe, options)
    layout = KVLayout(
        stored,
        max_len=max_model_len + widest.behind_prompts,
        granularity=options.granularity,
        layers_per_plane=_layers_per_plane(stored, options, probe.device),
    )
    slots = 2 * options.max_num_seqs  # those of running sequences, and as many for prefixes
    with (
        startup.part("kernels"),
        contextlib.closing(KVCache(layout, slots=slots, device=probe.device, mapper=False)) as addresses,
    ):
        expected = _expected_margins(model, probe, options, addresses)
        if probe.device.type == "cuda":
            torch.cuda.empty_cache()  # of what was measured with
    for margins in dict.fromkeys((expected, widest)):  # a model may do something else than is expected
        cache = KVCache(
            layout,
            slots=slots,
            device=probe.device,
            budget=_budget(options, probe.device),
            tail_rows=margins.behind,
            lookahead=lookahead(layout),
            empties_torch=False,  # growth must not make iterations wait for the device
            host_budget=int(options.swap_space * 2**30),
        )
        context = FlatContext(cache, configs_of(model), options.attention, margins, max_model_len)
        try:
            with startup.part("verify"):
                reason = verified(model, context, probe.vocabulary)
        except BaseException:
            cache.close()
            raise
        if reason is None:
            break
        cache.close()
        if not context.needs_margins:
            break
    return context, reason


def _compiled(
    model: Any, memory: KVMemory, context: FlatContext, probe: Probe, options: EngineOptions
) -> tuple[Any, str | None]:
    """A copy of the model whose layers are compiled, and None; or None and the reason why they are not."""
    if options.enforce_eager or not options.compile:
        return None, "enforce_eager is set" if options.enforce_eager else "compile is not set"
    if context.shares_kv_across_layers:
        return None, "its layers share K and V"
    tokens = min(_TUNED_TOKENS, options.max_num_batched_tokens) if probe.device.type == "cuda" else 0
    # Some models give layers that follow each other different arguments, or have small modules that do not compile.
    for pairs, small in ((True, True), (True, False), (False, False)):
        mine = private_copy(model)
        if not compilation.drop_output_hooks(mine):
            return None, "its modules have forward hooks"
        try:
            with contextlib.suppress(torch.OutOfMemoryError):  # some weights stay where they are
                compilation.lay_side_by_side(mine)
            if not compilation.compile_layers(mine, pairs=pairs, small=small):
                return None, "it has no layers that follow each other"
            with artifacts.kept(*_identity(model, probe), pairs, small, tokens), compilation.compiled_calls():
                if tokens:
                    runner = FlatRunner(model, memory, context, options.max_num_seqs, captures=False, compiled=mine)
                    runner.rehearse(tokens, 1)
                reason = verified(model, context, probe.vocabulary, compiled=mine)
        except Exception as error:  # whatever the compiler does not support
            reason = f"{type(error).__name__}: {error}"
        if reason is None:
            return mine, None
        reason = reason.partition("\n")[0]
        _LOG.info("layers are not compiled (pairs: %s, small modules: %s): %s", pairs, small, reason)
    _LOG.warning("layers are not compiled: %s", reason)
    return None, reason


def _identity(model: Any, probe: Probe) -> tuple[Any, ...]:
    """Values that tell models apart whose layers compile to other code."""
    device = "cpu" if probe.device.type == "cpu" else torch.cuda.get_device_name(probe.device)
    return type(model).__qualname__, model.config.to_json_string(), model.dtype, VERSION, device


def _budget(options: EngineOptions, device: torch.device, held: int = 0) -> int:
    """The bytes for K and V, which hold ``held`` bytes already."""
    budget = 0.5 if options.kv_budget is None else options.kv_budget
    checked_budget(budget)
    free, total = torch.cuda.mem_get_info(device) if device.type == "cuda" else _core.host_memory()
    free += held
    if (part := options.gpu_memory_utilization) is None:
        return int(budget * free) if isinstance(budget, float) else budget
    if (left := int(part * total) - (total - free)) <= 0:
        raise ValueError(
            f"gpu_memory_utilization is {part}, and {(total - free) / total:.2f} of the memory of {device} is in use"
        )
    return left


def _stored(probe: Probe, options: EngineOptions) -> list[LayerShape | None]:
    """What each layer keeps of a token, in the dtype in which it is stored."""
    dtype = KV_DTYPES[options.kv_cache_dtype]
    return [shape if shape is None or dtype is None else replace(shape, dtype=dtype) for shape in probe.layers]


def _layers_per_plane(layers: list[LayerShape | None], options: EngineOptions, device: torch.device) -> int | None:
    """How many layers are mapped together; None for all.

    What attention reads of a layer lies on fewer pages of memory the fewer layers share these. But each plane of a
    sequence has a granule of which half is unused on average.
    """
    if device.type == "cpu":
        return None  # it makes no difference how far apart the rows of a layer are
    sizes = [shape.k_bytes + shape.v_bytes for shape in layers if shape is not None]
    wanted = -(-_POSITIONS * sum(sizes) // options.granularity)
    unused = _MOST_UNUSED * _budget(options, device) / options.max_num_seqs
    planes = max(1, min(wanted, int(2 * unused / options.granularity)))
    return -(-len(sizes) // planes)


def _swap_is_faster(
    model: Any, layout: KVLayout, device: torch.device, preemption: str
) -> Callable[[int], bool] | None:
    """Whether a sequence of so many positions is to be swapped rather than computed again; None where none is."""
    if preemption != "auto":
        return None if preemption == "recompute" else lambda positions: True
    try:
        costs = _costs(device, model.dtype)
    except Error as error:  # there is no memory to measure with
        _LOG.warning("preempted requests are computed again: the cost of a swap cannot be measured: %s", error)
        return None
    # All parameters count, also the experts of a mixture that a token does not use.
    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = _query_heads(model) or max(shape.kv_heads for shape in layout.layers if shape is not None)

    def faster(positions: int) -> bool:
        return costs.better(layout, positions, parameters=parameters, query_heads=heads) == "swap"

    return faster


@functools.cache
def _costs(device: torch.device, dtype: torch.dtype) -> SwapCosts:
    """What swapping and computing cost, measured once in a process."""
    return SwapCosts.measure(device, dtype=dtype, nbytes=_SWAPPED_BYTES)


def _obstacle(probe: Probe) -> str | None:
    """Why a model cannot be computed flat, as far as its layers tell."""
    if probe.others:
        return f"its layers keep more than K and V ({', '.join(sorted(probe.others))})"
    if not any(probe.layers):
        return "it has no layers with K and V"
    return None


def _query_heads(model: Any) -> int | None:
    """The query heads of a model, where its configuration says how many."""
    heads = getattr(model.config.get_text_config(decoder=True), "num_attention_heads", None)
    return heads if isinstance(heads, int) else None


def _widest_margins(model: Any, probe: Probe, options: EngineOptions) -> Margins:
    """Rows that kernels may load around those that a query sees, whichever kernels are chosen."""
    heads = _query_heads(model)
    found, stored = [(0, 0)], KV_DTYPES[options.kv_cache_dtype]
    for shape in filter(None, probe.layers):
        spec = AttentionSpec(
            device=probe.device.type,
            dtype=getattr(torch, shape.dtype),
            query_heads=heads or shape.kv_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            v_head_dim=shape.v_head_dim,
            kv_dtype=None if stored is None else getattr(torch, stored),
            adjacent=False,
        )
        found += [kernels.margins(spec, options.attention), kernels.margins(replace(spec, kv_dtype=None))]
    head, tail = (max(rows) for rows in zip(*found, strict=True))
    return Margins(head, tail, tail, tail)


def _expected_margins(model: Any, probe: Probe, options: EngineOptions, cache: KVCache) -> Margins:
    """The same of the kernels that are chosen, as far as a model tells before it is called what its attention is."""
    config = model.config.get_text_config(decoder=True)
    heads, stored = _query_heads(model), KV_DTYPES[options.kv_cache_dtype]
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    before = behind = behind_prompts = behind_few = 0
    for layer, shape in enumerate(probe.layers):
        if shape is None:
            continue
        rows = cache.slot_tensors(layer)
        q = torch.empty(
            1, heads or shape.kv_heads, shape.head_dim, dtype=getattr(torch, shape.dtype), device=probe.device
        )
        features: dict[str, Any] = {
            "window": shape.window is not None,
            "softcap": bool(getattr(config, "attn_logit_softcapping", None)),
            "sinks": sinks,
            "adjacent": False,
        }
        with contextlib.suppress(ValueError):  # which is said when the model is called
            spec, dtype = AttentionSpec.of(q, *rows, **features), rows[0].dtype if stored else None
            many, few = (decode_kernel(spec, options.attention, few=few) for few in (False, True))
            before = max(before, many.head_rows, few.head_rows)
            behind = max(behind, many.tail(shape.head_dim, dtype))
            behind_few = max(behind_few, few.tail(shape.head_dim, dtype))
            several = (
                kernels.choose(AttentionSpec.of(q, *rows, queries="chunk", **features), name=options.attention)
                if stored is None
                else None
            )  # else prompts are computed on copies
            if several is not None and several.mixes:
                behind_prompts = max(behind_prompts, several.tail(shape.head_dim))
    if FEW * behind_few * cache.layout.bytes_per_token > _MOST_UNUSED * _budget(options, probe.device):
        behind_few = 0  # few sequences have no kernel of their own
    return Margins(before, behind, max(behind, behind_prompts), max(behind, behind_few))
