"""The kernels by name, and which of them does a task."""

from __future__ import annotations

from torch.nn.attention import SDPBackend

from vattn.arguments import shown
from vattn.kernels.base import AttentionSpec, Kernel
from vattn.kernels.flash import Flash2, Flash3
from vattn.kernels.flashinfer import FlashInfer
from vattn.kernels.flex import Flex
from vattn.kernels.reference import Reference
from vattn.kernels.sdpa import Sdpa

KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        Flash3(),
        Flash2(),
        FlashInfer(),
        Flex(),
        Sdpa("sdpa-flash", SDPBackend.FLASH_ATTENTION, masks=False, gqa=True, on=("cuda",)),
        Sdpa("sdpa-cudnn", SDPBackend.CUDNN_ATTENTION, masks=False, gqa=True, on=("cuda",)),
        Sdpa("sdpa-efficient", SDPBackend.EFFICIENT_ATTENTION, masks=False, gqa=False, on=("cuda",)),
        Sdpa("sdpa", None, masks=True, gqa=True, on=("cpu", "cuda")),
        Reference(),
    )
}
"""The kernels by name, in the order in which ``choose`` tries them: see docs/benchmarks.md for their speed."""


def named(name: str) -> list[Kernel]:
    """The kernel of a name, or of ``"auto"`` all of them."""
    if not isinstance(name, str) or (name != "auto" and name not in KERNELS):
        raise ValueError(f"attention must be 'auto' or one of {', '.join(KERNELS)}, not {shown(name)}")
    return list(KERNELS.values()) if name == "auto" else [KERNELS[name]]


def refused_kv(kernel: Kernel, task: AttentionSpec) -> str | None:
    """Why a kernel does not take the K and V of a task, for their dtype, or None."""
    if task.kv_dtype is None or (task.kv_dtype in kernel.kv_dtypes and task.queries == "one"):
        return None
    return f"it takes no {str(task.kv_dtype).removeprefix('torch.')} K and V"


def choose(task: AttentionSpec, *, name: str = "auto", capturable: bool = False) -> Kernel:
    """The kernel for a task: the one named, or the first that this machine has and that does it.

    Args:
        task: what it is to do.
        name: a key of ``KERNELS``, or ``"auto"``.
        capturable: leaves out those that cannot be captured.

    Raises:
        ValueError: there is none; says of each why.
    """
    reasons = []
    for kernel in named(name):
        reason = kernel.missing() or refused_kv(kernel, task) or kernel.refuses(task)
        if not reason and capturable and not kernel.capturable:
            reason = "it cannot be captured"
        if not reason:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(f"no attention kernel for {task}: {'; '.join(reasons)}")
