"""``GraphRunner``: a computation of so many rows, captured into a CUDA graph: pad, copy in, replay, hand out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vattn.graphs.capture import record


class GraphRunner:
    """A computation on tensors that stay where they are, which is captured into a CUDA graph and replayed.

    It computes a fixed number of rows. A call that has fewer leaves the rows behind its own idle.

    Args:
        inputs: the tensors that the computation reads, by name.
        by_rows: names of those inputs whose first dimension counts rows.
        rows: how many rows are computed.
        stream: the stream on which captures are made; None on a CPU.
        speculation: the stream on which a replay may start before its call; None on a CPU.

    Attributes:
        live: rows that are not idle; -1 while that is not known.
        outputs: what the captured computation leaves, by name; None for each output that is no tensor.
        graph_bytes: device memory that the capture took.
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
        """Whether there is a graph."""
        return self._graph is not None

    @property
    def idle(self) -> bool:
        """Whether some rows are idle."""
        return self.live < self.rows

    def set_live(self, live: int) -> None:
        """Lets the rows from ``live`` on be idle, and zeros their inputs."""
        self.live = -1  # should this be interrupted
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
        """An output without its idle rows; what is no tensor as it is."""
        return value[: self.live] if isinstance(value, torch.Tensor) and self.idle else value

    def fill(self, given: dict[str, torch.Tensor | None]) -> None:
        """Copies what a call gives to where the computation reads it; None leaves an input as it is."""
        pairs = self._pairs(given)
        torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs], non_blocking=True)

    def _pairs(self, given: dict[str, torch.Tensor | None]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [(self._live_inputs[name], tensor) for name, tensor in given.items() if tensor is not None]

    def capture(self, run: Callable[[], Any], pool: Any, device: torch.device) -> Any:
        """Captures a computation, which is not run, and returns what it returned.

        Args:
            run: launches it.
            pool: of ``torch.cuda.graph_pool_handle``, from which its memory is taken.
            device: that it runs on.

        The caller sets ``outputs`` to the tensors among what is returned.
        """
        torch.cuda.empty_cache()  # the capture begins with it, and its own memory could not be told otherwise
        before = torch.cuda.memory_reserved(device)
        graph, output = record(run, pool, self._stream)
        self._graph = graph
        self.graph_bytes = max(0, torch.cuda.memory_reserved(device) - before)
        return output

    def discard(self) -> None:
        """Lets the graph go."""
        self._graph, self.outputs = None, {}

    def replay(self) -> None:
        """Runs the captured computation on what the inputs hold."""
        self._graph.replay()

    def copy_outputs(self) -> dict[str, torch.Tensor | None]:
        """Copies of what the last replay left, without idle rows."""
        return {
            name: None if value is None else self.live_output(value).clone() for name, value in self.outputs.items()
        }

    @contextlib.contextmanager
    def on_capture_stream(self) -> Iterator[None]:
        """Within this context the capture's stream is the current one, so that libraries set themselves up there."""
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
        """Within this context work is queued on a stream that does not wait for what the caller does from now on."""
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
        """Replays, within ``speculating``, on inputs that were written there."""
        if self._speculation is not None:
            self._written.record()
        self._graph.replay()

    def was_given(self, given: dict[str, torch.Tensor | None]) -> bool:
        """Whether the inputs of a speculative replay are what the call gives."""
        if self._speculation is not None:
            torch.cuda.current_stream().wait_event(self._written)
        return all(torch.equal(mine, theirs) for mine, theirs in self._pairs(given))

    def join_speculative(self) -> None:
        """Has the current stream wait for the speculative replay."""
        if self._speculation is not None:
            torch.cuda.current_stream(self._speculation.device).wait_event(self._done)
