"""Measures attention kernels on each kind of memory, and decode steps of a model with each kind of cache."""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache, StaticCache, StoppingCriteria, StoppingCriteriaList

from vattn.hf import CACHE_KEYWORD
from vattn.hf.attach import forward_of
from vattn.hf.cache import VirtualCache
from vattn.kernels import KERNELS, AttentionParams, AttentionSpec, Kernel, SequenceRanges, reach_of
from vattn.memory.kv_cache import KVCache
from vattn.memory.layout import Kind, KVLayout

HEADS, KV_HEADS, DIM = 32, 8, 128  # of the kernel measurements, as in Llama-3-8B
BANDWIDTH = 3.0e12  # bytes per second that an H100 reads, for lower bounds of step times
_KEPT = 20e9  # the most bytes of K and V for which a baseline's cache is kept while other caches are measured
_PAGE = 16  # rows of a page for paged prompts; decode steps have pages of 64 rows
MEMORIES: tuple[Kind, ...] = ("compact", "interleaved")  # layouts of the virtual memory, which has 32 layers


@dataclass(frozen=True)
class _Work:
    """A workload: sequences of some lengths, and for each the number of last positions that are computed.

    In a decode step that number is one for each sequence.
    """

    name: str
    lengths: list[int]
    new: list[int]

    @property
    def prefill(self) -> bool:
        return max(self.new) > 1

    def rate(self, seconds: float) -> tuple[str, float]:
        if not self.prefill:
            return "TB/s", sum(self.lengths) * 2 * KV_HEADS * DIM * 2 / seconds / 1e12
        pairs = sum(n * (length - n) + n * (n + 1) / 2 for n, length in zip(self.new, self.lengths, strict=True))
        return "TFLOP/s", 4 * pairs * HEADS * DIM / seconds / 1e12


def _works(scale: int) -> list[_Work]:
    long, most = 65536 // scale, 8192 // scale
    prompt = 16384 // scale
    least = max(1, most // 128)
    mixed = [least + (most - least) * i // 31 for i in range(32)]
    return [
        _Work(f"prefill 4 x {prompt}", [prompt] * 4, [prompt] * 4),
        _Work(f"chunk of {most} at {long}", [long + most], [most]),
        _Work(f"decode 8 x {most}", [most] * 8, [1] * 8),
        _Work(f"decode 32 mixed to {most}", mixed, [1] * 32),
        _Work(f"decode 1 x {2 * long}", [2 * long], [1]),
    ]


class _Memory:
    """K and V of a workload's sequences: in virtual memory with a layout of ``kind``, or if it is None in torch's."""

    def __init__(self, kind: Kind | None, work: _Work, device: str, tail: int) -> None:
        longest, batch = max(work.lengths), len(work.lengths)
        self.cache = None
        if kind is None:
            shape = batch, longest + tail, KV_HEADS, DIM
            self.k, self.v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
            return
        layout = KVLayout.uniform(
            layers=32, kv_heads=KV_HEADS, head_dim=DIM, max_len=longest, dtype="bfloat16",
            kind=kind,
        )  # fmt: skip
        self.cache = KVCache(layout, slots=batch, device=device, tail_rows=tail, lookahead=0)
        for slot, length in enumerate(work.lengths):
            sequence = self.cache.open(slot=slot)
            sequence.grow(length)
            for view in (sequence.k(7), sequence.v(7)):
                view.normal_()
        self.k, self.v = self.cache.k(7), self.cache.v(7)

    def close(self) -> None:
        del self.k, self.v
        if self.cache is not None:
            self.cache.close()


def _seconds(device: str, *calls: Callable[[], Any]) -> list[float]:
    """Returns the median time of each call, in seconds; the calls take turns, in alternating order.

    On a GPU each call is queued behind a kernel that sleeps, so that the time to launch it does not count.
    """
    for call in calls * 3:
        call()
    times: list[list[float]] = [[] for _ in calls]
    turns = list(zip(calls, times, strict=True))
    for _ in range(30 if device != "cpu" else 1):
        turns.reverse()
        for call, took in turns:
            if device == "cpu":
                start = time.perf_counter()
                call()
                took.append(time.perf_counter() - start)
                continue
            begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(200_000)  # type: ignore[no-untyped-call]
            begun.record()
            call()
            done.record()
            done.synchronize()
            took.append(float(begun.elapsed_time(done)) / 1e3)
    return [statistics.median(took) for took in times]


def _call(kernel: Kernel, work: _Work, memory: _Memory, device: str) -> Callable[[], Any]:
    spans = SequenceRanges.of([(slot, 0, length) for slot, length in enumerate(work.lengths)], device)
    q = torch.randn(sum(work.new), HEADS, DIM, dtype=torch.bfloat16, device=device)
    how = AttentionParams(scale=DIM**-0.5)
    if work.prefill:
        return lambda: kernel.prefill(q, memory.k, memory.v, spans, work.new, how)
    return lambda: kernel.decode(q, memory.k, memory.v, spans, how)


def kernel_speed(device: str, scale: int = 1) -> Iterator[dict[str, Any]]:
    """Measures every kernel that supports a workload, with each layout of virtual memory and with torch's memory.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        scale: divides the lengths of the sequences.

    Yields:
        A row for each workload, kernel and layout.
    """
    on_gpu = device.startswith("cuda")
    for work in _works(scale):
        queries = "one" if not work.prefill else "first" if work.new == work.lengths else "chunk"
        task = AttentionSpec(
            device="cuda" if on_gpu else "cpu", dtype=torch.bfloat16, query_heads=HEADS, kv_heads=KV_HEADS,
            head_dim=DIM, v_head_dim=DIM, queries=queries,
        )  # fmt: skip
        for kernel in KERNELS.values():
            if kernel.missing() or kernel.refuses(task) or (kernel.name == "reference" and on_gpu):
                continue
            for kind in MEMORIES:
                row: dict[str, Any] = {"work": work.name, "kernel": kernel.name, "memory": kind}
                yield row | _on_memories(kernel, work, task, kind, device)


def _on_memories(kernel: Kernel, work: _Work, task: AttentionSpec, kind: Kind, device: str) -> dict[str, Any]:
    """Returns the rates with torch's memory and with virtual memory of one layout, or an error."""
    with contextlib.ExitStack() as memories:
        try:
            calls = []
            for each in (None, kind):
                memory = _Memory(each, work, device, kernel.tail(DIM))
                memories.callback(memory.close)
                if reason := kernel.refuses(replace(task, reach=reach_of(memory.k, memory.v))):
                    return {"error": reason}
                calls.append(_call(kernel, work, memory, device))
            if hasattr(kernel, "paged"):
                calls.append(_paged_call(kernel, work, device))
            (unit, ours), (_, virtual), *paged = map(work.rate, _seconds(device, *calls))
        except torch.OutOfMemoryError:
            return {"error": "out of memory"}
    row = {"torch's": ours, "virtual": virtual, "unit": unit, "virtual / torch's": virtual / ours}
    return row | ({"paged": paged[0][1], "virtual / paged": virtual / paged[0][1]} if paged else {})


def _paged_call(kernel: Any, work: _Work, device: str) -> Callable[[], Any]:
    """Returns a call of the kernel on K and V in shuffled pages of torch's memory."""
    size = 64 if not work.prefill else _PAGE
    counts = [-(-length // size) for length in work.lengths]
    places = torch.randperm(sum(counts), dtype=torch.int32, device=device)
    shape = len(places), size, KV_HEADS, DIM
    k, v = (torch.randn(shape, dtype=torch.bfloat16, device=device) for _ in range(2))
    q = torch.randn(sum(work.new), HEADS, DIM, dtype=torch.bfloat16, device=device)
    call: Callable[[], Any] = kernel.paged(
        q, k, v, list(torch.split(places, counts)), work.lengths, work.new, AttentionParams(scale=DIM**-0.5)
    )
    return call


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Records when each step is done, without waiting for the device."""

    def __init__(self) -> None:
        self._ticks: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            self._ticks.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self._ticks[-1].record()
        else:
            self._ticks.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def steps(self) -> list[float]:
        """Returns the seconds from each step to the next."""
        pairs = itertools.pairwise(self._ticks)
        if all(isinstance(tick, float) for tick in self._ticks):
            return [b - a for a, b in pairs]
        self._ticks[-1].synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def _layout_of(model: Any) -> KVLayout:
    return KVLayout.from_config(model.config, max_len=1, dtype=str(model.dtype).removeprefix("torch."))


def _fill(cache: Any, model: Any, mask: torch.Tensor) -> None:
    """Fills a cache with random K and V for a prompt with this mask, ``[batch, length]``, as the model would."""
    batch, length = mask.shape
    with cache.unpadded(mask) if isinstance(cache, VirtualCache) else contextlib.nullcontext():
        for layer, shape in enumerate(_layout_of(model).layers):
            if shape is None:
                raise ValueError(f"layer {layer} of {type(model).__name__} has no K and V")
            k, v = (
                torch.randn(batch, shape.kv_heads, length, dim, device=model.device, dtype=model.dtype)
                for dim in (shape.head_dim, shape.v_head_dim)
            )
            if isinstance(cache, StaticCache):
                cache.update(k, v, layer, {"cache_position": torch.arange(length, device=model.device)})
            else:
                cache.update(k, v, layer)


def baselines(device: str) -> list[str]:
    """Returns the names of transformers' caches that work on a device of this machine, see ``cache_factories``."""
    try:
        quantized = importlib.util.find_spec("optimum.quanto") is not None
    except ImportError:
        quantized = False
    on_gpu = ["static_compile", "offloaded"] if device.startswith("cuda") else []
    return ["dynamic", "static", *on_gpu, *["quantized"] * quantized]


@dataclass(frozen=True)
class CacheFactory:
    """A kind of cache to decode with.

    Attributes:
        name: the name of the kind in the rows of results.
        model: the model that decodes. Caches of vattn have a model of their own with the same weights, so that nothing
            of vattn is attached to the model of the other caches.
        make: makes a cache for a batch size and a length.
        compiled: whether ``generate`` may compile the model, which it does for some caches.
    """

    name: str
    model: Any
    make: Callable[[int, int], Any]
    compiled: bool = False


def cache_factories(model: Any, max_len: int, kernels: list[str], baselines: list[str]) -> list[CacheFactory]:
    """Returns factories for caches of vattn and of transformers.

    Args:
        model: the model to decode with. Nothing is attached to it, but compiled steps may move its weights to other
            addresses: warm those steps up first.
        max_len: positions of vattn's caches.
        kernels: kernels of captured decode steps: names, which ``+fp8``, ``+compiled`` or ``+tuned`` may follow.
        baselines: any of ``"dynamic"``, ``"static"``, ``"static_compile"``, ``"offloaded"`` (on CUDA) and
            ``"quantized"`` (4 bits, by optimum-quanto).
    """
    twin = _twin(model)
    tuned = {"max_autotune": True, "coordinate_descent_tuning": True}
    hows: dict[str, dict[str, Any]] = {
        "compiled": {"compiled": True}, "tuned": {"compiled": tuned}, "fp8": {"kv_dtype": "float8_e4m3fn"}
    }  # fmt: skip

    def virtual(**options: Any) -> Callable[[int, int], Any]:
        return lambda batch, length: VirtualCache(twin, max_len=max_len, slots=batch, **options)

    made = []
    for name in kernels:
        kernel, *parts = name.split("+")
        options: dict[str, Any] = {"attention": kernel}
        for part in parts:
            options |= hows[part]
        made.append(CacheFactory(f"vattn captured, {name}", twin, virtual(**options)))
    made.append(CacheFactory("vattn eager", twin, virtual(attention="auto", capture=False)))
    config = model.config
    others: dict[str, Callable[[int, int], Any]] = {
        "dynamic": lambda batch, length: DynamicCache(config=config),
        "static": lambda batch, length: StaticCache(config=config, max_cache_len=length),
        "static_compile": lambda batch, length: StaticCache(config=config, max_cache_len=length),
        "offloaded": lambda batch, length: DynamicCache(config=config, offloading=True),
        "quantized": lambda batch, length: QuantizedCache("quanto", config),
    }
    return made + [
        CacheFactory(baseline, model, others[baseline], compiled=baseline == "static_compile") for baseline in baselines
    ]


def _twin(model: Any) -> Any:
    """Returns a copy of a model that shares its weights."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return copy.deepcopy(model, {id(weight): weight for weight in weights})


class Decoding:
    """Times decode steps of ``model.generate`` after contexts of some lengths, padded on the left, with one cache.

    A step lasts from one call of the stopping criteria to the next, on a GPU by CUDA events. The first quarter of the
    steps of each round, at least two, are not counted; the row has the median, the mean and the longest of the others.
    To compare several kinds of caches, warm all of them up and then run their rounds in turns: the first steps of a
    process take two to three times as long.

    Args:
        factory: the kind of cache, and the model.
        point: the name of the contexts in the rows of results.
        lengths: tokens of each context.
        steps: steps of a round.
    """

    def __init__(self, factory: CacheFactory, point: str, lengths: list[int], steps: int) -> None:
        if steps < 4:
            raise ValueError(f"steps must be at least 4, not {steps}: the first are not counted")
        self.factory = factory
        self.row: dict[str, Any] = {"point": point, "cache": factory.name}
        self._lengths, self._steps = lengths, steps
        self._rounds: list[list[float]] = []
        self._cache: Any = None

    def warm_up(self) -> None:
        """Decodes once with a cache that is not used again, and measures the memory that it takes."""
        with self._failing(), self._used_cache() as cache:
            took = self._decode(cache)
            self.row |= self._times([took]) | self._memory(cache)

    def round(self) -> None:
        """Decodes once more, unless an earlier run has failed."""
        if "error" in self.row:
            return
        with self._failing(), self._used_cache(keep=True) as cache:
            self._rounds.append(self._decode(cache))
            self.row |= self._times(self._rounds)
            if isinstance(cache, VirtualCache):
                self.row["decode"] = str(cache.decode_stats())
                again = None if cache.decoder is None else cache.decoder.again()
                if again is not None:
                    # The replay of the last step alone, without the work of the host around it.
                    self.row["replay ms"] = _seconds(self._device.type, again)[0] * 1e3

    def close(self) -> None:
        """Closes the cache that the rounds share."""
        if isinstance(self._cache, VirtualCache):
            self._cache.close()
        self._cache = None

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.factory.model.device
        return device

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, ImportError) as error:
            self.close()
            self.row["error"] = str(error).splitlines()[0]

    @contextlib.contextmanager
    def _used_cache(self, *, keep: bool = False) -> Iterator[Any]:
        """Yields the cache that the round before has kept, so that nothing is compiled again, or else a new one."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        cache = self._cache or self.factory.make(len(self._lengths), max(self._lengths) + self._steps + 8)
        if isinstance(cache, VirtualCache):
            forward_of(self.factory.model).refused = None  # an earlier measurement may have set it
        try:
            yield cache
            if isinstance(cache, VirtualCache):
                cache.check()
        except BaseException:
            keep = False
            raise
        finally:
            if keep and (isinstance(cache, VirtualCache) or (self.factory.compiled and self._tokens_bytes() < _KEPT)):
                cache.reset()
                for kv_cache in getattr(cache, "kv_caches", []):
                    kv_cache.trim()
                self._cache = cache
            elif isinstance(cache, VirtualCache):
                cache.close()

    def _decode(self, cache: Any) -> list[float]:
        model, steps, lengths = self.factory.model, self._steps, self._lengths
        batch, longest = len(lengths), max(lengths)
        model.generation_config.disable_compile = not self.factory.compiled
        ids = torch.randint(1, model.config.get_text_config().vocab_size, (batch, longest + 1), device=self._device)
        padding = longest - torch.tensor(lengths, device=self._device)
        mask = (torch.arange(longest + 1, device=self._device) >= padding[:, None]).long()
        with torch.no_grad():
            _fill(cache, model, mask[:, :-1])
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the temporary memory of filling the cache is not that of decode steps
        clock = Clock()
        options = {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, CACHE_KEYWORD: cache}
        model.generate(ids, attention_mask=mask, stopping_criteria=StoppingCriteriaList([clock]), **options)
        return clock.steps()[max(2, steps // 4) :]

    def _times(self, rounds: list[list[float]]) -> dict[str, Any]:
        medians = [statistics.median(took) * 1e3 for took in rounds]
        means = [statistics.fmean(took) * 1e3 for took in rounds]
        return {
            "step ms p50": statistics.median(medians),
            "step ms least": min(medians),
            "step ms mean": statistics.median(means),
            "step ms max": statistics.median(max(took) * 1e3 for took in rounds),
            "tokens/s": len(self._lengths) / statistics.median(means) * 1e3,
            "rounds": len(rounds),
        }

    def _tokens_bytes(self) -> int:
        return sum(self._lengths) * _layout_of(self.factory.model).bytes_per_token

    def _memory(self, cache: Any) -> dict[str, Any]:
        """Returns the memory in use, and ``floor ms``: to read weights without the embedding, K and V at 3.0 TB/s."""
        model, text = self.factory.model, self.factory.model.config.get_text_config()
        size = model.dtype.itemsize
        layouts = [c.layout for c in cache.kv_caches] if isinstance(cache, VirtualCache) else [_layout_of(model)]
        token = sum(layout.bytes_per_token for layout in layouts)
        kv = sum(length + self._steps for length in self._lengths) * token
        weights = sum(parameter.numel() for parameter in model.parameters()) * size
        # A step reads only single rows of the embedding, unless the embedding also computes the logits.
        unread = 0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size * size
        floor = (weights - unread + kv) / BANDWIDTH
        row: dict[str, Any] = {"floor ms": floor * 1e3}
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info()
            row |= {
                "device used": total - free,
                "torch reserved": torch.cuda.max_memory_reserved(),
                # 1 GB of the memory in use is taken to be the CUDA context and the activations.
                "used over weights and tokens": (total - free - weights - 1e9) / kv,
            }
        if isinstance(cache, VirtualCache):
            row["kv physical"] = cache.stats().peak
        return row


def decode_speed(
    factories: list[CacheFactory], point: str, lengths: list[int], steps: int, rounds: int = 3
) -> list[dict[str, Any]]:
    """Returns a row for each factory: the median and the least of the median step times of the rounds, and the memory.

    Args:
        factories: from ``cache_factories``.
        point: the name of the contexts in the rows.
        lengths: tokens of each context.
        steps: steps of a round, see ``Decoding``.
        rounds: rounds of each factory, in turns, after all of them have been warmed up.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, not {rounds}")
    decodings = [Decoding(factory, point, lengths, steps) for factory in factories]
    for decoding in decodings:
        decoding.warm_up()
    return in_turns(decodings, rounds)


def in_turns(decodings: list[Decoding], rounds: int) -> list[dict[str, Any]]:
    """Runs the rounds of several warmed-up ``Decoding`` objects in turns, closes their caches and returns the rows."""
    for _ in range(rounds):
        for decoding in decodings:
            decoding.round()
    for decoding in decodings:
        decoding.close()
    return [decoding.row for decoding in decodings]
