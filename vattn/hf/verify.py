"""Whether a kernel computes what it should: attention beside its definition, and logits beside transformers'.

A step or a prompt that is verified is computed by vattn and by transformers. A wrong scale or a mask that is one
position short moves the logits of a model no further than honest kernels do, so they are the smaller part of it. Each
layer's attention is compared where it is made: its output with the definition in float64 on the same q, K and V, from
which it may differ by three times what stock kernels differ there; and the edges of what it sees by a probe. Logits may
then differ by what becomes of the model's own when its attention is perturbed by as much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from vattn.hf.padding import Padding
from vattn.hf.store import Store
from vattn.kernels import AttentionParams, Kernel, SequenceRanges
from vattn.kernels.quantize import rounded
from vattn.models.attention import attending, own_attention

# What rounding the output of attention alone makes of it, of its norm.
_ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 1e-4, torch.float64: 1e-10}
_TIMES = 3  # what a kernel may differ by, of what the worst of the stock ones does
_LOGITS = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-3, torch.float64: 1e-8}
_MOST = 0.5  # that logits may differ by, whatever becomes of a perturbation: other models differ by more
_DRAWS = 8  # perturbed computations of a model before its logits are held to be wrong
_POSITIONS = 1 << 16  # of a batch are looked at in each layer, or of four rows where these have more
_BLOCK = 4096  # positions that are widened at once


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The most that a row of logits differs by, of its norm."""
    a, b = ours.float(), theirs.float()
    return float(((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp_min(1e-30)).max())


def defined(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    seen: torch.Tensor,
    scores: AttentionParams,
    narrow: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by its definition in float64, and as a fused kernel rounds it: its weights and its output.

    Args:
        q: ``[n, query_heads, head_dim]``.
        k: ``[m, kv_heads, head_dim]``.
        v: ``[m, kv_heads, v_head_dim]``.
        seen: bool ``[n, m]``, what each query sees.
        scores: how they are made; the window is in ``seen``.
        narrow: the dtype that weights are rounded to, by default that of q.

    Returns:
        ``[n, query_heads, v_head_dim]`` twice, float64 and the dtype of q.
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
    """The same by what torch calls for it, where it has that."""
    if scores.softcap is not None or scores.sinks is not None:
        return []
    options: dict[str, Any] = {"scale": scores.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if not bool(seen.all()):
        options["attn_mask"] = seen
    q, k, v = (t.to(q.dtype).transpose(0, 1)[None] for t in (q, k, v))
    return [functional.scaled_dot_product_attention(q, k, v, **options)[0].transpose(0, 1)]


def _apart(ours: torch.Tensor, defined: torch.Tensor) -> torch.Tensor:
    """How far ``[n, heads, dim]`` is from what is defined, of the norm of each head's, ``[n, heads]``."""
    difference: torch.Tensor = torch.linalg.vector_norm(ours.to(defined.dtype) - defined, dim=-1)
    norm: torch.Tensor = torch.linalg.vector_norm(defined, dim=-1)
    return difference / norm.clamp_min(1e-30)


class Comparison:
    """Attention of layers beside its definition.

    Attributes:
        fault: the first that was found, or None.
        spread: the most that stock kernels differed by.
        ratio: the most that the attention compared differed by, of what it may.
    """

    def __init__(self) -> None:
        self.fault: str | None = None
        self.spread = 0.0
        self.ratio = 0.0

    def note(self, fault: str) -> None:
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
        """Compares an output ``[n, query_heads, v_head_dim]``; other arguments as in ``defined``.

        Where K and V are stored over scales, ``k`` and ``v`` are what is stored; with ``narrow`` queries and weights
        may be rounded to their dtype.
        """
        k_scale, v_scale = scales
        wide_k, wide_v = (
            t if scale is None else t.double() * scale.double()[:, None]
            for t, scale in zip((k, v), scales, strict=True)
        )
        right, rounding = defined(q, wide_k, wide_v, seen, scores)
        others = [rounding, *_stock(q, wide_k, wide_v, seen, scores)]
        if k_scale is not None and v_scale is not None:
            # Scales may as well go to the queries, and to what comes out, as long as they are rounded.
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
            return  # which tells nothing
        least = _ROUNDING.get(q.dtype, 1e-4)
        allowed = functools.reduce(torch.maximum, [_apart(other, right) for other in others]).clamp_min(least)
        # Of few numbers a head's may be near by chance.
        allowed = torch.maximum(allowed, allowed.square().mean(-1, keepdim=True).sqrt())
        differs = _apart(out, right)
        ratios = torch.where(differs.isfinite(), differs, math.inf) / (_TIMES * allowed)
        worst = int(ratios.argmax())
        ratio = float(ratios.flatten()[worst])
        self.spread = max(self.spread, float(allowed.max()))
        self.ratio = max(self.ratio, ratio)
        if ratio > 1:
            by, may = float(differs.flatten()[worst]), float(_TIMES * allowed.flatten()[worst])
            self.note(f"{what} differs from its definition by {by:.2g} of its norm, and may by {may:.2g}")


def sampled(count: int, most: int) -> list[int]:
    """So many of the first numbers, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


class Watch(Comparison):
    """What a decode step of a batch is compared with, layer by layer, as the host knows its rows.

    Args:
        store: whose rows they are, each of which is a slot.
        mask: the attention mask of the step, ``[live, length + 1]``, zeros on the left.
        length: of the rows before it, padding included.
        live: rows of the batch.
    """

    def __init__(self, store: Store, mask: torch.Tensor | None, length: int, live: int) -> None:
        super().__init__()
        self._store = store
        hidden = [0] * live if mask is None else (mask == 0).sum(1).tolist()
        padding = store.rows.format.padding or Padding([0] * live)
        self._ends = padding.stored(length + 1)
        self._firsts = [hides - pad for hides, pad in zip(hidden, padding.rows, strict=True)]
        self._rows = sampled(live, max(4, _POSITIONS // (length + 1)))
        self._slots: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _spans(self, window: int | None) -> list[tuple[int, int]]:
        return [
            (first if window is None else max(first, end - window), end)
            for first, end in zip(self._firsts, self._ends, strict=True)
        ]

    def appended(
        self,
        layer: int,
        k_new: torch.Tensor,
        v_new: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    ) -> None:
        """Looks at what was written of a layer's new rows; arguments as in ``append``."""
        self._slots[layer] = k, v
        rows = torch.arange(len(self._ends), device=k.device)
        at = torch.tensor(self._ends, device=k.device) - 1
        for name, new, slots, scale in zip("KV", (k_new, v_new), (k, v), scales, strict=True):
            new = new[: len(rows)]
            if slots.dtype.itemsize == 1:  # which torch does not index
                stored = slots.view(torch.uint8)[rows, at].view(slots.dtype).float()
                right = rounded(new[:, :, None], scale, slots.dtype)[:, :, 0].float()
                wrong = bool(((stored - right).norm() > 0.02 * right.norm()) & right.isfinite().all())
            else:
                wrong = not torch.equal(slots[rows, at].nan_to_num(), new.to(slots.dtype).nan_to_num())
            if wrong:
                self.note(f"{name} of layer {layer} is not what was appended")

    def attended(
        self,
        layer: int,
        kernel: Kernel,
        q: torch.Tensor,
        out: torch.Tensor,
        spans: SequenceRanges,
        scores: AttentionParams,
    ) -> None:
        """Compares the attention of a layer, ``[batch, query_heads, dim]``, behind ``appended``."""
        windows = [window for window in (self._store.windows[layer], scores.window) if window is not None]
        expected = self._spans(min(windows, default=None))
        live = len(expected)
        if [span[1:] for span in spans.tolist()[:live]] != expected or any(e for _, _, e in spans.tolist()[live:]):
            self.note(f"layer {layer} is given other rows than its queries see")
        k, v = self._slots[layer]
        scales = self._store.options.scales
        of_layer = (None, None) if scales is None else scales.at(layer, q.device)
        for row in self._rows:
            first, end = expected[row]
            keys, values = k[row, first:end], v[row, first:end]
            seen = torch.ones(1, end - first, dtype=torch.bool, device=q.device)
            what = f"{kernel.name} in layer {layer}"
            narrow = kernel.narrows and k.dtype.itemsize == 1
            self.compare(what, out[row, None], q[row, None], keys, values, seen, scores, of_layer, narrow=narrow)
        if fault := probe_decode(kernel, q, k, v, live, scores):
            self.note(fault)


class PromptWatch(Comparison):
    """What the attention of a prompt is compared with, at some of its positions.

    Args:
        hidden: positions of each row that its mask hides on the left.
        start: positions before it.
        n: of each row.
        windows: of the layers.
    """

    def __init__(self, hidden: list[int], start: int, n: int, windows: list[int | None]) -> None:
        super().__init__()
        self._hidden, self._start, self._n, self._windows = hidden, start, n, windows
        self._rows = sampled(len(hidden), max(4, _POSITIONS // (4 * (start + n))))

    def attended(
        self,
        layer: int,
        kernel: Kernel,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        scores: AttentionParams,
    ) -> None:
        """Compares the attention of a layer, ``[batch, n, heads, dim]``, on what the cache returned."""
        windows = [window for window in (self._windows[layer], scores.window) if window is not None]
        window = min(windows, default=None)
        left_out = self._start + self._n - k.shape[1]
        positions = torch.arange(k.shape[1], device=q.device) + left_out
        for row in self._rows:
            first = max(self._hidden[row] - self._start, 0)
            queries = [first + i for i in sampled(self._n - first, 4)]
            at = torch.tensor(queries, device=q.device)[:, None] + self._start
            seen = (positions <= at) & (positions >= self._hidden[row])
            if window is not None:
                seen &= positions > at - window
            # What no query sees of a window may be unmapped, or nothing a model has computed.
            used = int(seen.any(0).nonzero()[0])
            keys, values = k[row, used:], v[row, used:]
            what = f"{kernel.name} in the prompt of layer {layer}"
            self.compare(what, out[row, queries], q[row, queries], keys, values, seen[:, used:], scores)
        if fault := probe_prefill(kernel, q, k, v, window, self._start > 0, scores):
            self.note(fault)


def probe_decode(
    kernel: Kernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, live: int, scores: AttentionParams
) -> str | None:
    """A fault that shows where all scores are the same and V tells the rows apart; None where there is none.

    Args:
        kernel: to be tried.
        q: as in ``Kernel.decode``; this and the next two tell shapes and dtypes, and are not read.
        k: slot tensor.
        v: slot tensor.
        live: rows of the batch; the others are idle.
        scores: how they are made.
    """
    return _probed_decode(
        kernel, getattr(kernel.decode, "__func__", kernel.decode), q.device, q.dtype, k.dtype,
        *q.shape, k.shape[2], v.shape[3], live,
        scores.softcap is not None, scores.sinks is not None,
    )  # fmt: skip


# Rows of the spans that are tried: around the tiles of kernels, and few.
_TRIED = (1, 2, 3, 16, 17, 63, 64, 65, 80, 127, 128, 129, 130)


@functools.lru_cache(1024)
def _probed_decode(
    kernel: Kernel, function: Any, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype,
    batch: int, heads: int, dim: int, kv_heads: int, v_dim: int, live: int, softcap: bool, sinks: bool,
) -> str | None:  # fmt: skip
    """``function`` is the kernel's, so that another one in its place is tried anew."""
    longest, before, behind = max(_TRIED), max(kernel.head_rows, 8), kernel.tail(dim) + 8
    with torch.inference_mode(False), torch.no_grad():
        q = torch.ones(batch, heads, dim, dtype=dtype, device=device)
        rows = 64 * (-(-(before + longest + 8 + behind) // 64))
        k = torch.zeros(batch, rows, kv_heads, dim, dtype=kv_dtype, device=device)
        v = torch.zeros(batch, rows, kv_heads, v_dim, dtype=dtype, device=device)
        scores = AttentionParams(
            scale=dim**-0.5,
            softcap=30.0 if softcap else None,
            sinks=torch.zeros(heads, dtype=dtype, device=device) if sinks else None,
        )
        spans = []
        for row in range(batch):
            n = _TRIED[row % len(_TRIED)] if row else longest
            first = before + row % 8
            spans.append((row, first, first + n) if row < live else (row, 0, 0))
            # The last row before what is seen, its first and its last one, and the first one behind.
            for place, at in enumerate((first - 1, first, first + n - 1, first + n)):
                v[row, at, :, place] += n
        stored = v.to(kv_dtype)
        out = kernel.decode(q, k, stored, SequenceRanges.of(spans, device), scores)
        for row, first, end in spans[:live]:
            right = stored[row, first:end].double().sum(0) / (end - first + sinks)
            right = right.repeat_interleave(heads // kv_heads, 0)
            if not bool(((out[row].double() - right).abs() <= 0.1 * right.abs().clamp_min(1)).all()):
                return f"{kernel.name} does not see just the {end - first} rows that it is given"
    return None


def probe_prefill(
    kernel: Kernel,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    behind: bool,
    scores: AttentionParams,
) -> str | None:
    """The same of a prompt: ``[batch, n, heads, dim]`` each, of which only shapes and dtypes are looked at."""
    return _probed_prefill(
        kernel, getattr(kernel.prefill, "__func__", kernel.prefill), q.device, q.dtype,
        *q.shape[2:], k.shape[2], v.shape[3], window, behind,
        scores.softcap is not None, scores.sinks is not None,
    )  # fmt: skip


@functools.lru_cache(1024)
def _probed_prefill(
    kernel: Kernel, function: Any, device: torch.device, dtype: torch.dtype, heads: int, dim: int, kv_heads: int,
    v_dim: int, window: int | None, behind: bool, softcap: bool, sinks: bool,
) -> str | None:  # fmt: skip
    n = v_dim  # rows that a one-hot V tells apart
    if window is not None and window >= n:
        window = max(n // 2, 1)  # one that shows
    with torch.inference_mode(False), torch.no_grad():
        k = torch.zeros(2, n, kv_heads, dim, dtype=dtype, device=device)
        v = torch.eye(n, dtype=dtype, device=device)[None, :, None].expand(2, n, kv_heads, v_dim).contiguous()
        counts = [n // 2, 1] if behind else [n, n // 2]
        spans = [(0, 0, n), (1, 0, n if behind else n // 2)]
        scores = AttentionParams(
            scale=dim**-0.5,
            softcap=30.0 if softcap else None,
            sinks=torch.zeros(heads, dtype=dtype, device=device) if sinks else None,
            window=window,
        )
        q = torch.ones(sum(counts), heads, dim, dtype=dtype, device=device)
        out = kernel.prefill(q, k, v, SequenceRanges.of(spans, device), counts, scores)
        at = torch.cat([torch.arange(end - count, end) for (_, _, end), count in zip(spans, counts, strict=True)])
        distance = (at[:, None] - torch.arange(n)).to(device)
        seen = (distance >= 0) & (distance < (n if window is None else window))
        right = (seen.double() / (seen.sum(1, keepdim=True) + sinks))[:, None]
        if not bool(((out.double() - right).abs() <= 0.1 * right.amax(-1, keepdim=True)).all()):
            return f"{kernel.name} does not see just the positions before a query of a prompt"
    return None


class Perturbed:
    """A model's own attention, each output of which is moved by a part of itself.

    Args:
        amplitude: by how much, of its norm.
        seed: of the direction.
    """

    own_attention = True
    store = None  # updates of the cache are as ever

    def __init__(self, amplitude: float, seed: int) -> None:
        self._amplitude = amplitude
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def attend_own(self, module: Any, *args: Any, **options: Any) -> Any:
        out, *others = own_attention(module, *args, **options)
        if out.device not in self._generators:
            self._generators[out.device] = torch.Generator(out.device).manual_seed(self._seed)
        noise = torch.empty_like(out, dtype=torch.float32).normal_(generator=self._generators[out.device])
        return (out * (1 + self._amplitude * noise)).to(out.dtype), *others


class Expected:
    """What transformers gives for a call, and whether the last logits of its rows are near enough to it.

    Args:
        compute: the call, as often as it is wanted; each writes its K and V in the place of the last one's.
        configs: of the model.
        spread: what the attention of stock kernels differs by.
        rounded: whether K and V are rounded to fewer bits, where one that is rounded otherwise is a difference of its
            own.
    """

    def __init__(self, compute: Callable[[], Any], configs: list[Any], spread: float, *, rounded: bool) -> None:
        self._output = compute()
        self._logits = self._output[0][:, -1:].clone()
        self._compute, self._configs = compute, configs
        dtype = self._logits.dtype
        self._amplitude = _TIMES * max(spread, _ROUNDING.get(dtype, 1e-4))
        self.bound = max(_LOGITS.get(dtype, 1e-3), 2e-2 if rounded else 0.0)
        self._draws = 0

    def tells(self) -> bool:
        """Whether something can be told by it."""
        return not bool(torch.isnan(self._logits).any())

    def output(self) -> Any:
        """What transformers gives, whose K and V are those that are stored then."""
        if self._output is None:
            self._output = self._compute()
        return self._output

    def difference(self, ours: torch.Tensor) -> str | None:
        """How logits ``[batch, n, vocabulary]`` of any row differ at the last position, if by more than they may."""
        ours, theirs = ours[:, -1:], self._logits
        if ours.shape != theirs.shape:
            return f"{tuple(ours.shape)} for {tuple(theirs.shape)}"
        worst = relative_error(ours, theirs)
        while self.bound < worst <= _MOST and self._draws < _DRAWS:
            self._draws += 1
            self._output = None
            with attending(Perturbed(self._amplitude, self._draws), self._configs):
                perturbed = self._compute()
            # The worst of few draws is not the worst of all.
            self.bound = max(self.bound, min(_MOST, 1.5 * relative_error(perturbed[0][:, -1:], theirs)))
            del perturbed
        return None if worst <= self.bound else f"by {worst:.2g} of their norm, and may by {self.bound:.2g}"
