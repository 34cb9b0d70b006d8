"""``BatchGraphs``: CUDA graphs of one computation for batches of different sizes, captured when first needed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from vattn.graphs.capture import capturable, streams
from vattn.graphs.runner import GraphRunner, rows_of_graph

_LOG = logging.getLogger("vattn")
# How far the output of a replay may deviate from that of the computation, relative to the norm of a row: cuBLAS may
# choose other products during a capture.
_MOST_FAILURES = 3  # captures with so many rows that find no memory
_MAY_DEVIATE = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


class BatchGraphs:
    """CUDA graphs of one computation for batches of different sizes, captured when they are first needed.

    A graph has the rows of ``rows_of_graph``. Those that a batch does not have are idle: their inputs are 0.

    Args:
        compute: computes a batch of the inputs by name, each ``[rows]``; returns ``[rows, ...]``.
        inputs: the dtype of each input.
        most: rows of the largest batch.
        device: the device.
        least: rows of the smallest graph.

    Attributes:
        refused: why no batch is captured or replayed any more; None while they are.
    """

    def __init__(
        self, compute: Callable[[dict[str, torch.Tensor]], torch.Tensor], inputs: dict[str, torch.dtype], most: int,
        device: torch.device, *, least: int = 1,
    ) -> None:  # fmt: skip
        self._compute, self._inputs, self._most, self._device = compute, inputs, most, device
        self._least = least
        self._failures: Counter[int] = Counter()  # of captures, by the rows of the graph
        self._graphs: dict[int, GraphRunner] = {}
        self._pool: Any = None
        self._output: torch.Tensor | None = None  # of the last replay: all graphs write to it
        self.refused = None if capturable(device) else f"there are no CUDA graphs on {device}"

    def __len__(self) -> int:
        """How many graphs were captured."""
        return len(self._graphs)

    def clear(self) -> None:
        """Drops the graphs with their memory, since tensors that they read have moved."""
        self._graphs, self._pool, self._output = {}, None, None

    def run(self, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Computes a batch.

        Args:
            given: the inputs, ``[batch]`` each.

        Returns:
            The output ``[batch, ...]``, which the next call overwrites; None where it was not captured.
        """
        if self.refused is not None:
            return None
        batch = len(next(iter(given.values())))
        rows = rows_of_graph(max(batch, self._least))
        graph = self._graphs.get(rows)
        if graph is None:
            return self._capture(rows, batch, given) if self._failures[rows] < _MOST_FAILURES else None
        self._prepare(graph, batch, given)
        graph.replay()
        assert self._output is not None
        return self._output[:batch]

    def _prepare(self, graph: GraphRunner, batch: int, given: dict[str, torch.Tensor]) -> None:
        if graph.live != batch:
            graph.set_live(batch)
        graph.fill(given)

    def _capture(self, rows: int, batch: int, given: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """Captures a batch, and returns its output if a replay gives the same as the computation; else None."""
        stream = streams(self._device)[0] if self._device.type == "cuda" else None
        inputs = {name: torch.zeros(rows, dtype=dtype, device=self._device) for name, dtype in self._inputs.items()}
        graph = GraphRunner(inputs, set(inputs), rows, stream, None)
        try:
            self._prepare(graph, batch, given)
            with graph.on_capture_stream():
                self._compute(graph.inputs)  # kernels are loaded and libraries set up, which a capture does not allow
                expected = self._compute(given)
            if self._output is None:
                shape = rows_of_graph(max(self._most, self._least)), *expected.shape[1:]
                self._output = torch.empty(shape, dtype=expected.dtype, device=self._device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            graph.capture(lambda: self._run(graph), self._pool, self._device)
            graph.replay()
            if error := _deviation(self._output[:batch], expected):
                self._failures[rows] = _MOST_FAILURES
                _LOG.warning("iterations of %d rows are not captured: a replay gives something else (%s)", rows, error)
                return None
        except torch.OutOfMemoryError:
            self._failures[rows] += 1
            return None
        except Exception as error:  # a model may do anything that a capture does not allow
            self.refused = str(error).partition("\n")[0] or type(error).__name__
            _LOG.warning("iterations are not captured into CUDA graphs: %s", self.refused)
            self.clear()
            return None
        self._graphs[rows] = graph
        return self._output[:batch]

    def _run(self, graph: GraphRunner) -> torch.Tensor:
        output = self._compute(graph.inputs)
        assert self._output is not None
        return self._output[: graph.rows].copy_(output)


def _deviation(ours: torch.Tensor, theirs: torch.Tensor) -> str | None:
    """How far rows deviate, where it is more than they may."""
    a, b = (each.float().nan_to_num() for each in (ours, theirs))
    worst = float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-30)).max())
    may = _MAY_DEVIATE.get(theirs.dtype, 1e-3)
    return None if worst <= may else f"by {worst:.2g} of its norm, and may by {may:.2g}"
