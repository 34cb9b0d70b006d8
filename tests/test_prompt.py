"""Prompts on vattn's kernels, for models with verified decode steps: into empty or filled caches, padded or not."""

from __future__ import annotations

import threading

import pytest
import torch
import transformers
from models import MODELS, attentions, build, generated, molmo2, prompt, virtual_of
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vattn import CACHE_KEYWORD, kernels
from vattn.hf.attach import forward_of

# Models whose attention is of another kind, or expands what the cache holds.
OTHERS = ("t5", "deepseek_v3")
pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.thorough(5)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", ["reference", "sdpa"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in OTHERS])
def test_exact(name, kernel, padded, device):
    model = build(name, attentions(name)[0], device)
    options = {"batch": 3, "length": 30, "padded": padded, "max_new_tokens": 24}
    expected = generated(model, DynamicCache(config=model.config), **options)
    chunked = generated(model, DynamicCache(config=model.config), prefill_chunk_size=11, **options)
    with virtual_of(model, attention=kernel, capture=False) as cache:
        for calls in range(4):
            assert torch.equal(generated(model, cache, **options), expected)
            prompts = cache.decode_stats().prompts
            takes = kernel == "reference" or name not in ("gemma2", "gpt_oss")  # sdpa has no soft cap and no sinks
            assert prompts == (calls if takes else 0)  # all but the first, before which no step had been verified
            cache.check()
            cache.reset()
        assert torch.equal(generated(model, cache, prefill_chunk_size=11, **options), chunked)
        if takes:
            assert cache.decode_stats().prompts == 3 + 3
            assert forward_of(model).prompts


def test_experts_may_be_computed_by_other_means(device):
    """On a GPU, ``generate`` lets experts be computed by different means in prompts and in steps."""
    model = build("mixtral", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model, attention="reference", capture=False) as cache:
        for means in ("eager", "grouped_mm", "eager"):
            model.config._experts_implementation_internal = means
            assert torch.equal(generated(model, cache, max_new_tokens=1), expected[:, :11])
            model.config._experts_implementation_internal = "eager"
            cache.reset()
            assert torch.equal(generated(model, cache), expected)
            cache.reset()
        assert cache.decode_stats().prompts == 4


def test_logits_are_those_of_the_model(device):
    """Compares the logits of all tokens that are not padding, at the beginning of a sequence and behind a past."""
    model = build("mistral", "sdpa", device)
    inputs = prompt(3, 40, device, padded=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad(), virtual_of(model, attention="reference", capture=False) as cache:
        generated(model, cache)
        for _ in range(2):  # in the first turn, transformers also computes each prompt of a new kind
            cache.reset()
            dynamic = DynamicCache(config=model.config)
            for first, end in ((0, 25), (25, 33), (33, 40)):
                part = {"input_ids": ids[:, first:end], "attention_mask": mask[:, :end], "use_cache": True}
                got, want = (model(**part, **{CACHE_KEYWORD: c}).logits for c in (cache, dynamic))
                shown = mask[:, first:end] != 0
                torch.testing.assert_close(got[shown], want[shown], rtol=1e-3, atol=1e-4)
        assert cache.decode_stats().prompts == 6


def test_a_model_that_is_another_one_in_prompts_is_found_out(device, caplog):
    model = build("llama-gqa", "sdpa", device)
    forward = model.model.norm.forward
    seen = []

    def several(states):
        """Negates its output in every second call that has several tokens."""
        if states.shape[1] == 1:
            return forward(states)
        seen.append(1)
        return forward(states) * (1 if len(seen) % 2 else -1)

    with virtual_of(model, attention="reference", capture=False) as cache:
        generated(model, cache)
        cache.reset()
        model.model.norm.forward = several
        for _ in range(2):  # the model has changed, so its steps are verified anew
            cache.reset()
            generated(model, cache)
        assert forward_of(model).prompts is False
        assert "kernels give something else" in caplog.text
        assert cache.decode_stats().prompts == 0
        model.model.norm.forward = forward
        cache.reset()
        assert torch.equal(generated(model, cache), generated(model, DynamicCache(config=model.config)))
        assert cache.decode_stats().prompts == 0


def test_what_is_no_prompt_of_a_decoder(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = prompt(2, 12, device)
    dynamic = lambda: DynamicCache(config=model.config)  # noqa: E731
    with torch.no_grad(), virtual_of(model, attention="reference", capture=False) as cache:
        generated(model, cache)
        for changed in (
            {"attention_mask": torch.ones(2, 1, 12, 12, device=device).tril().bool()},
            {"attention_mask": torch.cat([inputs["attention_mask"][:, 1:], torch.zeros(2, 1, device=device)], 1)},
            {"output_attentions": True},
            {"labels": inputs["input_ids"]},
        ):
            cache.reset()
            if "output_attentions" in changed:
                model.set_attn_implementation("eager")
            got, want = (model(**{**inputs, **changed}, **{CACHE_KEYWORD: c}) for c in (cache, dynamic()))
            torch.testing.assert_close(got.logits[:, :-1], want.logits[:, :-1], rtol=1e-3, atol=1e-4)
            assert (got.attentions is None) == (want.attentions is None)
        assert cache.decode_stats().prompts == 0
        # These kernels do not serve a model that is not causal, and the attempt leaves nothing behind.
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
        cache.reset()
        model(**inputs, **{CACHE_KEYWORD: cache})
        assert cache.get_seq_length() == 12
        assert cache.decode_stats().prompts == 0


def test_a_mask_by_place_is_one(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = prompt(3, 20, device, padded=True)
    expected = model(**inputs, use_cache=False).logits[:, -1]
    with torch.no_grad(), virtual_of(model, attention="reference", capture=False) as cache:
        for _ in range(3):
            generated(model, cache)
            cache.reset()
            got = model(inputs["input_ids"], inputs["attention_mask"], **{CACHE_KEYWORD: cache}).logits[:, -1]
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
            cache.reset()
        assert cache.decode_stats().prompts >= 3


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "llama-gqa"])
def test_k_and_v_that_the_model_laid_out_otherwise(name, device, monkeypatch):
    seen = []
    prefill = kernels.Reference.prefill
    monkeypatch.setattr(
        kernels.Reference, "prefill", lambda self, q, k, v, *args: seen.append((k, v)) or prefill(self, q, k, v, *args)
    )
    model = build(name, "sdpa", device)
    with virtual_of(model, attention="reference", capture=False) as cache:
        for _ in range(2):
            generated(model, cache, batch=3, length=20, padded=True)
            cache.reset()
    assert any(k.shape[1] == 20 for k, _ in seen)
    assert all(kernels.alike(k, v) for k, v in seen)
    k = torch.zeros(2, 9, 4, 8)
    v = torch.zeros(2, 4, 9, 8).transpose(1, 2)
    assert not kernels.AttentionSpec.of(k, k, v).whole_slots


@pytest.mark.parametrize("error", [RuntimeError("no compiler"), torch.OutOfMemoryError()])
def test_a_kernel_that_fails_leaves_prompts_to_transformers(error, device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    prefill = kernels.Reference.prefill

    def failing(self, q, k, v, spans, counts, scores):
        if max(counts) > 1:
            raise error
        return prefill(self, q, k, v, spans, counts, scores)

    monkeypatch.setattr(kernels.Reference, "prefill", failing)
    with virtual_of(model, attention="reference", capture=False) as cache:
        for _ in range(3):
            assert torch.equal(generated(model, cache), expected)
            cache.reset()
        assert cache.decode_stats().prompts == 0
        assert cache.decode_stats().fallback is None


def test_trust_ends_where_the_model_computes_otherwise(device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model, attention="reference", capture=False) as cache:
        for _ in range(2):
            generated(model, cache)
            cache.reset()
        assert cache.decode_stats().prompts == 1

        def scaled(module, query, *args, scaling=None, **options):
            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, 3 * query, *args, scaling=scaling, **options)

        AttentionInterface.register("scaled", scaled)
        AttentionMaskInterface.register("scaled", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        model.set_attn_implementation("scaled")
        other = generated(model, DynamicCache(config=model.config))
        assert not torch.equal(other, expected)
        assert torch.equal(generated(model, cache), other)
        cache.reset()
        forward_of(model).refused = None  # the steps with the other attention were refused
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        with torch.no_grad():
            assert len(model(**prompt(2, 9, device), **{CACHE_KEYWORD: cache}).attentions) == 4


def test_other_threads_are_handed_on(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = prompt(3, 30, device, padded=True)
    expected = model.model(**inputs, use_cache=False)[0][:, -1]
    stop, results = threading.Event(), []

    def call():
        with torch.no_grad():
            while not stop.is_set():
                results.append(model.model(**inputs, use_cache=False)[0][:, -1])

    with virtual_of(model, attention="reference", capture=False) as cache:
        generated(model, cache)
        cache.reset()
        thread = threading.Thread(target=call)
        thread.start()
        for _ in range(6):
            generated(model, cache, batch=2, length=40, max_new_tokens=3)
            cache.reset()
        stop.set()
        thread.join()
        assert cache.decode_stats().prompts >= 5
    assert len(results) > 3
    for result in results:
        torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"])
@pytest.mark.parametrize("kernel", ["auto", "fa2", "fa3"])
@pytest.mark.parametrize("padded", [False, True])
def test_on_flash_attention(kernel, padded, device):
    if kernel != "auto" and (reason := kernels.KERNELS[kernel].missing()):
        pytest.skip(reason)
    model = build("llama-gqa", "sdpa", device, head_dim=64).bfloat16()
    inputs = prompt(3, 120, device, padded=padded)
    with torch.no_grad(), virtual_of(model, attention=kernel) as cache:
        generated(model, cache)
        for _ in range(2):
            cache.reset()
            dynamic = DynamicCache(config=model.config)
            for first, end in ((0, 50), (50, 120)):
                mask = inputs["attention_mask"][:, :end]
                part = {"input_ids": inputs["input_ids"][:, first:end], "attention_mask": mask, "use_cache": True}
                got, want = (model(**part, **{CACHE_KEYWORD: c}).logits for c in (cache, dynamic))
                shown = mask[:, first:] != 0
                difference = (got[shown].float() - want[shown].float()).norm() / want[shown].float().norm()
                assert float(difference) < 0.1
        # Without FlashAttention-3, "auto" leaves a first prompt to transformers if it is not padded.
        least = 2 if kernel == "auto" and not padded else 4
        assert cache.decode_stats().prompts >= least


@pytest.mark.skipif(not hasattr(transformers, "Molmo2Config"), reason="transformers does not know it yet")
def test_tokens_of_an_image_see_each_other(device):
    """The image may be anywhere in a row: a mask that is causal at its beginning may not be so further behind."""
    model = molmo2(device)
    kinds = torch.zeros(2, 20, dtype=torch.int64)
    kinds[:, 6:12] = 1
    ids = torch.randint(3, 99, (2, 20)).masked_fill(kinds == 1, model.config.image_patch_id).to(device)
    features = BaseModelOutputWithPooling(pooler_output=(torch.randn(12, 64, device=device),))
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    image = {"input_ids": ids, "mm_token_type_ids": kinds.to(device), "mm_encoder_outputs": {"image": features}}
    with virtual_of(model, attention="sdpa", capture=False) as cache:
        for _ in range(3):
            generated(model, cache, max_new_tokens=8)
            cache.reset()
        assert cache.decode_stats().prompts
        got = model.generate(**image, **options, **{CACHE_KEYWORD: cache})
    expected = model.generate(**image, **options, **{CACHE_KEYWORD: DynamicCache(config=model.config)})
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)
