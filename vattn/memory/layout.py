"""Computes where each row of K and V lies: arithmetic only, without a device and without torch.

The layers of a model are split into groups that have the same shape and window, and the rows of each group into planes.
A plane holds ``row_bytes`` for every position of a slot and is mapped separately from the other planes.

``interleaved`` (the default)
    One plane per group, ``[position, layer, (K, V), kv_head, head_dim]``: one mapping serves all its layers, so a
    granule holds few tokens and a sequence wastes at most one granule per group. With ``layers_per_plane`` groups have
    at most so many layers: more tokens in a granule, and kernels that read one layer find its rows closer together.
``compact``
    One plane for each layer's K and one for its V, ``[position, kv_head, head_dim]``: the rows of a layer are
    contiguous, and each growth step maps memory in every plane.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from vattn.arguments import choice, flag, integer, shown
from vattn.memory.configuration import described
from vattn.memory.shape import LayerShape

GRANULARITY = 2 * 1024 * 1024
"""Bytes of the smallest physical unit on CUDA devices, and the default on the host."""

_LARGEST_ROW = 1 << 40  # the most bytes that a position may take in all layers together

Kind = Literal["interleaved", "compact"]
KINDS: tuple[Kind, ...] = ("interleaved", "compact")


@dataclass(frozen=True)
class Plane:
    """A part of every slot that is mapped separately.

    Attributes:
        row_bytes: bytes of each position.
        window: positions that a query sees, itself included; None when it sees all.
    """

    row_bytes: int
    window: int | None


@dataclass(frozen=True)
class Group:
    """Layers of one shape that share planes, and where their rows lie.

    Attributes:
        shape: the shape of each of the layers.
        layers: indices of the layers, in model order.
        k_planes: the plane of each layer's K, as an index into ``KVLayout.planes``.
        v_planes: the same for V.
        k_offsets: for each layer, the bytes from the start of a row of its plane to the first element of its K.
        v_offsets: the same for V.
    """

    shape: LayerShape
    layers: tuple[int, ...]
    k_planes: tuple[int, ...]
    v_planes: tuple[int, ...]
    k_offsets: tuple[int, ...]
    v_offsets: tuple[int, ...]

    @property
    def fused(self) -> bool:
        """Whether V's heads directly follow K's heads in a row and have their size, so that one tensor covers both."""
        shape = self.shape
        heads = shape.kv_heads * shape.head_dim * shape.itemsize
        return (
            self.k_planes == self.v_planes
            and shape.head_dim == shape.v_head_dim
            and self.v_offsets[0] - self.k_offsets[0] == heads
        )


class KVLayout:
    """The layout of a model's KV cache.

    Args:
        layers: the shape of each layer; None for a layer that caches nothing.
        max_len: positions of the longest sequence.
        kind: ``"interleaved"`` or ``"compact"``.
        granularity: bytes of the smallest physical unit.
        recurrent: whether some layers keep a state that is not in the rows, so that a sequence cannot be continued
            from its rows alone.
        layers_per_plane: how many layers a plane holds at most where the layout is interleaved; None for all.
    """

    def __init__(
        self,
        layers: Sequence[LayerShape | None],
        *,
        max_len: int,
        kind: Kind = "interleaved",
        granularity: int = GRANULARITY,
        recurrent: bool = False,
        layers_per_plane: int | None = None,
    ) -> None:
        choice("kind", kind, KINDS)
        if not isinstance(layers, (list, tuple)) or not all(s is None or isinstance(s, LayerShape) for s in layers):
            raise TypeError(f"layers must be a list of LayerShape, None for one without a cache, not {shown(layers)}")
        if not any(layers):
            raise ValueError("layers must name at least one layer that caches something")
        self.layers = tuple(layers)
        self.kind: Kind = kind
        self.layers_per_plane = layers_per_plane
        if layers_per_plane is not None:
            self.layers_per_plane = integer("layers_per_plane", layers_per_plane, 1)
            if kind != "interleaved":
                raise ValueError(f"layers_per_plane must be None, not {layers_per_plane}: the layout is {kind}")
        if self.bytes_per_token > _LARGEST_ROW:
            raise ValueError(f"layers take {self.bytes_per_token} bytes a position, and may take {_LARGEST_ROW}")
        self.max_len = integer("max_len", max_len, 1)
        self.granularity = integer("granularity", granularity, 1)
        self.recurrent = flag("recurrent", recurrent)

    @classmethod
    def uniform(
        cls,
        *,
        layers: int,
        kv_heads: int,
        head_dim: int,
        max_len: int,
        v_head_dim: int = 0,
        dtype: str = "bfloat16",
        kind: Kind = "interleaved",
        granularity: int = GRANULARITY,
        layers_per_plane: int | None = None,
    ) -> KVLayout:
        """Makes the layout of ``layers`` layers of the same shape; see ``LayerShape`` for the other arguments."""
        shape = LayerShape(kv_heads=kv_heads, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
        shapes = [shape] * integer("layers", layers, 1)
        return cls(shapes, max_len=max_len, kind=kind, granularity=granularity, layers_per_plane=layers_per_plane)

    @classmethod
    def from_config(
        cls,
        config: Any,
        *,
        max_len: int,
        dtype: str | None = None,
        kind: Kind = "interleaved",
        granularity: int = GRANULARITY,
        layers_per_plane: int | None = None,
    ) -> KVLayout:
        """Makes the layout of a model from its configuration.

        Args:
            config: a Hugging Face configuration, or the mapping of a ``config.json``.
            max_len: positions of the longest sequence.
            dtype: name of the cache's dtype; by default the configuration's.
            kind: ``"interleaved"`` or ``"compact"``.
            granularity: bytes of the smallest physical unit.
            layers_per_plane: how many layers a plane holds at most; None for all.

        Raises:
            TypeError, ValueError: a value that a layout needs is missing, wrong or not understood; the message names
                it.
        """
        layers, recurrent = described(config, dtype)
        return cls(
            layers,
            max_len=max_len,
            kind=kind,
            granularity=granularity,
            recurrent=recurrent,
            layers_per_plane=layers_per_plane,
        )

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The groups, in the order of their first layers."""
        return self._split[0]

    @cached_property
    def planes(self) -> tuple[Plane, ...]:
        """The planes, in the order in which they lie in the reservation."""
        return self._split[1]

    @cached_property
    def _split(self) -> tuple[tuple[Group, ...], tuple[Plane, ...]]:
        members: dict[LayerShape, list[int]] = {}
        for index, shape in enumerate(self.layers):
            if shape is not None:
                members.setdefault(shape, []).append(index)
        most, parts = self.layers_per_plane, []
        for shape, layers in members.items():
            count = 1 if most is None else -(-len(layers) // most)
            bounds = [len(layers) * part // count for part in range(count + 1)]
            parts += [(shape, layers[start:end]) for start, end in itertools.pairwise(bounds)]
        parts.sort(key=lambda part: part[1][0])
        groups: list[Group] = []
        planes: list[Plane] = []
        for shape, indices in parts:
            n, k, v, first = len(indices), shape.k_bytes, shape.v_bytes, len(planes)
            if self.kind == "interleaved":
                planes.append(Plane(n * (k + v), shape.window))
                k_planes = v_planes = (first,) * n
                k_offsets = tuple(i * (k + v) for i in range(n))
                v_offsets = tuple(i * (k + v) + k for i in range(n))
            else:
                planes += [Plane(k, shape.window)] * n + [Plane(v, shape.window)] * n
                k_planes = tuple(range(first, first + n))
                v_planes = tuple(range(first + n, first + 2 * n))
                k_offsets = v_offsets = (0,) * n
            groups.append(Group(shape, tuple(indices), k_planes, v_planes, k_offsets, v_offsets))
        return tuple(groups), tuple(planes)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one more token takes as long as no sliding window is full."""
        return sum(plane.row_bytes for plane in self.planes)

    @property
    def tokens_per_granule(self) -> float:
        """Tokens that one granule holds in the plane with the largest rows; need not be an integer."""
        return self.granularity / max(plane.row_bytes for plane in self.planes)

    @property
    def growth_step_bytes(self) -> int:
        """Bytes of one granule in every plane: the least that a new sequence maps."""
        return len(self.planes) * self.granularity

    @property
    def slot_bytes(self) -> int:
        """Bytes of addresses that a slot takes.

        In each plane these are whole granules, and also whole rows unless the unit that is both exceeds 4 GiB.
        """
        total = 0
        for plane in self.planes:
            unit = math.lcm(self.granularity, plane.row_bytes)
            unit = unit if unit <= 1 << 32 else self.granularity
            total += -(-self.max_len * plane.row_bytes // unit) * unit
        return total

    def used_bytes(self, length: int) -> int:
        """Bytes of the rows that a sequence of ``length`` tokens needs; rows before a sliding window do not count."""
        length = integer("length", length)
        return sum(self._rows(plane, length) * plane.row_bytes for plane in self.planes)

    def mapped_bytes(self, length: int) -> int:
        """Bytes that must be mapped for ``length`` tokens: whole granules in every plane."""
        total, length = 0, integer("length", length)
        for plane in self.planes:
            first = (length - self._rows(plane, length)) * plane.row_bytes // self.granularity
            total += (-(-length * plane.row_bytes // self.granularity) - first) * self.granularity
        return total

    def waste(self, length: int) -> float:
        """The fraction of ``mapped_bytes(length)`` that holds no needed row, 0 to 1."""
        mapped = self.mapped_bytes(length)
        return 1 - self.used_bytes(length) / mapped if mapped else 0.0

    def static_waste(self, length: int) -> float:
        """The fraction, 0 to 1, of a static cache's ``max_len`` positions that ``length`` tokens leave unused."""
        return 1 - self.used_bytes(length) / self.static_bytes

    @property
    def static_bytes(self) -> int:
        """Bytes that a static cache allocates for one sequence of ``max_len`` positions."""
        return self.used_bytes(self.max_len)

    @staticmethod
    def _rows(plane: Plane, length: int) -> int:
        return length if plane.window is None else min(length, plane.window)


def layer_shapes(config: Any, *, dtype: str | None = None) -> list[LayerShape | None]:
    """Returns the shape of each layer of a model, None for a layer that stores no rows.

    Args:
        config: a Hugging Face configuration, or the mapping of a ``config.json``.
        dtype: name of the cache's dtype; by default the configuration's.

    Raises:
        TypeError, ValueError: a value is missing, wrong or not understood; the message names it.
    """
    return described(config, dtype)[0]
