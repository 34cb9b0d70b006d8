"""Weights side by side, and the products that are joined for it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build
from torch import nn
from torch.nn import functional

from vattn import compiled


def products(model, ids):
    """The logits of a compiled model and how many linear layers the graph has."""
    count = []

    def backend(graph, inputs):
        compiled._Joined()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        count.append(sum(node.target is functional.linear for node in graph.graph.nodes))
        return graph

    torch._dynamo.reset()
    with torch.no_grad():
        logits = torch.compile(model.forward, backend=backend, fullgraph=True, dynamic=False)(ids, use_cache=False)[0]
    return logits, sum(count)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2", "gemma2", "phi3"])
def test_products_of_one_input_are_joined(name):
    """Query, key and value become one, gate and up another, with biases or without."""
    model = build(name, "eager", "cpu")
    ids = torch.tensor([[5, 17, 9]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    layers = 4
    fused = name == "phi3"  # by its makers
    logits, number = products(model, ids)
    assert number == (4 if fused else 7) * layers + 1
    torch.testing.assert_close(logits, expected)
    kept = dict(model.named_parameters())
    compiled.lay_side_by_side(model)
    assert all(parameter is kept[n] for n, parameter in model.named_parameters())
    logits, number = products(model, ids)
    assert number == 4 * layers + 1
    torch.testing.assert_close(logits, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    places = [parameter.data_ptr() for parameter in model.parameters()]
    compiled.lay_side_by_side(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places
    torch.testing.assert_close(copy.deepcopy(model)(ids, use_cache=False).logits, expected)


def test_neighbours_are_saved_and_trained_as_ever(tmp_path):
    model = build("qwen2", "sdpa", "cpu")
    before = copy.deepcopy(model.state_dict())
    compiled.lay_side_by_side(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for states in (model.state_dict(), again.state_dict()):
        assert all(torch.equal(states[name], weight) for name, weight in before.items())
    ids = torch.tensor([[5, 17, 9]])
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())


class Several(nn.Module):
    """Layers that must not move, or whose products are not of one input."""

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
    compiled.lay_side_by_side(model)
    assert model.d.weight.data_ptr() == model.tied.weight.data_ptr() == tied
    result, number = products(model, x)
    torch.testing.assert_close(result, expected)
    assert number == 6  # neighbours of b, which has another input, and not of each other
