"""Gives each public argument values of many types: a valid one works, any other raises an error that names it."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

import vattn
from vattn import BackendUnavailable, KVCache, KVLayout, LayerShape, VirtualCache
from vattn.hf import install

PAGE = 4096
VALUES: dict[str, Any] = {
    "none": None,
    "string": "3",
    "float": 2.5,
    "half": 0.5,
    "nan": math.nan,
    "negative": -1,
    "too large": 2**63,
    "endless": 10**5000,
    "bool": True,
    "list": [3],
    "nested list": [[3]],
    "tensor": torch.tensor(3),
    "float tensor": torch.tensor(1.5),
    "bool tensor": torch.tensor(True),
    "row tensor": torch.tensor([[3]]),
    "numpy": np.int64(3),
    "numpy float": np.float32(2.7),
    "numpy half": np.float32(0.5),
    "numpy bool": np.True_,
    "object": object(),
}
COUNT = {"tensor": 3, "row tensor": 3, "numpy": 3}
FLAG = {"bool": True}
NOTHING: dict[str, Any] = {"none": None}
TOKENS = {"list": (3,), "nested list": (3,), "row tensor": (3,)}
BUDGET = {**NOTHING, **COUNT, "half": 0.5, "numpy half": 0.5}
ANYTHING = object()  # the value is valid, and the result is not compared further


def layout(**options: Any) -> KVLayout:
    given = {"layers": 1, "kv_heads": 1, "head_dim": 8, "max_len": 100, "granularity": PAGE, "dtype": "float32"}
    return KVLayout.uniform(**{**given, **options})


def small(**options: Any) -> KVCache:
    return KVCache(options.pop("layout", None) or layout(), **{"slots": 4, "budget": 100 * PAGE, **options})


def made(**options: Any) -> object:
    small(**options).close()
    return ANYTHING


class Case:
    """One public argument of a class or function.

    Args:
        what: the class or function.
        argument: the name of the argument.
        give: calls it with a value, and returns what the value was taken for.
        right: the keys of ``VALUES`` that are valid, and what ``give`` returns for them.
    """

    def __init__(self, what: str, argument: str, give: Callable[[Any], Any], right: dict[str, Any]) -> None:
        self.what, self.argument, self.give, self.right = what, argument, give, right

    def __str__(self) -> str:
        return f"{self.what}-{self.argument}"


CASES: list[Case] = []


def case(what: str, argument: str, right: dict[str, Any]) -> Callable[[Callable[[Any], Any]], Any]:
    def add(give: Callable[[Any], Any]) -> Callable[[Any], Any]:
        CASES.append(Case(what, argument, give, right))
        return give

    return add


def of_cache(method: str, argument: str, right: dict[str, Any], *, length: int = 10, **others: Any) -> None:
    """Adds a case for a method of a ``Sequence``, whose length and memory an error must leave unchanged.

    Args:
        method: the name of the method.
        argument: the name of its argument.
        right: as in ``Case``.
        length: positions of the sequence.
        others: further arguments of the method.
    """

    def give(value: Any) -> Any:
        with small() as cache:
            sequence = cache.open()
            sequence.grow(length)
            cache.wait_idle()
            before = sequence.length, cache.stats().running_slots, cache.map()[sequence.slot]
            try:
                getattr(sequence, method)(**{argument: value, **others})
            except Exception:
                after = sequence.length, cache.stats().running_slots, cache.map()[sequence.slot]
                assert before == after
                raise
            finally:
                cache.check()
            lengths = {type(sequence.length), int}
            assert lengths == {int}
            return ANYTHING

    CASES.append(Case(f"Sequence.{method}", argument, give, right))


for name in ("slots", "growth_divisor", "tail_rows", "capacity"):
    CASES.append(
        Case(
            "KVCache", name, lambda value, name=name: small(**{name: value, "budget": None}).close() or ANYTHING, COUNT
        )
    )
for name in ("lookahead", "alias_limit", "host_budget"):
    CASES.append(Case("KVCache", name, lambda value, name=name: made(**{name: value}), {**COUNT, **NOTHING}))
for name in ("mapper", "exportable", "protect_shared"):
    CASES.append(Case("KVCache", name, lambda value, name=name: made(**{name: value}), FLAG))


@case("KVCache", "layout", {})
def _(value: Any) -> None:
    KVCache(value, slots=1)


@case("KVCache", "device", {})
def _(value: Any) -> None:
    KVCache(layout(), slots=1, device=value)


@case("KVCache", "budget", {label: value for label, value in BUDGET.items() if value != 3})
def _(value: Any) -> None:
    with small(budget=value, capacity=100 * PAGE) as cache:
        found = cache.stats().budget
        return None if found is None else found / (100 * PAGE)


@case("KVCache.set_budget", "budget", {label: value for label, value in BUDGET.items() if value != 3})
def _(value: Any) -> Any:
    with small(capacity=100 * PAGE) as cache:
        cache.set_budget(value)
        found = cache.stats().budget
        return None if found is None else found / (100 * PAGE)


for method in ("k", "v", "slot_tensors"):

    @case(f"KVCache.{method}", "layer", COUNT)
    def _(value: Any, method: str = method) -> Any:
        with small(layout=layout(layers=4)) as cache:
            getattr(cache, method)(value)
            return 3


@case("KVCache.grouped", "group", {})
def _(value: Any) -> None:
    with small() as cache:
        cache.grouped(value)


@case("KVCache.open", "slot", {**COUNT, **NOTHING})
def _(value: Any) -> Any:
    with small() as cache:
        slot = cache.open(slot=value).slot
        return None if value is None else slot


@case("KVCache.open", "expected", COUNT)
def _(value: Any) -> Any:
    with small() as cache:
        cache.open(expected=value)
        return ANYTHING


for method in ("open", "pin"):

    @case(f"KVCache.{method}", "namespace", dict.fromkeys(set(VALUES) - {"list", "nested list"}, ANYTHING))
    def _(value: Any, method: str = method) -> Any:
        with small() as cache:
            known = cache.open(namespace=value)
            known.grow(5)
            known.remember([1, 2, 3, 4, 5])
            sequence = getattr(cache, method)(tokens=[1, 2, 3, 4, 5], namespace=value)
            assert sequence.length == (5 if method == "pin" else 4)
            return ANYTHING


@case("KVCache.open", "tokens", {**TOKENS, **NOTHING})
def _(value: Any) -> Any:
    with small() as cache:
        cache.open(tokens=value)
        return ANYTHING


@case("KVCache.pin", "tokens", TOKENS)
def _(value: Any) -> Any:
    with small() as cache:
        known = cache.open()
        known.grow(1)
        known.close(tokens=[3])
        assert cache.pin(value).length == 1
        return ANYTHING


@case("KVCache.import_sequence", "timeout", {})
def _(value: Any) -> Any:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, small() as cache:
        try:
            cache.import_sequence(ours, timeout=value)
        except vattn.Error as error:  # the other end is closed
            assert isinstance(value, (int, float))
            raise ValueError("timeout") from error


@case("KVCache.import_sequence", "of", {})
def _(value: Any) -> Any:
    with small() as cache:
        cache.import_sequence(value)


@case("KVCache.free_slots", "n", dict.fromkeys(COUNT, 1))
def _(value: Any) -> Any:
    with small() as cache:
        return cache.free_slots(value)


@case("KVCache.free_slots_from", "slot", dict.fromkeys(COUNT, 1))
def _(value: Any) -> Any:
    with small() as cache:
        return cache.free_slots_from(value)


for name in ("length", "min_truncate_length"):

    @case("KVCache.grow_all", name, {**COUNT, "list": 3})
    def _(value: Any, name: str = name) -> Any:
        with small() as cache:
            sequence = cache.open()
            sequence.grow(3)
            cache.grow_all([sequence], **{"length": 3, "min_truncate_length": 0, name: value})
            assert type(sequence.length) is int
            return sequence.length


@case("KVCache.truncate_all", "length", COUNT)
def _(value: Any) -> Any:
    with small() as cache:
        sequence = cache.open()
        sequence.grow(10)
        cache.truncate_all([sequence], value)
        assert type(sequence.length) is int
        return sequence.length


@case("KVCache.fork_all", "length", COUNT)
def _(value: Any) -> Any:
    with small() as cache:
        sequence, other = cache.open(), cache.open()
        sequence.grow(10)
        cache.fork_all(sequence, [other], value)
        return other.length


for method, others in (
    ("grow_all", {"length": 1, "min_truncate_length": 0}),
    ("truncate_all", {"length": 0}),
    ("copy_on_write", {"length": 0}),
    ("close_all", {}),
):

    @case(f"KVCache.{method}", "sequences", {})
    def _(value: Any, method: str = method, others: dict[str, int] = others) -> None:
        with small() as cache:
            getattr(cache, method)(value, **others)


@case("KVCache.fork_all", "targets", {})
def _(value: Any) -> None:
    with small() as cache:
        cache.fork_all(cache.open(), value, 0)


of_cache("grow", "n", dict.fromkeys(COUNT, ANYTHING))
of_cache("prefetch", "length", dict.fromkeys(COUNT, ANYTHING))
of_cache("truncate", "length", dict.fromkeys(COUNT, ANYTHING))
of_cache("fork", "length", dict.fromkeys({**COUNT, **NOTHING}, ANYTHING))
of_cache("fork", "n", dict.fromkeys(COUNT, ANYTHING))
of_cache("fork", "share", {})
of_cache("remember", "tokens", dict.fromkeys(TOKENS, ANYTHING))
of_cache("close", "tokens", dict.fromkeys({**TOKENS, **NOTHING}, ANYTHING))
of_cache("record_stream", "stream", {})
of_cache("compact", "length", dict.fromkeys({**COUNT, **NOTHING}, ANYTHING))
of_cache("compact", "forks", dict.fromkeys(COUNT, ANYTHING))
of_cache("k", "layer", {})
of_cache("v", "layer", {})


@case("Sequence.swap_in", "slot", {**COUNT, **NOTHING})
def _(value: Any) -> Any:
    with small() as cache:
        sequence = cache.open()
        sequence.grow(10)
        sequence.swap_out()
        try:
            sequence.swap_in(slot=value)
        except Exception:
            assert sequence.swapped
            assert sequence.length == 10
            raise
        return None if value is None else sequence.slot


@case("Sequence.export", "timeout", {})
def _(value: Any) -> Any:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, small(exportable=True) as cache:
        try:
            cache.open().export(ours, timeout=value)
        except vattn.Error as error:
            assert isinstance(value, (int, float))
            raise ValueError("timeout") from error


@case("Sequence.export", "to", {})
def _(value: Any) -> Any:
    with small(exportable=True) as cache:
        cache.open().export(value)


for name in ("kv_heads", "head_dim", "window"):
    given = {"kv_heads": 1, "head_dim": 8}
    CASES.append(
        Case(
            "LayerShape",
            name,
            lambda value, name=name, given=given: getattr(LayerShape(**{**given, name: value}), name),
            {**COUNT, **NOTHING} if name == "window" else COUNT,
        )
    )
for name in ("layers", "kv_heads", "head_dim", "max_len", "granularity"):
    CASES.append(Case("KVLayout.uniform", name, lambda value, name=name: layout(**{name: value}) and ANYTHING, COUNT))
for name in ("dtype", "kind"):
    CASES.append(Case("KVLayout.uniform", name, lambda value, name=name: layout(**{name: value}), {}))
for name in ("used_bytes", "mapped_bytes", "waste", "static_waste"):
    CASES.append(
        Case(f"KVLayout.{name}", "length", lambda value, name=name: getattr(layout(), name)(value) and ANYTHING, COUNT)
    )


@case("KVLayout", "layers", {})
def _(value: Any) -> None:
    KVLayout(value, max_len=3)


@case("KVLayout", "recurrent", FLAG)
def _(value: Any) -> Any:
    return KVLayout([LayerShape(kv_heads=1, head_dim=8)], max_len=3, recurrent=value).recurrent


@case("KVLayout.from_config", "config", {})
def _(value: Any) -> None:
    KVLayout.from_config(value, max_len=3)


CONFIG = LlamaConfig(
    num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64
)
MAKES: dict[str, Callable[..., Any]] = {
    "VirtualCache": lambda **options: VirtualCache(CONFIG, **{"max_len": 10, **options}),
    "KVCache.from_config": lambda **options: KVCache.from_config(CONFIG, **{"max_len": 10, "slots": 2, **options}),
}


def of_make(make: str, argument: str, right: dict[str, Any]) -> None:
    def give(value: Any) -> Any:
        MAKES[make](**{argument: value}).close()
        return ANYTHING

    CASES.append(Case(make, argument, give, dict.fromkeys(right, ANYTHING)))


for make in MAKES:
    of_make(make, "max_len", {**COUNT, **NOTHING} if make == "VirtualCache" else COUNT)
    of_make(make, "lookahead", {**COUNT, **NOTHING})
    of_make(make, "mapper", FLAG)
    of_make(make, "layout", {})
    of_make(make, "dtype", NOTHING)
of_make("KVCache.from_config", "slots", COUNT)
of_make("VirtualCache", "slots", {**COUNT, **NOTHING})
of_make("VirtualCache", "device", NOTHING)
of_make("VirtualCache", "budget", BUDGET)
of_make("VirtualCache", "attention", NOTHING)
of_make("VirtualCache", "capture", FLAG)
of_make("VirtualCache", "compiled", FLAG)
of_make("VirtualCache", "run_ahead", FLAG)
of_make("VirtualCache", "kv_dtype", NOTHING)
of_make("VirtualCache", "kv_scales", NOTHING)


@case("VirtualCache", "config", dict.fromkeys(NOTHING, ANYTHING))
def _(value: Any) -> Any:
    VirtualCache(value, max_len=3).close()
    return ANYTHING


@case("install", "max_len", dict.fromkeys(COUNT, ANYTHING))
def _(value: Any) -> Any:
    with install(max_len=value):
        return ANYTHING


@pytest.mark.parametrize("label", VALUES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_argument(case: Case, label: str) -> None:
    value = VALUES[label]
    if label in case.right:
        got, expected = case.give(value), case.right[label]
        assert (
            got is ANYTHING
            or expected is ANYTHING
            or got is expected is None
            or (type(got), got) == (type(expected), expected)
        )
        return
    with pytest.raises((TypeError, ValueError, BackendUnavailable)) as caught:
        case.give(value)
    message = str(caught.value)
    assert case.argument in message
    assert "incompatible function arguments" not in message  # pybind11's signatures say nothing to a user
    assert len(message) < 300


def test_counts_are_not_kept_as_what_they_were_given() -> None:
    with small() as cache:
        sequence, count = cache.open(), torch.tensor(50)
        sequence.grow(60)
        sequence.truncate(count)
        [fork] = sequence.fork(count)
        cache.grow_all([fork], count, min_truncate_length=count)
        count.add_(7)
        assert (sequence.length, fork.length) == (50, 50)
        assert type(sequence.length) is type(fork.length) is int


def test_a_sequence_is_named_once() -> None:
    with small() as cache:
        sequence, other = cache.open(), cache.open()
        for call in (
            lambda: cache.grow_all([sequence, other, sequence], 5, min_truncate_length=0),
            lambda: cache.truncate_all([sequence, sequence], 0),
            lambda: cache.copy_on_write([sequence, sequence], 0),
            lambda: cache.fork_all(other, [sequence, sequence], 0),
        ):
            with pytest.raises(ValueError, match=r"(sequences|targets) holds a sequence twice"):
                call()
        assert (sequence.length, other.length) == (0, 0)


@pytest.mark.parametrize("large", [2**40, 2**62, 2**63 - 1])
def test_large_counts_do_not_wrap_around(large: int) -> None:
    """No sum or product with a large argument overflows to a small number."""
    with small() as cache:
        sequence = cache.open()
        sequence.grow(10)
        for call in (
            lambda: sequence.grow(large),
            lambda: sequence.prefetch(large),
            lambda: sequence.truncate(large),
            lambda: sequence.fork(large),
            lambda: sequence.fork(n=large),
            lambda: sequence.compact(large),
            lambda: sequence.compact(forks=large),
            lambda: cache.open(slot=large),
            lambda: cache.grow_all([sequence], large, min_truncate_length=0),
            lambda: small(slots=large),
            lambda: KVCache(layout(max_len=large), slots=4),
            lambda: KVCache(layout(layers=2, kv_heads=large), slots=4),
            lambda: KVCache(layout(granularity=large), slots=4).open().grow(1),
            lambda: small(layout=layout(max_len=2**20), slots=large),
        ):
            with pytest.raises((ValueError, vattn.Error)):
                call()
        assert sequence.length == 10
        assert cache.open(expected=large).length == 0
        with small(growth_divisor=large, tail_rows=0, lookahead=large, alias_limit=large, host_budget=large) as other:
            one = other.open()
            one.grow(20)
            [fork] = one.fork()
            fork.swap_out()
            fork.swap_in()
            assert fork.length == 20
            other.check()
        cache.check()
    with pytest.raises((ValueError, vattn.Error)):
        small(tail_rows=large).open().grow(1)
