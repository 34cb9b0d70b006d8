"""``Comparison``: whether the attention that a kernel computed agrees with the definition of attention.

A wrong scale, or a mask that is one position short, changes the logits of a model no more than the rounding of correct
kernels does. Such faults show in the output of the attention itself. Each output is therefore compared with the
definition, computed in float64 on the same Q, K and V. It may deviate from it by ``TOLERANCE`` times as much as the
outputs of stock kernels do.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch.nn import functional

from vattn.kernels.base import AttentionParams

# The error that rounding the output of attention accounts for, relative to the norm of the output.
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 1e-4, torch.float64: 1e-10}
TOLERANCE = 3  # a kernel may deviate by this many times the error of the worst stock kernel
_BLOCK = 4096  # positions that are converted to float64 at once


def defined(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scores: AttentionParams,
    narrow: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes attention by its definition: exactly in float64, and with the rounding of a fused kernel.

    Args:
        q: ``[n, query_heads, head_dim]``.
        k: ``[m, kv_heads, head_dim]``.
        v: ``[m, kv_heads, v_head_dim]``.
        seen: bool ``[n, m]``, which positions each query sees.
        scores: how scores are computed. Its window is not used, since ``seen`` already tells it.
        narrow: the dtype to which the fused kernel rounds its weights, by default that of ``q``.

    Returns:
        The exact output in float64, and the output with rounded weights, rounded to the dtype of ``q``; each
        ``[n, query_heads, v_head_dim]``.
    """
    n, heads, dim = q.shape
    m, kv_heads, _ = k.shape
    wide = torch.float64
    grouped = q.to(wide).view(n, kv_heads, heads // kv_heads, dim)
    products = torch.empty(kv_heads, heads // kv_heads, n, m, dtype=wide, device=q.device)
    for block in range(0, m, _BLOCK):
        part = slice(block, block + _BLOCK)
        products[..., part] = torch.einsum("nkgd,mkd->kgnm", grouped, k[part].to(wide))
    products *= scores.scale
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    products = products.masked_fill(~seen, -math.inf)
    highest = products.amax(-1, keepdim=True)
    sinks = None
    if scores.sinks is not None:
        sinks = scores.sinks.to(wide).view(kv_heads, -1, 1, 1)
        highest = torch.maximum(highest, sinks)
    weights = (products - highest).exp()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - highest).exp()
    summed = []
    fewer = weights.to(q.dtype) if narrow is None else (256 * weights).to(narrow).to(wide) / 256
    for used in (weights, fewer):
        out = torch.zeros(*used.shape[:3], v.shape[2], dtype=wide, device=q.device)
        for block in range(0, m, _BLOCK):
            part = slice(block, block + _BLOCK)
            out += torch.einsum("kgnm,mkd->kgnd", used[..., part].to(wide), v[part].to(wide))
        summed.append((out / total).permute(2, 0, 1, 3).reshape(n, heads, -1))
    return summed[0], summed[1].to(q.dtype)


def _stock(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scores: AttentionParams
) -> list[torch.Tensor]:
    """The output of torch's own kernel for the same attention; empty where torch has none for it."""
    if scores.softcap is not None or scores.sinks is not None:
        return []
    options: dict[str, Any] = {"scale": scores.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if not bool(seen.all()):
        options["attn_mask"] = seen
    q, k, v = (t.to(q.dtype).transpose(0, 1)[None] for t in (q, k, v))
    return [functional.scaled_dot_product_attention(q, k, v, **options)[0].transpose(0, 1)]


def relative_errors(ours: torch.Tensor, defined: torch.Tensor) -> torch.Tensor:
    """The error of ``ours`` ``[..., dim]``, relative to the norm of each vector of ``defined``: ``[...]``."""
    difference: torch.Tensor = torch.linalg.vector_norm(ours.to(defined.dtype) - defined, dim=-1)
    norm: torch.Tensor = torch.linalg.vector_norm(defined, dim=-1)
    return difference / norm.clamp_min(1e-30)


class Comparison:
    """Compares the attention of layers with its definition, and keeps the outcome.

    Attributes:
        fault: a description of the first fault that was found, or None.
        spread: the largest error of stock kernels so far, relative to the norm of the output, and no less than that of
            rounding.
        ratio: the largest error so far of the attention that was compared, over the error that was allowed there.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self.spread = 0.0
        self.ratio = 0.0

    def note(self, fault: str) -> None:
        """Records a fault, unless one was found before."""
        self.fault = self.fault or fault

    def compare(
        self,
        what: str,
        out: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        seen: torch.Tensor,
        scores: AttentionParams,
        scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None] = (None, None),
        *,
        narrow: bool = False,
    ) -> None:
        """Compares an output of attention with the definition, and records a fault where it deviates too much.

        Args:
            what: names the attention in the description of the fault.
            out: the output, ``[n, query_heads, v_head_dim]``.
            q: as in ``defined``.
            k: as in ``defined``, as it is stored where there are scales.
            v: as in ``defined``, as it is stored where there are scales.
            seen: as in ``defined``.
            scores: as in ``defined``.
            scales: what K and V were divided by before they were stored, ``[1]`` or ``[kv_heads]``, or None each.
            narrow: whether the kernel may round queries and weights to the dtype of ``k``.
        """
        k_scale, v_scale = scales
        wide_k, wide_v = (
            t if scale is None else t.double() * scale.double()[:, None]
            for t, scale in zip((k, v), scales, strict=True)
        )
        right, rounding = defined(q, wide_k, wide_v, seen, scores)
        others = [rounding, *_stock(q, wide_k, wide_v, seen, scores)]
        if k_scale is not None and v_scale is not None:
            # A kernel may apply the scale of K to the queries instead, and that of V to the output. Both are rounded
            # then.
            heads = q.shape[1]
            of_q, of_out = (
                scale.double().expand(k.shape[1]).repeat_interleave(heads // k.shape[1])[:, None]
                for scale in (k_scale, v_scale)
            )
            inner = defined((q.double() * of_q).to(q.dtype), k, v, seen, scores)[1]
            others.append((inner.double() * of_out).to(q.dtype))
        if narrow:
            limit = torch.finfo(k.dtype).max
            fewer = q.clamp(-limit, limit).to(k.dtype).to(q.dtype)
            others.append(defined(fewer, wide_k, wide_v, seen, scores, k.dtype)[1])
        if not bool(right.isfinite().all()):
            return  # nothing can be told from values that are not finite
        least = ROUNDING.get(q.dtype, 1e-4)
        allowed = functools.reduce(torch.maximum, [relative_errors(other, right) for other in others]).clamp_min(least)
        # The few numbers of one head may agree by chance, so each head is allowed the root mean square of all heads.
        allowed = torch.maximum(allowed, allowed.square().mean(-1, keepdim=True).sqrt())
        differs = relative_errors(out, right)
        ratios = torch.where(differs.isfinite(), differs, math.inf) / (TOLERANCE * allowed)
        worst = int(ratios.argmax())
        ratio = float(ratios.flatten()[worst])
        self.spread = max(self.spread, float(allowed.max()))
        self.ratio = max(self.ratio, ratio)
        if ratio > 1:
            by, may = float(differs.flatten()[worst]), float(TOLERANCE * allowed.flatten()[worst])
            self.note(f"{what} differs from its definition by {by:.2g} of its norm, and may by {may:.2g}")


def sampled(count: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers below ``count``, evenly spaced, with the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})
