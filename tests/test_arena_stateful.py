"""Compares the arena with a model made of dicts, under random operations and driver faults.

Lengths, contents, addresses, cached prefixes and the budget must agree after every operation.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vattn import BudgetExceeded, DriverError, _core

ROWS = 4  # rows of a plane in a granule
SLOTS = 6
MAX_LEN = 64
WINDOW = 6
CAPACITY = 60  # granules


# Draws must not depend on the state of the arena, which may depend on the timing of the mapper. So rules draw indices.
INDEX = st.integers(0, 63)


def pick(slots: dict[int, object], index: int) -> int | None:
    return sorted(slots)[index % len(slots)] if slots else None


class ArenaMachine(RuleBasedStateMachine):
    on_gpu = False

    @initialize(
        budget=st.integers(4, 60),
        divisor=st.sampled_from([1, 4, 32]),
        tail_rows=st.sampled_from([0, 3]),
        lookahead=st.sampled_from([None, 0, 5]),
        protect_shared=st.booleans(),
        alias_limit=st.sampled_from([None, 20]),
    )
    def start(
        self,
        budget: int,
        divisor: int,
        tail_rows: int,
        lookahead: int | None,
        protect_shared: bool,
        alias_limit: int | None,
    ) -> None:
        self.driver = _core.cuda_driver(0) if self.on_gpu else _core.host_driver(4096, capacity=CAPACITY * 4096)
        self.page = self.driver.granularity
        row = self.page // ROWS
        self.arena = _core.Arena(
            self.driver,
            [(row, 0), (row, WINDOW)],
            slots=SLOTS,
            max_len=MAX_LEN,
            budget=budget * self.page,
            growth_divisor=divisor,
            tail_rows=tail_rows,
            lookahead=lookahead,
            mapper=_core.Mapper() if lookahead is not None else None,
            protect_shared=protect_shared,
            alias_limit=alias_limit,
        )
        self.planes = []
        for plane in range(2):
            stride = self.arena.slot_stride(plane)
            capsule = self.arena.dlpack(
                self.arena.plane_offset(plane), [SLOTS, MAX_LEN, 2], [stride // 8, row // 8, 1], 8
            )
            self.planes.append(torch.utils.dlpack.from_dlpack(capsule))
        self.addresses = [plane.data_ptr() for plane in self.planes]
        self.written: dict[int, list[int]] = {}  # slot -> what each of its rows holds
        self.kept: dict[int, int] = {}  # slot -> the first position that planes with a window must still have
        self.known: dict[
            int, tuple[int, list[int], int]
        ] = {}  # parked slot -> generation, what its rows hold, and its ``kept``
        self.swapped: list[tuple[_core.Swapped, list[int], int]] = []  # with what the rows hold, and ``kept``
        self.next_value = 1

    def attempt(self, operation) -> bool:
        """Runs an operation, and returns whether it succeeded.

        It may fail for want of memory or by a fault of the driver. Then it must have changed nothing.
        """
        try:
            operation()
        except (DriverError, BudgetExceeded):
            return False
        return True

    @rule(slot=st.integers(0, SLOTS - 1), by=st.integers(0, 30))
    def acquire(self, slot: int, by: int) -> None:
        if slot not in self.written and self.attempt(lambda: self.arena.acquire(slot)):
            self.begin(slot)
            self.grow_to([slot], by)

    def begin(self, slot: int) -> None:
        self.written[slot], self.kept[slot] = [], 0
        self.known.pop(slot, None)

    @rule(expected=st.integers(0, MAX_LEN), by=st.integers(0, 30))
    def acquire_any(self, expected: int, by: int) -> None:
        if len(self.written) == SLOTS:
            return
        chosen: list[int] = []
        if self.attempt(lambda: chosen.append(self.arena.acquire(expected=expected))):
            assert chosen[0] not in self.written
            self.begin(chosen[0])
            self.grow_to(chosen, by)

    @rule(indices=st.lists(INDEX, min_size=1, max_size=SLOTS), by=st.integers(0, 20))
    def grow(self, indices: list[int], by: int) -> None:
        if not self.written:
            return
        slots = list(dict.fromkeys(pick(self.written, index) for index in indices))
        self.grow_to(slots, min(max(len(self.written[slot]) for slot in slots) + by, MAX_LEN))

    def grow_to(self, slots: list[int], goal: int) -> None:
        lengths = [len(self.written[slot]) for slot in slots]
        keep = min(lengths)
        for slot in slots:
            self.kept[slot] = max(self.kept[slot], keep - WINDOW + 1)
        if not self.attempt(lambda: self.arena.grow(slots, goal, keep)):
            return
        for slot in slots:
            rows = self.written[slot]
            for position in range(len(rows), goal):
                for plane in self.planes:
                    plane[slot, position] = self.next_value
                rows.append(self.next_value)
                self.next_value += 1

    @rule(index=INDEX, fraction=st.floats(0, 1))
    def truncate(self, index: int, fraction: float) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        rows = self.written[slot]
        length = int(len(rows) * fraction)
        if 0 < length < len(rows) and length - WINDOW + 1 < self.kept[slot]:
            return  # a window may have moved past this length
        if self.attempt(lambda: self.arena.truncate([slot], length)):
            del rows[length:]
            if length == 0:
                self.kept[slot] = 0

    @rule(
        index=INDEX,
        fraction=st.floats(0, 1),
        share=st.sampled_from(["auto", "alias", "copy"]),
        parked=st.booleans(),
        more=st.sampled_from([None, 0, 5, 30]),
    )
    def fork(self, index: int, fraction: float, share: str, parked: bool, more: int | None) -> None:
        if parked and self.known:
            source = pick(self.known, index)
            generation, rows, kept = self.known[source]
        elif self.written:
            source = pick(self.written, index)
            generation, rows, kept = None, self.written[source], self.kept[source]
        else:
            return
        length = int(len(rows) * fraction)
        if length == len(rows) or length - WINDOW + 1 >= kept:  # else a window may have moved past this length
            self.fork_into_new(source, generation, length, rows, kept, share, more)

    def fork_into_new(
        self, source: int, generation: int | None, length: int, rows: list[int], kept: int, share: str, more: int | None
    ) -> None:
        if len(self.written.keys() | {source}) == SLOTS:
            return
        chosen: list[int] = []
        expected = 0 if more is None else length + more
        like = {"expected": expected, "empty": not expected, "like": source, "positions": length}
        if not self.attempt(lambda: chosen.append(self.arena.acquire(**like))):
            return
        [target] = chosen
        self.begin(target)
        if target == source:
            return
        done: list[bool] = []
        if self.attempt(
            lambda: done.append(self.arena.fork(source, length, [target], generation=generation, share=share))
        ) and (done[0] or generation is None):
            assert done[0]
            self.written[target], self.kept[target] = rows[:length], kept

    @rule(index=INDEX, fraction=st.floats(0, 1), swapped=st.booleans())
    def come_back(self, index: int, fraction: float, swapped: bool) -> None:
        if swapped and self.swapped and len(self.written) < SLOTS:
            position = index % len(self.swapped)
            sequence, rows, kept = self.swapped[position]
            slots: list[int] = []
            if self.attempt(lambda: slots.append(self.arena.swap_in(sequence))):
                del self.swapped[position]
                self.begin(slots[0])
                self.written[slots[0]], self.kept[slots[0]] = rows, kept
            else:  # a slot was acquired and released again, which may have ended its cached prefix
                self.known = {
                    slot: found for slot, found in self.known.items() if self.arena.cached_prefix(slot)[0] == found[0]
                }
        elif self.known:
            slot = pick(self.known, index)
            generation, rows, kept = self.known[slot]
            length = int(len(rows) * fraction)
            done: list[bool] = []
            if self.attempt(lambda: done.append(self.arena.resume(slot, generation, length))) and done[0]:
                del self.known[slot]
                self.written[slot], self.kept[slot] = rows[:length], kept

    @rule(index=INDEX, fraction=st.floats(0, 1), parked=st.booleans())
    def compact(self, index: int, fraction: float, parked: bool) -> None:
        if parked and self.known:
            slot = pick(self.known, index)
            generation, rows, _ = self.known[slot]
            self.arena.compact_later(slot, generation, int(len(rows) * fraction))
        elif self.written:
            slot = pick(self.written, index)
            self.attempt(lambda: self.arena.compact(slot, int(len(self.written[slot]) * fraction)))

    @rule(index=INDEX)
    def forget(self, index: int) -> None:
        if (slot := pick(self.known, index)) is not None:
            self.arena.forget(slot, self.known.pop(slot)[0])

    @rule(index=INDEX, how=st.sampled_from(["release", "commit", "publish half", "swap"]))
    def let_go(self, index: int, how: str) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        rows, kept = self.written[slot], self.kept[slot]
        if how == "swap":
            gone: list[_core.Swapped] = []
            if self.attempt(lambda: gone.append(self.arena.swap_out(slot))):
                self.swapped.append((gone[0], self.written.pop(slot), kept))
            return
        known = rows[: {"release": 0, "commit": len(rows), "publish half": len(rows) // 2}[how]]
        generation = self.arena.commit(slot, len(known))[0]
        if self.attempt(lambda: self.arena.release([slot])):
            del self.written[slot]
            if known:
                self.known[slot] = generation, known, kept
        else:
            self.arena.commit(slot, 0)

    @rule(index=INDEX)
    def drop_swapped(self, index: int) -> None:
        if self.swapped:
            del self.swapped[index % len(self.swapped)]

    @rule(index=INDEX, positions=st.integers(0, MAX_LEN))
    def prefetch(self, index: int, positions: int) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        self.attempt(lambda: self.arena.prefetch(slot, positions))

    @rule(budget=st.integers(4, 60))
    def set_budget(self, budget: int) -> None:
        if self.attempt(lambda: self.arena.set_budget(budget * self.page)):
            assert self.arena.stats()["budget"] == budget * self.page
            assert self.arena.stats()["physical"] <= budget * self.page

    @rule()
    def trim(self) -> None:
        self.attempt(self.arena.trim)

    @rule(k=st.integers(1, 12), times=st.sampled_from([1, 1, 1, 3]), out_of_memory=st.booleans())
    def break_soon(self, k: int, times: int, out_of_memory: bool) -> None:
        self.driver.fail_at(k, times=times, out_of_memory=out_of_memory)

    @rule()
    def heal(self) -> None:
        self.driver.fail_at(0)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.arena.wait_idle()
        self.arena.check()
        slots = self.arena.map()
        assert {i for i, slot in enumerate(slots) if slot["state"] == "running"} == set(self.written)
        assert [plane.data_ptr() for plane in self.planes] == self.addresses
        for slot, (generation, rows, _) in list(self.known.items()):
            now, positions, parked = self.arena.cached_prefix(slot)
            assert now == generation
            assert slots[slot]["state"] == "parked" if positions else slots[slot]["state"] != "running"
            # Memory is reclaimed from the end of a slot on.
            del rows[positions:]
            if not rows or not parked:
                del self.known[slot]
                continue
            assert torch.equal(self.planes[0][slot, :positions, 0].cpu(), torch.tensor(rows))
        for slot, rows in self.written.items():
            assert slots[slot]["length"] == len(rows)
            expected = torch.tensor(rows, dtype=torch.int64).reshape(-1, 1).expand(-1, 2)
            assert torch.equal(self.planes[0][slot, : len(rows)].cpu(), expected)
            first = max(len(rows) - WINDOW + 1, 0)
            assert torch.equal(self.planes[1][slot, first : len(rows)].cpu(), expected[first:])

    def teardown(self) -> None:
        if not hasattr(self, "arena"):
            return
        self.driver.fail_at(0)
        self.arena.close()
        self.arena.check()
        self.swapped.clear()
        if not self.on_gpu:
            assert self.driver.memory_info()[0] == CAPACITY * self.page


class CudaArenaMachine(ArenaMachine):
    on_gpu = True


ArenaMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=50,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestArena = ArenaMachine.TestCase

CudaArenaMachine.TestCase.settings = settings(ArenaMachine.TestCase.settings, max_examples=40)
TestArenaOnCuda = pytest.mark.gpu(CudaArenaMachine.TestCase)


# By operation: its relative frequency, and what its arguments are drawn from.
OPERATIONS = {
    "acquire": (3, {"slot": (0, SLOTS - 1), "by": (0, 30)}),
    "acquire_any": (3, {"expected": (0, MAX_LEN), "by": (0, 30)}),
    "grow": (12, {"indices": [(0, 63)], "by": (0, 20)}),
    "truncate": (6, {"index": (0, 63), "fraction": 1.0}),
    "fork": (
        12,
        {
            "index": (0, 63),
            "fraction": 1.0,
            "share": ("auto", "alias", "copy"),
            "parked": (False, True),
            "more": (None, 0, 5, 30),
        },
    ),
    "come_back": (8, {"index": (0, 63), "fraction": 1.0, "swapped": (False, True)}),
    "compact": (4, {"index": (0, 63), "fraction": 1.0, "parked": (False, True)}),
    "forget": (1, {"index": (0, 63)}),
    "let_go": (12, {"index": (0, 63), "how": ("release", "commit", "publish half", "swap")}),
    "drop_swapped": (1, {"index": (0, 63)}),
    "prefetch": (3, {"index": (0, 63), "positions": (0, MAX_LEN)}),
    "set_budget": (1, {"budget": (4, 60)}),
    "trim": (1, {}),
    "break_soon": (3, {"k": (1, 12), "times": (1, 1, 1, 3), "out_of_memory": (False, True)}),
    "heal": (2, {}),
}


def run_at_random(machine: ArenaMachine, steps: int, seed: int) -> Counter[str]:
    """Runs ``steps`` random operations.

    Returns:
        How often each operation changed which sequences there are, or their lengths.
    """
    source = random.Random(seed)

    def drawn(how: object) -> object:
        if isinstance(how, list):
            return [drawn(how[0]) for _ in range(source.randint(1, 3))]
        if isinstance(how, float):
            return source.choice([0.0, how, how, source.random()])
        if isinstance(how, tuple) and len(how) == 2 and type(how[0]) is int:
            return source.randint(*how)
        return source.choice(how)

    def state() -> list[object]:
        return [
            {slot: len(rows) for slot, rows in machine.written.items()},
            {slot: len(rows) for slot, (_, rows, _) in machine.known.items()},
            len(machine.swapped),
        ]

    names, weights = list(OPERATIONS), [weight for weight, _ in OPERATIONS.values()]
    changed: Counter[str] = Counter()
    for _ in range(steps):
        name = source.choices(names, weights)[0]
        before = state()
        getattr(machine, name)(**{key: drawn(how) for key, how in OPERATIONS[name][1].items()})
        machine.agrees()
        changed[name] += before != state()
    return changed


@pytest.mark.thorough(1)
@pytest.mark.parametrize("on_gpu", [False, pytest.param(True, marks=pytest.mark.gpu)], ids=["cpu", "cuda"])
@pytest.mark.parametrize("lookahead", [None, 0, 5])
@pytest.mark.parametrize("protect_shared", [False, True])
def test_ten_thousand_random_operations(lookahead, protect_shared, on_gpu):
    steps = 1000 if on_gpu else 10_000
    changed: Counter[str] = Counter()
    for seed in range(4):
        machine = (CudaArenaMachine if on_gpu else ArenaMachine)()
        machine.start(
            budget=[50, 25][seed % 2],
            divisor=4,
            tail_rows=[0, 3][seed // 2],
            lookahead=lookahead,
            protect_shared=protect_shared,
            alias_limit=None,
        )
        changed += run_at_random(machine, steps // 4, seed)
        machine.teardown()
    assert all(changed[name] >= steps // 100 for name in ("grow", "truncate", "fork", "come_back", "let_go")), changed
