"""The sampler beside a plain reference in float64, and its random numbers beside known answers."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from vattn.engine.choose import SamplingState, choose
from vattn.engine.last_tokens import LastTokens
from vattn.engine.philox import gumbel, philox
from vattn.engine.sampler import Sampled, Sampler
from vattn.engine.sampling_params import SamplingParams

VOCABULARY = 50


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected, device):
    """The answers are those of Random123's own tests."""
    numbers = philox(*(tuple(torch.tensor([n], device=device) for n in each) for each in (counter, key)))
    assert [int(n) for n in numbers] == expected


def test_noise_depends_on_seed_index_position_and_token_alone(device):
    def noise(seeds, indices, positions, vocabulary=VOCABULARY):
        return gumbel(*(torch.tensor(each, device=device) for each in (seeds, indices, positions)), vocabulary)

    rows = noise([1, 1, 1, 2, 2**40 + 1, -1], [0, 1, 0, 0, 0, 0], [7, 7, 8, 7, 7, 7])
    assert len({tuple(row) for row in rows.tolist()}) == 6
    assert torch.equal(noise([1], [0], [7]), rows[:1])
    assert torch.equal(noise([1], [0], [7], 13), rows[:1, :13])
    assert rows.isfinite().all()


def test_noise_is_of_a_gumbel_distribution(device):
    seeds = torch.arange(2000, device=device)
    noise = gumbel(seeds, torch.zeros_like(seeds), torch.zeros_like(seeds), 100).double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.02)
    for at in (-1.0, 0.0, 1.0, 3.0):
        assert float((noise < at).double().mean()) == pytest.approx(math.exp(-math.exp(-at)), abs=0.005)


def reference(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int], stops: list[int], bad: Any
) -> tuple[list[float], set[int]]:
    """The logits by which a token is chosen, and the tokens that are considered; plain Python, in float64."""
    changed = list(logits)
    for token in range(len(changed)):
        if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
            changed[token] = -math.inf
        for word in bad:
            if (
                word[-1] == token
                and output[len(output) - len(word) + 1 :] == word[:-1]
                and len(output) >= len(word) - 1
            ):
                changed[token] = -math.inf
        if len(output) < params.min_tokens and token in stops:
            changed[token] = -math.inf
        changed[token] += params.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            penalty = params.repetition_penalty
            changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
        count = output.count(token)
        changed[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
    if params.greedy:
        return changed, {token for token, value in enumerate(changed) if value == max(changed)}
    changed = [value / params.temperature for value in changed]
    considered = {token for token, value in enumerate(changed) if value > -math.inf}
    if params.min_p > 0:
        considered = {token for token in considered if changed[token] >= max(changed) + math.log(params.min_p)}
    order = sorted(considered, key=lambda token: (-changed[token], token))
    if params.top_k > 0:
        order = [token for token in order if changed[token] >= changed[order[min(params.top_k, len(order)) - 1]]]
    total = sum(math.exp(changed[token]) for token in order)
    kept, before = set(), 0.0
    for token in order:
        if before < params.top_p or not kept:
            kept.add(token)
        before += math.exp(changed[token]) / total
    return changed, kept


def case(chance: random.Random) -> tuple[SamplingParams, list[int], list[int], list[int], list[list[int]]]:
    """Parameters and tokens of an output, of which each parameter is left out half of the time."""

    def maybe(value: Any, otherwise: Any) -> Any:
        return value if chance.random() < 0.5 else otherwise

    def tokens(most: int) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, most))]

    output = maybe(tokens(40), [])
    bad = maybe([tokens(3), [*output[-2:], 7], [11]], [])
    params = SamplingParams(
        temperature=maybe(chance.uniform(0.1, 2), 0.0),
        top_k=maybe(chance.randrange(1, 60), 0),
        top_p=maybe(chance.uniform(0.05, 1), 1.0),
        min_p=maybe(chance.uniform(0, 0.5), 0.0),
        repetition_penalty=maybe(chance.uniform(0.5, 2), 1.0),
        presence_penalty=maybe(chance.uniform(-2, 2), 0.0),
        frequency_penalty=maybe(chance.uniform(-2, 2), 0.0),
        logit_bias=maybe({token: chance.uniform(-5, 5) for token in tokens(5)}, None),
        allowed_token_ids=maybe([*tokens(30), 1], None),
        min_tokens=maybe(chance.randrange(50), 0),
        max_tokens=100,
        seed=chance.randrange(2**50),
    )
    return params, tokens(20), output, tokens(4), bad


def sampled(sampler: Sampler, logits: torch.Tensor, slots: list[int], lengths: list[int], made: list[int]) -> Sampled:
    """Samples a token for each row, see ``Sampler.sample``."""
    return sampler.sample(logits, sampler.plan(slots), torch.tensor(lengths, device=logits.device), made)


@pytest.mark.parametrize("batch", [1, 7])
def test_rows_are_sampled_as_the_reference_does(batch, device):
    chance = random.Random(batch)
    torch.manual_seed(batch)
    sampler = Sampler(VOCABULARY, 16, torch.device(device))
    for _ in range(150):
        cases = [case(chance) for _ in range(batch)]
        slots = chance.sample(range(1, 17), batch)
        logits = 3 * torch.randn(batch, VOCABULARY) - chance.choice([0, 8])
        for slot, (params, prompt, output, stops, bad) in zip(slots, cases, strict=True):
            given = {"prompt": prompt, "output": output, "stops": stops, "bad_words": bad}
            sampler.begin(slot, params, seed=params.seed, index=2, **given)
        lengths = [len(prompt) + len(output) for _, prompt, output, _, _ in cases]
        got = sampled(sampler, logits.to(device), slots, lengths, [len(output) for _, _, output, _, _ in cases]).tokens
        for row, (params, prompt, output, stops, bad) in enumerate(cases):
            changed, considered = reference(logits[row].double().tolist(), params, prompt, output, stops, bad)
            token = int(got[row])
            if max(changed) == -math.inf:
                assert token == -1
                continue
            if params.greedy:
                assert changed[token] >= max(changed) - 1e-5
                continue
            noise = gumbel(*(torch.tensor([n]) for n in (params.seed, 2, lengths[row])), VOCABULARY)[0].double()
            scores = {each: changed[each] + float(noise[each]) for each in considered}
            best = max(scores, key=lambda each: scores[each])
            assert token == best or abs(scores.get(token, -math.inf) - scores[best]) < 1e-4


def test_the_state_follows_what_is_sampled(device):
    """What an output has sampled counts for the next token as if it had begun with it."""
    torch.manual_seed(0)
    params = SamplingParams(
        temperature=0, frequency_penalty=1.5, repetition_penalty=1.3, max_tokens=99, min_tokens=3, bad_words=["x"]
    )
    sampler = Sampler(VOCABULARY, 4, torch.device(device))
    given = {"seed": 1, "index": 0, "prompt": [3, 4], "stops": [5], "bad_words": [[1, 2], [9, 9, 8]]}
    sampler.begin(0, params, **given)
    output: list[int] = []
    for _ in range(60):
        logits = 2 * torch.randn(1, VOCABULARY, device=device)
        sampler.begin(1, params, output=output, **given)
        both = sampled(sampler, logits.repeat(2, 1), [0, 1], [2 + len(output)] * 2, [len(output)] * 2).tokens
        assert int(both[0]) == int(both[1])
        output.append(int(both[0]))


def test_samples_have_the_distribution_of_the_softmax(device):
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]], device=device)
    sampler = Sampler(4, 2, torch.device(device))
    counts = torch.zeros(4)
    for position in range(2000):
        sampler.begin(0, SamplingParams(temperature=0.7), seed=5, index=0, prompt=[1])
        counts[int(sampled(sampler, logits, [0], [position], [0]).tokens)] += 1
    expected = (logits[0] / 0.7).softmax(-1).cpu()
    assert torch.allclose(counts / 2000, expected, atol=0.03)


def test_logprobs_are_those_of_the_model(device):
    torch.manual_seed(3)
    logits = torch.randn(3, VOCABULARY, device=device)
    sampler = Sampler(VOCABULARY, 4, torch.device(device))
    sampler.begin(0, SamplingParams(temperature=0, logprobs=3, logit_bias={17: 100}), seed=0, index=0, prompt=[1])
    sampler.begin(1, SamplingParams(temperature=0, logprobs=5), seed=0, index=0, prompt=[1])
    sampler.begin(2, SamplingParams(temperature=0), seed=0, index=0, prompt=[1])
    told = sampled(sampler, logits, [0, 1, 2], [1, 1, 1], [0, 0, 0])
    expected = logits.double().log_softmax(-1)
    assert int(told.tokens[0]) == 17
    assert told.logprobs.shape == (3, 6)
    for row in range(3):
        order = expected[row].argsort(descending=True)[:5]
        assert told.logprob_tokens[row].tolist() == [int(told.tokens[row]), *order.tolist()]
        for token, value in zip(told.logprob_tokens[row], told.logprobs[row], strict=True):
            assert float(value) == pytest.approx(float(expected[row, token]), abs=1e-4)
        assert int(told.ranks[row]) == int((expected[row] >= expected[row, told.tokens[row]]).sum())
    alone = sampled(sampler, logits[2:], [2], [1], [0])
    assert alone.logprobs is None


def test_a_row_of_no_numbers_spoils_no_other(device):
    """E5."""
    torch.manual_seed(4)
    logits = torch.randn(3, VOCABULARY, device=device)
    sampler = Sampler(VOCABULARY, 4, torch.device(device))
    for slot in range(3):
        sampler.begin(slot, SamplingParams(frequency_penalty=1, top_k=5), seed=slot, index=0, prompt=[1])
    expected = sampled(sampler, logits, [0, 1, 2], [1, 1, 1], [0, 0, 0]).tokens.tolist()
    for broken in (float("nan"), float("inf")):
        logits[1, 7] = broken
        for slot in range(3):
            sampler.begin(slot, SamplingParams(frequency_penalty=1, top_k=5), seed=slot, index=0, prompt=[1])
        assert sampled(sampler, logits, [0, 1, 2], [1, 1, 1], [0, 0, 0]).tokens.tolist() == [
            expected[0],
            -1,
            expected[2],
        ]


def test_logits_stay_as_they_are(device):
    """Those of the model are needed for log probabilities, and may lie in the output of a graph."""
    torch.manual_seed(5)
    logits = torch.randn(2, VOCABULARY, device=device)
    kept = logits.clone()
    sampler = Sampler(VOCABULARY, 4, torch.device(device))
    sampler.begin(0, SamplingParams(top_k=2, top_p=0.5, min_p=0.1, logprobs=2), seed=1, index=0, prompt=[1])
    sampler.begin(1, SamplingParams(temperature=0, repetition_penalty=2, logprobs=2), seed=1, index=0, prompt=[1])
    told = sampled(sampler, logits, [0, 1], [3, 3], [0, 0])
    assert torch.equal(logits, kept)
    expected = kept.log_softmax(-1).gather(1, told.tokens[:, None])[:, 0]
    assert torch.allclose(told.logprobs[:, 0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [3, 101, 50257, 128256])
def test_the_kernel_chooses_as_torch_does(vocabulary, dtype):
    torch.manual_seed(6)
    logits = (3 * torch.randn(9, vocabulary)).to(dtype)
    logits[3, 1], logits[4], logits[5, 2] = float("nan"), float("-inf"), float("inf")
    temperatures = torch.tensor([0, 0.7, 1, 1, 1, 1, 0, 2, 0.3])
    seeds = torch.tensor([1, 2**61 + 12345, 7, 8, 5, -5, 2, 3, 4])
    indexes, lengths = torch.arange(9), torch.tensor([5, 900, 2**31 - 7, 3, 1, 2, 3, 4, 2**20])
    slots = torch.tensor([4, 9, 1, 2, 7, 6, 8, 3, 5])

    def chosen(device, by_slot):
        last = LastTokens(10, torch.device(device))
        last.ends[slots.to(device)] = lengths.int().to(device)
        of_slots = [torch.zeros(10, dtype=each.dtype, device=device) for each in (temperatures, seeds, indexes)]
        for each, values in zip(of_slots, (temperatures, seeds, indexes), strict=True):
            each[slots.to(device)] = values.to(device)
        given = None if by_slot else lengths.to(device)
        tokens = choose(logits.to(device), SamplingState(*of_slots, last), slots.to(device), given).cpu()
        assert last.tokens.cpu()[slots].tolist() == tokens.clamp_min(0).tolist()
        assert last.ends.cpu()[slots].tolist() == (lengths + 1).tolist()
        assert (int(last.tokens[0]), int(last.ends[0])) == (0, 0)
        return tokens

    expected = chosen("cpu", by_slot=False)
    assert expected[3:6].tolist() == [-1, -1, -1]
    assert chosen("cpu", by_slot=True).tolist() == expected.tolist()
    got = chosen("cuda", by_slot=False)
    assert chosen("cuda", by_slot=True).tolist() == got.tolist()
    noise = gumbel(seeds, indexes, lengths, vocabulary)
    for row in (got != expected).nonzero()[:, 0].tolist():  # logarithms differ in the last bit
        assert temperatures[row] > 0
        scores = logits[row].float() / temperatures[row] + noise[row]
        assert scores[got[row]] == pytest.approx(float(scores[expected[row]]), abs=1e-4)
