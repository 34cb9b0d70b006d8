"""Compares every kernel with the definition of attention in float64, on mixed lengths.

Behind the rows that a kernel says it may load, no further granule is mapped.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vattn import KVCache, KVLayout, kernels
from vattn.kernels import KERNELS, AttentionParams, AttentionSpec, Kernel, SequenceRanges, base, reach_of
from vattn.memory.layout import GRANULARITY

LENGTHS = [1, 64, 127, 128, 129, 300, 512]
SHAPES = [(8, 2, 64), (4, 4, 128), (8, 8, 64), (8, 1, 256), (6, 2, 96), (2, 2, 192)]  # query heads, KV heads, head dim
FEATURES = ["plain", "window", "padding", "softcap", "sinks", "uniform"]
PADDING, WINDOW = 5, 100


class Filled:
    """A cache with a sequence of each length, filled with random K and V.

    Granules hold few rows, so that little is mapped behind the rows that a kernel says it may load: on the host a
    granule holds from half a row to four rows, on a device four to nine.
    """

    def __init__(self, kernel: Kernel, task: AttentionSpec, lengths: list[int]) -> None:
        torch.manual_seed(0)
        stored = task.kv_dtype or task.dtype
        dtype = str(stored).removeprefix("torch.")
        fits = GRANULARITY // 8 // (task.kv_heads * task.head_dim * stored.itemsize)
        # The number of layers is a power of two. A slot takes whole rows and whole granules, and with other numbers it
        # would be so large that some kernels could not address all slots.
        layers = 2 if task.device == "cpu" else 1 << fits.bit_length() - 1
        layout = KVLayout.uniform(
            layers=layers, kv_heads=task.kv_heads, head_dim=task.head_dim, v_head_dim=task.v_head_dim, max_len=1024,
            dtype=dtype, **({"granularity": 4096} if task.device == "cpu" else {}),
        )  # fmt: skip
        self.cache = KVCache(
            layout,
            slots=len(lengths),
            device=task.device,
            lookahead=0,
            mapper=False,
            tail_rows=kernel.tail(task.head_dim, task.kv_dtype),
        )
        self.sequences = [self.cache.open(slot=slot) for slot in range(len(lengths))]
        for sequence, length in zip(self.sequences, lengths, strict=True):
            sequence.grow(length)
            for view in (sequence.k(1), sequence.v(1)):
                view.copy_(torch.randn(view.shape, device=view.device).to(stored))
        self.k, self.v = self.cache.k(1), self.cache.v(1)
        assert kernel.refuses(replace(task, reach=reach_of(self.k, self.v))) is None


def tasks(**more) -> list:
    """Returns pytest parameters (kernel, task), for each device, dtype and shape that a kernel supports."""
    return [
        pytest.param(
            kernel, task, id=f"{kernel.name}-{task.device}-{dtype}-{q}x{kv}x{dim}",
            marks=[pytest.mark.gpu] if task.device == "cuda" else [],
        )
        for device in ("cpu", "cuda")
        for kernel in KERNELS.values()
        for dtype in ("float32", "float16", "bfloat16")
        for q, kv, dim in SHAPES
        if not kernel.refuses(
            task := AttentionSpec(
                device=device, dtype=getattr(torch, dtype), query_heads=q, kv_heads=kv, head_dim=dim,
                **{"v_head_dim": dim, **more},
            )
        )
    ]  # fmt: skip


def features(names: list[str], **more) -> list:
    return [
        pytest.param(feature, *case.values, id=f"{feature}-{case.id}", marks=case.marks)
        for feature in names
        for case in tasks(
            softcap=feature == "softcap",
            sinks=feature == "sinks",
            window=feature == "window" and more.get("queries", "one") != "one",
            **more,
        )
    ]


def require(kernel: Kernel) -> None:
    if reason := kernel.missing():
        pytest.skip(reason)


def expected(q, k, v, spans: SequenceRanges, counts: list[int], how: AttentionParams) -> torch.Tensor:
    sinks = None if how.sinks is None else how.sinks.double()
    wide = AttentionParams(scale=how.scale, softcap=how.softcap, sinks=sinks, window=how.window)
    return torch.cat(
        [
            kernels.plain_attention(part, k[slot, start:end].double(), v[slot, start:end].double(), wide)
            for part, (slot, start, end) in zip(torch.split(q.double(), counts), spans.tolist(), strict=True)
        ]
    )


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Asserts equality within the error of rounding the attention weights and the output to the dtype."""
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def queries_of(task: AttentionSpec, n: int) -> torch.Tensor:
    return torch.randn(n, task.query_heads, task.head_dim, device=task.device, dtype=task.dtype)


def how_of(feature: str, task: AttentionSpec, **more) -> AttentionParams:
    sinks = torch.randn(task.query_heads, device=task.device, dtype=task.dtype) if feature == "sinks" else None
    return AttentionParams(scale=0.1, softcap=3.0 if feature == "softcap" else None, sinks=sinks, **more)


@pytest.mark.thorough(60)
@pytest.mark.parametrize(("feature", "kernel", "task"), features(FEATURES))
def test_decode(feature, kernel, task):
    require(kernel)
    lengths = [300] * 3 if feature == "uniform" else LENGTHS
    filled = Filled(kernel, task, lengths)
    firsts = {"window": [max(0, n - WINDOW) for n in lengths], "padding": [min(PADDING, n - 1) for n in lengths]}
    starts = firsts.get(feature, [0] * len(lengths))
    spans = SequenceRanges.of(
        [(slot, start, n) for slot, (start, n) in enumerate(zip(starts, lengths, strict=True))], task.device
    )
    q = queries_of(task, len(lengths))
    how = how_of(feature, task)
    got = kernel.decode(q, filled.k, filled.v, spans, how)
    close(got, expected(q, filled.k, filled.v, spans, [1] * len(lengths), how))


@pytest.mark.parametrize(
    ("feature", "kernel", "task"),
    [case for case in features(["plain", "softcap", "sinks"]) if case.values[1].capturable],
)
def test_a_span_without_rows(feature, kernel, task):
    """Idle rows of a graph have empty ranges, and nothing is mapped in their slots."""
    require(kernel)
    filled = Filled(kernel, task, [300, 0, 128, 0])
    q = queries_of(task, 4)
    how = how_of(feature, task)
    spans = SequenceRanges.of([(0, 0, 300), (1, 0, 0), (2, 0, 128), (3, 0, 0)], task.device)
    got = kernel.decode(q, filled.k, filled.v, spans, how)
    now = SequenceRanges.of([(0, 0, 300), (2, 0, 128)], task.device)
    close(got[[0, 2]], expected(q[[0, 2]], filled.k, filled.v, now, [1, 1], how))


@pytest.mark.thorough(36)
@pytest.mark.parametrize(
    ("feature", "kernel", "task"),
    [
        case
        for queries in ("first", "chunk")
        for case in features(["plain", "window", "padding", "softcap", "sinks"], queries=queries)
    ],
)
def test_prefill(feature, kernel, task):
    require(kernel)
    filled = Filled(kernel, task, LENGTHS)
    starts = [min(PADDING, n - 1) if feature == "padding" else 0 for n in LENGTHS]
    seen = [n - start for n, start in zip(LENGTHS, starts, strict=True)]
    counts = seen if task.queries == "first" else [max(1, n // 3) for n in seen]
    spans = SequenceRanges.of(
        [(slot, start, n) for slot, (start, n) in enumerate(zip(starts, LENGTHS, strict=True))], task.device
    )
    q = queries_of(task, sum(counts))
    how = how_of(feature, task, window=WINDOW if feature == "window" else None)
    got = kernel.prefill(q, filled.k, filled.v, spans, counts, how)
    close(got, expected(q, filled.k, filled.v, spans, counts, how))


@pytest.mark.thorough(12)
@pytest.mark.parametrize(
    ("feature", "kernel", "task"),
    [case for case in features(["plain", "softcap", "sinks"], queries="chunk") if case.values[1].mixes],
)
def test_prompts_and_single_queries_at_once(feature, kernel, task):
    """As in a graph: some sequences have no queries, and some queries belong to no sequence."""
    require(kernel)
    filled = Filled(kernel, task, LENGTHS)
    counts = [1, 1, 127, 5, 1, 0, 300]
    spans = SequenceRanges.of(
        [(slot, 0, n if count else 0) for slot, (n, count) in enumerate(zip(LENGTHS, counts, strict=True))], task.device
    )
    spans.longest = 1024
    idle = 10
    q = queries_of(task, sum(counts) + idle)
    how = how_of(feature, task)
    offsets = torch.tensor([0, *counts], device=task.device).cumsum(0).int()
    got = kernel.mixed(q, filled.k, filled.v, spans, offsets, 512, how)
    assert len(got) == len(q)
    there = [row for row, count in enumerate(counts) if count]
    now = SequenceRanges.of([spans.tolist()[row] for row in there], task.device)
    room = torch.empty_like(got)
    assert torch.equal(kernel.mixed(q, filled.k, filled.v, spans, offsets, 512, how, room)[:-idle], got[:-idle])
    close(got[:-idle], expected(q[:-idle], filled.k, filled.v, now, [counts[row] for row in there], how))


@pytest.mark.parametrize(
    ("kernel", "task"), [case for case in tasks(v_head_dim=32, softcap=True) if case.values[1].dtype is torch.float32]
)
def test_heads_of_different_width(kernel, task):
    require(kernel)
    filled = Filled(kernel, task, LENGTHS)
    spans = SequenceRanges.of([(slot, 0, n) for slot, n in enumerate(LENGTHS)], task.device)
    q = queries_of(task, len(LENGTHS))
    how = how_of("softcap", task)
    got = kernel.decode(q, filled.k, filled.v, spans, how)
    assert got.shape[-1] == 32
    close(got, expected(q, filled.k, filled.v, spans, [1] * len(LENGTHS), how))


@pytest.mark.parametrize(("kernel", "task"), [case for case in tasks() if case.values[0].capturable])
def test_a_captured_decode_follows_lengths_that_grow(kernel, task):
    require(kernel)
    lengths = [5, 100, 300]
    filled = Filled(kernel, task, lengths)
    spans = SequenceRanges.of([(slot, 0, n) for slot, n in enumerate(lengths)], task.device)
    spans.longest = 1024
    q = queries_of(task, 3)
    how = how_of("plain", task)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        spans._made.clear()
        kernel.decode(q, filled.k, filled.v, spans, how)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    spans._made.clear()
    with torch.cuda.graph(graph):
        got = kernel.decode(q, filled.k, filled.v, spans, how)
    for more in (0, 1, 200, 300):
        lengths = [n + more for n in lengths]
        for sequence, n in zip(filled.sequences, lengths, strict=True):
            start = sequence.length
            sequence.grow(n - start)
            for view in (sequence.k(1)[start:], sequence.v(1)[start:]):
                view.copy_(torch.randn_like(view))
        spans.ends.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        now = SequenceRanges.of([(slot, 0, n) for slot, n in enumerate(lengths)], task.device)
        close(got, expected(q, filled.k, filled.v, now, [1] * 3, how))


@pytest.mark.parametrize(("slots", "refused"), [(2047, False), (2048, True)])
def test_kernels_that_number_rows_by_32_bits_refuse_more(slots, refused):
    """The number of row 2**31 is negative in 32 bits, so that such a kernel reads memory that lies before the cache."""
    k = torch.empty(slots, 2**20, 2, 64, dtype=torch.bfloat16, device="meta")
    task = replace(AttentionSpec.of(k[0, :1], k, k), device="cuda")
    assert task.rows == slots * 2**20
    for name in ("fa2", "fa3"):
        reason = KERNELS[name].refuses(task)
        assert (reason is not None and "2**31 rows" in reason) == refused
    assert KERNELS["reference"].refuses(replace(task, device="cpu")) is None


def test_the_choice_says_why():
    task = AttentionSpec(device="cpu", dtype=torch.float32, query_heads=4, kv_heads=2, head_dim=64, v_head_dim=64)
    assert kernels.choose(task).name == "sdpa"
    assert kernels.choose(task, name="reference").name == "reference"
    with pytest.raises(ValueError, match=r"attention must be 'auto' or one of .*, not 'fa9'"):
        kernels.choose(task, name="fa9")
    with pytest.raises(ValueError, match="fa2: it"):
        kernels.choose(task, name="fa2")
    with pytest.raises(ValueError, match="sdpa: it cannot be captured; reference: it cannot be captured"):
        kernels.choose(task, capturable=True)


def test_names_of_before_warn():
    for before, now in (("Spans", "SequenceRanges"), ("Task", "AttentionSpec"), ("Scores", "AttentionParams")):
        with pytest.warns(DeprecationWarning, match=f"{before} is called {now} now"):
            assert getattr(kernels, before) is getattr(kernels, now)
    with pytest.raises(AttributeError, match=r"'vattn\.kernels' has no attribute 'Nothing'"):
        _ = kernels.Nothing


def test_multiples_are_kept_for_all_callers(device, monkeypatch):
    monkeypatch.setattr(base, "_multiples", {})
    place = torch.device(device)
    with torch.inference_mode():
        first = base.multiples_of(64, 5, place)
    assert first.tolist() == [0, 64, 128, 192, 256]
    again = base.multiples_of(64, 8, place)
    assert again.tolist() == list(range(0, 512, 64))
    assert again.data_ptr() == first.data_ptr()
    assert not again.is_inference()  # else nobody could compute gradients with them
    assert base.multiples_of(0, 3, place).tolist() == [0, 0, 0]
    assert [len(base.multiples_of(1, count, place)) for count in (0, 1, 9)] == [0, 1, 9]


@pytest.mark.gpu
def test_multiples_of_a_captured_graph_are_its_own(monkeypatch):
    monkeypatch.setattr(base, "_multiples", {})
    graph, place = torch.cuda.CUDAGraph(), torch.device("cuda", torch.cuda.current_device())
    with torch.cuda.graph(graph):
        inside = base.multiples_of(1, 4, place)
    assert not base._multiples
    outside = base.multiples_of(1, 4, place)
    graph.replay()
    assert inside.tolist() == outside.tolist() == [0, 1, 2, 3]
    assert inside.data_ptr() != outside.data_ptr()
