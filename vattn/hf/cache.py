"""``VirtualCache``: a drop-in cache for Hugging Face models over ``KVCache``.

Row ``i`` of the batch is slot ``base + i`` of a ``KVCache``, where ``base`` is 0 but for a copy of a cache. Each update
writes the new K and V in place and returns views of exact length, so that appending tokens copies no earlier rows. Only
rows that are stored without their padding or in fewer bits are copied, where a call needs them as the model computes
them.
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
from vattn.hf.layer_states import calling, marks_of
from vattn.hf.layer_views import write
from vattn.hf.layers import VirtualLayer, foreign, virtualize
from vattn.hf.model_facts import longest
from vattn.hf.options import Options
from vattn.hf.reservation import reserve_for_call
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

    Pass it to ``model.generate(..., cache=cache)``, to a forward call or to a pipeline; before transformers 5.24 the
    keyword is ``past_key_values``. The cache is a context manager, which closes it at the end. Only one thread may use
    it at a time. A call of the model that raises an error has appended nothing, or the cache raises ValueError until
    ``reset``.

    Layers that keep more than K and V, as those of DeepSeek-V3.2 and Falcon-H1, stay transformers' own, see
    ``foreign_layers``.

    Args:
        config: the model, or its configuration, which tells the layers and their sliding windows. Where the model is
            given, decode steps run on vattn's attention, and on CUDA as replays of a graph, see ``decode_stats``. With
            None, each layer is added at its first update. A list with the K and V of each layer fills the cache with
            them, which is how transformers rebuilds a cache.
        max_len: positions of the longest sequence. It costs addresses only, no memory. None takes
            ``max_position_embeddings`` of the configuration.
        slots: rows of the largest batch; a larger batch is then an error. None sets no limit, and reserves addresses
            for more rows than the first batch has.
        device: the device that all layers must compute on; None takes that of the model's first call.
        dtype: the dtype that all layers must compute in; None takes that of the model's first call.
        budget: the limit on physical memory of each device: bytes (int), a part of what is free (float in (0, 1]), or
            None for no limit.
        layout: ``"interleaved"`` or ``"compact"``, see ``vattn.memory.layout``.
        lookahead: positions past the length that are kept mapped; None adapts to the rate of growth. See ``KVCache``.
        mapper: False maps memory in the calling thread when it is needed, and nothing ahead in the background.
        attention: the name of the kernel that decode steps use, one of ``vattn.kernels.KERNELS``, or ``"auto"`` for the
            first that can compute them. None is ``"auto"`` on CUDA; on a CPU the model's own attention then computes
            all steps.
        capture: False does not capture decode steps into CUDA graphs. A graph has 1, 2, 4, 8 or a multiple of 8 rows,
            and serves the batches up to its size.
        compiled: True compiles decode steps by ``torch.compile`` before they are captured, which takes time for each
            graph and needs ``capture``. A dict does the same, and is passed on as the compiler's ``options``. The
            weights of linear layers that are children of one module are then moved next to each other in memory, see
            ``vattn.graphs.compilation.lay_side_by_side``.
        run_ahead: whether a greedy ``generate`` starts the next captured step speculatively, with the most likely
            tokens, while the host processes the last step. When other tokens follow, the step is computed again. Pass
            False where logits processors or stopping criteria write to the model's weights, since a speculative step
            has read them before.
        kv_dtype: ``"float8_e4m3fn"`` or ``"float8_e5m2"`` stores K and V rounded to 8 bits, in half of the memory of 16
            bits. Decode steps read them with kernels that accept this dtype (``flashinfer``, ``reference``). Other
            calls after the prompt, and the ``keys`` and ``values`` of a layer, get converted copies. None stores what
            the model computes.
        kv_scales: what K and V are divided by before they are rounded: two numbers, or two tensors ``[layers]`` or
            ``[layers, kv_heads]``. None divides by nothing.
        offloading: must be False. It exists because transformers passes it when it rebuilds a cache in ``generate``.
            The rebuilt cache takes the options of the cache that it replaces.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
        SequenceTooLong: by a call that would make a sequence longer than ``max_len``.
        BudgetExceeded: by a call for which the budget does not suffice.
        OutOfDeviceMemory: by a call for which the device has no memory.
        ValueError: by a call with a batch above ``slots``, with the K and V of another model or with a wrong dtype or
            device; by a call to a closed cache; and by calls after one that ended halfway and could not be undone,
            until ``reset``.
        RuntimeError: by a call while another thread is using the cache.
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
        """Appends the new K and V of one layer.

        Args:
            key_states: ``[batch, kv_heads, n, head_dim]``.
            value_states: ``[batch, kv_heads, n, v_head_dim]``.
            layer_idx: the index of the layer.
            args: passed on to a layer of another kind, as are ``kwargs``; vattn's layers ignore them.

        Returns:
            K and V of all positions that one of the new queries may see, as views, or as copies where rows are not
            stored as the model computes them.
        """
        # This method runs for every layer of every token. What is prepared in ``ready`` is written without further
        # checks; everything out of the ordinary goes to ``VirtualLayer.update``.
        store = self._store
        if self.decoder is not None and (step := running()) is not None and step.store is store:
            k, v = step.update(layer_idx, key_states, value_states)
            return k, v
        if ready := store.ready.get(layer_idx):
            new, k, v, (k_shape, v_numel, end) = ready
            if (
                key_states.shape == k_shape  # the write would broadcast another shape
                and value_states.numel() == v_numel
                and key_states.dtype is value_states.dtype is k.dtype  # and convert another dtype
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
        """Removes the last positions of every layer.

        Args:
            tokens_to_remove: minus the number of positions to remove. A positive number is the length to keep with
                transformers before 5.18, and an error since.

        Raises:
            ValueError: a sliding window has moved past the length asked for.
        """
        lengths = list(self._store.lengths)
        for layer in self._own():
            lengths[layer.index] = layer.cropped_length(tokens_to_remove)
        with self._calling_others("crop", tokens_to_remove):
            self._store.truncate(lengths)

    def reset(self) -> None:
        """Empties the cache. It keeps its memory for the next sequences; ``trim`` gives it back."""
        self._store.reset()
        for layer in self.layers:
            if isinstance(layer, VirtualLayer):
                layer.is_initialized = False
            else:
                layer.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Makes row ``i`` what row ``beam_idx[i]`` was."""
        with self._calling_others("reorder_cache", beam_idx):
            self._store.gather(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row ``repeats`` times."""
        rows = self._store.rows.batch
        with self._calling_others("batch_repeat_interleave", repeats):
            self._store.gather(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows that ``indices``, integers or a mask, select."""
        with self._calling_others("batch_select_indices", indices):
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
        """Within this context the empty cache stores a prompt without its padding on the left.

        Models whose decode steps run on vattn's attention enter this context by themselves. After such a prompt, calls
        that are no decode steps get copies with zeros for the padding. Operations that need whole rows (``crop``,
        ``reorder_cache``, the ``keys`` of a layer) move the rows and store the padding as zeros.

        Args:
            attention_mask: ``[batch, length]``, 0 or False where a position is padding. None changes nothing, and so
                does a mask that hides other positions than some on the left.
        """
        with self._store.rows.unpadded(attention_mask):
            yield

    decoder: Decoder | None = None
    _model: Callable[[], Any] = staticmethod(lambda: None)  # returns the model that the cache was made with

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within this context the cache belongs to the calling thread.

        Raises:
            RuntimeError: it belongs to another thread.
        """
        with self._store.guard.claimed():
            yield

    @contextlib.contextmanager
    def in_call(self, model: Any, given: dict[str, Any], half: str) -> Iterator[None]:
        """Within this context a call of a model appends to the cache; after an error it has appended nothing.

        Where a failed call has changed the state of a layer of another kind, the cache is torn until ``reset``.

        Args:
            model: the model that is called.
            given: the arguments of the call by name.
            half: ``"whole"``, or for an encoder-decoder ``"self"`` or ``"cross"``, where ``"cross"`` is the half that
                holds the K and V of the encoder's output.
        """
        store = self._store
        store.require_usable()
        if half == "cross":
            self.serve_as_cross()
        reserve_for_call(store, model, given, half)
        before, states = list(store.lengths), marks_of(self._others())
        try:
            yield
        except BaseException as error:
            store.roll_back(before)
            if marks_of(self._others()) != states:
                store.guard.torn = f"a call of the model ended halfway ({type(error).__name__})"
            raise

    def _others(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, VirtualLayer)]

    @contextlib.contextmanager
    def prompt(self, forward: Forward, given: dict[str, Any]) -> Iterator[Callable[[Callable[[], Any]], Any] | None]:
        """Within this context a model computes a call that is no decode step.

        Args:
            forward: of the model.
            given: the arguments of the call by name.

        Yields:
            A function that computes the call with its attention on kernels, given one that calls the model; it returns
            None where it cannot. None where the model takes no decode steps on slot tensors.
        """
        store, tokens, mask = self._store, tokens_of(given), given.get("attention_mask")
        flat = isinstance(mask, torch.Tensor) and mask.dim() == 2
        if mask is None or flat:
            store.rows.require_hidden(mask)
        if tokens is not None and tokens.shape[1] == 1:
            store.cancel_speculative()
            store.rows.restore_padding()  # more such calls may follow, each of which would copy the rows
        if self.decoder is None or tokens is None or not self.decoder.takes(forward, tokens.device):
            yield None
            return
        decoder = self.decoder
        with self.unpadded(mask if flat else None):
            yield lambda compute: decoder.prompt(forward, given, compute)

    @property
    def foreign_layers(self) -> dict[str, list[int]]:
        """Indices of the attention layers that stay transformers' own, by the name of their class.

        The options of this cache do not apply to these layers.
        """
        return foreign(self.layers)

    def serve_as_cross(self) -> None:
        """Makes an empty cache keep all positions, since an encoder's output is not subject to a decoder's windows."""
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
        """Returns how decode steps ran so far; None where the cache was not made with a model, or was detached."""
        return None if self.decoder is None else self.decoder.stats()

    @contextlib.contextmanager
    def eager(self) -> Iterator[None]:
        """Within this context decode steps run as transformers runs them, without vattn's attention and graphs."""
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
        """The ``KVCache``s that hold the rows: one for each device of the model, none before the first call.

        A cache that was made with neither a model nor a configuration has one for each layer.
        """
        return [rows.cache for rows in self._store.placement.rows.values()]

    def stats(self) -> CacheStats:
        """Returns memory and driver calls, summed over ``kv_caches`` (but the largest ``lookahead``)."""
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
        """Sets the limit on the physical memory of each device, also of devices that are used later.

        Args:
            budget: as in ``KVCache.set_budget``.

        Raises:
            BudgetExceeded: running sequences on a device need more. The devices before it have the new budget.
        """
        self._store.placement.set_budget(budget)

    def trim_on_oom(self) -> TrimOnOOM:
        """Returns a context in which torch operations that run out of device memory are tried again after a trim.

        See ``KVCache.trim_on_oom``.
        """
        return TrimOnOOM(self.trim)

    def check(self) -> None:
        """Checks the invariants of ``kv_caches``, and raises ``vattn.Error`` where one is broken."""
        for cache in self.kv_caches:
            cache.check()

    def close(self) -> None:
        """Gives all memory back. Neither the cache nor views that it returned may be used afterwards."""
        self._store.close()
        if self.decoder is not None:
            self.decoder.graphs.clear()
        if (model := self._model()) is not None:
            attach.detach(model, self)

    def detach(self) -> None:
        """Detaches the cache from the model that it was made with; the cache remains usable, without decode steps.

        The model's methods are restored once its last cache is detached, closed or deleted. Weights that were moved
        next to each other for compiled steps stay where they are.
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

    def _calling_others(self, name: str, *args: Any) -> contextlib.AbstractContextManager[None]:
        """Calls a method of the layers of other kinds, which may refuse it, before the context changes this cache."""
        self._store.cancel_speculative()
        return calling(self._others(), name, *args)

    def _own(self) -> Iterator[VirtualLayer]:
        return (layer for layer in self.layers if isinstance(layer, VirtualLayer))


def _is_layer(value: Any) -> bool:
    """Returns whether a value begins with the K and V of a layer, or with None where the layer is empty."""
    pair = isinstance(value, (list, tuple)) and len(value) >= 2
    return pair and all(t is None or isinstance(t, torch.Tensor) for t in value[:2])


def _replaced_options(layers: Any) -> Options | None:
    """Returns the options of the cache that a new one replaces in this context, or None.

    That is the cache of the running ``generate``. For a new cache that is filled with ``layers``, it is otherwise the
    cache that this thread last appended to.
    """
    if (cache := attach.replaced.get()) is not None:
        return cache._store.options  # type: ignore[no-any-return]
    store = last_of_thread() if layers else None
    return None if store is None else store.options
