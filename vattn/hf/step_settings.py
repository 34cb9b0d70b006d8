"""``StepSettings``: the arguments of ``VirtualCache`` that say how its decode steps run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vattn import kernels
from vattn.arguments import flag, shown


@dataclass(frozen=True)
class StepSettings:
    """Arguments of ``VirtualCache``, checked; ``VirtualCache`` says what each of them means."""

    attention: str | None = None
    capture: bool = True
    compiled: bool | dict[str, Any] = False
    run_ahead: bool = True

    def __post_init__(self) -> None:
        kernels.named(self.kernel)
        flag("capture", self.capture)
        flag("run_ahead", self.run_ahead)
        if not isinstance(self.compiled, (bool, dict)):
            raise TypeError(f"compiled must be True, False or torch.compile's options, not {shown(self.compiled)}")
        if self.compiled and not self.capture:
            raise ValueError("compiled steps are captured: leave capture as it is")

    @property
    def kernel(self) -> str:
        """The name of the kernel that steps use, or ``"auto"``."""
        return "auto" if self.attention is None else self.attention

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """The ``options`` that ``torch.compile`` is given; None for its own."""
        return self.compiled if isinstance(self.compiled, dict) else None

    def kernels(self) -> tuple[kernels.Kernel, ...]:
        """Returns the kernels that steps may use; for ``"auto"`` only those that can run on this machine."""
        auto = self.kernel == "auto"
        return tuple(kernel for kernel in kernels.named(self.kernel) if not (auto and kernel.missing()))
