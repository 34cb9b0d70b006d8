"""The measurements of kernels and decode steps: that they run, and count what they say."""

from __future__ import annotations

import pytest
from models import build

from vattn import speed
from vattn.kernels import KERNELS


def test_every_kernel_is_measured_on_every_memory():
    rows = list(speed.kernel_speed("cpu", 1024))
    assert {(row["kernel"], row["memory"]) for row in rows} == {
        (kernel, memory) for kernel in ("sdpa", "reference") for memory in speed.MEMORIES
    }
    assert len({row["work"] for row in rows}) == 5
    assert {row["unit"] for row in rows} == {"TFLOP/s", "TB/s"}
    assert all(row["virtual / torch's"] == row["virtual"] / row["torch's"] > 0 for row in rows)


def test_a_causal_prefill_counts_the_pairs_that_it_computes():
    whole = speed._Work("", [8], [8]).rate(1e-12)
    chunk = speed._Work("", [8], [3]).rate(1e-12)
    assert whole == ("TFLOP/s", pytest.approx(4 * 36 * speed.HEADS * speed.DIM))
    assert chunk == ("TFLOP/s", pytest.approx(4 * (6 + 7 + 8) * speed.HEADS * speed.DIM))
    assert speed._Work("", [8, 5], [1, 1]).rate(1e-12) == ("TB/s", 13 * 2 * speed.KV_HEADS * speed.DIM * 2)


def test_decode_steps_of_each_cache():
    model = build("llama-gqa", "sdpa", "cpu")
    model.generation_config.eos_token_id = None
    floors = {}
    for name, make in speed.ways(model, 256, ["reference", "reference+fp8"], ["dynamic", "static"]).items():
        row = speed.decode_speed(model, "mixed", [9, 20, 30], name, make, 8)
        floors[name] = row["floor ms"]
        assert row["cache"] == name
        assert row["step ms p50"] > row["floor ms"] > 0
        if name.startswith("vattn"):
            kernel = "reference" if "reference" in name else "sdpa"
            assert f"kernel='{kernel}', fallback=None" in row["decode"]
            assert "eager=8" in row["decode"]
    assert floors["vattn captured, reference+fp8"] < floors["vattn captured, reference"] == floors["dynamic"]
    assert set(KERNELS) >= {"fa2", "fa3", "flex"}
