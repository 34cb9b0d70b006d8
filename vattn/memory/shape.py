"""What an attention layer caches for a token. This module works without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vattn.arguments import integer, optional_integer, shown

ITEMSIZES = {
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
}
"""Bytes of an element, by the name of the torch dtype."""

ALIGNMENT = 16  # bytes; kernels that load by TMA require every stride to be a multiple of it


def dtype_name(argument: str, dtype: Any) -> str:
    """Returns the name of a supported dtype, which may be given by name or as a torch dtype.

    Raises:
        ValueError: the dtype is not supported; the message names the argument.
    """
    name = dtype if isinstance(dtype, str) else shown(dtype)
    name = name.removeprefix("torch.")
    if name not in ITEMSIZES:
        raise ValueError(f"{argument} {name!r} is not supported: use one of {', '.join(ITEMSIZES)}")
    return name


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What one attention layer caches for a token.

    Attributes:
        kv_heads: heads of K and V.
        head_dim: elements of a head of K.
        v_head_dim: elements of a head of V, where the number differs (MLA); by default ``head_dim``.
        dtype: name of the torch dtype, a key of ``ITEMSIZES``.
        window: positions that a query sees, itself included; None when it sees all.
    """

    kv_heads: int
    head_dim: int
    v_head_dim: int = 0
    dtype: str = "bfloat16"
    window: int | None = None

    def __post_init__(self) -> None:
        if self.v_head_dim == 0:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        for name in ("kv_heads", "head_dim", "v_head_dim"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        object.__setattr__(self, "window", optional_integer("window", self.window, 1))
        object.__setattr__(self, "dtype", dtype_name("dtype", self.dtype))

    @property
    def itemsize(self) -> int:
        return ITEMSIZES[self.dtype]

    @property
    def k_bytes(self) -> int:
        """Bytes of one token's K, padded to a multiple of ``ALIGNMENT``."""
        return aligned(self.kv_heads * self.head_dim * self.itemsize)

    @property
    def v_bytes(self) -> int:
        """Bytes of one token's V, padded to a multiple of ``ALIGNMENT``."""
        return aligned(self.kv_heads * self.v_head_dim * self.itemsize)


def aligned(nbytes: int) -> int:
    """Rounds a number of bytes up to a multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
