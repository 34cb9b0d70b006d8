"""The benchmarks of kernels and of decode steps run, and count what they claim to count."""

from __future__ import annotations

import pytest
import torch
from models import build

from vattn.bench import decode
from vattn.kernels import KERNELS


@pytest.mark.thorough
def test_every_kernel_is_measured_on_every_memory():
    rows = list(decode.kernel_speed("cpu", 1024))
    assert {(row["kernel"], row["memory"]) for row in rows} == {
        (kernel, memory) for kernel in ("sdpa", "reference") for memory in decode.MEMORIES
    }
    assert len({row["work"] for row in rows}) == 5
    assert {row["unit"] for row in rows} == {"TFLOP/s", "TB/s"}
    assert all(row["virtual / torch's"] == row["virtual"] / row["torch's"] > 0 for row in rows)


def test_a_causal_prefill_counts_the_pairs_that_it_computes():
    whole = decode._Work("", [8], [8]).rate(1e-12)
    chunk = decode._Work("", [8], [3]).rate(1e-12)
    assert whole == ("TFLOP/s", pytest.approx(4 * 36 * decode.HEADS * decode.DIM))
    assert chunk == ("TFLOP/s", pytest.approx(4 * (6 + 7 + 8) * decode.HEADS * decode.DIM))
    assert decode._Work("", [8, 5], [1, 1]).rate(1e-12) == ("TB/s", 13 * 2 * decode.KV_HEADS * decode.DIM * 2)


@pytest.mark.thorough
def test_decode_steps_of_each_cache():
    model = build("llama-gqa", "sdpa", "cpu")
    model.generation_config.eos_token_id = None
    before = dict(vars(model))
    factories = decode.cache_factories(model, 256, ["reference", "reference+fp8"], ["dynamic", "static"])
    rows = {row["cache"]: row for row in decode.decode_speed(factories, "mixed", [9, 20, 30], 8, rounds=3)}
    assert list(rows) == [factory.name for factory in factories]
    for name, row in rows.items():
        assert row["rounds"] == 3
        assert row["step ms p50"] >= row["step ms least"] > row["floor ms"] > 0
        if name.startswith("vattn"):
            kernel = "reference" if "reference" in name else "sdpa"
            assert f"kernel='{kernel}', fallback=None" in row["decode"]
            assert "eager=24" in row["decode"]  # three rounds of 8 steps on one cache
    floors = {name: row["floor ms"] for name, row in rows.items()}
    assert floors["vattn captured, reference+fp8"] < floors["vattn captured, reference"] == floors["dynamic"]
    # Nothing of vattn was attached to the model that transformers' caches were measured with.
    assert vars(model) == before
    assert all(factory.model is model for factory in factories if not factory.name.startswith("vattn"))
    twin = factories[0].model
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert set(KERNELS) >= {"fa2", "fa3", "flex"}


def test_what_finds_no_memory_is_a_row_that_says_so():
    model = build("llama-gqa", "sdpa", "cpu")

    def make(batch, length):
        raise torch.OutOfMemoryError("no memory\nat all")

    rows = decode.decode_speed([decode.CacheFactory("none", model, make)], "one", [4], 8)
    assert rows == [{"point": "one", "cache": "none", "error": "no memory"}]
    with pytest.raises(ValueError, match="steps must be at least 4, not 3"):
        decode.decode_speed([decode.CacheFactory("none", model, make)], "one", [4], 3)
