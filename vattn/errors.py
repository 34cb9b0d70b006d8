"""The errors that vattn raises. Wrong use (a wrong shape, a closed sequence) is ``TypeError`` or ``ValueError``."""

from __future__ import annotations

from vattn.aliases import renamed


class Error(Exception):
    """The base class of vattn's errors."""


class DriverError(Error, RuntimeError):
    """The driver refused a call; nothing has changed.

    Attributes:
        call: the name of the driver call, e.g. ``"cuMemCreate"``, or ``"create"`` on the host.
        code: the ``CUresult`` of the driver, or the ``errno`` on the host.
    """

    call: str
    code: int


class OutOfDeviceMemory(DriverError, MemoryError):
    """The device has no memory left: free some (``torch.cuda.empty_cache()``), or lower the budget."""


class BudgetExceeded(Error, MemoryError):
    """The memory budget of a cache is spent. This is normal under load: close, truncate or wait, and try again.

    Attributes:
        needed: bytes that the call would have mapped.
        free: bytes of the budget that are not in use.
    """

    needed: int
    free: int


class SequenceTooLong(Error, ValueError):
    """A sequence was asked to hold more than ``max_len`` positions."""


class BackendUnavailable(Error, RuntimeError):
    """The device cannot be used: no driver, no such device, or a cache that was made before ``fork`` of the process."""


__getattr__ = renamed(__name__, {"OutOfPages": "BudgetExceeded"})
