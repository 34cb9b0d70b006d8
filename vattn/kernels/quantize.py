"""``Scales``: K and V are stored in fewer bits than a model computes in, divided by a scale before they are rounded."""

from __future__ import annotations

from typing import Any

import torch

from vattn.arguments import shown

FORMATS = ("float8_e4m3fn", "float8_e5m2")


def rounded(states: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Divides states by scales, clamps them to the range of a dtype, and converts them to it.

    Args:
        states: ``[..., kv_heads, n, dim]``.
        scale: ``[1]`` or ``[kv_heads]``, or None to divide by nothing.
        dtype: the dtype of the result.
    """
    limit = torch.finfo(dtype).max
    return (states if scale is None else states / scale[:, None, None]).clamp(-limit, limit).to(dtype)


class Scales:
    """The dtype in which K and V are stored, and the scales by which they are divided before.

    Args:
        dtype: one of ``FORMATS``, as a name or as a ``torch.dtype``.
        scales: the scale of K and that of V: each a number, or a tensor ``[layers]`` or ``[layers, kv_heads]``. None
            divides by nothing.

    Raises:
        ValueError: the dtype is none of ``FORMATS``, or the scales are not positive, finite and of such shapes.
    """

    def __init__(self, dtype: str | torch.dtype, scales: tuple[Any, Any] | None = None) -> None:
        name = (dtype if isinstance(dtype, str) else shown(dtype)).removeprefix("torch.")
        if name not in FORMATS:
            raise ValueError(f"kv_dtype must be one of {', '.join(FORMATS)}, not {name!r}")
        self.dtype = getattr(torch, name)
        self._of: list[torch.Tensor] = []
        if scales is not None and not (isinstance(scales, (tuple, list)) and len(scales) == 2):
            raise ValueError(f"kv_scales must be two, of K and of V, not {shown(scales)}")
        for scale in scales or ():
            try:
                self._of.append(torch.as_tensor(scale, dtype=torch.float32).detach())
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"kv_scales must be numbers or tensors, not {shown(scale)}") from None
            if self._of[-1].dim() > 2 or not bool((self._of[-1] > 0).all()) or not bool(self._of[-1].isfinite().all()):
                raise ValueError(
                    "kv_scales must be positive numbers, or tensors of them: [layers] or [layers, kv_heads]"
                )
        self._placed: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = {}

    def check(self, layer: int, layers: int | None, kv_heads: int) -> None:
        """Checks that the scales have the shape of a model's layers.

        Args:
            layer: the index of a layer.
            layers: how many layers the model has, or None where that is not known.
            kv_heads: how many KV heads the layer has.

        Raises:
            ValueError: the scales have another shape.
        """
        for scale in self._of:
            if scale.dim() == 0:
                continue
            enough = scale.shape[0] > layer if layers is None else scale.shape[0] == layers
            if not enough or (scale.dim() == 2 and scale.shape[1] != kv_heads):
                of = "" if layers is None else f" of {layers}"
                raise ValueError(f"kv_scales are {list(scale.shape)}: layer {layer}{of} has {kv_heads} KV heads")

    def at(self, layer: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """The scales of K and V of a layer on a device, float32 ``[1]`` or ``[kv_heads]``; None each without scales."""
        if not self._of:
            return None, None
        if (layer, device) not in self._placed:
            with torch.inference_mode(False):
                k, v = ((scale if scale.dim() == 0 else scale[layer]).reshape(-1).to(device) for scale in self._of)
            self._placed[layer, device] = k, v
        return self._placed[layer, device]

    def rounded(self, states: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        """Converts K or V ``[batch, kv_heads, n, dim]`` to what is stored; values out of range are clamped to it."""
        return rounded(states, scale, self.dtype)

    def read(self, stored: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """Converts stored K or V to the dtype in which the model computes, and multiplies them by their scale."""
        return stored.to(dtype) if scale is None else (stored.float() * scale[:, None, None]).to(dtype)
