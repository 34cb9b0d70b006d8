"""The products of linear layers with few rows, and which of them is chosen."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.nn import functional

from vattn.kernels import linear
from vattn.kernels.check import relative_errors

gpu = pytest.mark.gpu


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 0, 8), (2, 3, 8)])
def test_the_operator_does_what_torch_does(shape):
    rows, weight = torch.randn(shape), torch.randn(5, 8)
    assert torch.equal(torch.ops.vattn.linear(rows, weight), functional.linear(rows, weight))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_operator_is_compiled_once_for_any_number_of_rows(backend):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda rows, weight: torch.ops.vattn.linear(rows * 2, weight) + 1, backend=backend, dynamic=True
    )
    weight = torch.randn(5, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in (2, 7, 9):
            rows = torch.randn(1, number, 8)
            torch.testing.assert_close(compiled(rows, weight), functional.linear(rows * 2, weight) + 1)


@pytest.mark.parametrize("other", [torch.randn(5, 7), torch.randn(5, 8).half()])
def test_what_does_not_fit_together_is_refused(other):
    with pytest.raises(RuntimeError):
        torch.ops.vattn.linear(torch.randn(3, 8), other)


def test_quantized_weights_keep_their_own_products():
    class Quantized(torch.Tensor):
        is_cuda = True

        def __tensor_flatten__(self):
            return [], None

    class Plain(torch.Tensor):
        is_cuda = True

    weight = torch.randn(5, 8, dtype=torch.bfloat16)
    assert linear.takes(weight.as_subclass(Plain))
    assert not linear.takes(weight.as_subclass(Quantized))
    assert not linear.takes(weight)  # on a CPU


def test_numbers_of_rows_share_a_measurement():
    assert [linear._measured_rows(n) for n in (1, 2, 3, 16, 17, 32, 33, 96, 97, 512)] == [
        *(1, 2, 16, 16, 32, 32, 64, 96, 128, 512)
    ]


def made(name, seconds, compute=functional.linear, *, most=512):
    """A product that seems to take some time."""

    def timed(rows, weight):
        return compute(rows, weight)

    timed.seconds = seconds
    return linear._Product(name, most, timed)


def broken(rows, weight):
    raise RuntimeError("there is no compiler")


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([], "cuBLAS"),
        ([made("a", 0.9), made("b", 0.5)], "b"),
        ([made("a", 0.99)], "cuBLAS"),  # what is nearly the same does not change the choice
        ([made("a", 0.5, most=8)], "cuBLAS"),
        ([made("a", 0.5, broken), made("b", 0.9)], "b"),
        ([made("a", 0.5, lambda rows, weight: functional.linear(rows, weight) * 1.1)], "cuBLAS"),
        ([made("a", 0.5, lambda rows, weight: functional.linear(rows, weight) * torch.nan)], "cuBLAS"),
        ([made("a", 0.5, lambda rows, weight: functional.linear(rows[:, :-1], weight[:, :-1]))], "cuBLAS"),
        ([made("a", 0.5, lambda rows, weight: functional.linear(rows.float(), weight.float()).bfloat16())], "a"),
    ],
)
def test_the_fastest_is_chosen_of_those_that_compute_the_product(others, chosen, monkeypatch):
    cublas = made("cuBLAS", 1.0)
    monkeypatch.setattr(linear, "_CUBLAS", cublas)
    monkeypatch.setattr(linear, "_others", lambda: others)
    monkeypatch.setattr(linear, "median_seconds", lambda call, **_: call.func.seconds)
    weight = torch.randn(1024, 2048).bfloat16()
    before = torch.get_rng_state()
    assert linear._measured(weight, 16).name == chosen
    assert torch.equal(torch.get_rng_state(), before)  # which is the caller's


def test_cublas_is_chosen_where_there_is_no_memory_to_measure_or_all_must_be_the_same_each_time(monkeypatch):
    weight, tried = torch.randn(24, 32).bfloat16(), []

    def measured(*given):
        tried.append(given)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(linear, "_found", {})
    monkeypatch.setattr(linear, "_measured", measured)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    torch.use_deterministic_algorithms(True)
    try:
        assert linear._fastest(weight, 16) is linear._CUBLAS
    finally:
        torch.use_deterministic_algorithms(False)
    assert not tried
    for _ in range(2):
        assert linear._fastest(weight, 16) is linear._CUBLAS
    assert len(tried) == 1  # it is not tried again at each call


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(512, 1024), (4099, 1280), (96, 14336), (70, 96)])
def test_products_round_as_those_of_torch(shape, dtype):
    """Each way to compute a product is as near to the exact one as torch's, whatever the number of rows."""
    torch.manual_seed(0)
    weight = torch.randn(shape, device="cuda", dtype=dtype)
    for number in (1, 2, 3, 16, 17, 32, 33, 160, 512):
        rows = torch.randn(number, shape[1], device="cuda", dtype=dtype)
        exact = functional.linear(rows.double(), weight.double())
        may = 1.5 * relative_errors(functional.linear(rows, weight), exact).max()
        for product in linear._others():
            if number <= product.most and (product.name != "the product by rows" or shape[1] % 256 == 0):
                error = relative_errors(product.compute(rows, weight), exact).max()
                assert error <= may, f"{product.name}, {number} rows: {error:.2g}, and may be {may:.2g}"


@gpu
def test_products_are_measured_once_and_not_in_a_capture(monkeypatch):
    monkeypatch.setattr(linear, "_found", {})
    weight = torch.randn(512, 1024, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(1, 3, 1024, device="cuda", dtype=torch.bfloat16)
    expected = functional.linear(rows, weight)  # first: cuBLAS cannot begin in a capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear.linear(rows, weight)
    graph.replay()
    torch.testing.assert_close(captured, expected, rtol=2e-2, atol=0.2)
    assert not linear._found
    for number in (3, 4, 16):
        linear.linear(rows[:, :1].expand(1, number, 1024), weight)
    assert len(linear._found) == 1
    linear.linear(rows.expand(200, 3, 1024), weight)  # more rows than are measured
    assert len(linear._found) == 1
