"""``Decoder``: decides which calls of a model are decode steps or prompts on kernels, and computes them.

A decode step appends one position to every sequence of a ``VirtualCache`` and attends by a stock kernel, with the
lengths in device memory. So it can be captured once and replayed while the sequences grow. The attention of prompts can
run on kernels too. All other calls, e.g. with unusual arguments, run as they do without vattn.

The first step of each kind is computed by transformers too. A model for which the results differ keeps running as
transformers runs it; a step that cannot be captured runs without a graph.
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vattn.hf.attach import Forward, calling_model, greedy
from vattn.hf.decode_graph import DecodeGraph
from vattn.hf.decode_graphs import DecodeGraphs
from vattn.hf.decode_stats import DecodeLog, DecodeStats
from vattn.hf.padding import hidden
from vattn.hf.prefill import Prompt
from vattn.hf.step_call import StepCall, tokens_of
from vattn.hf.step_settings import StepSettings
from vattn.hf.store import Store
from vattn.hf.verify import attends_by, verified_prompt, verified_step
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import UnsupportedError
from vattn.models.state import configs_of
from vattn.ranges import register_range

_LOG = logging.getLogger("vattn")


class Decoder:
    """Computes the decode steps and the prompts of one ``VirtualCache``.

    Args:
        settings: how steps run.
        store: of the cache.

    Attributes:
        enabled: where it is False, all calls run as transformers runs them.
        graphs: a graph for each kind of step.
    """

    def __init__(self, settings: StepSettings, store: Store) -> None:
        self._settings, self._store = settings, store
        self.enabled = True
        self._log = DecodeLog()
        self.graphs = DecodeGraphs(settings, self._log)
        # For each model the kinds of prompts for which no kernel is faster.
        self._slower: weakref.WeakKeyDictionary[Forward, set[str]] = weakref.WeakKeyDictionary()

    def stats(self) -> DecodeStats:
        """Returns how steps ran so far."""
        graphs = [graph.runner for graph in self.graphs.all()]
        return self._log.stats(sum(graph.captured for graph in graphs), sum(graph.graph_bytes for graph in graphs))

    def again(self) -> Callable[[], None] | None:
        """Returns a function that replays the last step, e.g. to measure its time.

        None where the last step was no replay, or other work has followed it.
        """
        graph = self.graphs.last()
        there = graph is not None and graph.last_step != "eager" and graph.model_state.model() is not None
        return graph.again if graph is not None and there else None

    def clone(self, store: Store) -> Decoder:
        """Returns a decoder with the same settings for another cache."""
        return Decoder(self._settings, store)

    def takes(self, forward: Forward, device: torch.device) -> bool:
        """Returns whether steps of a model may be computed on slot tensors, before a particular step is looked at.

        Args:
            forward: of the model.
            device: that the model computes on.
        """
        if not self.enabled or torch.is_grad_enabled() or forward.model.training:
            return False
        config = getattr(forward.model, "config", None)
        if getattr(config, "output_attentions", False) or getattr(config, "output_hidden_states", False):
            return False
        if forward.refused:
            self._log.fallback = forward.refused
            return False
        # On a CPU nothing is captured, so that transformers' own attention is as good, unless a kernel was named.
        # Autocast caches converted weights in its context, and a captured step must not refer to these.
        asked_for = self._settings.attention is not None or device.type == "cuda"
        return asked_for and not torch.is_autocast_enabled(device.type)

    # Steps.

    def step(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Computes a call as a decode step.

        Args:
            forward: of the model that is called.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Returns:
            The output of the model; None where the call is no decode step or cannot be computed as one. Then nothing
            has been appended.
        """
        store = self._store
        call = StepCall.of(forward, store, args, kwargs)
        if call is None or not self.takes(forward, call.ids.device):
            return None
        if call.unknown is not None:
            self._log.fall_back(f"decodes as transformers does: a step is given {call.unknown}")
            return None
        if (grown := store.grow_for_step(call.batch, call.ids.device)) is None:
            return None
        cache, base, call.length = grown
        output = None
        with _on_device(call.ids), forward.step():
            try:
                with calling_model():
                    graph, output = self._computed(call, cache, base)
                    if output is not None and graph.last_step != "eager" and not graph.model_state.stayed():
                        output = None
                        self.graphs.discard(graph)
                        self.graphs.interrupt()
                        graph, output = self._computed(call, cache, base)
            finally:
                store.lengths[:] = [call.length + (output is not None)] * len(store.lengths)
            if output is not None:
                self._start_speculative(graph, call)
        if output is not None and not forward.refused:
            self._log.counts["eager" if graph.last_step == "eager" else "replayed"] += 1
            self._log.counts["speculative"] += graph.last_step == "speculative"
        return output

    def _computed(self, call: StepCall, cache: KVCache, base: int) -> tuple[DecodeGraph, Any]:
        """Returns the graph of a step and the step's output, which is None where transformers has to compute it."""
        graph = self.graphs.graph_for(call, cache, base)
        rows = graph.context.rows
        if graph.can.slots and graph.steady(call.length) and not graph.follows_other_positions():
            rows.mark()
            output = graph.step(call)
            if rows.mask_fits(call.mask, call.length):  # compared on another stream while the replay runs
                return graph, output
        while True:
            idle = graph.can.idle
            output = self._compute_slowly(graph, call)
            if output is not None or graph.can.idle == idle:
                return graph, output
            graph = self.graphs.graph_for(call, cache, base)  # the step has shown that rows cannot be idle

    def _compute_slowly(self, graph: DecodeGraph, call: StepCall) -> Any:
        """Returns the output of a step that is no plain replay, or None where transformers has to compute it."""
        if not graph.can.slots:
            return None
        if graph.follows_other_positions():
            self._log.fall_back("positions are not given, and the model's do not count from 0 on (rope_deltas)")
            return None
        rows = graph.context.rows
        rows.mark()
        if not rows.mask_fits(call.mask, call.length):
            call.store.rows.require_hidden(call.mask)
            if not rows.take_mask(call.mask, call.length):
                self._log.fall_back("the attention mask is no left padding")
                return None
        if graph.steady(call.length):
            return graph.step(call)
        graph.join_speculative(call)
        graph.fill(call)
        if not (self._settings.capture and graph.can.capture):
            return self._compute_anew(graph, call)
        with call.forward.alone() as alone:
            # Calls of the model in other threads could make a capture fail.
            return self._compute_anew(graph, call) if alone else None

    def _compute_anew(self, graph: DecodeGraph, call: StepCall) -> Any:
        """Returns the output of a step that has to be verified or captured, or that runs without a graph, or None."""
        try:
            if not graph.covers(call.length):
                return self._verify(graph, call)
            if self._settings.capture and graph.can.capture and not graph.runner.captured:
                self.graphs.capture(graph, call)
            if not graph.runner.captured:
                return graph.run(call)
            output = graph.replay(call)
            if graph.tested.covers_replay(call.length):
                return output
            return self._verify(graph, call, output)
        except UnsupportedError as reason:
            if graph.can.idle:
                graph.can.idle = False
            elif reason.of_model:
                self._log.refuse(call.forward, str(reason))
            else:
                graph.can.slots = False
                self._log.fall_back(f"decodes as transformers does: {reason}")
            return None

    def _verify(self, graph: DecodeGraph, call: StepCall, replayed: Any = None) -> Any:
        """Returns the output of a step that is compared with transformers' own, see ``verified_step``."""
        output = verified_step(graph, call, self._log, replayed)
        if output[0].is_cuda:
            # transformers' own step may take gigabytes for a moment, which later growth may need.
            torch.cuda.empty_cache()
        return output

    def _start_speculative(self, graph: DecodeGraph, call: StepCall) -> None:
        """Starts the step after a call speculatively, where a greedy ``generate`` will most likely call for it."""
        store, length = call.store, call.length + 1
        run = greedy(call.forward.model) if self._settings.run_ahead else None
        if run is None or not run.goes_on(store) or graph.last_step == "eager" or not graph.steady(length):
            return
        if graph.foretells_inputs and store.rows.grow_speculatively(length):
            store.speculative = graph.wait
            graph.start_speculative(length, run)

    # Prompts.

    def prompt(self, forward: Forward, given: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """Computes a call with several tokens for each row, with its attention on kernels.

        Args:
            forward: of a model for which ``takes`` is True.
            given: the arguments of the call by name, including ``input_ids`` or ``inputs_embeds``.
            compute: calls the model itself.

        Returns:
            The output of the model; None where the call cannot be computed on kernels. Then nothing has been appended.
        """
        store = self._store
        tokens, mask, lengths = tokens_of(given), given.get("attention_mask"), list(store.lengths)
        (batch, n), start = tokens.shape[:2], lengths[0] if lengths else 0
        if n < 2 or len(set(lengths)) != 1 or given.get("labels") is not None:
            return None
        if given.get("output_attentions") or given.get("return_dict") is False:
            return None
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != (batch, start + n)):
            return None
        configs = configs_of(forward.model)
        if forward.verified is None or forward.prompts is False or forward.verified != attends_by(forward, configs):
            return None
        if (hides := [0] * batch if mask is None else hidden(mask)) is None:
            return None
        prompt = Prompt(hides, start, n, store.windows, self._settings.kernel)
        if prompt.kind in self._slower.get(forward, ()):
            return None
        kind = prompt.kind, self._settings.kernel, prompt.binding_windows
        agreed = True
        try:
            with calling_model():
                if kind not in forward.prompt_kinds:
                    output, agreed = verified_prompt(prompt, kind, configs, store, forward, compute)
                else:
                    with prompt.run(configs):
                        output = compute()
        except UnsupportedError as reason:
            _LOG.debug("a prompt runs as transformers runs it: %s", reason)
            if reason.of_model:
                forward.prompts = False
            if prompt.slower:
                self._slower.setdefault(forward, set()).add(prompt.kind)
            store.lengths[:] = lengths
            return None
        self._log.counts["prompts"] += agreed
        return output


@contextlib.contextmanager
def _on_device(tensor: torch.Tensor) -> Iterator[None]:
    """Within this context the device of a tensor is the current one."""
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        yield


register_range("vattn::step", Decoder, "step")
register_range("vattn::prompt", Decoder, "prompt")
