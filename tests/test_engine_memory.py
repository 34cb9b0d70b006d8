"""Memory that requests leave serves those that come after them, without calls of the driver."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from vattn import BudgetExceeded, KVCache, KVLayout
from vattn.bench import mixes
from vattn.bench.replay import MEMORY_CALLS
from vattn.engine import tier
from vattn.engine.kv_memory import KVMemory, lookahead
from vattn.engine.options import EngineOptions
from vattn.engine.policy import policy_named
from vattn.engine.request import Request
from vattn.engine.scheduler import Scheduler
from vattn.memory.shape import LayerShape
from vattn.models.flat import Margins


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize(("lengths", "may"), [("alike", 1.5), ("others", 6.0)])
def test_later_rounds_take_few_calls(lengths, may, reuse):
    """Sixteen positions a granule, as with Llama-3-8B on a GPU; prompts of each round have other tokens."""
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=64, max_len=2500, dtype="bfloat16", granularity=4096)
    assert layout.tokens_per_granule == 16
    works = mixes.mix("nano", 10_000, count=64)
    needed = sum(len(work.prompt) + work.output for work in works)
    cache = KVCache(layout, slots=128, budget=int(1.3 * needed) * layout.bytes_per_token, lookahead=lookahead(layout))
    memory = KVMemory(cache, Margins(0, 0, 175), 2048, reuse_prefixes=reuse)
    scheduler = Scheduler(
        memory, policy_named("fcfs", memory.cached_positions), clock=time.monotonic, stops=lambda branch: None,
        max_num_seqs=64, max_num_batched_tokens=4096,
    )  # fmt: skip
    calls = []
    for number in range(5):
        if lengths == "others":
            works = mixes.mix("nano", 10_000, count=64, seed=number)
        before = cache.stats().driver_calls
        for place, work in enumerate(works):
            prompt = tuple(10_000 * number + token for token in work.prompt)
            request = Request(f"{number}-{place}", prompt, work.output)
            request.trunk.stop_tokens = frozenset()
            scheduler.add(request)
        flying = scheduler.schedule()
        while not flying.empty:
            following = scheduler.schedule()
            scheduler.read(flying, [7] * len(flying.into))
            flying = following
        assert not scheduler.requests.running
        after = cache.stats().driver_calls
        tokens = sum(len(work.prompt) + work.output for work in works)
        calls.append(1000 * sum(after[name] - before[name] for name in MEMORY_CALLS) / tokens)
        scheduler.requests.ended.clear()
    cache.check()
    cache.close()
    assert calls[0] > 30
    assert max(calls[2:]) <= may, calls


def test_outputs_that_share_a_prefix_are_computed_side_by_side():
    def refuses(*args, **options):
        raise BudgetExceeded

    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=64, max_len=3000, dtype="bfloat16", granularity=4096)
    cache = KVCache(layout, slots=64, device="cpu", budget=64 << 20, lookahead=0)
    memory = KVMemory(cache, Margins(0, 0, 0), 3000)
    scheduler = Scheduler(
        memory,
        policy_named("fcfs", memory.cached_positions),
        clock=time.monotonic,
        stops=lambda branch: None,
        max_num_seqs=32,
        max_num_batched_tokens=16384,
    )
    for number, work in enumerate(mixes.mix("prefixes", 1000, count=48)):  # in three groups, mixed
        request = Request(str(number), tuple(work.prompt), work.output)
        request.stop_tokens = frozenset()
        scheduler.add(request)
    last, full = None, 0
    while any(scheduler.requests):
        iteration = scheduler.schedule()
        if last is not None:
            scheduler.read(last, [7] * len(last.into))
        last = None if iteration.empty else iteration
        groups = [branch.request.prompt[:8] for branch in iteration.decodes]
        if len(groups) == 32 and not iteration.rows:  # who has no memory is the last one that began
            assert memory.grow([*scheduler.requests.decoding], [], []) is None
            cache.grow_all, grow_all = refuses, cache.grow_all
            for branch in iteration.decodes:
                branch.launched += 1000
            assert memory.grow([*scheduler.requests.decoding], [], []) is [*scheduler.requests.decoding][-1]
            for branch in iteration.decodes:
                branch.launched -= 1000
            cache.grow_all = grow_all
        changes = sum(one != other for one, other in pairwise(groups))
        assert changes == max(len(set(groups)) - 1, 0)
        full += len(groups) == 32
    assert full > 200
    cache.check()
    cache.close()


@pytest.mark.parametrize(("granularity", "most"), [(4096, 340), (32768, 70)])  # of four rows, and of 32
@pytest.mark.parametrize("tail", [0, 7, 175])
@pytest.mark.parametrize("shapes", [[(1, 64)] * 4, [(1, 64), (3, 40), None, (1, 64)]])
def test_decodes_are_brought_to_where_their_last_granules_end(shapes, tail, granularity, most):
    layers = [shape and LayerShape(kv_heads=shape[0], head_dim=shape[1], dtype="bfloat16") for shape in shapes]
    layout = KVLayout(layers, max_len=1000 + tail, granularity=granularity)
    cache, plain = (KVCache(layout, slots=4, device="cpu", tail_rows=tail, mapper=False) for _ in range(2))
    sequence = plain.open(expected=1000 + int(layout.tokens_per_granule))
    memory = KVMemory(cache, Margins(0, tail, tail), 1000, reuse_prefixes=False)
    request = Request("one", (1,) * 20, 980)
    assert memory.open(request, 1000) == 0
    [branch] = request.branches
    calls = []
    grow_all = cache.grow_all
    cache.grow_all = lambda *args, **options: calls.append(args[1]) or grow_all(*args, **options)
    for positions in range(1, 1001):
        branch.launched = positions - 1
        assert memory.grow([branch], [], []) is None
        sequence.grow()
        [[room]] = calls[-1:]
        assert positions <= room <= 1000
        assert cache.stats().mapped == plain.stats().mapped  # as if the sequence grew by one position each time
    assert len(calls) <= most
    memory.close(branch, 0)
    assert memory.open(request, 1000) == 0  # it is nowhere now
    calls.clear()
    branch.launched = 19
    assert memory.grow([branch], [], []) is None
    assert len(calls) == 1
    cache.close()
    plain.close()


@pytest.mark.parametrize(
    ("layers", "kv_budget", "expected"),
    [
        (32, 54 << 30, 8),  # Llama-3-8B on a GPU of 80 GiB: 64 positions a granule
        (28, 70 << 30, 7),  # Qwen3-0.6B
        (32, 27 << 30, 16),
        (32, 8 << 30, 32),  # memory is short
        (4, 54 << 30, 4),
    ],
)
def test_layers_that_are_mapped_together(layers, kv_budget, expected, monkeypatch):
    monkeypatch.setattr(tier, "_budget", lambda options, device: options.kv_budget)
    shapes = [LayerShape(kv_heads=8, head_dim=128, dtype="bfloat16")] * layers
    options = EngineOptions(kv_budget=kv_budget, max_num_seqs=256)
    assert tier._layers_per_plane([*shapes, None], options, torch.device("cuda")) == expected
    assert tier._layers_per_plane(shapes, options, torch.device("cpu")) is None
