"""``vattn::linear``: a linear layer's product with few rows, by the kernel that is measured to be the fastest.

Such a product takes as long as its weight is read, and no library has the fastest kernel for each number of rows. The
operator does what ``torch.nn.functional.linear`` does without a bias, and is called by compiled models.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from vattn.kernels.base import HALVES
from vattn.kernels.timing import BETTER, median_seconds

_LOG = logging.getLogger("vattn")
_MOST = 512  # rows of a product that is measured; that of more rows is bound by arithmetic
_WRITTEN = 64 << 20  # bytes between calls that are measured, or twice what the caches hold
_ROUNDS, _REPEATS = 3, 3
_LAUNCHED_IN = 300_000  # cycles of a device
_DEPTH = 128  # elements of a weight's row that a program of ``tiles`` reads at once


@dataclass(frozen=True)
class _Product:
    """A way to compute a product.

    Args:
        name: for messages.
        most: rows that it takes at most.
        compute: takes rows ``[n, inputs]`` and a weight ``[outputs, inputs]``; returns ``[n, outputs]``.
    """

    name: str
    most: int
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def takes(weight: torch.Tensor) -> bool:
    """Whether products with a weight may be worth a measurement: it is a matrix of 16 bits on a GPU, and no subclass.

    Quantized weights are such subclasses, which have their own products.
    """
    plain = weight.is_cuda and weight.dim() == 2 and weight.dtype in HALVES
    return plain and not hasattr(weight, "__tensor_flatten__")


def linear(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of rows with a weight.

    Args:
        rows: ``[..., inputs]``.
        weight: ``[outputs, inputs]``, of the same dtype and on the same device.

    Returns:
        ``[..., outputs]``.

    Raises:
        RuntimeError: the tensors do not fit together.
    """
    number = rows.numel() // max(1, rows.shape[-1])
    fit = rows.shape[-1] == weight.shape[-1] and (rows.dtype, rows.device) == (weight.dtype, weight.device)
    if not (fit and 0 < number <= _MOST and takes(weight) and weight.is_contiguous()):
        return functional.linear(rows, weight)
    product = _fastest(weight, _measured_rows(number))
    return product.compute(rows.reshape(number, -1), weight).view(*rows.shape[:-1], len(weight))


def _linear_shape(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


# A call of an operator that ``torch.library.custom_op`` makes takes some 0.1 ms more of the host's time.
torch.library.define("vattn::linear", "(Tensor rows, Tensor weight) -> Tensor")
torch.library.impl("vattn::linear", ("cpu", "cuda"), linear)
torch.library.register_fake("vattn::linear", _linear_shape)


def _measured_rows(number: int) -> int:
    """With how many rows the kernel is chosen that computes so many."""
    return next((most for most in (1, 2, 16) if number <= most), -(-number // 32) * 32)


_found: dict[Any, _Product] = {}


def _fastest(weight: torch.Tensor, rows: int) -> _Product:
    """The fastest product for a shape of weight and a number of rows, measured once in a process."""
    if torch.are_deterministic_algorithms_enabled():
        return _CUBLAS  # what is chosen depends on how long things take
    key = weight.device, weight.dtype, weight.shape, rows
    if (found := _found.get(key)) is None:
        if torch.cuda.is_current_stream_capturing():
            return _CUBLAS
        found = _CUBLAS
        with contextlib.suppress(torch.OutOfMemoryError), torch.cuda.device(weight.device):
            found = _measured(weight, rows)
        _found[key] = found
    return found


def _measured(weight: torch.Tensor, rows: int) -> _Product:
    random = torch.Generator(weight.device).manual_seed(0)  # that of torch is the caller's
    given = torch.rand(rows, weight.shape[1], dtype=weight.dtype, device=weight.device, generator=random)
    expected, took = functional.linear(given, weight), {_CUBLAS: math.inf}
    for product in _others():
        if rows <= product.most:
            try:
                _require_alike(product.compute(given, weight), expected)
                took[product] = math.inf
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # e.g. there is no compiler, or too little shared memory
                _LOG.info("%s is not used: %s", product.name, str(error).partition("\n")[0])
    written = max(_WRITTEN, 2 * _cache_size(weight.device))
    for _ in range(_ROUNDS):  # by turns, since a device is not always as fast
        for product in took:
            call = functools.partial(product.compute, given, weight)
            seconds = median_seconds(call, written=written, repeats=_REPEATS, launched_in=_LAUNCHED_IN)
            took[product] = min(took[product], seconds)
    best = _CUBLAS
    for product, seconds in took.items():
        if seconds < BETTER * took[best]:
            best = product
    _LOG.debug("%d rows of %s: %s of %s", rows, list(weight.shape), best.name, took)
    return best


def _cache_size(device: torch.device) -> int:
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) if device.type == "cuda" else 0


def _require_alike(ours: torch.Tensor, torchs: torch.Tensor) -> None:
    """Raises ValueError where a product differs by more than two roundings, or one of a number of usual size."""
    eps = torch.finfo(torchs.dtype).eps
    difference, size = (ours.float() - torchs.float()).abs_(), torchs.float().abs_()
    usual = size.square().mean(-1, keepdim=True).sqrt_()
    if not bool((difference <= eps * (2 * size + usual)).all()):
        raise ValueError("it computes something else than torch")


def _by_cublaslt(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """torch computes products with cuBLASLt where a bias is added."""
    return torch.addmm(_zeros(len(weight), weight.dtype, weight.device), rows, weight.t())


@functools.cache
def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=dtype, device=device)


_CUBLAS = _Product("cuBLAS", _MOST, functional.linear)


@functools.cache
def _others() -> list[_Product]:
    """The ways to compute a product besides torch's own."""
    found = [_Product("cuBLASLt", _MOST, _by_cublaslt)]
    try:
        by_row, tiled = _kernels()
    except ImportError:
        return found
    return [*found, _Product("the product of tiles", 32, tiled), _Product("the product by rows", 2, by_row)]


def _kernels() -> tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]:
    """Products by Triton: of one or two rows, and of up to 32."""
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator]
    def gemv(  # type: ignore[no-untyped-def]
        rows, weight, out, outputs, inputs: tl.constexpr, two: tl.constexpr, height: tl.constexpr, width: tl.constexpr,
    ):  # fmt: skip
        # Each program computes ``height`` outputs of one row, or of two.
        output = tl.program_id(0) * height + tl.arange(0, height)
        row = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * inputs
        first = tl.zeros((height, width), tl.float32)
        second = tl.zeros((height, width), tl.float32)
        for start in range(0, inputs, width):
            at = start + tl.arange(0, width)
            part = tl.load(row + at[None, :], eviction_policy="evict_first").to(tl.float32)
            first += part * tl.load(rows + at).to(tl.float32)[None, :]
            if two:
                second += part * tl.load(rows + inputs + at).to(tl.float32)[None, :]
        there = output < outputs
        tl.store(out + output, tl.sum(first, 1).to(out.dtype.element_ty), mask=there)
        if two:
            tl.store(out + outputs + output, tl.sum(second, 1).to(out.dtype.element_ty), mask=there)

    @triton.jit(do_not_specialize=["number"])  # type: ignore[untyped-decorator]
    def tiles(  # type: ignore[no-untyped-def]
        rows, weight, out, number, outputs, inputs: tl.constexpr, wide: tl.constexpr, height: tl.constexpr,
        depth: tl.constexpr,
    ):  # fmt: skip
        # Each program computes ``height`` outputs of all rows.
        output = tl.program_id(0) * height + tl.arange(0, height)
        at = tl.arange(0, wide)
        there = at[None, :] < number
        row = weight + tl.minimum(output, outputs - 1).to(tl.int64)[:, None] * inputs
        sums = tl.zeros((height, wide), tl.float32)
        for start in range(0, inputs, depth):
            of = start + tl.arange(0, depth)
            given = tl.load(rows + at[None, :] * inputs + of[:, None], mask=there, other=0.0)
            sums = tl.dot(tl.load(row + of[None, :]), given, sums)
        place = out + at[None, :].to(tl.int64) * outputs + output[:, None]
        tl.store(place, sums.to(out.dtype.element_ty), mask=there & (output[:, None] < outputs))

    def by_row(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, (outputs, inputs) = rows.contiguous(), weight.shape
        width = _divisor(inputs, 1024, 256)
        out = rows.new_empty(len(rows), outputs)
        gemv[-(-outputs // 2),](
            rows, weight, out, outputs, inputs, two=len(rows) == 2, height=2, width=width, num_warps=4, num_stages=4
        )
        return out

    def tiled(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows, (outputs, inputs) = rows.contiguous(), weight.shape
        depth = _divisor(inputs, _DEPTH, 32)
        out = rows.new_empty(len(rows), outputs)
        tiles[-(-outputs // 64),](
            rows, weight, out, len(rows), outputs, inputs, wide=16 if len(rows) <= 16 else 32, height=64, depth=depth,
            num_warps=4, num_stages=6,
        )  # fmt: skip
        return out

    return by_row, tiled


def _divisor(inputs: int, most: int, least: int) -> int:
    """The largest power of two up to ``most`` that divides the inputs."""
    if (found := min(most, inputs & -inputs)) < least:
        raise ValueError(f"{inputs} inputs are not a multiple of {least}")
    return found
