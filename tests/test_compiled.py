"""Weights that are laid side by side in memory, and matrix products that a compiled graph joins because of that."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build
from torch import nn
from torch.nn import functional

from vattn.graphs import compilation


def products(model, ids, operators=None):
    """Returns the logits of a compiled model, and how many linear layers its graph has after products were joined.

    Those that ``vattn::linear`` computes are counted in ``operators``.
    """
    count = []

    def backend(graph, inputs):
        compilation._Joined()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        count.append(sum(node.target is functional.linear for node in graph.graph.nodes))
        if operators is not None:
            operators.append(sum(node.target is torch.ops.vattn.linear.default for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)(ids, use_cache=False)[0]
    return logits, sum(count)


@pytest.mark.thorough(1)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma2", "phi3"])
def test_products_of_one_input_are_joined(name):
    """The products of query, key and value become one, and those of gate and up another, with and without biases."""
    model = build(name, "eager", "cpu")
    ids = torch.tensor([[5, 17, 9]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    layers = 4
    fused = name == "phi3"  # the model itself has one weight for query, key and value, and one for gate and up
    logits, number = products(model, ids)
    assert number == (4 if fused else 7) * layers + 1
    torch.testing.assert_close(logits, expected)
    kept = dict(model.named_parameters())
    compilation.lay_side_by_side(model)
    assert all(parameter is kept[n] for n, parameter in model.named_parameters())
    logits, number = products(model, ids)
    assert number == 4 * layers + 1
    torch.testing.assert_close(logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    compilation.lay_side_by_side(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    torch.testing.assert_close(copy.deepcopy(model)(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize(("name", "biased"), [("llama-gqa", 0), ("qwen2", 1)])
def test_products_without_a_bias_are_computed_by_the_operator(name, biased, monkeypatch):
    monkeypatch.setattr(compilation, "takes", lambda weight: True)
    model = build(name, "eager", "cpu")
    ids = torch.tensor([[5, 17, 9]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    compilation.lay_side_by_side(model)
    operators = []
    logits, left = products(model, ids, operators)
    assert (left, sum(operators)) == (4 * biased, 4 * (4 - biased) + 1)  # of four layers
    torch.testing.assert_close(logits, expected)


def test_neighbours_are_saved_and_trained_as_ever(tmp_path):
    model = build("qwen2", "sdpa", "cpu")
    before = copy.deepcopy(model.state_dict())
    compilation.lay_side_by_side(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for states in (model.state_dict(), again.state_dict()):
        assert all(torch.equal(states[name], weight) for name, weight in before.items())
    ids = torch.tensor([[5, 17, 9]])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


class Several(nn.Module):
    """Linear layers whose weights must not move because they are tied, or whose products have different inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.d = nn.Linear(8, 8, bias=False)
        self.tied, self.other = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
        self.tied.weight = self.d.weight

    def forward(self, x, **options):
        return (self.a(x) + self.b(x + 1) + self.c(x) + self.d(x) + self.tied(x) + self.other(x),)


def test_what_does_not_fit_stays():
    torch.manual_seed(0)
    model, x = Several(), torch.randn(2, 8)
    expected = model(x)[0]
    tied = model.d.weight.data_ptr()
    compilation.lay_side_by_side(model)
    assert model.d.weight.data_ptr() == model.tied.weight.data_ptr() == tied
    result, number = products(model, x)
    torch.testing.assert_close(result, expected)
    assert number == 6  # a and c are neighbours of b, which has another input, and not of each other


class Parallel(nn.Module):
    """Two modules, in each of which all layers have the same input. ``changes`` makes the second module's input."""

    def __init__(self, changes):
        super().__init__()
        self.attention = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in "qkv"})
        self.mlp = nn.ModuleDict({name: nn.Linear(8, 16, bias=False) for name in ("gate", "up")})
        self.out = nn.ModuleDict({"one": nn.Linear(16, 8, bias=False)})
        self.changes = changes

    def forward(self, x, **options):
        x = x * 2
        q, k, v = (layer(x) for layer in self.attention.values())
        x = self.changes(x)
        gate, up = (layer(x) for layer in self.mlp.values())
        return (q * k * v + self.out["one"](gate * up),)


@pytest.mark.parametrize(
    ("changes", "joined"),
    [
        (lambda x: x, 3),
        (lambda x: x.add_(1), 3),
        (lambda x: functional.relu(x, inplace=True), 3),
        (lambda x: functional.silu(x, True), 3),
        (lambda x: torch.sigmoid(x, out=x), 3),
    ],
)
def test_each_run_of_neighbours_is_joined(changes, joined):
    torch.manual_seed(0)
    model, x = Parallel(changes), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)[0]
        assert compilation.lay_side_by_side(model)
        result, number = products(model, x)
    torch.testing.assert_close(result, expected)
    assert number == joined
    assert not compilation.lay_side_by_side(model)


@pytest.mark.parametrize("change", [lambda x: x.add_(1), lambda x: functional.relu(x, True), lambda x: x.__iadd__(1)])
def test_an_input_that_changes_parts_a_run(change):
    class Changed(Parallel):
        def forward(self, x, **options):
            x = x * 2
            q = self.attention["q"](x)
            change(x)
            return (q + self.attention["k"](x) + self.attention["v"](x),)

    torch.manual_seed(0)
    model, x = Changed(None), torch.randn(2, 8)
    with torch.no_grad():
        expected = model(x)[0]
        compilation.lay_side_by_side(model)
        result, number = products(model, x)
    torch.testing.assert_close(result, expected)
    assert number == 3  # only layers from the start of a storage on are joined, and k and v begin behind q


def test_weights_of_several_processes_stay():
    model = Several()
    model.share_memory()
    assert not compilation.lay_side_by_side(model)
    model = Several()
    rows = torch.randn(24, 8)
    for layer, part in zip((model.a, model.b, model.c), rows.split(8), strict=True):
        layer.weight.data = part  # a part of a tensor that is used elsewhere, too
    compilation.lay_side_by_side(model)
    assert model.a.weight.data_ptr() == rows.data_ptr()
