"""``EngineOptions``: how an engine serves. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vattn.arguments import choice, flag, integer, optional_integer, shown
from vattn.engine.policy import POLICIES
from vattn.memory.layout import GRANULARITY

KV_DTYPES = {"auto": None, "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
"""By name, in what K and V are stored; None is what the model computes in."""
PREEMPTIONS = ("auto", "swap", "recompute")


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """How an engine serves.

    Args:
        max_model_len: positions of the longest sequence; None is what the configuration of the model allows.
        max_num_seqs: outputs that run at the same time, at most.
        max_num_batched_tokens: positions that an iteration computes, at most.
        kv_budget: memory for K and V: bytes (int), or a part of what is free (float in (0, 1]); None is half of it.
        gpu_memory_utilization: in the place of ``kv_budget`` the part of the device's memory that K and V fill up to,
            with all that is there already; on a CPU of the machine's.
        kv_cache_dtype: ``"auto"`` stores K and V as the model computes them, ``"fp8"`` (``"fp8_e4m3"``) and
            ``"fp8_e5m2"`` in 8 bits, without scales.
        preemption: what a request does that loses its memory to others: ``"swap"`` keeps it in host memory as long as
            ``swap_space`` lasts, ``"recompute"`` computes it again, ``"auto"`` does what takes less time, as
            ``vattn.SwapCosts`` estimates it.
        swap_space: GiB of host memory for requests that are swapped out.
        policy: which request is served first, a key of ``vattn.engine.policy.POLICIES``.
        enable_prefix_caching: whether requests begin behind rows that others have computed.
        attention: the kernel, of ``vattn.kernels.KERNELS``, or ``"auto"``.
        waiting_served_ratio: see ``Scheduler``.
        enable_chunked_prefill: prompts longer than ``max_num_batched_tokens`` are computed in chunks; only True.
        enforce_eager: whether no iteration is captured into a CUDA graph, and nothing is compiled.
        compile: whether layers are compiled by ``torch.compile``, once for all lengths. Weights of the model may be
            moved to lie side by side.
        depth: iterations in flight when the next one is scheduled, 0 or 1.
        granularity: bytes of a granule.
        seed: of requests that give none; None draws one for each.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of range.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    kv_budget: int | float | None = None
    gpu_memory_utilization: float | None = None
    kv_cache_dtype: str = "auto"
    preemption: str = "auto"
    swap_space: float = 4.0
    policy: str = "fcfs"
    enable_prefix_caching: bool = True
    attention: str = "auto"
    waiting_served_ratio: float = 0.0
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    compile: bool = False
    depth: int = 1
    granularity: int = GRANULARITY
    seed: int | None = None

    def __post_init__(self) -> None:
        optional_integer("max_model_len", self.max_model_len, 2)
        integer("max_num_seqs", self.max_num_seqs, 1)
        integer("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        integer("depth", self.depth, 0, 1)
        choice("policy", self.policy, POLICIES)
        choice("preemption", self.preemption, PREEMPTIONS)
        choice("kv_cache_dtype", self.kv_cache_dtype, KV_DTYPES)
        flag("enable_prefix_caching", self.enable_prefix_caching)
        flag("enforce_eager", self.enforce_eager)
        flag("compile", self.compile)
        if not flag("enable_chunked_prefill", self.enable_chunked_prefill):
            raise ValueError("enable_chunked_prefill must be True: prompts and outputs share iterations")
        names = ("kv_budget", "gpu_memory_utilization", "swap_space", "waiting_served_ratio")
        for name, value in {name: getattr(self, name) for name in names if getattr(self, name) is not None}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number that is not negative, not {shown(value)}")
        if self.kv_budget is not None and self.gpu_memory_utilization is not None:
            raise ValueError("kv_budget and gpu_memory_utilization say the same: give one of them")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], not {self.gpu_memory_utilization}")
        if self.kv_budget == 0 or (isinstance(self.kv_budget, float) and self.kv_budget > 1):
            raise ValueError(f"kv_budget must be bytes, or a part of what is free in (0, 1], not {self.kv_budget}")
        optional_integer("seed", self.seed, -(2**63))
