"""Layers that are compiled once for all lengths, in an engine."""

from __future__ import annotations

import pytest
import torch
from models import build
from serving import GREEDY, LENGTHS, engine_of, generated, model_of, prompts_of, served, tokens
from torch import nn
from torch._dynamo.utils import counters

from vattn.graphs import compilation
from vattn.graphs.compilation import LayersAsOne, compile_layers, lay_side_by_side
from vattn.kernels import linear
from vattn.models.private import private_copy
from vattn.models.versions import VERSION

pytestmark = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.thorough(1)
@pytest.mark.parametrize(
    ("name", "graphs"), [("llama-gqa", 3), ("gemma2", 3), ("gpt_oss", 3), ("qwen3_moe", 3), ("gpt2", 1)]
)
def test_layers_are_compiled_once(name, graphs):
    """Once for any number of tokens, behind prompts and chunks, and whatever runs beside.

    Two layers are compiled as one, and so are the last normalization and the rotary embedding where there are.
    """
    model = model_of(name)
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with engine_of(model, max_num_batched_tokens=40, compile=True) as engine:
        assert engine.tier.uncompiled is None
        compiled = counters["stats"]["unique_graphs"]
        assert compiled == graphs
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert counters["stats"]["unique_graphs"] == compiled
    assert all(module._compiled_call_impl is None for module in model.modules())  # the caller's model is as it was
    assert generated(model, prompts[:1]) == expected[:1]


def test_layers_with_other_arguments_are_compiled_apart(caplog):
    """Gemma 3 has a rotary embedding for each kind of layer."""
    caplog.set_level("INFO", "vattn")
    model = model_of("gemma3")
    prompts = prompts_of(LENGTHS)
    expected = generated(model, prompts)
    with engine_of(model, max_num_batched_tokens=40, compile=True) as engine:
        assert engine.tier.uncompiled is None
        assert "given other arguments than the first" in caplog.text
        assert tokens(served(engine, prompts, GREEDY)) == expected


@pytest.mark.parametrize(("count", "sizes"), [(4, [2, 2]), (5, []), (1, [])])
def test_layers_that_are_compiled_as_one(count, sizes):
    """None of an odd number, since the last one would run other code."""
    config = model_of("llama-gqa").config
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": count})
    mine = private_copy(type(model_of("llama-gqa"))(config))
    assert compile_layers(mine) == count
    owners = dict.fromkeys(getattr(layer._compiled_call_impl, "__self__", None) for layer in mine.model.layers)
    assert [len(owner.layers) for owner in owners if isinstance(owner, LayersAsOne)] == sizes


def test_forward_hooks_are_called():
    model = model_of("llama-gqa")
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    model(torch.tensor([[1, 2]]), output_hidden_states=True)  # hooks of transformers' own, which do nothing later
    with engine_of(model, compile=True) as engine:
        assert engine.tier.uncompiled is None
    seen = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *args: seen.append(args))
    with engine_of(model, compile=True) as engine:
        assert engine.tier.uncompiled == "its modules have forward hooks"
        seen.clear()
        assert tokens(served(engine, prompts, GREEDY)) == expected
        assert seen


def test_layers_are_compiled_in_pairs_where_a_small_module_is_not(caplog):
    """Of a dynamic rotary embedding, whose frequencies depend on the positions, as long as these do not come so far."""
    caplog.set_level("INFO", "vattn")
    model = model_of("llama-gqa")
    config = type(model.config)(
        **{**model.config.to_dict(), "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    )
    torch.manual_seed(1)
    model = type(model)(config).eval()
    model.generation_config.eos_token_id = None
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    with engine_of(model, compile=True) as engine:
        assert (engine.tier.name, engine.tier.uncompiled) == ("flat", None)
        [why] = [record.message for record in caplog.records if "layers are not compiled" in record.message]
        assert "(pairs: True, small modules: True)" in why
        assert "\n" not in why
        assert tokens(served(engine, prompts, GREEDY)) == expected


def test_layers_as_one_take_no_other_arguments():
    class Layer(nn.Module):
        def forward(self, states, scale=None, *, mask=None):
            return states + 1

    layers = [Layer() for _ in range(3)]
    LayersAsOne(layers).take_calls()
    mask, states = torch.ones(1), torch.zeros(2)
    for given in ({}, {"mask": mask}):
        states = layers[0](states, **given)
        assert layers[2](layers[1](states, **given), **given) is states
    assert states.tolist() == [6, 6]
    for args, given in (((states,), {}), ((states, mask), {"mask": mask}), ((states,), {"mask": mask.clone()})):
        made = layers[0](states, mask=mask)
        with pytest.raises(ValueError, match="other arguments"):
            layers[1](made, *args[1:], **given)
    with pytest.raises(ValueError, match="other arguments"):
        layers[1](states.clone(), mask=mask)


def test_a_layer_that_is_not_laid_out_alike_is_not_compiled():
    """Code that reads neighbouring weights as one tensor would read past the weights of such a layer."""
    model = model_of("llama-gqa")
    lay_side_by_side(model)
    apart = model.model.layers[1].self_attn.k_proj
    apart.weight.data = apart.weight.data.clone()
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    mine = private_copy(model)
    assert compile_layers(mine) == len(model.model.layers) - 1
    assert mine.model.layers[1]._compiled_call_impl is None
    with engine_of(model, compile=True) as engine:
        assert engine.tier.uncompiled is None
        assert tokens(served(engine, prompts, GREEDY)) == expected


@pytest.mark.thorough(2)
@pytest.mark.parametrize("changed", ["nothing", "bias", "forward", "kind"])
def test_the_operator_computes_logits_unless_their_layer_is_another_one(changed, monkeypatch):
    model = model_of("llama-gqa")
    plain = model.lm_head.forward
    if changed == "bias":
        model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, model.config.vocab_size))
    elif changed == "forward":
        model.lm_head.forward = lambda states: plain(states) * 0.5
    elif changed == "kind":
        model.lm_head.__class__ = type("Half", (nn.Linear,), {"forward": lambda self, states: plain(states) * 0.5})
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    called = []
    monkeypatch.setattr(
        compilation, "product_of", lambda rows, weight: called.append(weight) or linear.linear(rows, weight)
    )
    with engine_of(model, compile=True) as engine:
        assert engine.tier.uncompiled is None
        assert tokens(served(engine, prompts, GREEDY)) == expected
    assert bool(called) == (changed == "nothing")
    assert all(weight is model.lm_head.weight for weight in called)


@pytest.mark.parametrize("autotune", [False, True])
def test_compiled_layers_compute_their_products_by_the_operator(autotune, monkeypatch):
    """But not where torch is to measure products itself."""
    model = model_of("llama-gqa")
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    monkeypatch.setattr(compilation, "takes", lambda weight: True)  # on a CPU, too
    called = []
    monkeypatch.setattr(linear, "takes", lambda weight: called.append(tuple(weight.shape)))
    with compilation.inductor.patch(max_autotune_gemm=autotune), engine_of(model, compile=True) as engine:
        assert engine.tier.uncompiled is None
        called.clear()
        assert tokens(served(engine, prompts, GREEDY)) == expected
    layers = [
        (sum(len(each.weight) for each in joined), joined[0].in_features)
        for layer in model.model.layers
        for joined in (
            (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            (layer.self_attn.o_proj,),
            (layer.mlp.gate_proj, layer.mlp.up_proj),
            (layer.mlp.down_proj,),
        )
    ]
    head = tuple(model.lm_head.weight.shape)
    assert [shape for shape in called if shape != head][: len(layers)] == ([] if autotune else layers)


def test_what_does_not_compile_stays_as_it_is(caplog):
    model = model_of("llama-gqa")
    forward = model.model.layers[0].mlp.forward

    def forward_with_a_break(states):
        torch._dynamo.graph_break()
        return forward(states)

    model.model.layers[0].mlp.forward = forward_with_a_break
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    with engine_of(model, compile=True) as engine:
        assert engine.tier.uncompiled is not None
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert len([message for message in warnings if "layers are not compiled" in message]) == 1
        assert tokens(served(engine, prompts, GREEDY)) == expected


def test_compiled_layers_that_compute_something_else_are_not_used(monkeypatch):
    compiled = private_copy

    def changed(model):
        mine = compiled(model)
        mine.model.norm = nn.Identity()
        return mine

    monkeypatch.setattr("vattn.engine.tier.private_copy", changed)
    model = model_of("llama-gqa")
    prompts = prompts_of((12, 20))
    with engine_of(model, compile=True) as engine:
        assert "its logits differ" in engine.tier.uncompiled
        assert tokens(served(engine, prompts, GREEDY)) == generated(model, prompts)


def test_compiled_layers_sleep_and_take_weights():
    model, other = model_of("llama-gqa"), build("llama-gqa", "eager", "cpu")
    other.generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.9)
    prompts = prompts_of((12, 20))
    expected = generated(model, prompts)
    with engine_of(model, compile=True) as engine:
        assert tokens(served(engine, prompts, GREEDY)) == expected
        engine.sleep()
        engine.wake_up()
        assert tokens(served(engine, prompts, GREEDY)) == expected
        engine.update_weights(other.state_dict())
        assert tokens(served(engine, prompts, GREEDY)) == generated(other, prompts)


def test_a_private_copy_shares_weights_and_nothing_else():
    model = model_of("llama-gqa")
    mine = private_copy(model)
    assert all(a is b for a, b in zip(model.parameters(), mine.parameters(), strict=True))
    assert not {id(module) for module in model.modules()} & {id(module) for module in mine.modules()}
    mine.model.layers[0].mlp = nn.Identity()
    assert not isinstance(model.model.layers[0].mlp, nn.Identity)
    mine.model.register_forward_hook(lambda *args: None)
    assert not model.model._forward_hooks
