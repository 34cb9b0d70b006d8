"""Traces of requests, and their replay against a cache."""

from __future__ import annotations

import json
import statistics

import pytest

from vattn import BudgetExceeded, KVCache, KVLayout
from vattn.bench import mapping
from vattn.bench.replay import replay
from vattn.bench.trace import DATASETS, Request, generate, read, write
from vattn.cli import command

pytestmark = pytest.mark.mapper


def cache(**options):
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=32, max_len=2000, dtype="float32", granularity=4096)
    return KVCache(layout, **{"slots": 16, **options})


@pytest.mark.parametrize("dataset", sorted(DATASETS))
def test_made_up_requests_have_the_printed_moments(dataset):
    requests = generate(dataset, 4000, longest=10**6, seed=1)
    for lengths, (median, p90) in (
        ([request.prompt for request in requests], DATASETS[dataset].prompt),
        ([request.output for request in requests], DATASETS[dataset].output),
    ):
        assert statistics.median(lengths) == pytest.approx(median, rel=0.1)
        assert statistics.quantiles(lengths, n=10)[8] == pytest.approx(p90, rel=0.1)
    assert generate(dataset, 10, seed=1) == generate(dataset, 10, seed=1) != generate(dataset, 10, seed=2)


def test_arrivals_follow_a_rate_and_lengths_are_cut():
    requests = generate("sharegpt", 2000, rate=10.0, longest=500)
    assert requests[-1].arrival == pytest.approx(200, rel=0.15)
    assert max(request.prompt + request.output for request in requests) == 500
    assert min(request.output for request in requests) == 1
    with pytest.raises(ValueError, match="dataset 'alpaca' is not known"):
        generate("alpaca", 1)
    with pytest.raises(ValueError, match="longest must be at least 2"):
        generate("sharegpt", 1, longest=1)


def test_a_trace_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "trace.jsonl"
    requests = [Request(1.5, 10, 3), Request(0.25, 7, 1)]
    write(path, requests)
    assert read(path) == requests[::-1]
    for line, error in (
        ('{"arrival": 0, "prompt": 3}', "line 2 is not a request"),
        ("nonsense", "line 2 is not a request"),
        ('{"arrival": 0, "prompt": 0, "output": 1}', "line 2: arrival must not be negative"),
    ):
        path.write_text('{"arrival": 0, "prompt": 3, "output": 2}\n' + line)
        with pytest.raises(ValueError, match=error):
            read(path)


@pytest.mark.parametrize("mapper", [True, False])
def test_every_token_is_served_and_counted(mapper):
    requests = [Request(0.0, 20 + 7 * n % 90, 5 + 3 * n % 20) for n in range(60)]
    with cache(mapper=mapper) as c:
        result = replay(c, [*requests, Request(0.0, 1, 1)], concurrency=4)
        assert result.finished >= 57
        assert result.preempted == 0
        made = sum(request.prompt + request.output for request in requests)
        assert made - 3 * (110 + 25) <= result.tokens <= made + 1
        assert result.rows_peak <= result.needed_peak <= result.physical_peak
        assert 0 <= result.waste_mean <= result.unused_mean
        assert c.stats().running_slots == 0
    calls = ("create", "map", "set_access", "unmap", "release")
    if mapper:
        assert sum(result.caller_calls[call] for call in calls) == 0
    else:
        assert result.caller_calls == result.calls


def test_a_full_budget_holds_requests_back_and_none_is_lost():
    requests = [Request(0.0, 100, 60) for _ in range(30)]
    with cache(budget=60 * 4096) as c:  # a page of 4096 bytes holds 16 rows
        result = replay(c, requests, concurrency=16)
        assert result.physical_peak <= 60 * 4096
        assert result.running_mean < 9
        assert result.finished >= 20
        c.check()


def test_arrivals_count_from_the_end_of_the_warm_up():
    with cache() as c:
        result = replay(c, [Request(1000.0, 10, 5)] * 9, concurrency=2, warm_up=4, steps_per_second=1000)
        assert result.running_mean > 1
        assert result.seconds < 100


def test_a_warm_up_beyond_the_trace_is_refused():
    with cache() as c, pytest.raises(ValueError, match="the requests end before 5 have finished"):
        replay(c, [Request(0.0, 1, 1)], concurrency=1, warm_up=5)


def test_bench_map_prints_and_reads_a_trace(capsys, tmp_path, monkeypatch):
    # The other measurements would take seconds, and gigabytes of host memory.
    monkeypatch.setattr(mapping, "growth", lambda device: [{"growing by": "vattn"}])
    monkeypatch.setattr(mapping, "call_latency", lambda device: [{"call": "create"}])
    monkeypatch.setattr(mapping, "prompts", lambda device: [{"tokens": 128, "vattn ms": 0.1}])
    trace = tmp_path / "trace.jsonl"
    write(trace, [Request(0.0, 200, 30)] * 40)
    assert command.main(["bench", "map", "--trace", str(trace), "--concurrency", "4", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["replay"]
    assert [(row["policy"], row["budget"]) for row in rows] == [
        (policy, budget) for policy in mapping.POLICIES for budget in ("live + 20%", "full")
    ]
    assert all(row["thousand tokens"] > 1 for row in rows[:-1])
    assert "pages are needed" in rows[-1]["not served"]  # a page for each layer's K and V holds 1024 tokens
    assert command.main(["bench", "map", "--trace", str(tmp_path / "none"), "--json"]) == 1


def test_a_request_that_does_not_fit_is_told():
    for options in ({}, {"mapper": False}):
        with cache(budget=4096, **options) as c, pytest.raises(BudgetExceeded):
            replay(c, [Request(0.0, 100, 10)] * 2, concurrency=2)


def test_growth_by_every_policy():
    rows = mapping.growth("cpu", tokens=40, rate=2000)
    assert [row["growing by"] for row in rows] == ["vattn", "vattn, mapper off", *mapping.PAGES]
    assert [row["calls of the caller"] for row in rows[2:]] == [6, 0, 8]  # two more pages of 16 tokens
    for row in rows:
        assert row["p50 us"] <= row["p99 us"] <= row["max us"]


def test_what_a_call_costs():
    rows = mapping.call_latency("cpu", rounds=3)
    assert {row["call"] for row in rows} == {"create", "map", "set_access", "unmap", "release"}
    for row in rows:
        assert row["p99 us"] >= row["p50 us"] >= mapping.CHARGES[row["call"]]
