"""Appends one row of K and V to each sequence of a batch, at positions that are read from device memory."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vattn.kernels.quantize import rounded

_FEW = 512  # the next kernel may begin early while at most so many rows are appended
_TOGETHER = 2048  # elements of a row that one program writes at most, unless a head has more


def append(
    k_new: torch.Tensor,
    v_new: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends: torch.Tensor,
    slots: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None),
) -> None:
    """Writes the new K and V of sequence i to row ``ends[i] - 1`` of slot ``slots[i]``.

    On a GPU with Triton one kernel writes both K and V; otherwise torch operations write them one after the other.

    Args:
        k_new: ``[batch, kv_heads, head_dim]``.
        v_new: ``[batch, kv_heads, v_head_dim]``.
        k: slot tensor, ``[slots, max_len, kv_heads, head_dim]``. The rows to write must be mapped.
        v: slot tensor, ``[slots, max_len, kv_heads, v_head_dim]``.
        ends: int32 ``[batch]``, one past the row to write. Nothing is written to an idle slot, whose value is 0; see
            ``takes_idle`` for the devices where slots may be idle.
        slots: int64 ``[batch]``.
        scales: of K and of V, float32 ``[1]`` or ``[kv_heads]``: the states are divided by them before they are rounded
            to fewer bits. ``(None, None)`` divides by nothing.
    """
    kernel = _kernel() if k.is_cuda else None
    if kernel is None:
        if not k.is_cuda and bool((idle := ends <= 0).any()):
            k_new, v_new, ends, slots = (t[~idle] for t in (k_new, v_new, ends, slots))
        at = ends.long() - 1
        for new, rows, scale in zip((k_new, v_new), (k, v), scales, strict=True):
            if rows.dtype.itemsize == 1:  # torch cannot index fp8
                stored = rounded(new[:, :, None], scale, rows.dtype)[:, :, 0]
                rows.view(torch.uint8)[slots, at] = stored.view(torch.uint8)
            else:
                rows[slots, at] = new.to(rows.dtype)
        return
    batch, heads, dim = k_new.shape
    v_dim = v_new.shape[2]
    block = 1 << (max(dim, v_dim) - 1).bit_length()
    together = min(max(1, _TOGETHER // block), 1 << (heads - 1).bit_length())
    # Without scales the kernel does not read these two arguments, and any tensor serves as their pointer.
    k_scale, v_scale = (ends if scale is None else scale for scale in scales)
    kernel[batch, -(-heads // together)](
        # K and V are passed as plain addresses: Triton looks up the memory where a tensor argument begins, and the
        # first row may have none, since a sliding window that has passed it gives its memory back.
        k_new, v_new, k.data_ptr(), v.data_ptr(), ends, slots, k_scale, v_scale,
        *k_new.stride(), *v_new.stride(), *k.stride()[:3], *v.stride()[:3],
        kind=_triton_types()[k.dtype], heads=heads, dim=dim, v_dim=v_dim, block=block, together=together,
        limit=torch.finfo(k.dtype).max if k.dtype.itemsize == 1 else 0.0, scaled=scales[0] is not None,
        k_heads=k_scale.numel(), v_heads=v_scale.numel(), lets_next_begin=batch <= _FEW and _lets_next_begin(k.device),
        aligned=k.data_ptr() % 16 == 0 and v.data_ptr() % 16 == 0,
    )  # fmt: skip


def takes_idle(device: torch.device) -> bool:
    """Whether ``append`` accepts idle slots on this device."""
    return device.type == "cpu" or _kernel() is not None


@functools.cache
def _kernel() -> Any:
    try:
        import triton
        import triton.language as tl
    except ImportError:
        return None

    @triton.jit  # type: ignore[untyped-decorator]
    def kernel(  # type: ignore[no-untyped-def]
        k_new, v_new, k, v, ends, slots, k_scale, v_scale,
        k_new_b, k_new_h, k_new_d, v_new_b, v_new_h, v_new_d, k_slot, k_row, k_head, v_slot, v_row, v_head,
        kind: tl.constexpr, heads: tl.constexpr, dim: tl.constexpr, v_dim: tl.constexpr, block: tl.constexpr,
        together: tl.constexpr, limit: tl.constexpr, scaled: tl.constexpr, k_heads: tl.constexpr,
        v_heads: tl.constexpr, lets_next_begin: tl.constexpr, aligned: tl.constexpr,
    ):  # fmt: skip
        if lets_next_begin:
            tl.extra.cuda.gdc_launch_dependents()
        k = k.to(tl.pointer_type(kind))
        v = v.to(tl.pointer_type(kind))
        if aligned:  # which Triton does not see of an address, and which lets it store several elements at once
            k = tl.multiple_of(k, 16)
            v = tl.multiple_of(v, 16)
        sequence = tl.program_id(0).to(tl.int64)  # products with strides can exceed 32 bits
        head = (tl.program_id(1) * together + tl.arange(0, together)).to(tl.int64)[:, None]
        row = (tl.load(ends + sequence) - 1).to(tl.int64)
        slot = tl.load(slots + sequence).to(tl.int64)
        at = tl.arange(0, block)[None, :]
        there = (row >= 0) & (head < heads)
        k_part, v_part = there & (at < dim), there & (at < v_dim)
        new = tl.load(k_new + sequence * k_new_b + head * k_new_h + at * k_new_d, mask=k_part)
        if scaled:
            new = new / tl.load(k_scale + head % k_heads)
        if limit > 0:
            new = tl.clamp(new.to(tl.float32), -limit, limit).to(kind)
        tl.store(k + slot * k_slot + row * k_row + head * k_head + at, new, mask=k_part)
        new = tl.load(v_new + sequence * v_new_b + head * v_new_h + at * v_new_d, mask=v_part)
        if scaled:
            new = new / tl.load(v_scale + head % v_heads)
        if limit > 0:
            new = tl.clamp(new.to(tl.float32), -limit, limit).to(kind)
        tl.store(v + slot * v_slot + row * v_row + head * v_head + at, new, mask=v_part)

    return kernel


@functools.cache
def _lets_next_begin(device: torch.device) -> bool:
    """Whether the next kernel may begin with what it does before it waits for this one (programmatic dependent launch).

    Only kernels that are made for it begin early, e.g. those of FlashInfer. They take room from a kernel that runs for
    long.
    """
    import triton.language as tl

    there = hasattr(getattr(tl.extra, "cuda", None), "gdc_launch_dependents")
    return there and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def _triton_types() -> dict[torch.dtype, Any]:
    import triton.language as tl

    return {
        torch.float32: tl.float32,
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float8_e4m3fn: tl.float8e4nv,
        torch.float8_e5m2: tl.float8e5,
    }
