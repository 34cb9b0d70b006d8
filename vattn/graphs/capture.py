"""Captures computations into CUDA graphs."""

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
    """Whether computations on this device can be captured."""
    return device.type == "cuda"


@functools.cache
def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """Two streams of a device that all callers share: one for captures, and one for checks that run beside replays.

    They are shared because cuBLAS keeps memory for every stream that it is used on.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def record(run: Callable[[], Any], pool: Any, stream: Any) -> tuple[Any, Any]:
    """Captures what a function launches into a CUDA graph, without running it on the device.

    Args:
        run: launches the work.
        pool: a handle of ``torch.cuda.graph_pool_handle``, from which the graph's memory is taken.
        stream: the stream on which the capture is made.

    Returns:
        The graph, and what ``run`` returned.
    """
    graph = torch.cuda.CUDAGraph()
    # The lock lets a process make one capture at a time. The outer stream context restores the current stream where a
    # capture fails, since that leaves its own stream the current one.
    with _capturing, _garbage_kept(), torch.cuda.stream(torch.cuda.current_stream()):
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"), _workspaces():
                output = run()
        except BaseException:
            _end_capture(graph, pool, stream)
            raise
    return graph, output


@contextlib.contextmanager
def _workspaces() -> Iterator[None]:
    """Lets what is captured in this context have workspaces of cuBLAS in the graph's own pool.

    torch keeps a workspace for each stream, and frees it when a graph that was captured on that stream is destroyed, or
    when torch.compile captures graphs of its own. A graph that was captured with such a workspace would then write to
    memory that belongs to others, or to nobody. (https://github.com/pytorch/pytorch/issues/193402)
    """
    # The context begins after the capture has, which empties torch's cache: to other threads that are about to use
    # their workspaces the memory stays mapped. torch has no such function where it was built without CUDA.
    forget = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    forget()
    try:
        yield
    finally:
        forget()


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Disables garbage collection within this context.

    A cache that is collected waits for the device, which invalidates a capture.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end_capture(graph: Any, pool: Any, stream: torch.cuda.Stream) -> None:
    """Cleans up after a failed capture: torch's allocator and random generators may take it to be still running."""
    with contextlib.suppress(RuntimeError):
        graph.pool()
        return  # the capture itself has ended, and the graph releases the pool
    for forget in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
        with contextlib.suppress(RuntimeError):  # the failed capture may have done this already
            forget(stream.device.index, pool)
    # The random generators may take the capture to be still running; one more capture, which nothing uses, ends that.
    with contextlib.suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
        torch.zeros((), device=stream.device)


def cause_of(error: BaseException, handled: BaseException | None) -> str:
    """Returns the first line of the first error in a chain, since the end of a capture or compilation adds another.

    Args:
        error: the last error of the chain.
        handled: what the caller was handling already, ``sys.exc_info()[1]`` before it began; no part of the chain.
    """
    while True:
        before = error.__cause__ if error.__suppress_context__ else error.__context__
        if before is None or before is handled:
            break
        error = before
    return str(error).partition("\n")[0] or type(error).__name__


class _Memory:
    """Bytes of a device, as a tensor takes them without owning them."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def unowned(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor on the memory of a contiguous one, which does not keep that memory from others.

    The output of a captured graph is such memory: each replay writes to it, and it may be temporary memory of other
    graphs of the same pool. On a CPU the tensor itself is returned.
    """
    if not tensor.is_cuda:
        return tensor
    flat = torch.as_tensor(_Memory(tensor.data_ptr(), tensor.nbytes), device=tensor.device)
    return flat.view(tensor.dtype).view(tensor.shape)
