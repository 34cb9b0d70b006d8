"""``Options``: the arguments of ``VirtualCache`` that say how its rows are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vattn.arguments import choice, flag, integer, optional_integer
from vattn.kernels import Kernel
from vattn.kernels.quantize import Scales
from vattn.memory.device import checked_budget, resolve_device
from vattn.memory.layout import KINDS, Kind
from vattn.memory.shape import dtype_name


@dataclass(frozen=True, kw_only=True)
class Options:
    """Arguments of ``VirtualCache``, checked and converted; ``VirtualCache`` says what each of them means.

    Two are made from other arguments: ``kernels`` are the kernels that decode steps may use, each of which says how
    many rows around a sequence it may load; ``scales`` is made from ``kv_dtype`` and ``kv_scales``.
    """

    max_len: int
    slots: int | None = None
    device: str | torch.device | None = None
    dtype: str | torch.dtype | None = None
    budget: int | float | None = None
    layout: Kind = "interleaved"
    lookahead: int | None = None
    mapper: bool = True
    kernels: tuple[Kernel, ...] = ()
    scales: Scales | None = None

    def __post_init__(self) -> None:
        checked = {
            "max_len": integer("max_len", self.max_len, 1),
            "slots": optional_integer("slots", self.slots, 1),
            "lookahead": optional_integer("lookahead", self.lookahead),
            "budget": checked_budget(self.budget),
            "dtype": None if self.dtype is None else getattr(torch, dtype_name("dtype", self.dtype)),
            "device": None if self.device is None else resolve_device(self.device),
        }
        flag("mapper", self.mapper)
        choice("layout", self.layout, KINDS)
        for name, value in checked.items():
            object.__setattr__(self, name, value)
