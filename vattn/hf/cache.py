"""``VirtualCache``: a drop-in cache for Hugging Face models over ``KVCache``.

Row ``i`` of the batch is slot ``i``. Each update writes the new K and V in place and returns views of exact length, so
nothing of the size of the cache is ever copied while tokens are appended.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, NoReturn

import torch
from transformers.cache_utils import DynamicCache

from vattn.arguments import flag, shown
from vattn.hf import attach
from vattn.hf.attach import Forward
from vattn.hf.decode_stats import DecodeStats
from vattn.hf.decoder import Decoder
from vattn.hf.layer_views import write
from vattn.hf.layers import VirtualLayer, foreign, virtualize
from vattn.hf.model_facts import expected_layers, layer_devices, longest
from vattn.hf.options import Options
from vattn.hf.step_call import tokens_of
from vattn.hf.step_settings import StepSettings
from vattn.hf.store import last_of_thread
from vattn.kernels.quantize import Scales
from vattn.memory.device import TrimOnOOM
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import Kind
from vattn.memory.stats import CacheStats
from vattn.models.attention import running

_LOG = logging.getLogger("vattn")
attach.claim_in_generate()


class VirtualCache(DynamicCache):  # type: ignore[misc]
    """A KV cache for Hugging Face models whose address never changes and whose memory grows.

    Hand it to ``model.generate(..., cache=cache)``, to a forward call or to a pipeline; before transformers 5.24 the
    keyword is ``past_key_values``. What is None is taken from the model's first call.

    Args:
        config: the model, or its configuration, which tells the layers and their windows. Given the model, decode steps
            run on vattn's attention, and on CUDA as replays of a graph: see ``decode_stats``. None takes layers as they
            come. K and V of each layer in a list fill the cache, as transformers does when it rebuilds one.
        max_len: positions of the longest sequence. Costs addresses only. None is what the configuration allows,
            ``max_position_embeddings``.
        slots: rows of the largest batch; None reserves plenty. A batch above a given number is an error.
        device: the device all layers must compute on.
        dtype: the dtype all layers must compute in.
        budget: limit on physical memory of each device: bytes (int), a part of what is free (float in (0, 1]), or None.
        layout: ``"interleaved"`` or ``"compact"``, see ``vattn.memory.layout``.
        lookahead: positions that are kept mapped past the length; None adapts to the rate of growth. See ``KVCache``.
        mapper: False maps in the calling thread, when memory is needed, and not ahead in the background.
        attention: the kernel of decode steps, of ``vattn.kernels.KERNELS``, or ``"auto"`` for the first that does it.
            None is ``"auto"`` on CUDA; on a CPU the model's own attention then computes all steps.
        capture: False does not capture decode steps into CUDA graphs. A graph has 1, 2, 4, 8 or a multiple of 8 rows,
            for the batches that come up to that.
        compiled: compiles decode steps by ``torch.compile`` before they are captured (so ``capture`` must be True),
            which takes its time for each graph; a dict is passed on as its ``options``. Weights of linear layers side
            by side in a module then come to lie side by side in memory, see ``lay_side_by_side`` of
            ``vattn.graphs.compilation``.
        run_ahead: lets a greedy ``generate`` begin the next captured step with the most likely tokens while the host is
            at the last one's; a step of others is computed again. False begins none before its call; it is for logits
            processors and stopping criteria that write to the model's weights, which a step that runs already has read.
        kv_dtype: ``"float8_e4m3fn"`` or ``"float8_e5m2"`` stores K and V in half of the memory of 16 bits, rounded.
            Decode steps read them by kernels that take them (``flashinfer``, ``reference``); what else comes behind a
            prompt gets copies, as the ``keys`` of a layer are. None stores what the model computes.
        kv_scales: what K and V are divided by before they are rounded: two numbers, or two tensors ``[layers]`` or
            ``[layers, kv_heads]``. None is 1.
        offloading: False; it is there since transformers names it when it rebuilds a cache in ``generate``, where what
            is not given is that of the cache that it replaces.

    Layers that keep more than K and V, as those of DeepSeek-V3.2 and Falcon-H1, stay transformers' own: see
    ``foreign_layers``. It is a context manager, which closes it.

    One thread at a time uses it. What raises in a call of the model has appended nothing.

    Raises (at the first call that needs it):
        SequenceTooLong: a sequence would exceed ``max_len``.
        BudgetExceeded: the budget is spent.
        OutOfDeviceMemory: the device is full.
        ValueError: a batch above ``slots``, another model's keys, a wrong dtype or device, a closed cache; or a call
            has ended halfway that could not be taken back: ``reset`` it.
        RuntimeError: another thread is using the cache.
    """

    def __init__(
        self,
        config: Any,
        *,
        max_len: int | None = None,
        slots: int | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        budget: int | float | None = None,
        layout: Kind = "interleaved",
        lookahead: int | None = None,
        mapper: bool = True,
        attention: str | None = None,
        capture: bool = True,
        compiled: bool | dict[str, Any] = False,
        run_ahead: bool = True,
        kv_dtype: str | torch.dtype | None = None,
        kv_scales: tuple[Any, Any] | None = None,
        offloading: bool = False,
    ) -> None:
        if flag("offloading", offloading):
            raise ValueError("offloading is not for a VirtualCache: give it a budget, or use a DynamicCache")
        if kv_dtype is None and kv_scales is not None:
            raise ValueError("kv_scales need a kv_dtype")
        settings = StepSettings(attention, capture, compiled, run_ahead)
        model = config if isinstance(config, torch.nn.Module) else None
        config = config if model is None else getattr(model, "config", model)
        layers = config if isinstance(config, (list, tuple)) and all(map(_is_layer, config)) else ()
        config = None if layers else config
        if config is not None and not hasattr(config, "get_text_config"):
            raise TypeError(f"config must be a model of transformers or its configuration, not {shown(config)}")
        told = (max_len, slots, device, dtype, budget, lookahead, attention, kv_dtype)
        nothing_told = all(each is None for each in told) and (layout, mapper) == ("interleaved", True)
        if nothing_told and (replaced := _replaced_options(layers)) is not None:
            super().__init__(config=config)
            virtualize(self, replaced)
            self._fill(layers)
            return
        options = Options(
            max_len=longest(config) if max_len is None else max_len,
            slots=slots,
            device=device,
            dtype=dtype,
            budget=budget,
            layout=layout,
            lookahead=lookahead,
            mapper=mapper,
            kernels=() if model is None else settings.kernels(),
            scales=None if kv_dtype is None else Scales(kv_dtype, kv_scales),
        )
        super().__init__(config=config)
        virtualize(self, options)
        self._fill(layers)
        if model is not None:
            self.decoder = Decoder(settings, self._store)
            self._model = weakref.ref(model)
            attach.attach(model, self)

    def _fill(self, layers: Any) -> None:
        for index, (k, v, *_) in enumerate(layers):
            if k is not None and v is not None:
                self.update(k, v, index)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends one layer's new K and V, ``[batch, kv_heads, n, head_dim]``, and returns views of all of them."""
        # This runs for every layer of every token; the way through the layer is for what is out of the ordinary.
        store = self._store
        if self.decoder is not None and (step := running()) is not None and step.store is store:
            k, v = step.update(layer_idx, key_states, value_states)
            return k, v
        if ready := store.ready.get(layer_idx):
            new, k, v, (k_shape, v_numel, end) = ready
            if (
                key_states.shape == k_shape  # a copy would broadcast
                and value_states.numel() == v_numel
                and key_states.dtype == value_states.dtype == k.dtype  # and convert
                and key_states.device == value_states.device == k.device
                and not key_states.requires_grad
                and not value_states.requires_grad
            ):
                write(new, key_states, value_states)
                store.ready.pop(layer_idx, None)
                store.lengths[layer_idx] = end
                return k, v
        if layer_idx >= len(self.layers) and not store.placement.open_ended:
            raise ValueError(
                f"layer {layer_idx} does not exist: the cache was made for a model of {len(self.layers)} layers. "
                "Use one VirtualCache for each model"
            )
        while layer_idx >= len(self.layers):
            self.layers.append(VirtualLayer(store, store.add_layer()))
        updated: tuple[torch.Tensor, torch.Tensor] = self.layers[layer_idx].update(
            key_states, value_states, *args, **kwargs
        )
        return updated

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last ``-tokens_to_remove`` positions of every layer, as the installed transformers means it.

        Raises:
            ValueError: a sliding window has moved past the length asked for.
        """
        lengths = list(self._store.lengths)
        for layer in self._own():
            lengths[layer.index] = layer.cropped_length(tokens_to_remove)
        with self._each_other("crop", tokens_to_remove):
            self._store.truncate(lengths)

    def reset(self) -> None:
        """Empties the cache. The memory stays with it, for the next sequences; see ``trim``."""
        self._store.reset()
        for layer in self.layers:
            if isinstance(layer, VirtualLayer):
                layer.is_initialized = False
            else:
                layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row ``i`` what row ``beam_idx[i]`` was."""
        with self._each_other("reorder_cache", beam_idx):
            self._store.gather(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        rows = self._store.rows.batch
        with self._each_other("batch_repeat_interleave", repeats):
            self._store.gather(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows that ``indices``, integers or a mask, select."""
        with self._each_other("batch_select_indices", indices):
            self._store.gather(indices)

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualCache:
        memo[id(self)] = other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._store = self._store.clone()
        other.decoder = self.decoder and self.decoder.clone(other._store)
        if self.decoder is not None and (model := self._model()) is not None:
            attach.attach(model, other)
        other.layers = [
            layer.clone(other._store) if isinstance(layer, VirtualLayer) else copy.deepcopy(layer, memo)
            for layer in self.layers
        ]
        return other

    @contextlib.contextmanager
    def unpadded(self, attention_mask: torch.Tensor | None) -> Iterator[None]:
        """While it lasts, a prompt that the empty cache is given is stored without its padding on the left.

        Calls of a model that take vattn's decode steps do so by themselves. What else than steps comes behind such a
        prompt gets copies with zeros for the padding, and whatever needs all of a row at once, as ``crop``,
        ``reorder_cache`` and the ``keys`` of a layer, stores the padding, as zeros.

        Args:
            attention_mask: ``[batch, length]``, 0 or False for the padding; None, and one that hides anything else
                than a part on the left, changes nothing.
        """
        with self._store.rows.unpadded(attention_mask):
            yield

    decoder: Decoder | None = None
    _model: Callable[[], Any] = staticmethod(lambda: None)  # that it was made with

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """While it lasts the cache is this thread's.

        Raises:
            RuntimeError: it is another one's.
        """
        with self._store.guard.claimed():
            yield

    @contextlib.contextmanager
    def in_call(self, model: Any, given: dict[str, Any], half: str) -> Iterator[None]:
        """Is around a model's call that its layers write to; what fails in it has appended nothing.

        Args:
            model: whose call it is.
            given: its arguments by name.
            half: ``"cross"`` where the cache holds what a decoder sees of its encoder.
        """
        store = self._store
        store.require_usable()
        if half == "cross":
            self.serve_as_cross()
        self._reserve(model, given, half)
        before, states = list(store.lengths), self._other_states()
        try:
            yield
        except BaseException as error:
            store.roll_back(before)
            if self._other_states() != states:
                store.guard.torn = f"a call of the model ended halfway ({type(error).__name__})"
            raise

    def _reserve(self, model: Any, given: dict[str, Any], half: str) -> None:
        """Has memory for what a call will append, where several layers or caches would find out one after another."""
        store = self._store
        if half == "whole" and all(store.placement.cached):
            several = len(store.placement.rows) if store.placement.expected else len(set(layer_devices(model).values()))
            if several < 2:
                return  # the first layer asks for all
        names = ["decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"]
        if half == "cross":
            if any(store.lengths):
                return
            names = names[2:]
        found = [given.get(name) for name in names]
        if half == "cross" and (encoded := given.get("encoder_outputs")) is not None:
            found.insert(0, encoded[0])
        tokens = next((t for t in found if isinstance(t, torch.Tensor) and t.dim() >= 2), None)
        if tokens is not None:
            store.reserve(*tokens.shape[:2], lambda: expected_layers(model, store.placement))

    def _other_states(self) -> list[Any]:
        """What layers of other kinds hold, as far as a change of it is to be noticed."""
        return [_marks(vars(layer)) for layer in self.layers if not isinstance(layer, VirtualLayer)]

    @contextlib.contextmanager
    def prompt(self, forward: Forward, given: dict[str, Any]) -> Iterator[Callable[[Callable[[], Any]], Any] | None]:
        """Is around a model's call that is no decode step, with its arguments by name; yields what may compute it."""
        store, tokens, mask = self._store, tokens_of(given), given.get("attention_mask")
        flat = isinstance(mask, torch.Tensor) and mask.dim() == 2
        if mask is None or flat:
            store.rows.require_hidden(mask)
        if tokens is not None and tokens.shape[1] == 1:
            store.cancel_speculative()
            store.rows.restore_padding()  # others may follow, and would copy
        if self.decoder is None or tokens is None or not self.decoder.takes(forward, tokens.device):
            yield None
            return
        decoder = self.decoder
        with self.unpadded(mask if flat else None):
            yield lambda compute: decoder.prompt(forward, given, compute)

    @property
    def foreign_layers(self) -> dict[str, list[int]]:
        """Layers that keep rows and are transformers' own, by their class: no option of this cache is of them."""
        return foreign(self.layers)

    def serve_as_cross(self) -> None:
        """Has the empty cache keep all positions, as those of an encoder, whatever windows a decoder's layers have."""
        store = self._store
        if store.placement.seen or not any(store.windows):
            return
        store.windows[:] = [None] * len(store.windows)
        for layer in list(self._own()):
            self.layers[layer.index] = VirtualLayer(store, layer.index)

    def __enter__(self) -> VirtualCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def decode_stats(self) -> DecodeStats | None:
        """How decode steps ran so far; None where the cache was made with a configuration."""
        return None if self.decoder is None else self.decoder.stats()

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """While it lasts, decode steps run as transformers runs them, without vattn's attention and without graphs."""
        if self.decoder is None:
            yield
            return
        before, self.decoder.enabled = self.decoder.enabled, False
        try:
            yield
        finally:
            self.decoder.enabled = before

    @property
    def kv_caches(self) -> list[KVCache]:
        """The ``KVCache`` under each device that the model has computed on, empty before the first call."""
        return [rows.cache for rows in self._store.placement.rows.values()]

    def stats(self) -> CacheStats:
        """Memory and driver calls, summed over ``kv_caches`` (the longest lookahead); see ``CacheStats``."""
        total: dict[str, Any] = {field.name: 0 for field in fields(CacheStats)}
        total |= {"driver_calls": {}, "background_calls": {}, "budget": None}
        for cache in self.kv_caches:
            stats = cache.stats()
            for name, value in vars(stats).items():
                if isinstance(value, dict):
                    for call, count in value.items():
                        total[name][call] = total[name].get(call, 0) + count
                elif name == "lookahead":
                    total[name] = max(total[name], value)
                elif value is not None:
                    total[name] = (total[name] or 0) + value
        return CacheStats(**total)

    def trim(self) -> None:
        """Gives memory back to the driver that no sequence in the cache needs."""
        for cache in self.kv_caches:
            cache.trim()

    def set_budget(self, budget: int | float | None) -> None:
        """Sets the limit on the physical memory of each device, also of those to come; see ``KVCache.set_budget``.

        When it raises BudgetExceeded for one device, the devices before it have the new budget.
        """
        self._store.placement.set_budget(budget)

    def trim_on_oom(self) -> TrimOnOOM:
        """While it lasts, torch operations that run out of device memory are tried again after a trim.

        See ``KVCache.trim_on_oom``.
        """
        return TrimOnOOM(self.trim)

    def check(self) -> None:
        """Recounts everything; raises ``vattn.Error`` where an invariant is broken."""
        for cache in self.kv_caches:
            cache.check()

    def close(self) -> None:
        """Gives all memory back. Views returned earlier must not be read any more, and the cache not be used."""
        self._store.close()
        if self.decoder is not None:
            self.decoder.graphs.clear()
        if (model := self._model()) is not None:
            attach.detach(model, self)

    def detach(self) -> None:
        """Lets the model that the cache was made with be what it was; the cache goes on without decode steps.

        A model is what it was once its last cache has gone, is closed or detached. Weights that compiled steps have
        laid side by side stay where they are.
        """
        if self.decoder is not None:
            self.decoder.graphs.clear()
            self._store.cancel_speculative()
        if (model := self._model()) is not None:
            attach.detach(model, self)
        self.decoder = None

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a VirtualCache cannot be pickled, or copied but by copy.deepcopy, which makes one that shares its memory: "
            "save clones of its layers' keys and values"
        )

    def _own(self) -> Iterator[VirtualLayer]:
        return (layer for layer in self.layers if isinstance(layer, VirtualLayer))

    @contextlib.contextmanager
    def _each_other(self, name: str, *args: Any) -> Iterator[None]:
        """Calls a method of the layers of other kinds, which may refuse it; what fails in the context undoes that."""
        others = [layer for layer in self.layers if not isinstance(layer, VirtualLayer)]
        self._store.cancel_speculative()
        before = [_copied(vars(layer)) for layer in others]  # they put new tensors in the place of the old ones
        try:
            for layer in others:
                getattr(layer, name)(*args)
            yield
        except BaseException:
            for layer, state in zip(others, before, strict=True):
                vars(layer).clear()
                vars(layer).update(state)
            raise


def _marks(value: Any) -> Any:
    """Something that is another one when tensors in a value are others, or were written to."""
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict):
        return {name: _marks(each) for name, each in value.items()}
    return [_marks(each) for each in value] if isinstance(value, (list, tuple)) else value


def _copied(value: Any) -> Any:
    """A value whose containers may be written to without changing it."""
    if isinstance(value, dict):
        return {name: _copied(each) for name, each in value.items()}
    return [_copied(each) for each in value] if isinstance(value, list) else value


def _is_layer(value: Any) -> bool:
    """Whether it is K and V of a layer, and perhaps more."""
    return isinstance(value, (list, tuple)) and len(value) >= 2 and all(isinstance(t, torch.Tensor) for t in value[:2])


def _replaced_options(layers: Any) -> Options | None:
    """Of the cache that transformers replaces by another one here, if any."""
    if (cache := attach.replaced.get()) is not None:
        return cache._store.options  # type: ignore[no-any-return]
    store = last_of_thread() if layers else None
    return None if store is None else store.options
