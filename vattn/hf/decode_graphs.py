"""``DecodeGraphs``: the decode graphs of one cache, and how they are found, compiled and captured."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from typing import Any

import torch

from vattn import kernels
from vattn.graphs import compilation
from vattn.graphs.capture import capturable, cause_of, streams
from vattn.graphs.runner import GraphRunner
from vattn.hf.attach import Forward
from vattn.hf.decode_context import DecodeContext
from vattn.hf.decode_graph import DecodeGraph, TestedSteps
from vattn.hf.decode_stats import DecodeLog
from vattn.hf.step_call import StepCall
from vattn.hf.step_rows import StepRows
from vattn.hf.step_settings import StepSettings
from vattn.kernels.append import takes_idle
from vattn.memory.kv_cache import KVCache
from vattn.models.attention import UnsupportedError
from vattn.ranges import register_range

_LOG = logging.getLogger("vattn")
_MOST_GRAPHS = 8  # captured graphs that a cache keeps


class DecodeGraphs:
    """The decode graphs of one cache. Where there are too many, the least recently used graph is dropped.

    Args:
        settings: how steps run.
        log: notes why a step is not captured or not compiled.
    """

    def __init__(self, settings: StepSettings, log: DecodeLog) -> None:
        self._settings, self._log = settings, log
        self._graphs: OrderedDict[Any, DecodeGraph] = OrderedDict()
        self._pool: Any = None  # the graph pool that captures take memory from
        self._speculation: torch.cuda.Stream | None = None  # the stream of speculative steps

    def all(self) -> list[DecodeGraph]:
        """Returns the graphs, the least recently used first."""
        return list(self._graphs.values())

    def last(self) -> DecodeGraph | None:
        """Returns the graph that was used last, or None."""
        return next(reversed(self._graphs.values()), None)

    def interrupt(self) -> None:
        """Notes that the next step does not directly follow the last one.

        The whole state of the model is then compared before the step.
        """
        for graph in self._graphs.values():
            graph.length = -2

    def discard(self, graph: DecodeGraph) -> None:
        """Drops a graph."""
        self._graphs = OrderedDict((key, other) for key, other in self._graphs.items() if other is not graph)

    def clear(self) -> None:
        """Drops all graphs with their memory."""
        self._graphs.clear()
        self._pool = None

    def graph_for(self, call: StepCall, cache: KVCache, base: int) -> DecodeGraph:
        """Returns the graph of a step, prepared for its batch.

        The graph has the rows of ``call.bucket()``, some of which may be idle, or just those of the batch where rows
        cannot be idle.

        Args:
            call: the step.
            cache: holds the rows of all layers.
            base: slot of row 0.
        """
        for key in [key for key, graph in self._graphs.items() if graph.context.cache is not cache]:
            del self._graphs[key]  # its ``KVCache`` was replaced by another one
        device = call.ids.device
        spare = self._settings.capture and capturable(device) and takes_idle(device)
        graph = self._find(call, cache, base, min(call.bucket(), cache.slots - base) if spare else call.batch)
        if graph.runner.rows > call.batch and (not graph.can.idle or graph.copies_experts()):
            graph = self._find(call, cache, base, call.batch)
            graph.can.idle = False
        graph.prepare(call)
        return graph

    def _find(self, call: StepCall, cache: KVCache, base: int, rows: int) -> DecodeGraph:
        """Returns the graph with ``rows`` rows. It is made where there is none, or where the model has changed."""
        forward, length = call.forward, call.length
        key = (id(forward.model), base, call.key(rows))
        graph = self._graphs.get(key)
        if graph is None or not graph.is_of(forward, everything=length != graph.length + 1):
            graph = self._graphs[key] = self._make(call, cache, base, rows)
            while len(self._graphs) > 2 * _MOST_GRAPHS:  # ``capture`` limits those that are captured
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        graph.length = length
        return graph

    def _make(self, call: StepCall, cache: KVCache, base: int, rows: int) -> DecodeGraph:
        device, settings = call.ids.device, self._settings
        stream, side = streams(device) if call.ids.is_cuda else (None, None)
        if call.ids.is_cuda and self._speculation is None:
            self._speculation = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        if settings.compiled:
            self._lay_side_by_side(call.forward)
        context = DecodeContext(cache, base, StepRows(rows, cache.device, side), settings.kernel, settings.capture)
        by_rows = {name for name, given in call.tensors.items() if given is not None and call.by_rows(given)}
        runner = GraphRunner(call.inputs(rows), by_rows, rows, stream, self._speculation)
        windows = sorted({window for window in call.store.windows if window is not None})
        return DecodeGraph(context, runner, call, TestedSteps(windows), capturable(device))

    def _lay_side_by_side(self, forward: Forward) -> None:
        try:
            forward.move(compilation.lay_side_by_side)
        except torch.OutOfMemoryError:
            forward.moves += 1  # some weights may have been moved before the error
            self._log.fall_back("weights stay where they are: there is no memory to lay them side by side")

    def capture(self, graph: DecodeGraph, call: StepCall) -> None:
        """Captures a step, after it was compiled where ``settings`` say so.

        Where the step cannot be captured, the reason is logged and the step stays eager.

        Args:
            graph: of the step.
            call: the step.

        Raises:
            UnsupportedError: the step cannot be computed on slot tensors.
        """
        if reason := graph.obstacle():
            graph.can.capture = graph.can.idle = False
            self._log.fall_back(f"the step is not captured: {reason}")
            return
        if self._pool is None or not any(other.runner.captured for other in self._graphs.values()):
            self._pool = torch.cuda.graph_pool_handle()  # a pool cannot be used again once no graph uses it
        for key in [key for key, other in self._graphs.items() if other.runner.captured][: 1 - _MOST_GRAPHS]:
            del self._graphs[key]
        if self._settings.compiled and graph.can.compiled is None:
            self._compile(graph, call)
        handled = sys.exc_info()[1]
        try:
            graph.capture(call, self._pool)
        except UnsupportedError:
            self._pool = None
            raise
        except Exception as error:  # a model may do anything that a capture does not allow
            graph.can.capture = graph.can.idle = False
            self._pool = None
            _LOG.debug("a capture failed", exc_info=True)
            self._log.fall_back(f"the step cannot be captured: {cause_of(error, handled)}")
            return
        self._log.counts["captures"] += 1

    def _compile(self, graph: DecodeGraph, call: StepCall) -> None:
        graph.can.compiled = False
        if graph.context.shares_kv_across_layers:
            self._log.fall_back("the step is not compiled: its layers share K and V")
            return
        graph.can.compiled = compilation.compiled(call.forward.original, self._settings.compile_options)
        handled = sys.exc_info()[1]
        try:
            with graph.runner.on_capture_stream(), kernels.many_shapes():
                graph.compute(call, compiled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model may do anything that the compiler does not support
            graph.can.compiled = False
            _LOG.debug("a compilation failed", exc_info=True)
            self._log.fall_back(f"the step cannot be compiled: {cause_of(error, handled)}")


register_range("vattn::capture", DecodeGraphs, "capture")
