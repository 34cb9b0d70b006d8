"""The scheduler on a simulated clock and a simulated cache: invariants E1, E4, E6, E7 and E8 after every step."""

from __future__ import annotations

import ast
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulation import Simulation, expected, token

import vattn.engine.scheduler as scheduler_module
from vattn.engine.policy import POLICIES
from vattn.engine.request import FinishReason, Status

ENGINE = Path(scheduler_module.__file__).parent


def outputs(simulation: Simulation) -> None:
    """Every output that nobody aborted has the tokens that it has alone (E2)."""
    for request in simulation.done.values():
        for branch in request.branches:
            if branch.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert branch.output == expected(request, branch.index), request.id
            else:
                assert branch.output == expected(request, branch.index)[: len(branch.output)]


@pytest.mark.thorough(4)
@pytest.mark.parametrize("whole_prompts", [False, True])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_a_mix_under_pressure(policy, depth, whole_prompts):
    chance = random.Random(policy)
    simulation = Simulation(400, policy=policy, depth=depth, refuses=0.02, whole_prompts=whole_prompts)
    for number in range(120):
        prompt = tuple(chance.choices(range(3), k=chance.randrange(1, 150)))
        options = {"n": chance.choice([1, 1, 1, 2, 4]), "priority": chance.randrange(3), "tenant": chance.choice("abc")}
        simulation.add(str(number), prompt, chance.randrange(1, 60), **options)
        for _ in range(chance.randrange(4)):
            simulation.step()
    simulation.run()
    assert simulation.scheduler.requests.counters.finished == 120
    assert simulation.scheduler.requests.counters.preemptions > 0
    outputs(simulation)


def test_prompts_are_computed_in_chunks_beside_the_tokens_of_others():
    simulation = Simulation(10_000, depth=0, max_num_batched_tokens=32)
    simulation.add("short", 10, 20)
    simulation.step()
    simulation.add("long", 200, 5)
    mixed = [simulation.step() for _ in range(4)]
    for iteration in mixed:
        assert [branch.request.id for branch in iteration.decodes] == ["short"]
        assert {row.branch.request.id: row.count for row in iteration.rows} == {"long": 31}
    simulation.run()
    outputs(simulation)


def test_a_request_begins_behind_a_prefix_and_namespaces_are_apart():
    simulation = Simulation(10_000)
    prompt = tuple(range(50))
    simulation.add("first", prompt, 4, namespace="a")
    simulation.run()
    behind = simulation.add("behind", (*prompt, 7, 8), 4, namespace="a")
    apart = simulation.add("apart", (*prompt, 7, 8), 4, namespace="b")
    fresh = simulation.add("fresh", (*prompt, 7, 8), 4, namespace="a", reuse_prefix=False)
    simulation.run()
    assert behind.cached == 50
    assert apart.cached == fresh.cached == 0
    outputs(simulation)


def of_one_group(simulation, count, *, system=200, own=20, **options):
    """Requests that begin with the same tokens, and one that does not."""
    group = [
        simulation.add(f"{number}", (*range(system), *(1000 + number,) * own), 40, **options) for number in range(count)
    ]
    return group, simulation.add("other", tuple(range(5000, 5000 + 70)), 40)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prefix_that_is_being_computed_is_waited_for(depth):
    """Its tokens are computed once, and requests with other prompts begin at once."""
    simulation = Simulation(10_000, depth=depth, endless=True, max_num_batched_tokens=300)
    (first, *behind), other = of_one_group(simulation, 6)
    simulation.step()
    assert first.status is other.status is Status.RUNNING
    assert {request.status for request in behind} == {Status.WAITING}
    simulation.run()
    assert [request.cached for request in behind] == [200] * 5
    assert simulation.computed == 200 + 6 * 20 + 70 + 7 * 39


@pytest.mark.parametrize("ends", ["abort", "fail"])
def test_nobody_waits_for_a_prefix_that_is_computed_no_more(ends):
    simulation = Simulation(10_000, max_num_batched_tokens=300)
    (_, second), _ = of_one_group(simulation, 2)
    simulation.step()
    assert second.status is Status.WAITING
    simulation.scheduler.abort("0") if ends == "abort" else simulation.scheduler.fail("0", "broken")
    simulation.step()
    simulation.step()
    assert second.status is Status.RUNNING
    simulation.run()
    assert second.branches[0].output == expected(second, 0)


@pytest.mark.parametrize(
    ("system", "own", "options"),
    [
        (50, 50, {}),  # too little to wait for
        (200, 1000, {}),  # the other prompt takes much longer than what they share
        (200, 20, {"reuse_prefix": False}),
        (200, 20, {"overdue": True}),
    ],
)
def test_requests_begin_beside_each_other_where_it_is_not_worth_waiting(system, own, options):
    simulation = Simulation(100_000, max_num_batched_tokens=5000)
    group, other = of_one_group(simulation, 3, system=system, own=own, **options)
    simulation.step()
    assert {request.status for request in (*group, other)} == {Status.RUNNING}
    simulation.run()
    outputs(simulation)


def test_prompts_of_another_namespace_are_not_waited_for():
    simulation = Simulation(10_000, max_num_batched_tokens=5000)
    requests = [simulation.add(name, 200, 5, namespace=name) for name in "ab"]
    simulation.step()
    assert {request.status for request in requests} == {Status.RUNNING}


def test_what_is_known_already_is_not_waited_for():
    simulation = Simulation(10_000, max_num_batched_tokens=5000)
    simulation.add("before", tuple(range(180)), 1)
    simulation.run()
    group, _ = of_one_group(simulation, 2)  # of which 20 tokens in common are not known
    simulation.step()
    assert {request.status for request in group} == {Status.RUNNING}


def test_each_group_is_computed_once_behind_what_all_have_in_common():
    simulation = Simulation(100_000, endless=True, max_num_batched_tokens=5000)
    simulation.add("system", tuple(range(100)), 1)
    simulation.run()
    before = simulation.computed
    for group in "abcd":
        own = tuple(1000 * ord(group) + number for number in range(300))
        for number in range(3):
            simulation.add(f"{group}{number}", (*range(100), *own, number), 1)
    simulation.run()
    assert simulation.computed - before == 4 * 300 + 12


def test_samples_wait_for_a_prefix_with_their_whole_request():
    simulation = Simulation(10_000, endless=True, max_num_batched_tokens=5000)
    requests = [simulation.add(str(number), (*range(200), 1000 + number), 4, n=3) for number in range(2)]
    simulation.run()
    assert [request.cached for request in requests] == [0, 200]
    outputs_of_all = [len(branch.output) for request in requests for branch in request.branches]
    assert outputs_of_all == [4] * 6


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_who_waits_for_a_prefix_keeps_its_place(policy):
    """Requests behind it may begin, but neither in its seat nor with the memory that it needs."""
    for limits, capacity, own in (({"max_num_seqs": 2}, 10_000, 600), ({}, 1000, 300)):
        simulation = Simulation(capacity, policy=policy, endless=True, max_num_batched_tokens=600, **limits)
        simulation.add("computes", 500, 20)
        simulation.step()
        waits = simulation.add("waits", (*range(400), 7), 5)
        behind = simulation.add("behind", tuple(range(5000, 5000 + own)), 300, priority=10)
        simulation.step()
        assert {waits.status, behind.status} == {Status.WAITING}
        for _ in range(12):
            simulation.step()
        assert waits.status is Status.FINISHED
        simulation.run()


def test_what_another_prompt_still_misses_counts():
    """A prompt that is nearly computed is waited for."""
    simulation = Simulation(10_000, endless=True, max_num_batched_tokens=300)
    simulation.add("long", 600, 5)
    simulation.step()
    simulation.step()
    waits = simulation.add("waits", (*range(200), 7), 5)
    simulation.step()
    assert waits.status is Status.WAITING
    simulation.run()
    assert waits.cached == 200


def test_requests_that_are_computed_again_wait_for_each_other():
    simulation = Simulation(10_000, endless=True, max_num_batched_tokens=5000)
    group, _ = of_one_group(simulation, 4)
    for _ in range(10):
        simulation.step()
    assert all(request.branches[0].output for request in group)
    simulation.flight.clear()
    simulation.scheduler.recover()
    simulation.memory.prefixes.clear()
    before = simulation.computed
    simulation.run()
    assert simulation.computed - before < 200 + 4 * (20 + 40) + 2 * (70 + 40)
    assert [request.branches[0].output for request in group] == [
        [token(request.id, 0, 220 + number) for number in range(40)] for request in group
    ]


def test_nobody_waits_for_a_prefix_where_prompts_are_not_kept(monkeypatch):
    simulation = Simulation(10_000, max_num_batched_tokens=5000)
    monkeypatch.setattr(simulation.memory, "keeps_prompts", False, raising=False)
    group, _ = of_one_group(simulation, 3)
    simulation.step()
    assert {request.status for request in group} == {Status.RUNNING}


def test_samples_share_their_prompt():
    simulation = Simulation(100 + 4 * 10)
    simulation.add("four", 100, 10, n=4)
    simulation.run()
    assert simulation.scheduler.requests.counters.preemptions == 0
    assert simulation.computed < 100 + 4 * 10
    outputs(simulation)


def test_an_aborted_request_serves_others_within_two_iterations():
    """E6."""
    for depth in (0, 1):
        simulation = Simulation(100, depth=depth, max_num_batched_tokens=100)
        simulation.add("holds", 80, 20)
        for _ in range(3):
            simulation.step()
        simulation.add("waits", 80, 5)
        simulation.step()
        assert simulation.requests["waits"].status is Status.WAITING
        simulation.scheduler.abort("holds")
        for _ in range(2):
            simulation.step()
        assert simulation.requests["waits"].status in (Status.RUNNING, Status.FINISHED)


def test_a_request_that_never_fits_is_refused_with_what_it_needs():
    simulation = Simulation(100)
    with pytest.raises(ValueError, match="it needs 130 positions, and there are 100"):
        simulation.add("large", 100, 30)
    with pytest.raises(ValueError, match="prompt must have at least one token"):
        simulation.add("empty", (), 3)
    with pytest.raises(ValueError, match="n is 20, and at most max_num_seqs=16"):
        simulation.add("many", 1, 1, n=20)
    simulation.add("one", 10, 10)
    with pytest.raises(ValueError, match="there is a request 'one' already"):
        simulation.add("one", 10, 10)
    simulation.run()


def test_a_deadline_ends_a_request_where_it_is():
    simulation = Simulation(1000)
    runs = simulation.add("runs", 10, 900, deadline=0.055)
    simulation.run(100)
    assert [branch.finish_reason for branch in runs.branches] in ([FinishReason.ABORT], [FinishReason.STOP])
    assert len(runs.branches[0].output) <= 6


def test_nobody_waits_for_ever_under_priority():
    """E7: a stream of urgent requests passes the one that is not for a thousand iterations, and no longer."""
    simulation = Simulation(60, policy="priority", max_num_seqs=1)
    patient = simulation.add("patient", 20, 5, priority=9)
    for number in range(3000):
        if len(simulation.scheduler.requests.waiting) < 3:
            simulation.add(f"urgent {number}", 20, 5, priority=0)
        simulation.step()
        if patient.id in simulation.done:
            break
    assert 1000 < number < 1100


def test_tenants_get_the_same_service():
    """One sends ten times as much as the other; both are served alike while both have work."""
    simulation = Simulation(200, policy="fair", max_num_seqs=2)
    for number in range(100):
        simulation.add(f"loud {number}", 20, 10, tenant="loud")
    for number in range(10):
        simulation.add(f"quiet {number}", 20, 10, tenant="quiet")
    while sum(name.startswith("quiet") for name in simulation.done) < 10:
        simulation.step()
    assert 5 <= sum(name.startswith("loud") for name in simulation.done) <= 20
    simulation.run()


def test_a_tenant_that_comes_back_has_no_credit():
    simulation = Simulation(200, policy="fair", max_num_seqs=1)
    for number in range(30):
        simulation.add(f"busy {number}", 20, 10, tenant="busy")
        simulation.run()
    for number in range(20):
        simulation.add(f"busy later {number}", 20, 10, tenant="busy")
        simulation.add(f"late {number}", 20, 10, tenant="late")
    while len(simulation.done) < 30 + 20:
        simulation.step()
    late = sum(name.startswith("late") for name in simulation.done)
    assert 7 <= late <= 13
    simulation.run()


def test_requests_wait_for_others_where_the_ratio_says_so():
    simulation = Simulation(1000, waiting_served_ratio=2.0, depth=0, endless=True)
    simulation.add("runs", 10, 900)
    simulation.step()
    late = simulation.add("late", 10, 5)
    steps = 0
    while late.status is Status.WAITING:
        simulation.step()
        steps += 1
    assert steps in (20, 21)
    simulation.add("a", 10, 5)
    simulation.add("b", 10, 5)
    simulation.add("c", 10, 5)
    simulation.add("d", 10, 5)
    simulation.step()
    assert simulation.requests["a"].status is Status.RUNNING
    simulation.run()


@pytest.mark.parametrize(("tokens", "capacity", "begins"), [(10, 80, True), (60, 120, False)])
def test_a_request_begins_where_others_end_before_memory_is_short(tokens, capacity, begins):
    """What both come to have is more than there is, but in one case the other gives its memory back before."""
    simulation = Simulation(capacity, endless=True, max_num_batched_tokens=32)
    simulation.add("long", 10, 60)
    for _ in range(3):
        simulation.step()
    other = simulation.add("other", tuple(range(100, 120)), tokens)
    for _ in range(2):
        simulation.step()
    assert (other.status is Status.RUNNING) == begins
    simulation.run()
    assert simulation.scheduler.requests.counters.preemptions == 0


def test_a_swapped_request_comes_back_where_fewer_outputs_run():
    simulation = Simulation(1000, endless=True)
    simulation.memory.prefers_swap = lambda request: True
    samples = simulation.add("samples", 20, 30, n=4)
    for _ in range(8):
        simulation.step()
    simulation.scheduler.preempt_one()
    while samples.status is not Status.SWAPPED:
        while simulation.flight:
            simulation.scheduler.read(*simulation.flight.popleft())
    while simulation.scheduler.limits.seqs > 2:
        simulation.scheduler.limits.narrow()
    simulation.add("other", 5, 5)
    simulation.run()
    assert [len(branch.output) for branch in samples.branches] == [30] * 4


def test_what_makes_no_room_by_itself_ends_with_an_error():
    """The budget was cut under a request that runs alone."""
    simulation = Simulation(100, depth=0)
    request = simulation.add("alone", 50, 40)
    for _ in range(5):
        simulation.step()
    simulation.memory.capacity = 56
    simulation.run(200)
    if request.branches[0].finish_reason is FinishReason.ERROR:
        assert request.error == "it needs 90 positions, and there are 56"


class Machine(RuleBasedStateMachine):
    """Arrivals, aborts, failures, deadlines, budget changes and steps in any order."""

    @initialize(
        policy=st.sampled_from(sorted(POLICIES)),
        depth=st.sampled_from([0, 1]),
        refuses=st.sampled_from([0.0, 0.1]),
        swaps=st.booleans(),
        ratio=st.sampled_from([0.0, 1.2]),
    )
    def begin(self, policy, depth, refuses, swaps, ratio):
        self.simulation = Simulation(
            200, policy=policy, depth=depth, refuses=refuses, swaps=swaps, waiting_served_ratio=ratio, max_num_seqs=6
        )
        self.number = 0

    @rule(
        prompt=st.integers(1, 90),
        max_tokens=st.integers(1, 25),
        n=st.sampled_from([1, 1, 2, 4]),
        priority=st.integers(0, 2),
        tenant=st.sampled_from("ab"),
        alike=st.booleans(),
        soon=st.sampled_from([None, None, 0.0, 0.05]),
    )
    def arrive(self, prompt, max_tokens, n, priority, tenant, alike, soon):
        self.number += 1
        tokens = tuple(range(prompt)) if alike else tuple(range(self.number, self.number + prompt))
        deadline = None if soon is None else self.simulation.now + soon
        options = {"n": n, "priority": priority, "tenant": tenant, "deadline": deadline}
        try:
            self.simulation.add(str(self.number), tokens, max_tokens, **options)
        except ValueError as error:
            assert "it needs" in str(error)

    @rule(steps=st.integers(1, 8))
    def step(self, steps):
        for _ in range(steps):
            self.simulation.step()

    @precondition(lambda self: self.number)
    @rule(data=st.data(), fails=st.booleans())
    def end(self, data, fails):
        name = str(data.draw(st.integers(1, self.number)))
        request = self.simulation.requests.get(name)
        there = request is not None and bool(request.live)
        scheduler = self.simulation.scheduler
        assert (scheduler.fail(name, "broken") if fails else scheduler.abort(name)) == there
        self.simulation.check()

    @rule(capacity=st.integers(20, 250))
    def resize(self, capacity):
        """As the engine does it: running requests lose their memory until what is left fits."""
        simulation = self.simulation
        for _ in range(100):
            if simulation.memory.used <= capacity:
                break
            if not simulation.scheduler.preempt_one():
                simulation.step()  # one leaves already
        assert simulation.memory.used <= capacity
        simulation.memory.capacity = capacity

    @invariant()
    def holds(self):
        if hasattr(self, "simulation"):
            self.simulation.check()

    def teardown(self):
        if hasattr(self, "simulation"):
            self.simulation.memory._refuses = 0.0
            self.simulation.run(5000)
            outputs(self.simulation)


def test_any_order_of_events(request):
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=150 if request.config.getoption("usual") else 1500,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_an_iteration_is_scheduled_on_one_screen():
    source = (ENGINE / "scheduler.py").read_text()
    [step] = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef) and node.name == "schedule"
    ]
    assert step.end_lineno - step.lineno < 40
