"""``BatchGraphs``: CUDA graphs of one computation for batches of different sizes, captured when first needed."""

from __future__ import annotations

import logging
import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vattn.graphs.capture import capturable, cause_of, streams, unowned
from vattn.graphs.runner import GraphRunner
from vattn.kernels.check import relative_errors

_LOG = logging.getLogger("vattn")
_MOST_FAILURES = 3  # captures of a size that find no memory
# How far the output of a replay may deviate from that of the computation, relative to the norm of a row: cuBLAS may
# choose other products during a capture.
_MAY_DEVIATE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class _Graph:
    """A captured batch.

    Args:
        runner: replays it.
        live: how many elements of each input the last batch had; the others are 0.
        parts: the inputs without the others.
        held: the last batch, in the order of the inputs.
        outputs: of the computation; None before it was captured.
    """

    runner: GraphRunner
    live: list[int] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    held: list[torch.Tensor] = field(default_factory=list)
    outputs: tuple[torch.Tensor, ...] | None = None

    def fill(self, given: dict[str, torch.Tensor]) -> None:
        """Copies a batch to the inputs. Tensors of the last batch are there already."""
        batch = [given[name] for name in self.runner.inputs]
        if self.held and all(map(operator.is_, batch, self.held)):
            return
        self.held = []  # not known, should an exception interrupt this method
        live = [len(each) for each in batch]
        if live != self.live:
            self.live = []
            with torch.inference_mode(False):
                self.parts = []
                for each, n in zip(self.runner.inputs.values(), live, strict=True):
                    each[n:].zero_()
                    self.parts.append(each[:n])
            self.live = live
        torch._foreach_copy_(self.parts, batch, non_blocking=True)
        self.held = batch


class BatchGraphs:
    """CUDA graphs of one computation for batches of different sizes, captured when they are first needed.

    A graph may be larger than a batch. What a batch lacks is idle: the inputs are 0 there.

    Args:
        compute: computes a batch of the inputs by name, one-dimensional tensors; returns tensors ``[rows, ...]``, of
            which the first tells whether a replay gives the same.
        inputs: the dtype of each input.
        sizes: the elements that the inputs of a graph have, by those that the inputs of a batch have.
        rows: the names of inputs. Outputs have a row for each element of the first, then for each of the next.
        device: the device.
        changes: the tensors that ``compute`` changes besides, such that a second call gives something else.

    Attributes:
        refused: why no batch is captured or replayed any more; None while they are.
    """

    def __init__(
        self, compute: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, ...]], inputs: dict[str, torch.dtype],
        sizes: Callable[[dict[str, int]], dict[str, int]], rows: tuple[str, ...], device: torch.device,
        changes: Callable[[], Sequence[torch.Tensor]] = tuple,
    ) -> None:  # fmt: skip
        self._compute, self._inputs, self._sizes, self._rows = compute, inputs, sizes, rows
        self._device, self._changes = device, changes
        self._failures: Counter[Any] = Counter()  # of captures, by size
        self._graphs: dict[Any, _Graph] = {}
        self._pool: Any = None
        self.refused = None if capturable(device) else f"there are no CUDA graphs on {device}"

    def __len__(self) -> int:
        """How many graphs were captured."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drops the graphs with their memory, since tensors that they read have moved."""
        self._graphs, self._pool = {}, None

    def run(self, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
        """Computes a batch.

        Args:
            given: the inputs by name. A tensor that was given before has the values that it had then.

        Returns:
            The outputs ``[rows, ...]``, which the next call overwrites; None where it was not captured, and what
            ``changes`` names is as it was.
        """
        if self.refused is not None:
            return None
        sizes = self._sizes({name: len(each) for name, each in given.items()})
        key = tuple(sizes.values())
        graph = self._graphs.get(key)
        if graph is None:
            return self._capture(key, sizes, given) if self._failures[key] < _MOST_FAILURES else None
        graph.fill(given)
        graph.runner.replay()
        assert graph.outputs is not None
        return self._live(graph.outputs, sizes, given)

    def _live(
        self, outputs: tuple[torch.Tensor, ...], sizes: dict[str, int], given: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The rows of outputs that the batch has."""
        spans, at = [], 0
        for name in self._rows:
            if live := len(given[name]):
                spans.append(slice(at, at + live))
            at += sizes[name]
        if len(spans) == 1:
            return tuple(output[spans[0]] for output in outputs)
        return tuple(torch.cat([output[span] for span in spans]) for output in outputs)

    def _capture(
        self, key: Any, sizes: dict[str, int], given: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...] | None:
        """Captures a batch, and returns its outputs if a replay gives the same as the computation; else None."""
        stream = streams(self._device)[0] if self._device.type == "cuda" else None
        inputs = {
            name: torch.zeros(sizes[name], dtype=each, device=self._device) for name, each in self._inputs.items()
        }
        rows, handled = sum(sizes[name] for name in self._rows), sys.exc_info()[1]
        graph = _Graph(GraphRunner(inputs, set(), rows, stream, None))
        before = [(each, each.clone()) for each in self._changes()]
        done = False
        try:
            graph.fill(given)
            with graph.runner.on_capture_stream():
                # Also loads kernels and sets libraries up, which a capture does not allow.
                expected = self._live(self._compute(inputs), sizes, given)
            if not self._graphs:  # a pool cannot be used again once no graph uses it
                self._pool = torch.cuda.graph_pool_handle()
            graph.runner.capture(lambda: self._run(graph), self._pool, self._device)
            assert graph.outputs is not None
            graph.outputs = tuple(map(unowned, graph.outputs))  # so that graphs' outputs share the memory of the pool
            _restore(before)
            graph.runner.replay()
            outputs = self._live(graph.outputs, sizes, given)
            if error := _difference(outputs[0], expected[0]):
                self._failures[key] = _MOST_FAILURES
                _LOG.warning(
                    "iterations of %d rows are not captured: a replay gives something else (%s)", key[0], error
                )
                return None
            done = True
        except torch.OutOfMemoryError:
            self._failures[key] += 1
            return None
        except Exception as error:  # a model may do anything that a capture does not allow
            self.refused = cause_of(error, handled)
            _LOG.warning("iterations are not captured into CUDA graphs: %s", self.refused)
            self.clear()
            return None
        finally:
            if not done:
                _restore(before)
        self._graphs[key] = graph
        return outputs

    def _run(self, graph: _Graph) -> None:
        outputs = tuple(output.contiguous() for output in self._compute(graph.runner.inputs))
        if graph.outputs is None:
            graph.outputs = outputs
        else:  # where a function that is called again stands in for a graph
            for mine, output in zip(graph.outputs, outputs, strict=True):
                mine.copy_(output)


def _restore(before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Gives tensors the values that they had."""
    for tensor, values in before:
        tensor.copy_(values)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """How far rows deviate, where it is more than they may."""
    a, b = (each.double().nan_to_num().flatten(1) for each in (ours, theirs))
    worst, may = float(relative_errors(a, b).max()), _MAY_DEVIATE.get(theirs.dtype, 1e-3)
    return None if worst <= may else f"by {worst:.2g} of its norm, and may by {may:.2g}"
