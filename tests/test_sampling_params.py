"""Each parameter takes what vLLM's takes, and anything else is an error that names it."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import torch

from vattn.engine.sampling_params import RequestOutputKind, SamplingParams

NAMES = [field.name for field in fields(SamplingParams)]
# By parameter: values that are right and what they become, and values that are wrong.
RIGHT = {
    "n": [(3, 3), (np.int64(2), 2), (torch.tensor(2), 2)],
    "temperature": [(0, 0.0), (0.7, 0.7), (2, 2.0), (1e-6, 0.0), (0.001, 0.01)],
    "top_p": [(1, 1.0), (0.1, 0.1)],
    "top_k": [(0, 0), (-1, 0), (50, 50)],
    "min_p": [(0, 0.0), (1, 1.0)],
    "repetition_penalty": [(0.5, 0.5), (30, 30.0)],
    "presence_penalty": [(-2, -2.0), (2.0, 2.0)],
    "frequency_penalty": [(-2, -2.0), (2.0, 2.0)],
    "seed": [(None, None), (-1, None), (0, 0), (2**40, 2**40), (-5, -5)],
    "stop": [(None, ()), ("a", ("a",)), (["a", "b", "a"], ("a", "b"))],
    "stop_token_ids": [(None, ()), ([3, 4, 3], (3, 4)), (torch.tensor([5]), (5,))],
    "include_stop_str_in_output": [(True, True)],
    "ignore_eos": [(True, True)],
    "max_tokens": [(None, None), (1, 1)],
    "min_tokens": [(0, 0), (16, 16)],
    "logprobs": [(None, None), (0, 0), (True, 1), (-1, -1), (20, 20)],
    "prompt_logprobs": [(None, None), (0, 0), (True, 1)],
    "truncate_prompt_tokens": [(None, None), (-1, -1), (5, 5)],
    "logit_bias": [(None, {}), ({3: 1, 4: -300}, {3: 1.0, 4: -100.0})],
    "allowed_token_ids": [(None, None), ([1, 2, 1], (1, 2))],
    "bad_words": [(None, ()), (["x"], ("x",))],
    "detokenize": [(False, False)],
    "skip_special_tokens": [(False, False)],
    "spaces_between_special_tokens": [(False, False)],
    "output_kind": [(RequestOutputKind.DELTA, RequestOutputKind.DELTA)],
    "skip_reading_prefix_cache": [(None, None), (True, True)],
    "priority": [(-3, -3), (7, 7)],
    "deadline": [(None, None), (1.5, 1.5)],
}
WRONG = {
    "n": [0, -1, 1.0, True, "2", None],
    "temperature": [-0.1, 2.1, math.nan, math.inf, "1", None, True],
    "top_p": [0, -0.1, 1.1, math.nan, "1", None],
    "top_k": [-2, 1.5, "3", None, True],
    "min_p": [-0.1, 1.1, math.nan, None],
    "repetition_penalty": [0, -1, math.inf, math.nan, None],
    "presence_penalty": [-2.1, 2.1, math.nan, None],
    "frequency_penalty": [-2.1, 2.1, math.nan, None],
    "seed": ["1", 1.0, True, 2**64],
    "stop": ["", ["a", ""], [1], 3, b"x", {"a": 1}],
    "stop_token_ids": [[-1], ["a"], "ab", 3, [1.0], [True]],
    "include_stop_str_in_output": [None, 1],
    "ignore_eos": [None, 1],
    "max_tokens": [0, 1.0, "5", True],
    "min_tokens": [-1, 17, None, 1.0],
    "logprobs": [-2, 1.0, "1", False],
    "prompt_logprobs": [-2, 1.0, "1", False],
    "truncate_prompt_tokens": [0, -2, 1.5, "3", True],
    "logit_bias": [[1, 2], {"a": 1}, {-1: 1.0}, {1: "x"}, {1: math.nan}, 3],
    "allowed_token_ids": [[], [-1], "ab", 3],
    "bad_words": [[""], [1], 3],
    "detokenize": [None, 0],
    "skip_special_tokens": [None, 0],
    "spaces_between_special_tokens": [None, 0],
    "output_kind": [0, None, "delta"],
    "skip_reading_prefix_cache": [0, "no"],
    "priority": [None, 1.0, "1"],
    "deadline": [0, -1, math.nan, "1", True],
}


def test_every_parameter_is_tried():
    assert set(RIGHT) == set(WRONG) == set(NAMES)


@pytest.mark.parametrize(("name", "value", "becomes"), [(n, v, b) for n, pairs in RIGHT.items() for v, b in pairs])
def test_right_values(name, value, becomes):
    got = getattr(SamplingParams(**{name: value}), name)
    assert got == becomes
    assert type(got) is type(becomes)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_values_are_named(name, value):
    with pytest.raises((TypeError, ValueError), match=name):
        SamplingParams(**{name: value})


def test_what_does_not_fit_together():
    with pytest.raises(ValueError, match="min_tokens must be at most max_tokens=3"):
        SamplingParams(min_tokens=4, max_tokens=3)
    with pytest.raises(ValueError, match="n must be 1 where temperature is 0"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match="stop needs detokenize"):
        SamplingParams(stop="x", detokenize=False)
    assert not SamplingParams(prompt_logprobs=1).reads_prefixes
    assert SamplingParams(prompt_logprobs=1, skip_reading_prefix_cache=False).reads_prefixes
    assert SamplingParams().reads_prefixes


def test_what_they_are_given_is_copied():
    given = [1, 2]
    params = SamplingParams(stop_token_ids=given)
    given.append(3)
    assert params.stop_token_ids == (1, 2)


def test_a_low_temperature_is_told_of(caplog):
    SamplingParams(temperature=0.001)
    assert "temperature 0.001 is taken for 0.01" in caplog.text
