"""Ctrl-C at any line of the methods that call the core: rows, slots and lengths are as before the call or after it."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import build, prompt, virtual_of
from serving import llm_of, model_of, prompts_of, tokens

import vattn
from vattn import CACHE_KEYWORD, KVCache, KVLayout
from vattn.engine.sampling_params import SamplingParams
from vattn.models.versions import VERSION

PACKAGE = str(Path(vattn.__file__).parent)
PAGE = 4096


def interrupted(call: Callable[[], Any], at: int, files: tuple[str, ...]) -> bool:
    """Calls a function, and interrupts it at one of the lines that it executes in some of vattn's files.

    Args:
        call: the function.
        at: the number of the line, counted in the order of execution from 0 on.
        files: the names of the files.

    Returns:
        Whether the call was interrupted; False if it executed fewer lines.
    """
    left = at
    entered: set[Any] = set()

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and Path(frame.f_code.co_filename).name in files and frame.f_code.co_name != "__del__":
            # Python handles no signal at a "try", nor between the end of a "with" block and the call of __exit__. That
            # call is traced as a second event at the line of the "with".
            line = frame.f_code.co_filename, frame.f_lineno
            text = linecache.getline(*line).strip()
            if text == "try:" or (text.startswith("with ") and (id(frame), line) in entered):
                return trace
            entered.add((id(frame), line))
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def write(sequence, n, value):
    start = sequence.length
    sequence.grow(n)
    sequence.k(0)[start:] = torch.arange(value + start, value + start + n)[:, None, None]


def values(sequence):
    return sequence.k(0)[:, 0, 0].long().tolist()


class World:
    """A cache with sequences that run, are swapped out, or are closed and have left a cached prefix."""

    def __init__(self, mapper: bool) -> None:
        layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=128, max_len=400, granularity=PAGE, dtype="float32")
        self.cache = KVCache(layout, slots=9, mapper=mapper, exportable=False)
        self.one, self.two, self.out = (self.cache.open() for _ in range(3))
        for sequence, n, value in ((self.one, 40, 0), (self.two, 20, 1000), (self.out, 30, 2000)):
            write(sequence, n, value)
        self.one.remember(range(40))
        self.out.swap_out()
        with self.cache.open() as known:
            write(known, 24, 3000)
            known.remember(range(100, 124))
        self.made: list[Any] = []

    def check(self) -> None:
        self.cache.check()
        mine = [self.one, self.two, self.out, *self.made]
        running = [s for s in mine if "closed" not in repr(s) and not s.swapped]
        assert self.cache.stats().running_slots == len(running)
        states = self.cache.map()
        for sequence in running:
            assert states[sequence.slot]["length"] == sequence.length
        for sequence, value in ((self.one, 0), (self.two, 1000), (self.out, 2000)):
            if "closed" in repr(sequence):
                continue
            if sequence.swapped:
                sequence.swap_in()
            n = min(sequence.length, 20)
            assert values(sequence)[:n] == list(range(value, value + n))
            # The sequence can still grow and be closed.
            length = sequence.length
            assert sequence.grow(3) == length + 3
            assert values(sequence)[:n] == list(range(value, value + n))
            sequence.close()
        for sequence in self.made:
            sequence.close()
        with self.cache.open(tokens=[*range(40), 7]) as again:
            assert values(again) == list(range(again.length))
        assert self.cache.stats().running_slots == 0
        self.cache.check()


OPERATIONS: dict[str, Callable[[World], Any]] = {
    "grow": lambda w: w.one.grow(5),
    "grow far": lambda w: w.two.grow(200),
    "grow_all": lambda w: w.cache.grow_all([w.one, w.two], 60, min_truncate_length=20),
    "grow_all to lengths": lambda w: w.cache.grow_all([w.one, w.two], [60, 70], min_truncate_length=20),
    "truncate": lambda w: w.one.truncate(30),
    "truncate_all": lambda w: w.cache.truncate_all([w.one, w.two], 20),
    "open": lambda w: w.made.append(w.cache.open(expected=30)),
    "open known tokens": lambda w: w.made.append(w.cache.open(tokens=[*range(100, 124), 5])),
    "open what runs": lambda w: w.made.append(w.cache.open(tokens=range(35))),
    "pin": lambda w: w.made.append(w.cache.pin(range(40))),
    "fork": lambda w: w.made.extend(w.one.fork(n=3)),
    "fork a part": lambda w: w.made.extend(w.one.fork(25, share="copy")),
    "remember": lambda w: w.two.remember(range(200, 220)),
    "remember anew": lambda w: w.one.remember([*range(10), *range(300, 320)]),
    "compact": lambda w: w.one.compact(forks=2),
    "swap_out": lambda w: w.two.swap_out(),
    "swap_in": lambda w: w.out.swap_in(),
    "close": lambda w: w.two.close(),
    "close and remember": lambda w: w.two.close(tokens=range(400, 420)),
    "close_all": lambda w: w.cache.close_all([w.one, w.two]),
    "copy_on_write": lambda w: w.cache.copy_on_write([w.one], 10),
    "prefetch": lambda w: w.one.prefetch(100),
    "trim": lambda w: w.cache.trim(),
    "set_budget": lambda w: w.cache.set_budget(1 << 22),
    "stats": lambda w: w.cache.stats(),
}


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("mapper", [False, True])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_interrupt_at_any_line(name, mapper):
    at = 0
    while True:
        world = World(mapper)
        cut = interrupted(
            lambda world=world: OPERATIONS[name](world),
            at,
            ("sequence.py", "kv_cache.py", "prefix_cache.py", "prefix_tree.py", "device.py"),
        )
        world.check()
        world.cache.close()
        if not cut:
            break
        at += 1
    assert at >= 1


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("kind", ["prompt", "chunk", "step"])
def test_an_interrupt_in_a_models_call(kind, device):
    """With a cache that is made with the model, an interrupted call can be repeated: all lengths are as before it.

    Where only the return of the result was left, the lengths are those after the call.
    """
    model = build("llama-gqa", "eager", device)
    ids = prompt(2, 30, device)["input_ids"]
    before, n = {"prompt": (0, 12), "chunk": (12, 5), "step": (12, 1)}[kind]
    with virtual_of(model, attention=None) as cache, torch.no_grad():
        for at in range(0, 400, 7):
            cache.reset()
            if before:
                model(ids[:, :before], **{CACHE_KEYWORD: cache}, use_cache=True)
            more = ids[:, before : before + n]
            files = ("cache.py", "store.py", "layer_views.py", "kv_cache.py", "sequence.py")
            cut = interrupted(lambda more=more: model(more, **{CACHE_KEYWORD: cache}, use_cache=True), at, files)
            if not cut:
                break
            cache.check()
            if set(cache._store.lengths) == {before + n}:  # only the return of the result was left
                continue
            assert set(cache._store.lengths) == {before}, at
            got = model(more, **{CACHE_KEYWORD: cache}, use_cache=True).logits
            torch.testing.assert_close(got, model(ids[:, : before + n]).logits[:, before:], rtol=1e-4, atol=1e-4)
        assert at > 30


@pytest.mark.usefixtures("small")
def test_an_interrupt_between_the_layers_of_a_configurations_cache_is_told(device, monkeypatch):
    model = build("llama-gqa", "eager", device)
    ids = prompt(2, 30, device)["input_ids"]
    with virtual_of(model.config) as cache, torch.no_grad():
        model(ids[:, :12], **{CACHE_KEYWORD: cache}, use_cache=True)

        def broken(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[2], "forward", broken)
            with pytest.raises(KeyboardInterrupt):
                model(ids[:, 12:13], **{CACHE_KEYWORD: cache}, use_cache=True)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"a call of the model ended halfway.*Call reset\(\)"):
                model(ids[:, 12:13], **{CACHE_KEYWORD: cache}, use_cache=True)
        cache.reset()
        got = model(ids[:, :13], **{CACHE_KEYWORD: cache}, use_cache=True).logits
        torch.testing.assert_close(got, model(ids[:, :13]).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough(1)
@pytest.mark.skipif(VERSION < (5, 17), reason="the engine needs transformers 5.17")
@pytest.mark.parametrize("file", ["table.py", "kv_memory.py", "scheduler.py", "launcher.py"])
def test_ctrl_c_in_an_engine_loses_no_request(file):
    """E9, at lines all over a call of ``generate``: it ends its requests, and the next one is answered as ever."""
    model = model_of("llama-gqa")
    prompts = prompts_of((20, 3))
    params = SamplingParams(temperature=0, max_tokens=6)
    with llm_of(model, max_num_batched_tokens=16) as llm:
        expected = tokens(llm.generate(prompts, params, use_tqdm=False))
        at = 0
        while interrupted(lambda: llm.generate(prompts, params, use_tqdm=False), at, (file,)):
            assert llm.engine.unfinished == 0, at
            assert tokens(llm.generate(prompts, params, use_tqdm=False)) == expected, at
            llm.engine.tier.cache.check()
            assert llm.reset_prefix_cache(), at
            at += 3 if file == "table.py" else 7
        assert at > 20
