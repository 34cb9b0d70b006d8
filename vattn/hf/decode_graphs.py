"""``DecodeGraphs``: the decode graphs of one cache, by what their steps are given; their compilation and capture."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch

from vattn import kernels
from vattn.graphs import compilation
from vattn.graphs.capture import capturable, streams
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
_MOST_GRAPHS = 8  # captured graphs of one cache


class DecodeGraphs:
    """The decode graphs of one cache. The least recently used of them goes first.

    Args:
        settings: how steps run.
        log: is told why a step is not captured or not compiled.
    """

    def __init__(self, settings: StepSettings, log: DecodeLog) -> None:
        self._settings, self._log = settings, log
        self._graphs: OrderedDict[Any, DecodeGraph] = OrderedDict()
        self._pool: Any = None  # that captures take memory from
        self._speculation: torch.cuda.Stream | None = None  # where steps begin before their calls

    def all(self) -> list[DecodeGraph]:
        """The graphs, the least recently used first."""
        return list(self._graphs.values())

    def last(self) -> DecodeGraph | None:
        """The graph that was used last."""
        return next(reversed(self._graphs.values()), None)

    def interrupt(self) -> None:
        """Notes that the next step follows no other one, so that all that a model computes by is looked at again."""
        for graph in self._graphs.values():
            graph.length = -2

    def discard(self, graph: DecodeGraph) -> None:
        """Lets a graph go."""
        self._graphs = OrderedDict((key, other) for key, other in self._graphs.items() if other is not graph)

    def clear(self) -> None:
        """Lets all graphs and their memory go."""
        self._graphs.clear()
        self._pool = None

    def graph_for(self, call: StepCall, cache: KVCache, base: int) -> DecodeGraph:
        """The graph of a step: one with rows to spare, or with just those of the batch where none may be idle.

        Args:
            call: the step.
            cache: holds the rows of all layers.
            base: slot of row 0.
        """
        for key in [key for key, graph in self._graphs.items() if graph.context.cache is not cache]:
            del self._graphs[key]  # the ``KVCache`` was rebuilt
        device = call.ids.device
        spare = self._settings.capture and capturable(device) and takes_idle(device)
        graph = self._find(call, cache, base, min(call.bucket(), cache.slots - base) if spare else call.batch)
        if graph.runner.rows > call.batch and (not graph.can.idle or graph.copies_experts()):
            graph = self._find(call, cache, base, call.batch)
            graph.can.idle = False
        graph.prepare(call)
        return graph

    def _find(self, call: StepCall, cache: KVCache, base: int, rows: int) -> DecodeGraph:
        """The graph of so many rows, which is made where there is none, or the model computes by something else now."""
        forward, length = call.forward, call.length
        key = (id(forward.model), base, call.key(rows))
        graph = self._graphs.get(key)
        if graph is None or not graph.is_of(forward, everything=length != graph.length + 1):
            graph = self._graphs[key] = self._make(call, cache, base, rows)
            while len(self._graphs) > 2 * _MOST_GRAPHS:  # not all have been captured
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
            forward.moves += 1  # some may lie elsewhere
            self._log.fall_back("weights stay where they are: there is no memory to lay them side by side")

    def capture(self, graph: DecodeGraph, call: StepCall) -> None:
        """Captures a step. What the model does that a capture does not take is noted, and the step stays eager.

        Raises:
            UnsupportedError: the step cannot be computed on slot tensors.
        """
        if reason := graph.obstacle():
            graph.can.capture = graph.can.idle = False
            self._log.fall_back(f"the step is not captured: {reason}")
            return
        if self._pool is None or not any(other.runner.captured for other in self._graphs.values()):
            self._pool = torch.cuda.graph_pool_handle()  # a pool that no graph uses any more takes no other graph
        for key in [key for key, other in self._graphs.items() if other.runner.captured][: 1 - _MOST_GRAPHS]:
            del self._graphs[key]
        if self._settings.compiled and graph.can.compiled is None:
            self._compile(graph, call)
        try:
            graph.capture(call, self._pool)
        except UnsupportedError:
            self._pool = None
            raise
        except Exception as error:  # whatever the model does that a capture does not take
            graph.can.capture = graph.can.idle = False
            self._pool = None
            _LOG.debug("a capture failed", exc_info=True)
            self._log.fall_back(f"the step cannot be captured: {_first_line(error)}")
            return
        self._log.counts["captures"] += 1

    def _compile(self, graph: DecodeGraph, call: StepCall) -> None:
        graph.can.compiled = False
        if graph.context.shares_kv_across_layers:
            self._log.fall_back("the step is not compiled: its layers share K and V")
            return
        graph.can.compiled = compilation.compiled(call.forward.original, self._settings.compile_options)
        try:
            with graph.runner.on_capture_stream(), kernels.many_shapes():
                graph.compute(call, compiled=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the model does that the compiler does not take
            graph.can.compiled = False
            _LOG.debug("a compilation failed", exc_info=True)
            self._log.fall_back(f"the step cannot be compiled: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    """The first line of the error that came first: the end of a capture or a compilation raises another one."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition("\n")[0]


register_range("vattn::capture", DecodeGraphs, "capture")
