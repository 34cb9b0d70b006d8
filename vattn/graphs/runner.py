"""``GraphRunner``: a computation of a fixed number of rows that is captured into a CUDA graph and replayed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from vattn.graphs.capture import record


def rows_of_graph(batch: int) -> int:
    """Returns how many rows a graph for a batch has: 1, 2, 4, 8 or a multiple of 8."""
    return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


class GraphRunner:
    """A computation on tensors at fixed addresses, which is captured into a CUDA graph and replayed.

    The computation has a fixed number of rows. When a call has fewer, its rows are the first ones, and the remaining
    rows are idle.

    Args:
        inputs: the tensors that the computation reads, by name.
        by_rows: the names of those inputs whose first dimension counts rows.
        rows: how many rows are computed, idle ones included.
        stream: the stream on which captures are made; None on a CPU.
        speculation: the stream on which a replay may start before it is called for; None on a CPU.

    Attributes:
        live: how many rows are not idle; -1 while that is not known.
        outputs: the tensors that a replay writes, by name; None for each output that is no tensor.
        graph_bytes: bytes of device memory that the capture took.
    """

    def __init__(
        self,
        inputs: dict[str, torch.Tensor],
        by_rows: set[str],
        rows: int,
        stream: torch.cuda.Stream | None,
        speculation: torch.cuda.Stream | None,
    ) -> None:
        self.inputs, self.rows = inputs, rows
        self._by_rows = by_rows
        self._live_inputs = inputs
        self.live = -1
        self._graph: Any = None
        self.graph_bytes = 0
        self.outputs: dict[str, torch.Tensor | None] = {}
        self._stream, self._speculation = stream, speculation
        if speculation is not None:
            self._written, self._done = (torch.cuda.Event() for _ in range(2))  # type: ignore[no-untyped-call]

    @property
    def captured(self) -> bool:
        """Whether the computation has been captured."""
        return self._graph is not None

    @property
    def idle(self) -> bool:
        """Whether some rows are idle."""
        return self.live < self.rows

    def set_live(self, live: int) -> None:
        """Makes the rows from ``live`` on idle, and fills their inputs with zeros."""
        self.live = -1  # not known, should an exception interrupt this method
        self._live_inputs = dict(self.inputs)
        with torch.inference_mode(False):
            for name in self._by_rows:
                self._live_inputs[name], idle = self.inputs[name].tensor_split([live])
                idle.zero_()
        self.live = live

    def live_input(self, name: str) -> torch.Tensor:
        """An input without its idle rows."""
        return self._live_inputs[name]

    def live_output(self, value: Any) -> Any:
        """An output without its idle rows; a value that is no tensor is returned as it is."""
        return value[: self.live] if isinstance(value, torch.Tensor) and self.idle else value

    def fill(self, given: Mapping[str, torch.Tensor | None]) -> None:
        """Copies a call's tensors to the inputs of the same names; None leaves an input as it is."""
        pairs = self._pairs(given)
        torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs], non_blocking=True)

    def _pairs(self, given: Mapping[str, torch.Tensor | None]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(self._live_inputs[name], tensor) for name, tensor in given.items() if tensor is not None]

    def capture(self, run: Callable[[], Any], pool: Any, device: torch.device) -> Any:
        """Captures the computation without running it.

        Args:
            run: launches the computation.
            pool: a handle of ``torch.cuda.graph_pool_handle``, from which the graph's memory is taken.
            device: the device of the computation.

        Returns:
            What ``run`` returned. The caller sets ``outputs`` to the tensors of it.
        """
        # A capture begins with ``empty_cache``. Called here, it does not count in the difference below.
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        graph, output = record(run, pool, self._stream)
        self._graph = graph
        self.graph_bytes = max(0, torch.cuda.memory_reserved(device) - before)
        return output

    def discard(self) -> None:
        """Releases the graph and its outputs."""
        self._graph, self.outputs = None, {}

    def replay(self) -> None:
        """Runs the captured computation on the current values of the inputs."""
        self._graph.replay()

    def copy_outputs(self) -> dict[str, torch.Tensor | None]:
        """Copies of the outputs of the last replay, without idle rows."""
        return {
            name: None if value is None else self.live_output(value).clone() for name, value in self.outputs.items()
        }

    @contextlib.contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        """Makes the capture stream the current one within this context, so that libraries set themselves up there."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            torch.cuda.current_stream().wait_stream(self._stream)

    @contextlib.contextmanager
    def speculating(self) -> Iterator[None]:
        """Queues the work of this context on the stream for speculation.

        That stream waits for the work that the caller has queued so far, but not for what the caller queues later.
        """
        if self._speculation is None:
            yield
            return
        self._speculation.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._speculation):
            try:
                yield
            finally:
                self._done.record()

    def replay_speculatively(self) -> None:
        """Replays the graph on inputs that were written within ``speculating``. Requires that context."""
        if self._speculation is not None:
            self._written.record()
        self._graph.replay()

    def was_given(self, given: dict[str, torch.Tensor | None]) -> bool:
        """Whether the inputs of the speculative replay equal the tensors that a call gives."""
        if self._speculation is not None:
            torch.cuda.current_stream().wait_event(self._written)
        return all(torch.equal(mine, theirs) for mine, theirs in self._pairs(given))

    def join_speculative(self) -> None:
        """Makes the current stream wait for the speculative replay."""
        if self._speculation is not None:
            torch.cuda.current_stream(self._speculation.device).wait_event(self._done)
