"""Decode steps on vattn's kernels: which calls are steps, which models are refused, and how steps are captured."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import pickle
import sys
import threading
import weakref

import pytest
import torch
import transformers
from models import CASES, MODES, MORE, adaptable, attentions, build, generated, prompt, qwen2_vl, virtual_of
from transformers import DynamicCache

from vattn import CACHE_KEYWORD, VirtualCache, kernels
from vattn.models.expected import Expected

MAX_LEN = 160
OTHERS = ("t5", "deepseek_v3")  # their attention does not get what the cache returned, or takes no positions
pytestmark = pytest.mark.usefixtures("small")


@pytest.mark.thorough(14)
@pytest.mark.parametrize(("name", "attention", "mode"), [case for case in CASES if case[0] not in OTHERS])
def test_exact(name, attention, mode, device):
    if attention != attentions(name)[0]:
        pytest.skip("decode steps are the same whatever the attention of prompts is")
    model = build(name, attention, device)
    made = []

    def make(model):
        made.append(VirtualCache(model, max_len=MAX_LEN, attention="auto"))
        return made[-1]

    try:
        expected = MODES[mode](model, lambda model: DynamicCache(config=model.config))
    except (ValueError, RuntimeError, NotImplementedError):
        try:
            expected = MODES[mode](model, lambda model: DynamicCache())  # without a configuration it can crop
        except RuntimeError as error:
            pytest.skip(f"transformers cannot: {error}")
    for a, b in zip(expected, MODES[mode](model, make), strict=True):
        assert torch.equal(a, b)
    for cache in made:
        cache.check()
        stats = cache.decode_stats()
        if name == "gpt_oss" and device == "cuda" and mode not in ("greedy", "padded", "sampling", "reset"):
            continue  # on CUDA its experts are computed in another way, which cannot be captured
        assert {type(length) for length in cache._store.lengths} <= {int}
        assert stats.fallback is None
        if mode in ("greedy", "padded", "sampling", "beams", "reset"):
            steps = stats.eager + stats.replayed
            assert steps >= 20
            if device == "cuda":  # only compared steps run eagerly: the first, and the first with a full window
                assert stats.eager <= 2 * stats.captures


# Models whose attention adds positions to a mask of its own, and how the reason for their fallback begins.
UNSUITABLE = {"falcon": "decodes as transformers does: ", "bloom": None}


@pytest.mark.thorough(4)
@pytest.mark.parametrize("name", MORE)
def test_more_architectures(name, device):
    if not hasattr(transformers, f"{MORE[name][0]}Config"):
        pytest.skip("this transformers does not have it")
    model = build(name, attentions(name)[0], device)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=24)
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache, max_new_tokens=24), expected)
        stats = cache.decode_stats()
    if name in UNSUITABLE:
        assert stats.kernel is None
        assert (UNSUITABLE[name] or "") in (stats.fallback or "")
        return
    takes_functions = "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[type(model).__module__])
    if not takes_functions or (name == "opt" and transformers.__version__.startswith("4.")):
        # Older versions of some models take no attention function, or make a mask of their own.
        assert "decodes as transformers does: " in stats.fallback
        return
    assert stats.fallback is None
    assert stats.eager + stats.replayed == expected.shape[1] - 11
    if device == "cuda":
        assert stats.eager <= 2


def test_steps_are_those_that_generate_makes(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache:
        generated(model, cache)
        stats = cache.decode_stats()
        assert stats.eager + stats.replayed == 11
        cache.reset()
        with cache.eager():
            generated(model, cache)
        assert cache.decode_stats() == stats


def test_steps_are_for_gpus_where_no_kernel_is_named(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model, attention=None) as cache:
        generated(model, cache)
        stats = cache.decode_stats()
        assert stats.eager + stats.replayed == (11 if device == "cuda" else 0)


def test_a_cache_made_with_a_configuration_has_no_steps(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model.config) as cache:
        generated(model, cache)
        assert cache.decode_stats() is None


@pytest.mark.parametrize("name", ["reference", "auto"])
def test_the_kernel_is_the_one_named(name, device):
    model = build("llama-gqa", "sdpa", device)
    if device == "cuda" and name == "reference":
        with virtual_of(model, attention=name) as cache:
            generated(model, cache)
            assert "it cannot be captured" in cache.decode_stats().fallback
        return
    with virtual_of(model, attention=name) as cache:
        generated(model, cache)
        used = cache.decode_stats().kernel
        assert used == ("reference" if name == "reference" else {"cpu": "sdpa", "cuda": "flex"}[device])


def test_an_unknown_kernel_is_refused(device):
    with pytest.raises(ValueError, match="attention must be 'auto' or one of"):
        VirtualCache(build("llama-gqa", "sdpa", device), max_len=MAX_LEN, attention="fa9")


def test_what_is_no_step_runs_as_ever(device):
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 12, device)["input_ids"]
    holes = torch.ones(2, 11, dtype=torch.long, device=device)
    holes[0, 4] = 0
    calls = [
        {"input_ids": ids[:, 10:12]},
        {"input_ids": ids[:, 10:11], "output_hidden_states": True},
        {"input_ids": ids[:, 10:11], "attention_mask": holes},
        {"inputs_embeds": model.get_input_embeddings()(ids[:, 10:11])},
    ]
    for call in calls:
        results = []
        for cache in (DynamicCache(config=model.config), VirtualCache(model, max_len=MAX_LEN, attention="auto")):
            with torch.no_grad():
                model(ids[:, :10], **{CACHE_KEYWORD: cache}, use_cache=True)
                results.append(model(**call, **{CACHE_KEYWORD: cache}, use_cache=True).logits)
        torch.testing.assert_close(*results)
        stats = cache.decode_stats()
        assert stats.eager + stats.replayed == 0
        assert cache.get_seq_length() == 10 + (call.get("input_ids", ids[:, :1]).shape[1])


def test_masks_are_looked_at_in_every_step(device):
    """Padding appears after steps without it, and disappears again."""
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 20, device)["input_ids"]
    caches = DynamicCache(config=model.config), VirtualCache(model, max_len=MAX_LEN, attention="auto")
    for padding in (None, 0, 3, 3, 5, None, 0, "hole", 2):
        outputs = []
        for cache in caches:
            length = cache.get_seq_length()
            mask = torch.ones(2, max(length + 1, 10), dtype=torch.long, device=device)
            if padding == "hole":
                mask[1, 6] = 0
            elif padding:
                mask[1, :padding] = 0
            given = ids[:, :10] if length == 0 else ids[:, length : length + 1]
            options = {} if padding is None else {"attention_mask": mask}
            with torch.no_grad():
                outputs.append(model(given, **options, **{CACHE_KEYWORD: cache}, use_cache=True).logits[:, -1])
        torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    stats = caches[1].decode_stats()
    assert stats.eager + stats.replayed == 7
    assert stats.fallback == "the attention mask is no left padding"


@pytest.mark.parametrize("name", OTHERS[1:])
def test_models_that_attend_otherwise_are_not_trusted(name, device, caplog):
    if transformers.__version__.startswith("4."):
        pytest.skip("it attends to what the cache returns there")
    model = build(name, attentions(name)[0], device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model) as cache, caplog.at_level(logging.WARNING, "vattn"):
        assert torch.equal(generated(model, cache), expected)
        cache.reset()
        assert torch.equal(generated(model, cache), expected)
        assert cache.decode_stats().fallback.startswith("DeepseekV3ForCausalLM decodes as transformers does: ")
    assert [record.name for record in caplog.records if record.name == "vattn"] == ["vattn"]


@pytest.mark.parametrize("what", ["scale", "crash"])
def test_a_kernel_that_is_wrong_is_found_out(what, device, monkeypatch, caplog):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    kernel = kernels.choose(
        kernels.AttentionSpec(device=device, dtype=torch.float32, query_heads=4, kv_heads=2, head_dim=16, v_head_dim=16)
    )

    def wrong(q, k, v, spans, scores):
        if what == "crash":
            raise RuntimeError("out of order")
        return original(2 * q, k, v, spans, scores)

    original = kernel.decode
    monkeypatch.setattr(kernel, "decode", wrong)
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache), expected)
        reason = {"scale": "its attention is not what the kernels compute (", "crash": "RuntimeError: out of order"}
        assert f"decodes as transformers does: {reason[what]}" in cache.decode_stats().fallback
        assert cache.decode_stats().eager == 0


def test_a_model_stays_what_it_was(device):
    model = build("mistral", "sdpa", device)
    with virtual_of(model) as cache:
        expected = generated(model, cache)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(generated(model, DynamicCache(config=model.config)), expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    with virtual_of(other) as cache:
        assert torch.equal(generated(other, cache), generated(other, DynamicCache(config=other.config)))
        assert cache.decode_stats().eager + cache.decode_stats().replayed == 11
    with virtual_of(model) as cache:
        ids = prompt(2, 8, device)["input_ids"]
        model(ids, **{CACHE_KEYWORD: cache}, use_cache=True)
        loss = model(ids[:, :1], **{CACHE_KEYWORD: cache}, use_cache=True).logits.sum()
        with pytest.raises(RuntimeError, match="keeps no gradients"):
            loss.backward()


def test_growth_that_is_refused_loses_nothing(device):
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 20, device)["input_ids"]
    cache = VirtualCache(model, max_len=16, attention="auto")
    with torch.no_grad():
        model(ids[:, :14], **{CACHE_KEYWORD: cache}, use_cache=True)
        for at in (14, 15):
            model(ids[:, at : at + 1], **{CACHE_KEYWORD: cache}, use_cache=True)
        for _ in range(2):
            with pytest.raises(ValueError, match="17 positions are more than max_len, 16"):
                model(ids[:, 16:17], **{CACHE_KEYWORD: cache}, use_cache=True)
        assert cache.get_seq_length() == 16
        cache.check()


def test_threads_that_share_a_model(device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), max_new_tokens=30)
    wrong, steps = [], []

    def work(make):
        try:
            for _ in range(3):
                cache = make()
                if not torch.equal(generated(model, cache, max_new_tokens=30), expected):
                    wrong.append("tokens")
                if isinstance(cache, VirtualCache):
                    stats = cache.decode_stats()
                    steps.append(stats.eager + stats.replayed)
        except Exception as error:
            wrong.append(error)

    makes = [lambda: VirtualCache(model, max_len=MAX_LEN, attention="auto")] * 2 + [
        lambda: DynamicCache(config=model.config)
    ] * 2
    threads = [threading.Thread(target=work, args=(make,)) for make in makes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(steps) == 6
    if device == "cpu":  # nothing is captured, so no thread falls back because of another one
        assert steps == [29] * 6
    assert model.config._attn_implementation == "sdpa"


def test_wrappers_put_on_later_are_called(device):
    model = build("llama-gqa", "sdpa", device)
    VirtualCache(model, max_len=MAX_LEN, attention="auto").close()
    inner, calls = model.forward, []

    @functools.wraps(inner)
    def counting(*args, **kwargs):
        calls.append(1)
        return inner(*args, **kwargs)

    model.forward = counting
    with virtual_of(model) as cache:
        generated(model, cache)
        assert len(calls) == (13 if device == "cpu" else 8)  # steps that are compared are computed twice


def test_nothing_keeps_a_cache_or_a_model():
    model = build("llama-gqa", "sdpa", "cpu")
    gc.collect()
    gc.disable()
    try:
        cache = VirtualCache(model, max_len=MAX_LEN, attention="auto")
        generated(model, cache)
        gone = weakref.ref(cache), weakref.ref(cache.kv_caches[0])
        del cache
        assert [ref() for ref in gone] == [None, None]
        gone = weakref.ref(model)
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_copies_of_a_cache_come_and_go(device):
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(1, 20, device)["input_ids"]
    with virtual_of(model) as cache:
        with torch.no_grad():
            model(ids, **{CACHE_KEYWORD: cache}, use_cache=True)
        longer = {"input_ids": torch.cat([ids, ids[:, :3]], 1), "max_new_tokens": 5, "do_sample": False}
        expected = model.generate(**longer)
        with cache.eager():
            copies = [copy.deepcopy(cache)]
        for _ in range(5):
            copies.append(copy.deepcopy(cache))
            assert torch.equal(model.generate(**longer, **{CACHE_KEYWORD: copies[-1]}), expected)
            assert copies[-1].decode_stats().eager == (1 if device == "cuda" else 4)
            copies.pop()
        assert copies[0].decoder.enabled
        assert cache.kv_caches[0].stats().running_slots == 2


def test_models_are_copied_and_pickled(device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config))
    with virtual_of(model) as cache:
        generated(model, cache)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model)
            assert vars(other).keys() == vars(model).keys()
            with virtual_of(other) as theirs:
                assert torch.equal(generated(other, theirs), expected)
                assert theirs.decode_stats().eager >= 1
    assert list(inspect.signature(model.forward).parameters)[:2] == ["input_ids", "attention_mask"]


def test_weights_that_move_and_adapters_that_change_are_noticed(device):
    model = build("llama-gqa", "sdpa", device)
    layer = adaptable(model)
    with virtual_of(model) as cache:
        for adapter in ("a", "b", "a"):
            layer.active_adapter = adapter
            expected = generated(model, DynamicCache(config=model.config))
            assert torch.equal(generated(model, cache), expected)
            cache.reset()
        first = generated(model, cache)
        for parameter in model.parameters():
            parameter.data = parameter.data * 1.1
        more = {"input_ids": first, "max_new_tokens": 8, "do_sample": False}
        graph = cache.decoder.graphs.last()
        model.generate(**more, **{CACHE_KEYWORD: cache})
        assert cache.decoder.graphs.last() is not graph


def test_padding_is_compared_by_itself(device):
    """OPT computes positions from the mask if it is given none."""
    model = build("opt", attentions("opt")[0], device)
    ids = prompt(2, 12, device)["input_ids"]
    mask = torch.ones(2, 13, dtype=torch.long, device=device)
    mask[1, :4] = 0
    with virtual_of(model) as cache:
        for masks in ((None, None, None), (mask[:, :11], mask[:, :12], mask[:, :13])):
            results = []
            for one in (DynamicCache(config=model.config), cache):
                logits = []
                with torch.no_grad():
                    for part, given in zip((ids[:, :11], ids[:, 11:12], ids[:, :1]), masks, strict=True):
                        options = {} if given is None else {"attention_mask": given}
                        logits.append(model(part, **options, **{CACHE_KEYWORD: one}, use_cache=True).logits[:, -1])
                results.append(torch.stack(logits))
            torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
            cache.reset()


def test_autocast_is_left_alone(device):
    model = build("llama-gqa", "sdpa", device)
    with torch.autocast(device, torch.bfloat16), virtual_of(model) as cache:
        generated(model, cache)
        assert cache.decode_stats().eager == 0


def test_a_kernel_that_cannot_is_the_caches_affair(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model, attention="sdpa-flash") as cache:  # this kernel needs CUDA and 16 bits
        generated(model, cache)
        assert "no attention kernel" in cache.decode_stats().fallback
    with virtual_of(model) as cache:
        generated(model, cache)
        assert cache.decode_stats().eager >= 1


def test_an_error_in_a_step_loses_nothing(device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 20, device)["input_ids"]
    with virtual_of(model, capture=False) as cache, torch.no_grad():
        model(ids[:, :10], **{CACHE_KEYWORD: cache}, use_cache=True)
        model(ids[:, 10:11], **{CACHE_KEYWORD: cache}, use_cache=True)
        forward = model.model.layers[2].forward

        def broken(*args, **kwargs):
            raise KeyboardInterrupt

        model.model.layers[2].forward = broken
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, 11:12], **{CACHE_KEYWORD: cache}, use_cache=True)
        model.model.layers[2].forward = forward
        assert cache._store.lengths == [11] * 4
        assert model.config._attn_implementation == "sdpa"
        got = model(ids[:, 11:12], **{CACHE_KEYWORD: cache}, use_cache=True).logits
        torch.testing.assert_close(got, model(ids[:, :12]).logits[:, -1:], rtol=1e-4, atol=1e-4)


def test_a_cache_built_anew_drops_its_plans(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache:
        generated(model, cache, batch=1)
        old = weakref.ref(cache.kv_caches[0])
        cache.reset()
        generated(model, cache, batch=100, max_new_tokens=3)
        gc.collect()
        assert old() is None


def test_one_wrong_row_is_a_difference():
    b = torch.randn(64, 1, 100, dtype=torch.bfloat16)
    a = b.clone()
    a[5] = torch.randn(1, 100)
    for changed, differs in ((b, False), (a, True)):
        expected = Expected(lambda: (b,), [], 0.002, rounded=False)
        assert (expected.difference(changed) is not None) == differs


def test_models_that_adapt_another(device):
    class Adapted(torch.nn.Module):
        """Wraps another model as PEFT's models do."""

        def __init__(self, model):
            super().__init__()
            self.base, self.config = model, model.config

        def get_base_model(self):
            return self.base

    model = build("llama-gqa", "sdpa", device)
    with virtual_of(Adapted(model)) as cache:
        generated(model, cache)
        stats = cache.decode_stats()
        assert stats.eager + stats.replayed == 11


def test_the_models_attention_can_be_changed_meanwhile(device):
    model = build("llama-gqa", "sdpa", device)
    with virtual_of(model) as cache:
        first = generated(model, cache)
        model.set_attn_implementation("eager")
        more = {"input_ids": first, "max_new_tokens": 8, "do_sample": False}
        got = model.generate(**more, **{CACHE_KEYWORD: cache})
        assert model.config._attn_implementation == "eager"
        assert torch.equal(got, model.generate(**more))
        stats = cache.decode_stats()
        assert stats.eager + stats.replayed == 11 + 8  # the second call also computes the first one's last token
        assert stats.fallback is None


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_quantized_weights(name, device):
    quantization = pytest.importorskip("torchao.quantization")
    model = build(name, "sdpa", device)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert type(model.model.layers[0].self_attn.q_proj.weight) is not torch.nn.Parameter
    expected = generated(model, DynamicCache(config=model.config))
    for attention in ("auto", None):
        with virtual_of(model, attention=attention) as cache:
            assert torch.equal(generated(model, cache), expected)
            stats = cache.decode_stats()
            assert stats.fallback is None
            assert stats.eager + stats.replayed == (0 if attention is None and device == "cpu" else 11)


@pytest.mark.parametrize("by_hand", [False, True])
def test_positions_behind_an_image(by_hand, device):
    """``generate`` gives positions. Without them, the model adds an offset that it computed from the prompt."""
    model = qwen2_vl(device)
    words = torch.randint(3, 80, (1, 12), device=device)
    image = words.clone()
    image[0, 3], image[0, 4:8], image[0, 8] = 92, 90, 93
    seen = {
        "pixel_values": torch.randn(16, 96, device=device),
        "image_grid_thw": torch.tensor([[1, 4, 4]], device=device),
    }
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        seen["mm_token_type_ids"] = (image == 90).long()

    def run(cache, inputs):
        model.model.rope_deltas = None
        if not by_hand:
            return model.generate(**inputs, max_new_tokens=12, do_sample=False, **{CACHE_KEYWORD: cache})
        with torch.no_grad():
            outputs = [model(**inputs, **{CACHE_KEYWORD: cache})]
            for token in range(6):
                ids = torch.tensor([[5 + token]], device=device)
                outputs.append(model(ids, **{CACHE_KEYWORD: cache}))
        return torch.cat([output.logits[:, -1] for output in outputs])

    with virtual_of(model) as cache:
        for inputs in ({"input_ids": words}, {"input_ids": image, **seen}, {"input_ids": words}):
            expected = run(DynamicCache(config=model.config.get_text_config()), inputs)
            torch.testing.assert_close(run(cache, inputs), expected, rtol=1e-3, atol=1e-3)
            cache.reset()
        stats = cache.decode_stats()
        told = stats.fallback or ""
        if by_hand:
            assert "rope_deltas" in told  # older versions of transformers set them for text alone, too
            assert stats.eager + stats.replayed == (12 if transformers.__version__ >= "5" else 0)
        else:  # some versions give every step the sizes of images, too
            assert stats.eager + stats.replayed == (22 if "a step is given" in told else 33)
