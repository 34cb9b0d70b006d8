"""What vattn raises. Plain misuse (a wrong shape, a closed sequence) is ``TypeError`` or ``ValueError``."""

from __future__ import annotations

from vattn.aliases import renamed


class Error(Exception):
    """Base of every error that is vattn's own."""


class DriverError(Error, RuntimeError):
    """The driver refused a call; nothing has changed.

    Attributes:
        call: name of the driver call, e.g. ``"cuMemCreate"``, or ``"create"`` on the host.
        code: the driver's ``CUresult``, or the ``errno`` on the host.
    """

    call: str
    code: int


class OutOfDeviceMemory(DriverError, MemoryError):
    """The device has no memory left: free some (``torch.cuda.empty_cache()``) or lower the budget."""


class BudgetExceeded(Error, MemoryError):
    """The cache's byte budget is spent. Normal under load: close, truncate or wait, and try again.

    Attributes:
        needed: bytes the call would have mapped.
        free: bytes of the budget that are not mapped.
    """

    needed: int
    free: int


class SequenceTooLong(Error, ValueError):
    """A sequence was asked to hold more than ``max_len`` positions."""


class BackendUnavailable(Error, RuntimeError):
    """The device cannot be used here: no driver, no such device, or a cache carried through ``fork``."""


__getattr__ = renamed(__name__, {"OutOfPages": "BudgetExceeded"})
