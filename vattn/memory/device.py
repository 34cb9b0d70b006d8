"""What a cache needs from its device: a driver, the mapper thread, a budget, and a retry when memory runs out."""

from __future__ import annotations

import atexit
import contextlib
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vattn import _core
from vattn.arguments import integer, shown
from vattn.errors import BackendUnavailable

UNLIMITED = 1 << 62  # bytes; more than any machine has

# The mapper thread of each device, by process id and device. Each cache holds a reference to the mapper that it uses.
_mappers: weakref.WeakValueDictionary[tuple[int, str], _core.Mapper] = weakref.WeakValueDictionary()


class TrimOnOOM(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Repeats a torch operation that runs out of device memory once, after a trim.

    Args:
        trim: frees device memory.
    """

    def __init__(self, trim: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trim = trim

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with contextlib.suppress(torch.OutOfMemoryError):
            return func(*args, **(kwargs or {}))
        # Not in an exception handler: the traceback would keep alive what the operation has allocated.
        self.trim()
        return func(*args, **(kwargs or {}))


def resolve_device(device: str | torch.device) -> torch.device:
    """Returns the device with its index.

    Raises:
        TypeError: ``device`` is neither a name nor a ``torch.device``.
        BackendUnavailable: vattn or this machine cannot use the device.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a name such as 'cpu' or 'cuda:0', or a torch.device, not {shown(device)}")
    found = None
    with contextlib.suppress(RuntimeError):  # torch does not know the name
        found = torch.device(device)
    if found is None or found.type not in ("cpu", "cuda"):
        raise BackendUnavailable(f"device {str(device)!r} is not supported: use 'cuda' or 'cpu'")
    if found.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = _core.probe_cuda()["why"] or f"this torch, {torch.__version__}, is built without CUDA or sees no device"
        raise BackendUnavailable(f"device {str(device)!r} cannot be used: {why}. Use device='cpu' instead")
    return torch.device("cuda", torch.cuda.current_device() if found.index is None else found.index)


def driver_of(device: torch.device, granularity: int, capacity: int, exportable: bool) -> _core.Driver:
    """Makes a driver for a device.

    Args:
        device: the device, with its index.
        granularity: bytes of the smallest physical unit; a CUDA device has a fixed one.
        capacity: bytes of a simulated device on the host; 0 uses the memory of the machine.
        exportable: whether other processes can map the memory.

    Raises:
        ValueError: ``capacity`` is given for a CUDA device, or ``granularity`` is not the device's.
    """
    if device.type == "cpu":
        return _core.host_driver(granularity, capacity=capacity, exportable=exportable)
    if capacity:
        raise ValueError("capacity simulates a device on the host: it cannot be given for a CUDA device")
    driver = _core.cuda_driver(device.index, exportable=exportable)
    if driver.granularity != granularity:
        raise ValueError(f"granularity must be {driver.granularity} on {device}, not {granularity}")
    return driver


def mapper_of(device: torch.device) -> _core.Mapper:
    """Returns the mapper thread of a device in this process; starts it at the first call."""
    key = os.getpid(), str(device)  # a thread does not survive a fork
    mapper = _mappers.get(key)
    if mapper is None:
        mapper = _mappers[key] = _core.Mapper()
    return mapper


@atexit.register
def _stop_mappers() -> None:
    for (pid, _), mapper in list(_mappers.items()):
        if pid == os.getpid():
            mapper.stop()


def checked_budget(budget: int | float | None) -> int | float | None:
    """Returns a budget as bytes (int), as a fraction of the free memory (float in (0, 1]), or None.

    Raises:
        TypeError, ValueError: ``budget`` is none of these.
    """
    if budget is None:
        return None
    kind = getattr(getattr(budget, "dtype", None), "kind", "")  # "f" for NumPy's floating-point numbers
    if isinstance(budget, float) or kind == "f":
        if not 0 < budget <= 1:
            raise ValueError(f"budget as a part of the free memory must be in (0, 1], not {budget}")
        return float(budget)
    try:
        return integer("budget", budget)
    except TypeError:
        what = "bytes, a part of the free memory as a float, or None"
        raise TypeError(f"budget must be {what}, not {shown(budget)}") from None


def budget_bytes(budget: int | float | None, driver: _core.Driver, held: int = 0) -> int:
    """Returns a budget in bytes; a fraction refers to the free memory and ``held``, the bytes that a cache has."""
    budget = checked_budget(budget)
    if isinstance(budget, float):
        return int(budget * (driver.memory_info()[0] + held))
    return UNLIMITED if budget is None else min(budget, UNLIMITED)
