"""Copies between the host and the device that do not wait for the device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Within this context the device is the current one, and what is computed may be changed in place later.

    Neither gradients nor tensors of ``torch.inference_mode`` are made, whatever mode the caller is in.
    """
    on = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with torch.inference_mode(False), torch.no_grad(), on:
        yield


def upload(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """Returns numbers of the host as a tensor on the device.

    Args:
        values: a list of numbers, or a tensor on the CPU.
        device: the device.
        dtype: of the tensor, where ``values`` is a list.
    """
    tensor = values if isinstance(values, torch.Tensor) else torch.tensor(values, dtype=dtype)
    # A copy from memory that is not page-locked would wait until the device has done all that is queued. The memory is
    # not used again before the copy is done: torch's allocator sees to that.
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Download:
    """Tensors on their way to the host. They may be written to afterwards.

    Args:
        tensors: on one device; None for those that there are not.
    """

    def __init__(self, *tensors: torch.Tensor | None) -> None:
        self._copies: list[torch.Tensor | None] = []
        self._event: torch.cuda.Event | None = None
        for tensor in tensors:
            if tensor is None or not tensor.is_cuda:
                self._copies.append(None if tensor is None else tensor.clone())
            else:
                copy = torch.empty_like(tensor, device="cpu", pin_memory=True)
                self._copies.append(copy.copy_(tensor, non_blocking=True))
                self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._event.record(torch.cuda.current_stream(tensor.device))

    def lists(self) -> list[Any]:
        """The values of each tensor. Waits for what the device has computed up to them, and for nothing behind."""
        if self._event is not None:
            self._event.synchronize()
        return [None if copy is None else copy.tolist() for copy in self._copies]


class Mirror:
    """Numbers that the host writes, and that the device reads from a tensor which stays where it is.

    Args:
        shape: of the numbers.
        dtype: of the numbers.
        device: the device.
    """

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.zeros(shape, dtype=dtype)
        self._device = self._host.to(device, copy=True)
        self._written = False

    def write(self, column: int, values: Any) -> None:
        """Writes the numbers of a column, the last index."""
        self._host[..., column] = torch.tensor(values, dtype=self._host.dtype)
        self._written = True

    def read(self) -> torch.Tensor:
        """The numbers on the device."""
        if self._written:
            self._device.copy_(upload(self._host.clone(), self._device.device))
            self._written = False
        return self._device
