"""The kernels by name, and the choice of one for a given attention."""

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
"""The kernels by name, in the order in which ``choose`` tries them. Their speed is in docs/benchmarks.md."""


def named(name: str) -> list[Kernel]:
    """The kernel with this name, or all kernels for ``"auto"``.

    Raises:
        ValueError: no kernel has this name.
    """
    if not isinstance(name, str) or (name != "auto" and name not in KERNELS):
        raise ValueError(f"attention must be 'auto' or one of {', '.join(KERNELS)}, not {shown(name)}")
    return list(KERNELS.values()) if name == "auto" else [KERNELS[name]]


def refused_kv(kernel: Kernel, task: AttentionSpec) -> str | None:
    """Why a kernel does not take K and V of the dtype that ``task`` has, or None where it does."""
    if task.kv_dtype is None or (task.kv_dtype in kernel.kv_dtypes and task.queries == "one"):
        return None
    return f"it takes no {str(task.kv_dtype).removeprefix('torch.')} K and V"


def refused(kernel: Kernel, task: AttentionSpec) -> str | None:
    """Why a kernel does not run on this machine, or does not compute the attention ``task``; None where it does."""
    return kernel.missing() or refused_kv(kernel, task) or kernel.refuses(task)


def margins(task: AttentionSpec, name: str = "auto") -> tuple[int, int]:
    """How many rows before and behind a range are loaded at most by kernels that may be chosen to decode.

    Args:
        task: the attention, without window, soft cap and sinks where these are not known.
        name: a key of ``KERNELS``, or ``"auto"``.

    Raises:
        ValueError: no kernel has this name.
    """
    usable = [kernel for kernel in named(name) if not refused(kernel, task)]
    return (
        max((kernel.head_rows for kernel in usable), default=0),
        max((kernel.tail(task.head_dim, task.kv_dtype) for kernel in usable), default=0),
    )


def choose(task: AttentionSpec, *, name: str = "auto", capturable: bool = False) -> Kernel:
    """Chooses a kernel: the named one, or the first that runs on this machine and can compute the attention.

    Args:
        task: the attention that the kernel has to compute.
        name: a key of ``KERNELS``, or ``"auto"``.
        capturable: whether to leave out kernels that cannot be captured into a CUDA graph.

    Raises:
        ValueError: no kernel has this name, or none can be used; the message has the reason for each kernel.
    """
    reasons = []
    for kernel in named(name):
        reason = refused(kernel, task)
        if not reason and capturable and not kernel.capturable:
            reason = "it cannot be captured"
        if not reason:
            return kernel
        reasons.append(f"{kernel.name}: {reason}")
    raise ValueError(f"no attention kernel for {task}: {'; '.join(reasons)}")
