"""The capture of what is launched into a CUDA graph."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

_capturing = threading.RLock()


def capturable(device: torch.device) -> bool:
    """Whether there are graphs."""
    return device.type == "cuda"


@functools.cache
def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """For captures, and for what is looked at beside replays: few, since cuBLAS keeps memory for every stream."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def record(run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Any, Any]:
    """A graph of what is launched, which is not run, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    # A process captures one at a time. A capture that fails leaves its stream the current one.
    with _capturing, _garbage_kept(), torch.cuda.stream(torch.cuda.current_stream()):
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = run()
        except BaseException:
            _end_capture(graph, pool, stream)
            raise
    return graph, output


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """While it lasts no garbage is collected: a cache among it would wait for the device, which ends a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_capture(graph: Any, pool: Any, stream: torch.cuda.Stream) -> None:
    """After a capture that failed: torch's allocator and its random generators may think that it goes on."""
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # all but what is captured went well, and the graph lets the pool go
    for forget in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):  # where the capture came so far itself
            forget(stream.device.index, pool)
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros((), device=stream.device)
