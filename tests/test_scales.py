"""K and V in fp8: rows are stored rounded, and every way of reading them gives the rounded values."""

from __future__ import annotations

import copy

import pytest
import torch
from models import build, generated, virtual_of
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vattn import VirtualCache, kernels
from vattn.kernels import KERNELS, AttentionParams, AttentionSpec, SequenceRanges
from vattn.kernels.quantize import Scales

FP8 = "float8_e4m3fn"
pytestmark = pytest.mark.usefixtures("small")


class Rounded(DynamicCache):
    """A DynamicCache that keeps K and V as torch rounds them to fp8. A first prompt sees its own K and V unrounded."""

    def __init__(self, config, scales=None):
        super().__init__(config=config)
        self.scales = scales or (torch.ones(len(self.layers)), torch.ones(len(self.layers)))

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        first = self.get_seq_length(layer_idx) == 0
        rounded = []
        for states, scale in zip((key_states, value_states), self.scales, strict=True):
            s = scale[layer_idx].reshape(-1, 1, 1).to(states.device)
            rounded.append(((states / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s).to(states.dtype))
        kind = DynamicSlidingWindowLayer if self.layers[layer_idx].is_sliding else DynamicLayer
        seen = kind.update(self.layers[layer_idx], *rounded)
        return (key_states, value_states) if first else seen


def scales_of(model, shape):
    torch.manual_seed(2)
    config = model.config
    heads = config.num_key_value_heads
    size = (config.num_hidden_layers, heads)[: len(shape)]
    return tuple(0.02 + torch.rand(size) / 20 for _ in range(2))


@pytest.mark.thorough(5)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2"])
@pytest.mark.parametrize("shape", ["", "l", "lh"], ids=["unscaled", "of layers", "of heads"])
@pytest.mark.parametrize("attention", [None, "reference"], ids=["copies", "steps"])
@pytest.mark.parametrize("padded", [False, True])
def test_generation_is_that_of_rounded_states(name, shape, attention, padded, device):
    if device == "cuda" and attention is None:
        attention = "sdpa"  # no kernel takes these float32 queries, so that transformers computes all steps
    model = build(name, "eager" if name == "gemma2" else "sdpa", device)
    model.generation_config.eos_token_id = None
    scales = scales_of(model, shape) if shape else None
    options = {"batch": 3, "max_new_tokens": 24}
    if padded:
        options["padded"] = True
    expected = generated(model, Rounded(model.config, scales), **options)
    assert not torch.equal(expected, generated(model, DynamicCache(config=model.config), **options))
    with virtual_of(model, attention=attention, capture=False, kv_dtype=FP8, kv_scales=scales) as cache:
        for _ in range(2):
            assert torch.equal(generated(model, cache, **options), expected)
            stats = cache.decode_stats()
            assert (stats.kernel == "reference") == (attention == "reference")
            cache.check()
            cache.reset()
        kinds = {shape.dtype for kv in cache.kv_caches for shape in kv.layout.layers}
        assert kinds == {FP8}


class Each(StoppingCriteria):
    def __init__(self, do):
        self.do = do

    def __call__(self, input_ids, scores, **options):
        self.do(input_ids.shape[1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@pytest.mark.thorough(4)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
@pytest.mark.parametrize(
    "act",
    [
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])) or cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.batch_repeat_interleave(2) or cache.batch_select_indices(torch.tensor([0, 2])),
        lambda cache: copy.deepcopy(cache).close(),
        lambda cache: [layer.keys for layer in cache.layers],
    ],
    ids=["reordered", "repeated", "copied", "viewed"],
)
@pytest.mark.parametrize("padded", [False, True])
def test_what_else_is_done_to_a_cache(name, act, padded, device):
    model = build(name, "sdpa", device)
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 16, "padded": padded}
    expected = generated(model, Rounded(model.config), **options)
    with virtual_of(model, attention="reference", capture=False, kv_dtype=FP8) as cache:
        criteria = StoppingCriteriaList([Each(lambda length: act(cache) if length % 5 == 0 else None)])
        assert torch.equal(generated(model, cache, stopping_criteria=criteria, **options), expected)


def test_keys_are_what_the_model_computes_with(device):
    model = build("llama-gqa", "sdpa", device)
    scales = scales_of(model, "lh")
    with virtual_of(model, kv_dtype=FP8, kv_scales=scales, attention="reference", capture=False) as cache:
        k = torch.randn(2, 2, 9, 16, device=device)
        cache.update(k, 100 * k, 1)
        layer = cache.layers[1]
        assert layer.keys.dtype == torch.float32
        torch.testing.assert_close(layer.keys, k, rtol=0.07, atol=1e-3)
        largest = 448 * scales[1][1].to(device)[:, None, None]  # values are clamped to the largest fp8 number
        expected = (100 * k).clamp(-largest, largest)
        torch.testing.assert_close(layer.values, expected, rtol=0.07, atol=1e-2)


def test_memory_is_half_of_that_of_16_bits(device):
    if device == "cuda":
        pytest.skip("these few tokens fit the smallest memory that a device maps")
    model = build("llama-gqa", "sdpa", device).bfloat16()
    peaks = []
    for kv_dtype in (None, FP8):
        with virtual_of(model, kv_dtype=kv_dtype, mapper=False, lookahead=0) as cache:
            generated(model, cache, length=120, max_new_tokens=8, batch=3)
            peaks.append(cache.stats().peak)
    assert peaks[1] <= 0.6 * peaks[0]


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("heads", [(8, 2, 64), (8, 1, 128)])
def test_kernels_on_fp8(heads, device):
    """Compares kernels with the definition in float64, with nothing mapped behind the rows that a kernel may load."""
    from test_kernels import LENGTHS, Filled, expected, queries_of

    query_heads, kv_heads, dim = heads
    task = AttentionSpec(
        device=device, dtype=torch.bfloat16, query_heads=query_heads, kv_heads=kv_heads, head_dim=dim, v_head_dim=dim,
        kv_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    tried = []
    for kernel in KERNELS.values():
        if kernel.missing() or kernels.refused_kv(kernel, task) or kernel.refuses(task):
            continue
        filled = Filled(kernel, task, LENGTHS)
        spans = SequenceRanges.of([(slot, 0, n) for slot, n in enumerate(LENGTHS)], device)
        q, how = queries_of(task, len(LENGTHS)), AttentionParams(scale=0.1)
        got = kernel.decode(q, filled.k, filled.v, spans, how)
        want = expected(q, filled.k, filled.v, spans, [1] * len(LENGTHS), how)
        # A kernel may round its queries, too.
        difference = (got.double() - want).norm(dim=-1) / want.norm(dim=-1)
        assert float(difference.max()) < (0.01 if kernel.name == "reference" else 0.08)
        tried.append(kernel.name)
    assert "reference" in tried


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.skipif(KERNELS["flashinfer"].missing() is not None, reason="flashinfer-python is not there")
def test_captured_steps_on_fp8(device):
    model = build("llama-gqa", "sdpa", device, head_dim=64).bfloat16()
    with virtual_of(model, kv_dtype=FP8, attention="flashinfer") as cache:
        generated(model, cache, max_new_tokens=24)
        stats = cache.decode_stats()
        assert stats.fallback is None
        assert stats.kernel == "flashinfer"
        assert stats.replayed >= 21


def test_misuse_is_told(device):
    model = build("llama-gqa", "sdpa", device)
    make = lambda **options: VirtualCache(model, max_len=160, attention="reference", **options)  # noqa: E731
    with pytest.raises(ValueError, match="kv_dtype must be one of float8_e4m3fn, float8_e5m2, not 'int8'"):
        make(kv_dtype="int8")
    with pytest.raises(ValueError, match="kv_scales need a kv_dtype"):
        make(kv_scales=(1.0, 1.0))
    with pytest.raises(ValueError, match=r"kv_scales must be two, of K and of V, not \(1.0,\)"):
        make(kv_dtype=FP8, kv_scales=(1.0,))
    for scales in (1.0, (), torch.ones(2, 4), {"k": 1.0, "v": 1.0}):
        with pytest.raises(ValueError, match="kv_scales must be two, of K and of V"):
            make(kv_dtype=FP8, kv_scales=scales)
    with pytest.raises(ValueError, match="kv_scales must be numbers or tensors, not 'a'"):
        make(kv_dtype=FP8, kv_scales=("a", 1.0))
    for scale in (0.0, float("nan"), torch.ones(1, 2, 3)):
        with pytest.raises(ValueError, match="kv_scales must be positive numbers"):
            make(kv_dtype=FP8, kv_scales=(scale, 1.0))
    cache = make(kv_dtype=FP8, kv_scales=(torch.ones(4, 7), 1.0))
    with pytest.raises(ValueError, match=r"kv_scales are \[4, 7\]: layer 0 of 4 has 2 KV heads"):
        generated(model, cache)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="kv_dtype"):
        Scales("float32")


def test_layers_without_states_have_none_to_read(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model, kv_dtype=FP8, attention="reference", capture=False) as cache:
        k = torch.randn(2, 2, 9, 16, device=device)
        cache.update(k, k, 1)
        assert cache.layers[0].keys.shape[2] == 0
        cache.layers[1].reset()
        assert cache.layers[1].keys.shape[2] == 0
    cache = VirtualCache(None, max_len=20, kv_dtype=FP8, kv_scales=(torch.tensor([1.0, 2.0]), 1.0))
    for layer in range(2):  # without a configuration, layers are added when they are first updated
        cache.update(k, k, layer)
        torch.testing.assert_close(cache.layers[layer].keys, k, rtol=0.07, atol=1e-2)
    with pytest.raises(ValueError, match=r"kv_scales are \[2\]: layer 2 has 2 KV heads"):
        cache.update(k, k, 2)
    cache.close()
