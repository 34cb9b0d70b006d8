"""The arena against a dict, in any order of operations, with faults: lengths, contents, budget and counts agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from vattn import DriverError, OutOfPages, _core

ROWS = 4  # a granule
SLOTS = 4
MAX_LEN = 64
WINDOW = 6
CAPACITY = 60  # granules


INDEX = st.integers(0, 63)  # what is drawn must not depend on what happened: a mapper's timing may


def pick(slots: dict[int, object], index: int) -> int | None:
    return sorted(slots)[index % len(slots)] if slots else None


class ArenaMachine(RuleBasedStateMachine):
    on_gpu = False

    @initialize(
        budget=st.integers(2, 50),
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
        self.kept: dict[int, int] = {}  # slot -> the first position that a truncated window may still need
        self.known: dict[int, tuple[int, list[int], int]] = {}  # parked slot -> lineage, rows, what is kept of windows
        self.swapped: list[tuple[_core.Swapped, list[int], int]] = []  # and their rows, and what is kept of windows
        self.next_value = 1

    def attempt(self, operation) -> bool:
        """Whether the operation succeeded; it fails in the ways it may, and then has changed nothing."""
        try:
            operation()
        except (DriverError, OutOfPages):
            return False
        return True

    @rule(slot=st.integers(0, SLOTS - 1))
    def acquire(self, slot: int) -> None:
        if slot not in self.written and self.attempt(lambda: self.arena.acquire(slot)):
            self.begin(slot)

    def begin(self, slot: int) -> None:
        self.written[slot], self.kept[slot] = [], 0
        self.known.pop(slot, None)

    @rule(expected=st.integers(0, MAX_LEN))
    def acquire_any(self, expected: int) -> None:
        if len(self.written) == SLOTS:
            return
        chosen: list[int] = []
        if self.attempt(lambda: chosen.append(self.arena.acquire(expected=expected))):
            assert chosen[0] not in self.written
            self.begin(chosen[0])

    @rule(indices=st.lists(INDEX, min_size=1, max_size=SLOTS), by=st.integers(0, 20))
    def grow(self, indices: list[int], by: int) -> None:
        if not self.written:
            return
        slots = list(dict.fromkeys(pick(self.written, index) for index in indices))
        lengths = [len(self.written[slot]) for slot in slots]
        goal = min(max(lengths) + by, MAX_LEN)
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
            return  # a window may have passed
        if self.attempt(lambda: self.arena.truncate([slot], length)):
            del rows[length:]
            if length == 0:
                self.kept[slot] = 0

    @rule(index=INDEX, fraction=st.floats(0, 1), share=st.sampled_from(["auto", "alias", "copy"]))
    def fork(self, index: int, fraction: float, share: str) -> None:
        if (source := pick(self.written, index)) is None:
            return
        rows = self.written[source]
        length = int(len(rows) * fraction)
        if length < len(rows) and length - WINDOW + 1 < self.kept[source]:
            return  # a window may have passed
        self.fork_into_new(source, None, length, rows, self.kept[source], share)

    @rule(index=INDEX, fraction=st.floats(0, 1), share=st.sampled_from(["auto", "alias", "copy"]))
    def fork_from_known(self, index: int, fraction: float, share: str) -> None:
        if (source := pick(self.known, index)) is None:
            return
        lineage, rows, kept = self.known[source]
        length = int(len(rows) * fraction)
        if length - WINDOW + 1 >= kept or length == len(rows):
            self.fork_into_new(source, lineage, length, rows, kept, share)

    def fork_into_new(
        self, source: int, lineage: int | None, length: int, rows: list[int], kept: int, share: str
    ) -> None:
        if len(self.written.keys() | {source}) == SLOTS:
            return
        target = min(
            (slot for slot in range(SLOTS) if slot not in self.written and slot != source),
            key=self.known.__contains__,
        )
        if not self.attempt(lambda: self.arena.acquire(target, empty=True)):
            return
        self.begin(target)
        done: list[bool] = []
        if self.attempt(
            lambda: done.append(self.arena.fork(source, length, [target], lineage=lineage, share=share))
        ) and (done[0] or lineage is None):
            assert done[0]
            self.written[target], self.kept[target] = rows[:length], kept

    @rule(index=INDEX, fraction=st.floats(0, 1))
    def resume(self, index: int, fraction: float) -> None:
        if (slot := pick(self.known, index)) is None:
            return
        lineage, rows, kept = self.known[slot]
        length = int(len(rows) * fraction)
        done: list[bool] = []
        if self.attempt(lambda: done.append(self.arena.resume(slot, lineage, length))) and done[0]:
            del self.known[slot]
            self.written[slot], self.kept[slot] = rows[:length], kept

    @rule(index=INDEX, fraction=st.floats(0, 1))
    def compact(self, index: int, fraction: float) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        self.attempt(lambda: self.arena.compact(slot, int(len(self.written[slot]) * fraction)))

    @rule(index=INDEX, fraction=st.floats(0, 1))
    def compact_known(self, index: int, fraction: float) -> None:
        if (slot := pick(self.known, index)) is None:
            return
        lineage, rows, _ = self.known[slot]
        self.arena.compact_later(slot, lineage, int(len(rows) * fraction))

    @rule(index=INDEX)
    def forget(self, index: int) -> None:
        if (slot := pick(self.known, index)) is None:
            return
        self.arena.forget(slot, self.known.pop(slot)[0])

    @rule(index=INDEX)
    def publish_and_release(self, index: int) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        rows = self.written[slot]
        lineage = self.arena.publish(slot, len(rows))[0]
        if self.attempt(lambda: self.arena.release([slot])):
            del self.written[slot]
            if rows:
                self.known[slot] = lineage, rows, self.kept[slot]
        else:
            self.arena.publish(slot, 0)

    @rule(index=INDEX)
    def release(self, index: int) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        if self.attempt(lambda: self.arena.release([slot])):
            del self.written[slot]

    @rule(index=INDEX)
    def swap_out(self, index: int) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        gone: list[_core.Swapped] = []
        if self.attempt(lambda: gone.append(self.arena.swap_out(slot))):
            self.swapped.append((gone[0], self.written.pop(slot), self.kept[slot]))

    @rule(index=INDEX)
    def swap_in(self, index: int) -> None:
        if not self.swapped or len(self.written) == SLOTS:
            return
        position = index % len(self.swapped)
        swapped, rows, kept = self.swapped[position]
        slots: list[int] = []
        if self.attempt(lambda: slots.append(self.arena.swap_in(swapped))):
            del self.swapped[position]
            self.begin(slots[0])
            self.written[slots[0]], self.kept[slots[0]] = rows, kept

    @rule(index=INDEX)
    def drop_swapped(self, index: int) -> None:
        if self.swapped:
            del self.swapped[index % len(self.swapped)]

    @rule(index=INDEX, positions=st.integers(0, MAX_LEN))
    def prefetch(self, index: int, positions: int) -> None:
        if (slot := pick(self.written, index)) is None:
            return
        self.attempt(lambda: self.arena.prefetch(slot, positions))

    @rule(budget=st.integers(1, 50))
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
        self.arena.settle()
        self.arena.check()
        slots = self.arena.map()
        assert {i for i, slot in enumerate(slots) if slot["state"] == "running"} == set(self.written)
        assert [plane.data_ptr() for plane in self.planes] == self.addresses
        for slot, (lineage, rows, _) in list(self.known.items()):
            now, positions, parked = self.arena.known(slot)
            assert now == lineage
            assert slots[slot]["state"] == "parked" if positions else slots[slot]["state"] != "running"
            # What was taken back is gone from the end on.
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
    max_examples=200,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestArena = ArenaMachine.TestCase

CudaArenaMachine.TestCase.settings = settings(ArenaMachine.TestCase.settings, max_examples=40)
TestArenaOnCuda = pytest.mark.gpu(CudaArenaMachine.TestCase)
