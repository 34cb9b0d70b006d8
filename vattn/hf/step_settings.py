"""``StepSettings``: the arguments of ``VirtualCache`` that say how its decode steps run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vattn import kernels
from vattn.arguments import flag, shown


@dataclass(frozen=True)
class StepSettings:
    """Arguments of ``VirtualCache``, checked; see there for what each of them means."""

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
        """The name of the kernel, or ``"auto"``."""
        return "auto" if self.attention is None else self.attention

    @property
    def compile_options(self) -> dict[str, Any] | None:
        """What ``torch.compile`` is given."""
        return self.compiled if isinstance(self.compiled, dict) else None

    def kernels(self) -> tuple[kernels.Kernel, ...]:
        """The kernels that steps may come to use."""
        auto = self.kernel == "auto"
        return tuple(kernel for kernel in kernels.named(self.kernel) if not (auto and kernel.missing()))
