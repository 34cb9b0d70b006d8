"""Batches that are padded on the left: their rows are stored without the padding, which changes no result."""

from __future__ import annotations

import copy
import unittest.mock

import pytest
import torch
from models import build, prompt, virtual_of
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from vattn import CACHE_KEYWORD, BudgetExceeded, KVCache
from vattn.hf.attach import forward_of
from vattn.hf.padding import Padding

LENGTH = 40  # positions of a prompt
pytestmark = pytest.mark.usefixtures("small")


def mixed(device, lengths=(40, 3, 17)):
    torch.manual_seed(5)
    ids = torch.randint(3, 99, (len(lengths), LENGTH))
    mask = (torch.arange(LENGTH) >= LENGTH - torch.tensor(lengths)[:, None]).long()
    return {"input_ids": (ids * mask).to(device), "attention_mask": mask.to(device)}


class Each(StoppingCriteria):
    """Calls ``do`` with the number of the step after each step."""

    def __init__(self, do):
        self.do, self.steps = do, 0

    def __call__(self, input_ids, scores, **options):
        self.do(self.steps)
        self.steps += 1
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generated(model, cache, inputs, do=lambda step: None, **options):
    options = {"max_new_tokens": 24, "do_sample": False, CACHE_KEYWORD: cache, **options}
    return model.generate(**inputs, stopping_criteria=StoppingCriteriaList([Each(do)]), **options)


def held(cache):
    """Returns how many positions each row stores."""
    [rows] = cache._store.placement.rows.values()
    return [row.length for row in rows.sequences]


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gemma2", "gpt2", "phi3", "qwen2"])
def test_rows_are_stored_without_their_padding(name, device):
    model = build(name, "eager" if name == "gemma2" else "sdpa", device)
    model.generation_config.eos_token_id = None
    inputs = mixed(device)
    expected = generated(model, DynamicCache(config=model.config), inputs)
    seen = []
    with virtual_of(model) as cache:
        for _ in range(2):
            assert torch.equal(generated(model, cache, inputs, lambda step: seen.append(held(cache))), expected)
            assert held(cache) == [40 + 23, 3 + 23, 17 + 23]
            assert cache.get_seq_length() == LENGTH + 23
            # A speculative step may have added a position to every row.
            assert all(rows[0] - rows[1] == 37 and rows[0] - rows[2] == 23 for rows in seen)
            cache.check()
            cache.reset()
        assert cache.decode_stats().fallback is None


def test_memory_is_what_the_tokens_need(device):
    if device == "cuda":
        pytest.skip("these few tokens fit the smallest memory that a device maps")
    model = build("llama-gqa", "sdpa", device)
    sizes = []
    for attention in ("auto", None):  # with vattn's decode steps, and without them
        with virtual_of(model, attention=attention, mapper=False, lookahead=0) as cache:
            generated(model, cache, mixed(device, (40, 3, 3, 3)), max_new_tokens=2)
            sizes.append(cache.stats().peak)
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.thorough(5)
@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
@pytest.mark.parametrize(
    "act",
    [
        lambda cache: cache.reorder_cache(torch.tensor([2, 1, 0])) or cache.reorder_cache(torch.tensor([2, 1, 0])),
        lambda cache: [layer.keys.clone() for layer in cache.layers],
        lambda cache: cache.batch_repeat_interleave(2) or cache.batch_select_indices(torch.tensor([0, 2, 4])),
        lambda cache: copy.deepcopy(cache).close(),
        lambda cache: [
            layer.keys for layer in copy.deepcopy(cache).layers
        ],  # restores padding in memory that both caches share
        lambda cache: setattr(cache.decoder, "enabled", not cache.decoder.enabled),
    ],
    ids=["reordered", "viewed", "repeated", "copied", "copy restored", "eager"],
)
@pytest.mark.parametrize("at", [0, 5])
def test_what_else_is_done_to_a_cache_finds_the_padding(name, act, at, device):
    model = build(name, "sdpa", device)
    model.generation_config.eos_token_id = None
    inputs = mixed(device)
    expected = generated(model, DynamicCache(config=model.config), inputs)
    with virtual_of(model) as cache:
        for _ in range(2):
            got = generated(model, cache, inputs, lambda step: act(cache) if step in (at, at + 9) else None)
            assert torch.equal(got, expected)
            cache.reset()


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_what_rows_show_is_what_they_were_given(name, device):
    """Layers return the K and V that they were given where the mask hides nothing, and zeros for the padding."""
    model = build(name, "sdpa", device)
    inputs = mixed(device)
    dynamic = DynamicCache()  # without a configuration, so that its layers keep all positions
    generated(model, dynamic, inputs, max_new_tokens=20)
    with virtual_of(model) as cache:
        generated(model, cache, inputs, max_new_tokens=20)
        assert cache._store.rows.format.padding is not None
        shown = torch.cat([inputs["attention_mask"] != 0, torch.ones(3, 19, dtype=torch.bool, device=device)], 1)
        for ours, theirs in zip(cache.layers, dynamic.layers, strict=True):
            for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                visible = shown[:, None, -mine.shape[2] :, None]
                expected = torch.where(visible, other[:, :, -mine.shape[2] :], 0)
                torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        assert held(cache) == [LENGTH + 19] * 3


def test_a_later_prompt_goes_on_behind(device):
    """A later call may have several tokens: the next turn of a chat, or a chunk of a prompt."""
    model = build("mistral", "sdpa", device)
    model.generation_config.eos_token_id = None
    inputs = mixed(device, (40, 36, 38))
    results = []

    def run(cache):
        first = generated(model, cache, inputs, max_new_tokens=9)
        torch.manual_seed(1)
        ids = torch.cat([first, torch.randint(3, 99, (3, 7)).to(device)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 16, dtype=torch.int64, device=device)], 1)
        results.append((first, generated(model, cache, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=9)))
        return generated(model, cache_of(), inputs, prefill_chunk_size=7)

    cache_of = lambda: DynamicCache(config=model.config)  # noqa: E731
    chunked = run(cache_of())
    with virtual_of(model) as cache, virtual_of(model) as other:
        cache_of = lambda: other  # noqa: E731
        assert torch.equal(run(cache), chunked)
        assert held(cache) == [56 + 8 - pad for pad in (0, 4, 2)]
        assert held(other) == [40 + 23 - pad for pad in (0, 4, 2)]
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_beams_share_memory_rather(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = mixed(device)
    expected = generated(model, DynamicCache(config=model.config), inputs, num_beams=3)
    with virtual_of(model) as cache:
        assert torch.equal(generated(model, cache, inputs, num_beams=3), expected)


def test_a_mask_that_shows_what_is_not_stored(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = mixed(device)
    more = {"input_ids": inputs["input_ids"][:, -1:], "use_cache": True}
    with torch.no_grad(), virtual_of(model) as cache:
        model(**inputs, **{CACHE_KEYWORD: cache}, use_cache=True)
        lengths = held(cache)
        for mask in ({}, {"attention_mask": torch.ones(3, LENGTH + 1, device=device)}):
            with pytest.raises(ValueError, match="attention_mask shows padding that the prompt's has hidden"):
                model(**more, **mask, **{CACHE_KEYWORD: cache})
            assert cache.get_seq_length() == LENGTH
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        got = model(**more, attention_mask=mask, **{CACHE_KEYWORD: cache}).logits
        assert held(cache) == [length + 1 for length in lengths]
        dynamic = DynamicCache(config=model.config)
        model(**inputs, **{CACHE_KEYWORD: dynamic}, use_cache=True)
        torch.testing.assert_close(got, model(**more, attention_mask=mask, **{CACHE_KEYWORD: dynamic}).logits)
        # A later mask may hide more than the prompt's mask did.
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        mask[0, :5] = 0
        got = model(**more, attention_mask=mask, **{CACHE_KEYWORD: cache}).logits
        torch.testing.assert_close(got, model(**more, attention_mask=mask, **{CACHE_KEYWORD: dynamic}).logits)
        # A mask with a hole, which is no padding, works as well.
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        mask[0, 30] = 0
        got = model(**more, attention_mask=mask, **{CACHE_KEYWORD: cache}).logits
        torch.testing.assert_close(got, model(**more, attention_mask=mask, **{CACHE_KEYWORD: dynamic}).logits)


def test_no_memory_for_the_padding_loses_nothing(device):
    if device == "cuda":
        pytest.skip("these few tokens fit the smallest memory that a device maps")
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    inputs = mixed(device, (40, 3, 3, 3))
    expected = generated(model, DynamicCache(config=model.config), inputs)
    with virtual_of(model, mapper=False, lookahead=0) as cache:
        generated(model, cache, inputs, max_new_tokens=2)
        cache.set_budget(cache.stats().peak)
        before = held(cache)
        with pytest.raises(BudgetExceeded):
            cache.layers[0].keys  # noqa: B018
        assert held(cache) == before
        cache.check()
        cache.set_budget(None)
        ids = expected[:, : LENGTH + 2]
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        got = generated(model, cache, {"input_ids": ids, "attention_mask": mask}, max_new_tokens=22)
        assert torch.equal(got, expected)


def test_a_model_that_is_refused_finds_its_padding(device):
    model = build("llama-gqa", "sdpa", device)
    expected = generated(model, DynamicCache(config=model.config), mixed(device))
    with virtual_of(model) as cache:
        forward_of(model).refused = "it is not to be trusted"
        assert torch.equal(generated(model, cache, mixed(device)), expected)
        forward_of(model).refused = None
        cache.reset()

        def refuse(step):
            forward_of(model).refused = "it is not to be trusted" if step == 7 else None

        assert torch.equal(generated(model, cache, mixed(device), refuse), expected)
        assert cache._store.rows.format.padding is None


@pytest.mark.parametrize("name", ["llama-gqa", "mistral"])
def test_what_is_blank_stays_hidden(name, device):
    """A call must not show padding of the prompt, also when the padding is stored as zeros by then."""
    model = build(name, "sdpa", device)
    inputs = mixed(device)
    ids = inputs["input_ids"]
    with torch.no_grad(), virtual_of(model) as cache:
        for act in (lambda: None, lambda: cache.layers[0].keys, lambda: cache.reorder_cache(torch.tensor([1, 0, 2]))):
            cache.reset()
            model(**inputs, **{CACHE_KEYWORD: cache})
            act()
            shows = torch.ones(3, LENGTH + 4, device=device)
            for n, given in ((4, None), (1, None), (4, shows), (1, shows[:, : LENGTH + 1])):
                with pytest.raises(ValueError, match="attention_mask shows padding"):
                    model(ids[:, :n], attention_mask=given, **{CACHE_KEYWORD: cache})
                assert cache.get_seq_length() == LENGTH
        cache.reset()
        model(ids, **{CACHE_KEYWORD: cache})  # after a reset nothing is hidden


def test_forks_after_an_error_do_not_share_what_is_written(device):
    """Rows may have grown for a call that then failed; a fork must not share that memory."""
    model = build("llama-gqa", "sdpa", device)
    inputs = mixed(device)
    ids, mask = inputs["input_ids"][:, -1:], torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)

    def logits(cache, n):
        step = {"input_ids": ids + n, "attention_mask": mask[:, : LENGTH + 1 + n], "use_cache": True}
        return model(**step, **{CACHE_KEYWORD: cache}).logits

    with torch.no_grad(), virtual_of(model) as cache:
        model(**inputs, **{CACHE_KEYWORD: cache})
        dynamic = DynamicCache(config=model.config)
        model(**inputs, **{CACHE_KEYWORD: dynamic})
        with pytest.raises(ValueError, match="shows padding"):
            model(ids, **{CACHE_KEYWORD: cache})
        assert held(cache)[0] <= LENGTH + 1
        other = copy.deepcopy(cache)
        for n in range(2):
            expected = logits(dynamic, n)
            for one in (cache, other):
                torch.testing.assert_close(logits(one, n), expected, rtol=1e-3, atol=1e-4)
        other.close()


def test_no_memory_while_the_padding_is_restored(device, monkeypatch):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    inputs = mixed(device)
    expected = generated(model, DynamicCache(config=model.config), inputs)
    with virtual_of(model) as cache:
        generated(model, cache, inputs, max_new_tokens=2)
        other = copy.deepcopy(cache)  # shares memory with the cache, which then needs new memory to restore padding
        before = held(cache)
        with monkeypatch.context() as full:
            needs = (
                "copy_on_write" if device == "cpu" else "grow_all"
            )  # so few tokens fill no granule of a device, and only whole granules are shared
            full.setattr(KVCache, needs, unittest.mock.Mock(side_effect=BudgetExceeded("no")))
            with pytest.raises(BudgetExceeded):
                cache.layers[0].keys  # noqa: B018
        assert held(cache) == before
        with monkeypatch.context() as full:
            full.setattr(torch, "empty_like", unittest.mock.Mock(side_effect=torch.OutOfMemoryError))
            with pytest.raises(torch.OutOfMemoryError):
                cache.layers[0].keys  # noqa: B018
        assert held(cache) == before
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
        more = {"input_ids": expected[:, : LENGTH + 2], "attention_mask": mask}
        for one in (cache, other):
            assert torch.equal(generated(model, one, more, max_new_tokens=22), expected)
        with monkeypatch.context() as broken:
            broken.setattr(Padding, "restore", unittest.mock.Mock(side_effect=KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                cache.layers[0].keys  # noqa: B018
        assert cache.get_seq_length() == 0  # the cache is emptied, since only some of its rows have moved
        assert torch.equal(generated(model, cache, inputs), expected)
        other.close()


@pytest.mark.parametrize("chunk", [None, 5, 1])
def test_padding_of_a_longer_batch_is_forgotten(chunk, device):
    model = build("llama-gqa", "sdpa", device)
    model.generation_config.eos_token_id = None
    long = mixed(device)
    short = {name: tensor[:, -12:] for name, tensor in mixed(device, (12, 8, 9)).items()}
    options = {} if chunk is None else {"prefill_chunk_size": chunk}
    expected = [generated(model, DynamicCache(config=model.config), each, **options) for each in (long, short)]
    with virtual_of(model) as cache:
        for _ in range(2):
            for inputs, tokens in zip((long, short), expected, strict=True):
                assert torch.equal(generated(model, cache, inputs, **options), tokens)
                cache.reset()
        assert forward_of(model).refused is None


def test_models_of_any_kind_and_masks_by_place(device):
    model = build("llama-gqa", "sdpa", device)

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **options):
            return self.inner(input_ids, attention_mask, position_ids, **options)

    inputs = mixed(device)
    expected = model(**inputs, use_cache=False).logits[:, -1]
    wrapper = Wrapper().eval()
    with torch.no_grad(), virtual_of(wrapper) as cache:
        got = wrapper(inputs["input_ids"], inputs["attention_mask"], **{CACHE_KEYWORD: cache}).logits[:, -1]
        torch.testing.assert_close(got, expected)
        assert held(cache) == [40, 3, 17]


def test_engines_can_say_what_the_padding_is(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = mixed(device)
    with torch.no_grad(), virtual_of(model.config, attention=None) as cache:
        with cache.unpadded(inputs["attention_mask"]):
            inner = model.model(**inputs, **{CACHE_KEYWORD: cache}, use_cache=True)
        assert held(cache) == [40, 3, 17]
        torch.testing.assert_close(inner[0], model.model(**inputs, use_cache=False)[0])


def test_padding_of_masks():
    assert Padding.of(torch.ones(2, 5)) is None
    assert Padding.of(torch.tensor([[0, 1, 1], [0, 0, 0]])) is None  # a row of which nothing is visible
    assert Padding.of(torch.tensor([[0, 1, 1], [1, 1, 0]])) is None
    assert Padding.of(torch.tensor([[0, 1, 0], [1, 1, 1]])) is None
    found = Padding.of(torch.tensor([[False, True, True], [True, True, True]]))
    assert found is not None
    assert found.rows == [1, 0]
    assert found.stored(1) == [0, 1]
    assert prompt(2, 10, "cpu", padded=True)["attention_mask"][1, :3].sum() == 0


def test_rows_that_are_left_of_a_padded_batch_need_no_mask(device):
    model = build("llama-gqa", "sdpa", device)
    inputs = prompt(2, 8, device, padded=True)
    row = int(inputs["attention_mask"].sum(1).argmax())
    ids, outputs = inputs["input_ids"], []
    assert inputs["attention_mask"][row].all()
    with virtual_of(model) as cache, torch.no_grad():
        for each in (cache, DynamicCache(config=model.config)):
            model(**inputs, **{CACHE_KEYWORD: each})
            each.batch_select_indices(torch.tensor([row], device=device))
            outputs.append(model(ids[:1, :3], **{CACHE_KEYWORD: each}).logits)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_padding_longer_than_a_first_chunk_is_stored(device):
    """The first chunk comes with the mask of the whole prompt."""
    model = build("llama-gqa", "sdpa", device)
    ids = prompt(2, 14, device)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :10] = 0
    outputs = []
    with virtual_of(model) as cache, torch.no_grad():
        for each in (cache, DynamicCache(config=model.config)):
            model(ids[:, :8], attention_mask=mask, **{CACHE_KEYWORD: each})
            outputs.append(model(ids[:, 8:], **{CACHE_KEYWORD: each}).logits[0])  # of the row that is not padded
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
