"""Mixes of requests, and the measurements of an engine."""

from __future__ import annotations

import random

import pytest
from serving import model_of

from vattn.bench import mixes, serving
from vattn.bench.mixes import Work, mix
from vattn.bench.static_batch import static_batch
from vattn.engine.llm import LLM
from vattn.models.versions import VERSION

engine = pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")


def test_the_mix_of_nano_vllm_is_its_own():
    random.seed(0)
    prompts = [[random.randint(0, 10000) for _ in range(random.randint(100, 1024))] for _ in range(256)]
    outputs = [random.randint(100, 1024) for _ in range(256)]
    assert mix("nano", 151936) == [Work(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]


@pytest.mark.parametrize("name", mixes.MIXES)
def test_a_seed_gives_the_same_requests_and_another_one_others(name):
    first, again, other = (mix(name, 100, count=6, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 6
    assert all(0 <= token < 100 for work in first for token in work.prompt)


def test_groups_share_a_prefix():
    works = mix("prefixes", 1000, count=48)
    groups = {}
    for work in works:
        assert (len(work.prompt), work.output) == (2176, 256)
        groups.setdefault(tuple(work.prompt[:2048]), []).append(work)
    assert [len(group) for group in groups.values()] == [16, 16, 16]


def test_requests_are_written_and_read(tmp_path):
    works = mix("nano", 1000, count=3)
    mixes.write(tmp_path / "mix.jsonl", works)
    assert mixes.read(tmp_path / "mix.jsonl") == works
    (tmp_path / "bad.jsonl").write_text('{"prompt": [1], "output": 0}\n')
    with pytest.raises(ValueError, match=r"line 1: prompt must not be empty, and output must be at least 1"):
        mixes.read(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"prompt": [1]}\n')
    with pytest.raises(ValueError, match="line 1 is not a request"):
        mixes.read(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="mix 'other' is not known"):
        mix("other", 100)


@engine
def test_an_engine_is_measured():
    options = {"max_model_len": 256, "max_num_seqs": 4, "kv_budget": 64 << 20, "granularity": 4096}
    with LLM(model_of("llama-gqa"), **options) as llm:
        works = [Work([3 + 7 * i] * 20, 24) for i in range(6)]
        rows = list(serving.throughput(llm, [works, works]))
        assert [row["sampled tokens"] for row in rows] == [144] * 3
        assert [row["warm-up"] for row in rows] == [True, False, False]
        assert rows[1]["known tokens"] == 0 < rows[2]["known tokens"]  # the last round has the same prompts
        assert all(row["tokens/s"] == pytest.approx(144 / row["seconds"]) for row in rows)
        [one] = serving.latency(llm, [30], 8, 100)
        assert one["first token ms"] > 0
        with pytest.raises(ValueError, match="output must be at least 2"):
            serving.latency(llm, [30], 1, 100)
        host = serving.host_work(llm, 4, 100, iterations=5)
        assert 0 < host["scheduler ms"] < host["host ms"] <= host["whole ms"]
        assert llm.engine.unfinished == 0
        resized = serving.resized(llm, 4, 100, prompt=60, output=40)
        assert resized["failed"] == 0 < resized["preemptions"]
        assert resized["physical MiB, after"] <= resized["budget MiB, after"] < resized["physical MiB, before"]
        assert 0.5 < resized["mapped, over needed"] < 1.5
        assert llm.engine.tier.cache.stats().budget == 64 << 20
        for count in (5, 9):
            with pytest.raises(ValueError, match=f"no room for {count} requests"):
                serving.resized(llm, count, 100, prompt=60, output=40)
        assert not llm.engine.unfinished
        ready = serving.ready(llm, 0.0, 4, 100)
        assert ready["ready s, 4"] < ready["ready s, 1"]
        llm.engine.tier.cache.check()


@engine
@pytest.mark.parametrize("cache", ["dynamic", "vattn"])
def test_generate_is_measured_on_a_batch(cache):
    model = model_of("llama-gqa")
    row = static_batch(model, [Work([3 + i] * (5 + i), 10 + i) for i in range(4)], cache)
    assert (row["cache"], row["requests"], row["prompt tokens"], row["sampled tokens"]) == (cache, 4, 26, 46)
    assert row["tokens/s"] == pytest.approx(46 / row["seconds"])
