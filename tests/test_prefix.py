"""Cached prefixes: the tree of tokens against brute force, and sequences that start behind the rows of others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vattn import BudgetExceeded, DriverError, KVCache, KVLayout
from vattn.memory.prefix_tree import PrefixTree
from vattn.memory.shape import LayerShape

PAGE = 4096  # 8 tokens


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["insert", "insert", "remove", "shorten"]),
            st.integers(0, 5),
            st.lists(st.integers(0, 2), max_size=8),
        ),
        max_size=30,
    ),
    st.lists(st.integers(0, 2), max_size=8),
)
def test_the_tree_finds_who_holds_the_most(operations, query):
    tree, held = PrefixTree(), {}
    for operation, holder, tokens in operations:
        if operation == "insert":
            tree.insert(tokens, holder)
            held[holder] = tokens
        elif operation == "remove":
            tree.remove(holder)
            held.pop(holder, None)
        else:
            tree.shorten(holder, len(tokens))
            if holder in held:
                held[holder] = held[holder][: len(tokens)]
        held = {holder: tokens for holder, tokens in held.items() if tokens}
        assert len(tree) == len(held)
        assert all(tree.tokens(holder) == tuple(tokens) for holder, tokens in held.items())

    def common(tokens):
        return next(
            (i for i, (a, b) in enumerate(zip(tokens, query, strict=False)) if a != b), min(len(tokens), len(query))
        )

    most = max((common(tokens) for tokens in held.values()), default=0)
    found = tree.match(query)
    if most == 0:
        assert found is None
    else:
        holder, length = found
        assert length == most == common(held[holder])
    for holder in list(held):
        tree.remove(holder)
    assert tree.match(query) is None


def test_of_several_holders_the_one_used_last_is_found():
    tree = PrefixTree()
    tree.insert([1, 2, 3], "a")
    tree.insert([1, 2, 4], "b")
    assert tree.match([1, 2]) == ("b", 2)
    assert tree.match([1, 2, 3, 4]) == ("a", 3)
    assert tree.match([1, 2]) == ("a", 2)
    tree.insert([1, 2, 3], "c")
    assert tree.match([1, 2, 3]) == ("c", 3)


def cache(slots=6, **options):
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=64, max_len=2000, dtype="float32", granularity=PAGE)
    return KVCache(layout, slots=slots, **{"lookahead": 0, **options})


def run(c, tokens, **options):
    """Opens a sequence and writes the rows that are not cached, as a model would.

    Returns:
        The sequence, and how many of its tokens were cached.
    """
    sequence = c.open(tokens=tokens, **options)
    start = sequence.length
    assert start < len(tokens)
    sequence.grow(len(tokens) - start)
    sequence.k(0)[start:] = torch.tensor(tokens[start:], dtype=torch.float32).reshape(-1, 1, 1)
    assert sequence.k(0)[:, 0, 0].tolist() == list(tokens)
    return sequence, start


def memory_calls(c):
    calls = c.stats().driver_calls
    return [calls[name] for name in ("create", "map", "set_access", "unmap", "release", "copy")]


def test_a_chats_next_turn_goes_on_in_its_slot():
    c = cache()
    tokens = list(range(100))
    sequence, start = run(c, tokens)
    assert start == 0
    slot = sequence.slot
    sequence.close(tokens=tokens)
    run(c, list(range(1000, 1050)))
    c.wait_idle()
    calls = memory_calls(c)
    again = c.open(tokens=[*tokens, 7, 8, 9])
    assert (again.slot, again.length) == (slot, 100)
    again.grow(3)
    assert memory_calls(c) == calls
    c.check()


def test_a_known_prefix_serves_while_its_sequence_runs_and_after_it():
    c = cache()
    system = list(range(200))
    first, _ = run(c, [*system, 1, 2, 3])
    first.remember([*system, 1, 2, 3])
    second, start = run(c, [*system, 4, 5, 6])
    assert start == 200
    assert c.stats().shared > 0
    second.close(tokens=[*system, 4, 5, 6])
    first.close()
    _, start = run(c, [*system, 4, 5, 9, 9])
    assert start == 202
    _, start = run(c, torch.tensor([*system[:150], 9, 9]).tolist())
    assert start == 150
    exact = c.open(tokens=torch.tensor(system))
    assert exact.length == 199  # the model has to compute the last token
    c.check()


def test_what_is_needed_is_taken_from_who_was_of_use_least_recently():
    c = cache(slots=8, budget=80 * PAGE)
    chats = [[n * 1000 + i for i in range(160)] for n in range(3)]  # 20 granules each
    for tokens in chats:
        run(c, tokens)[0].close(tokens=tokens)
    run(c, [*chats[0][:100], 5])[0].close()  # uses the first chat again
    run(c, list(range(9000, 9000 + 250)))  # 32 granules
    assert c.open(tokens=[*chats[0], 1]).length == 160
    assert c.open(tokens=[*chats[2], 1]).length == 160
    assert c.open(tokens=[*chats[1], 1]).length < 160
    c.check()


def test_a_pinned_prefix_stays():
    c = cache(slots=8, budget=40 * PAGE)
    system = list(range(100))
    run(c, system)[0].close(tokens=system)
    pinned = c.pin(system)
    with pytest.raises(BudgetExceeded):
        c.open().grow(1000)
    c.trim()
    sequence, start = run(c, [*system, 1])
    assert start == 100
    sequence.close()
    pinned.close()
    c.trim()
    assert c.open(tokens=[*system, 1]).length == 0
    with pytest.raises(ValueError, match="these 100 tokens are not known"):
        c.pin(system)
    c.check()


@pytest.mark.mapper
def test_a_hot_prefix_is_compacted_in_the_background():
    c = cache(slots=8)
    system = list(range(300))
    sequence = c.open(tokens=system)
    for token in system:
        sequence.grow(1)
        sequence.k(0)[-1] = token
    slot = sequence.slot
    sequence.close(tokens=system)
    assert len(c.map()[slot]["runs"][0]["extents"]) > 10
    for token in range(3):
        run(c, [*system[:200], token])
        c.wait_idle()
    assert c.map()[slot]["runs"][0]["extents"][0] == 25 * PAGE
    before = c.stats()
    _, start = run(c, [*system[:200], 5])
    assert start == 200
    assert c.stats().aliases - before.aliases == 1
    assert c.stats().copied == before.copied
    # A boundary between extents at which forks end stays, and new boundaries are added.
    for token in range(3):
        run(c, [*system[:100], 1000 + token])
        c.wait_idle()
    assert c.map()[slot]["runs"][0]["extents"][:3] == [12 * PAGE, 8 * PAGE, 4 * PAGE]
    assert c.open(tokens=[*system, 1]).length == 300
    c.check()


def test_tokens_of_windows_are_known_where_their_rows_are():
    shapes = [LayerShape(kv_heads=1, head_dim=64, dtype="float32", window=window) for window in (None, 16)]
    c = KVCache(KVLayout(shapes, max_len=1000, granularity=PAGE), slots=6, lookahead=0)
    tokens = list(range(120))
    sequence = c.open(tokens=tokens)
    for token in tokens:
        sequence.grow(1)
        for layer in range(2):
            sequence.k(layer)[-1] = token
    sequence.close(tokens=tokens)
    assert c.open(tokens=[*tokens[:50], 7]).length == 0  # the window's rows before 50 have been given back
    other = c.open(tokens=[*tokens, 7])
    assert other.length == 120
    assert other.k(0)[:, 0, 0].tolist() == tokens
    assert other.k(1)[105:, 0, 0].tolist() == tokens[105:]
    c.check()


def test_recurrent_models_are_refused():
    config = {
        "model_type": "x", "num_hidden_layers": 2, "num_attention_heads": 1, "hidden_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
    }  # fmt: skip
    c = KVCache.from_config(config, max_len=100, slots=1, granularity=PAGE)
    with pytest.raises(ValueError, match="recurrent layers"):
        c.open(tokens=[1, 2])
    sequence = c.open()
    sequence.grow(2)
    with pytest.raises(ValueError, match="recurrent layers"):
        sequence.remember([1, 2])
    with pytest.raises(ValueError, match="recurrent layers"):
        c.pin([1])


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        iter,
        lambda ids: range(ids[0], ids[-1] + 1),
        np.array,
        torch.tensor,
        lambda ids: torch.tensor(ids, dtype=torch.int32),
        lambda ids: torch.tensor(ids)[None],
        lambda ids: np.array(ids, dtype=np.uint16)[None],
        lambda ids: [ids],
        lambda ids: [torch.tensor(i) for i in ids],
        lambda ids: [np.int64(i) for i in ids],
    ],
)
def test_tokens_are_the_same_in_every_form(form):
    ids = list(range(100, 120))
    for remembers in (form, list):
        with cache(slots=4) as c:
            first = c.open()
            first.grow(20)
            first.remember(remembers(ids))
            assert c.open(tokens=form(ids)).length == 19
            assert c.pin(form(ids)).length == 20
            first.close(tokens=remembers(ids))


def test_namespaces_keep_prefixes_apart():
    with cache(slots=8) as c:
        ids = list(range(20))
        for namespace in (None, "adapter", ("tenant", 3)):
            sequence = c.open(namespace=namespace)
            sequence.grow(20)
            sequence.k(0)[:] = hash(namespace) % 97
            sequence.close(tokens=ids)
        for namespace in (None, "adapter", ("tenant", 3)):
            for known in (c.pin(ids, namespace=namespace), c.open(tokens=ids, namespace=namespace)):
                assert known.length >= 19
                assert bool((known.k(0) == hash(namespace) % 97).all())
                [fork] = known.fork()
                assert fork.namespace == namespace
                fork.close()
                known.close()
        assert c.open(tokens=ids, namespace="another").length == 0
        with pytest.raises(ValueError, match="are not known"):
            c.pin(ids, namespace="another")


def test_a_sequence_that_is_swapped_out_is_closed_without_its_tokens():
    with cache(slots=2) as c:
        sequence = c.open()
        sequence.grow(20)
        sequence.swap_out()
        sequence.close(tokens=range(20))
        assert c.stats().host == 0
        assert c.open(tokens=range(20)).length == 0


def test_what_is_expected_counts_behind_a_known_prefix_too():
    """With ``expected``, a bare slot grows in larger steps, and a parked slot with enough memory is adopted."""
    with cache(slots=8, mapper=False) as c:
        first = c.open()
        first.grow(500)
        first.k(0)[:] = torch.arange(500, dtype=torch.float32).reshape(-1, 1, 1)
        first.remember(range(500))

        def calls(expected):
            before = c.stats().driver_calls["map"]
            sequence = c.open(tokens=[*range(500), 7], expected=expected)
            assert sequence.length == 500
            while sequence.length < 2000:
                sequence.grow(1)
            assert sequence.k(0)[:500, 0, 0].tolist() == list(range(500))
            return c.stats().driver_calls["map"] - before

        before = c.open()
        before.grow(2000)
        untold, told = calls(0), calls(2000)
        assert told < 0.7 * untold
        before.close()
        assert calls(2000) <= 10
        c.check()


@pytest.mark.parametrize("parked", [False, True])
def test_the_last_slot_serves_a_hit(parked):
    with cache(slots=2) as c:
        holder = c.open()
        holder.grow(100)
        holder.k(0)[:] = torch.arange(100, dtype=torch.float32).reshape(-1, 1, 1)
        holder.remember(range(100))
        if parked:
            holder.close()
            other = c.open()  # the parked slot is the only one that is left
            other.grow(1)
        found = c.open(tokens=[*range(50), 7, 8, 9])
        assert found.length == 50
        assert found.k(0)[:, 0, 0].tolist() == list(range(50))
        c.check()


def test_tokens_that_are_none_close_nothing():
    with cache(slots=2) as c:
        sequence = c.open()
        sequence.grow(20)
        for wrong in ("abc", [1, "b"], [[1, 2], [3, 4]], torch.zeros(2, 3, dtype=torch.int64), 5, {"input_ids": [1]}):
            with pytest.raises((TypeError, ValueError), match="tokens must be"):
                sequence.close(tokens=wrong)
        assert sequence.length == 20
        sequence.close()


def test_misuse_is_told():
    c = cache()
    sequence, _ = run(c, [1, 2, 3])
    with pytest.raises(ValueError, match="tokens are 4, and the sequence has 3 positions"):
        sequence.remember([1, 2, 3, 4])
    with pytest.raises(ValueError, match="slot cannot be chosen"):
        c.open(slot=2, tokens=[1])
    sequence.remember([1, 2, 3])
    sequence.truncate(1)
    assert c.open(tokens=[1, 2, 3, 4]).length == 1
    sequence.close()
    with pytest.raises(ValueError, match="closed"):
        sequence.remember([1])


def test_the_tree_holds_no_more_than_there_are_slots():
    c = cache(slots=3)
    for n in range(20):
        tokens = [n, *range(30)]
        run(c, tokens)[0].close(tokens=tokens)
    assert len(c._slots.prefixes._index.trees[None]) <= 3
    c.check()


@pytest.mark.parametrize("pages", [None, 50])
def test_a_slot_with_cached_rows_is_taken_as_a_whole_when_memory_is_short(pages):
    """Else its memory would be taken from it extent by extent. Of the half used longest ago the one that fits best."""
    layout = KVLayout.uniform(layers=1, kv_heads=1, head_dim=128, max_len=400, dtype="float16", granularity=PAGE)
    assert layout.tokens_per_granule == 8
    cache = KVCache(layout, slots=8, budget=None if pages is None else pages * PAGE, lookahead=0, mapper=False)
    lengths = {40: 1000, 80: 2000, 120: 3000, 160: 4000}  # in the order in which they are parked, and a first token
    opened = {length: cache.open() for length in lengths}
    slots = {length: sequence.slot for length, sequence in opened.items()}
    for length, sequence in opened.items():
        sequence.grow(length)
    for length, sequence in opened.items():
        sequence.close(tokens=range(lengths[length], lengths[length] + length))
    before = cache.stats().driver_calls

    def known(length):
        return cache.cached_positions(range(lengths[length], lengths[length] + length + 1))

    with cache.open(expected=84) as sequence:
        if pages is None:
            assert sequence.slot not in slots.values()
            assert [known(length) for length in lengths] == list(lengths)
            return
        assert sequence.slot == slots[80]
        sequence.grow(80)
        assert cache.stats().driver_calls["map"] == before["map"]
        with cache.open(expected=160) as longest:  # of 40, 120 and 160 only the first two may be taken
            assert longest.slot == slots[120]
        assert (known(40), known(160)) == (40, 160)
    cache.check()
    cache.close()


def requests(c, prefixes, own=24):
    """Three sequences with each prefix of 64 rows, and with some rows of their own; each takes its place in turn."""
    opened = []
    for prefix in prefixes:
        for number in range(3):
            tokens = [*range(prefix, prefix + 64), *range(prefix + 500 + 50 * number, prefix + 500 + 50 * number + own)]
            sequence = c.open(tokens=tokens, expected=64 + own)
            sequence.expect(64 + own, prompt=64)
            start = sequence.length
            assert start == (64 if number else 0)
            sequence.grow(64 - start)
            sequence.grow(own)
            sequence.k(0)[start:] = torch.tensor(tokens[start:], dtype=torch.float32).reshape(-1, 1, 1)
            assert sequence.k(0)[:, 0, 0].tolist() == tokens
            sequence.remember(tokens)
            opened.append((sequence, tokens))
    return opened


def closed(opened):
    for sequence, tokens in opened:
        sequence.close(tokens=tokens)


@pytest.mark.parametrize("share", ["another", "the same"])
def test_a_fork_keeps_the_memory_behind_what_it_shares(share):
    """It takes the place of a fork of another prefix, or of the same one; only what they share is mapped anew."""
    with cache(slots=9, mapper=False, lookahead=0) as c:
        closed(requests(c, [1000, 2000]))
        running = requests(c, [3000])  # in bare slots
        assert c.stats().parked_slots == 6
        before = c.stats()
        of = 1000 if share == "the same" else 3000  # the one that was used longest ago, or one that no parked slot has
        with c.open(tokens=[*range(of, of + 64), 7], expected=88) as sequence:
            assert sequence.length == 64
            sequence.grow(24)
            now = c.stats()
            calls = {name: now.driver_calls[name] - before.driver_calls[name] for name in now.driver_calls}
            assert calls["create"] == calls["release"] == 0
            assert calls["map"] == calls["unmap"] == now.aliases - before.aliases == (0 if share == "the same" else 1)
            assert now.physical == before.physical
            assert sequence.k(0)[:64, 0, 0].tolist() == list(range(of, of + 64))
            sequence.k(0)[64:] = -1  # nobody else sees this
            assert [one.k(0)[:, 0, 0].tolist() for one, _ in running] == [tokens for _, tokens in running]
            c.check()
        closed(running)


@pytest.mark.parametrize("times", [1, 3])
def test_a_refused_call_of_such_a_fork_loses_nothing(times):
    """Whichever call the driver refuses, what others hold stays as it is, and the fork succeeds afterwards."""
    refused = 0
    for call in range(1, 12):
        with cache(slots=9, mapper=False, lookahead=0) as c:
            closed(requests(c, [1000, 2000]))
            running = requests(c, [3000])
            c.driver.fail_at(call, times=times)
            try:
                sequence = c.open(tokens=[*range(3000, 3064), 7], expected=88)
                sequence.grow(24)
            except DriverError:
                refused += 1
                c.driver.fail_at(0)
                c.check()
                sequence = c.open(tokens=[*range(3000, 3064), 7], expected=88)
                sequence.grow(24)
            c.driver.fail_at(0)
            assert sequence.length == 88
            sequence.k(0)[64:] = -1
            assert [one.k(0)[:, 0, 0].tolist() for one, _ in running] == [tokens for _, tokens in running]
            c.check()
            sequence.close()
            closed(running)
    assert refused > 1


def test_sequences_that_share_rows_stand_side_by_side():
    with cache(slots=8) as c:
        assert c.side_by_side([]) == []
        one, other, alone = c.open(), c.open(), c.open()
        for sequence in (one, other, alone):
            for _ in range(3):
                sequence.grow(32)
        [late] = one.fork(64, share="alias")
        [first, second] = other.fork(64, 2, share="alias")
        assert c.side_by_side([one, other, alone]) == [0, 1, 2]
        assert c.side_by_side([alone, first, late, second, one, other]) == [0, 1, 3, 5, 2, 4]
        [nested] = first.fork(32, share="alias")
        order = c.side_by_side([late, nested, alone, other, one])
        assert order == [0, 4, 1, 3, 2]
        alone.close()
        with pytest.raises(ValueError, match="closed"):
            c.side_by_side([alone])


def test_a_prompt_lies_in_few_extents_whatever_is_expected_behind_it():
    with cache(slots=4, mapper=False, lookahead=0) as c:
        lengths = []
        for told in ({"prompt": 300}, {}):
            sequence = c.open(expected=900)
            sequence.expect(900, **told)
            for _ in range(3):  # in chunks
                sequence.grow(100)
            lengths.append(len(c.map()[sequence.slot]["runs"][0]["extents"]))
            sequence.grow(1)
        assert lengths[0] <= 12 < lengths[1]
        with pytest.raises(ValueError, match="prompt"):
            sequence.expect(5, prompt=-1)


@pytest.mark.parametrize("count", [6, 7])
def test_a_slot_is_not_taken_for_a_fork_of_its_own_prefix(count):
    """Also where it was used longest ago and all other slots have a prefix, too."""
    with cache(slots=8, mapper=False) as c:
        hits = 0
        for turn in range(6):
            for number in range(count):
                prefix = [1000 * number + token for token in range(200)]
                known = c.cached_positions([*prefix, 7])
                with c.open(tokens=[*prefix, 7], expected=260) as sequence:
                    assert sequence.length == known
                    hits += known == 200
                    sequence.grow(260 - known)
                    sequence.remember([*prefix, *(10_000 * (turn + 1) + token for token in range(60))])
                c.check()
        assert hits >= 10


def test_a_bare_slot_is_taken_where_nothing_of_a_parked_one_can_be_kept():
    with cache(slots=4, mapper=False) as c:
        source, tokens = c.open(), list(range(1001))
        source.grow(1001)
        source.remember(tokens)
        with c.open(slot=3) as parked:
            for _ in range(20):
                parked.grow(8)
        before = c.stats().driver_calls["unmap"]
        with c.open(tokens=[*tokens, 7, 8], expected=1010) as fork:
            assert (fork.slot != 3, fork.length) == (True, 1001)
        assert c.stats().driver_calls["unmap"] == before
