"""A sequence handed to another process: its rows, its memory, and either process's death at every step."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from vattn import BudgetExceeded, Error, KVCache, KVLayout
from vattn.memory import ipc

PAGE = 4096


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """Closes the sockets and processes that a test leaves open."""
    with contextlib.ExitStack() as stack:

        def pair(original=socket.socketpair):
            here, there = original()
            return stack.enter_context(here), stack.enter_context(there)

        def popen(*args, original=subprocess.Popen, **options):
            return stack.enter_context(original(*args, **options))

        monkeypatch.setattr(socket, "socketpair", pair)
        monkeypatch.setattr(subprocess, "Popen", popen)
        yield


def layout(device="cpu", **options):
    granularity = PAGE if device == "cpu" else 2 * 1024 * 1024
    options = {"max_len": 200_000, "granularity": granularity, "kv_heads": 1, **options}
    return KVLayout.uniform(layers=1, head_dim=64, dtype="float32", **options)


def cache(device="cpu", **options):
    return KVCache(layout(device), slots=4, device=device, **{"exportable": True, "lookahead": 0, **options})


def write(sequence, n, value=0):
    start = sequence.length
    sequence.grow(n)
    sequence.k(0)[start:] = torch.arange(start, start + n).reshape(-1, 1, 1).to(sequence.k(0)) + value


def rows(sequence):
    return sequence.k(0)[:, 0, 5].tolist()


# The other process. It imports a sequence, prints what it has found, and then obeys lines from its standard input.
IMPORTER = textwrap.dedent(
    """
    import os, signal, socket, sys, torch
    sys.path.insert(0, sys.argv[3])
    from tests.test_export import cache, write, rows
    from vattn.memory import ipc
    of = socket.socket(fileno=int(sys.argv[1]))
    device, die_at = sys.argv[2], sys.argv[4]
    c = cache(device, exportable=False)

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if die_at == "start":
        die()
    if die_at == "header":
        ipc._send = die
    elif die_at == "descriptors":
        received = ipc._receive
        ipc._receive = lambda of: (received(of), die())
    elif die_at == "done":
        c._arena.__class__.import_rows = die
    s = c.import_sequence(of, timeout=20)
    print(sum(rows(s)), s.length, flush=True)
    if die_at == "end":
        die()
    for line in sys.stdin:
        if line == "append\\n":
            write(s, 100, value=7)
            s.truncate(50)
            write(s, 10)
        torch.cuda.synchronize() if device == "cuda" else None
        print(sum(rows(s)), s.length, flush=True)
    c.check()
    s.close()
    c.trim()
    assert c.stats().physical == 0
    assert c.driver.reports == 0
    print("gone", flush=True)
    """
)


def importer(device, die_at="never"):
    here, there = socket.socketpair()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            IMPORTER,
            str(there.fileno()),
            device,
            os.path.dirname(os.path.dirname(__file__)),
            die_at,
        ],
        pass_fds=[there.fileno()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    there.close()
    return here, process


def told(process, line=None):
    if line is not None:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return process.stdout.readline().split()


def test_another_process_reads_the_rows_and_goes_on(device):
    c = cache(device)
    s = c.open()
    write(s, 20_001)
    total = sum(range(20_001))
    to, process = importer(device)
    s.export(to)
    assert told(process) == [str(float(total)), "20001"]
    # Both processes write on, and neither sees what the other writes.
    s.truncate(100)
    write(s, 19_901, value=3)
    assert told(process, "look") == [str(float(total)), "20001"]
    assert told(process, "append") == [str(float(sum(range(60)))), "60"]
    assert rows(s) == [*range(100), *[x + 3.0 for x in range(100, 20_001)]]
    s.close()
    c.trim()
    assert c.stats().physical == 0
    process.stdin.close()
    assert told(process) == ["gone"]
    assert process.wait(60) == 0
    c.check()


def test_the_exporters_death_leaves_the_importer_whole(device):
    exporter = textwrap.dedent(
        """
        import os, signal, socket, sys
        sys.path.insert(0, sys.argv[3])
        from tests.test_export import cache, write
        to = socket.socket(fileno=int(sys.argv[1]))
        c = cache(sys.argv[2])
        s = c.open()
        write(s, 5000)
        s.export(to)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    here, there = socket.socketpair()
    root = os.path.dirname(os.path.dirname(__file__))
    process = subprocess.Popen(
        [sys.executable, "-c", exporter, str(there.fileno()), device, root], pass_fds=[there.fileno()]
    )
    there.close()
    c = cache(device, exportable=False)
    s = c.import_sequence(here, timeout=60)
    assert process.wait(60) == -signal.SIGKILL
    assert rows(s) == list(range(5000))
    write(s, 10)
    [fork] = s.fork(share="alias")
    s.truncate(2)
    write(s, 3)
    assert rows(fork) == list(range(5010))
    assert rows(s) == list(range(5))
    c.check()
    c.close()


@pytest.mark.thorough(1)
@pytest.mark.parametrize("die_at", ["start", "header", "descriptors", "done", "end"])
def test_the_importers_death_at_any_step_leaves_the_exporter_whole(device, die_at):
    c = cache(device)
    s = c.open()
    write(s, 3000)
    before = c.stats()
    gc.collect()  # closes files of earlier tests
    files = len(os.listdir("/proc/self/fd"))
    to, process = importer(device, die_at)
    if die_at == "end":
        s.export(to)
    else:
        with pytest.raises(Error, match="the transfer of a sequence broke off"):
            s.export(to)
    assert process.wait(60) == -signal.SIGKILL
    to.close()
    process.stdin.close()
    process.stdout.close()
    assert len(os.listdir("/proc/self/fd")) == files
    assert c.stats().running_slots == 1
    assert rows(s) == list(range(3000))
    write(s, 10)
    s.close()
    c.trim()
    assert c.stats().physical == 0
    assert before.physical > 0
    if device == "cuda":
        free = c.driver.memory_info()[0]
        other = cache(device)
        other.open().grow(3000)
        other.close()
        assert abs(c.driver.memory_info()[0] - free) < 64 * 1024 * 1024
    c.check()


def exchange(exporting, importing):
    """Runs both ends in one process, the exporter in a thread.

    Returns:
        What the importer returned, what it raised, and what the exporter raised; None for each that there is not.
    """
    import threading

    here, there = socket.socketpair()
    caught = []

    def run():
        try:
            exporting(there)
        except Exception as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    result = error = None
    try:
        result = importing(here)
    except Exception as raised:
        error = raised
    thread.join(60)
    assert not thread.is_alive()
    here.close()
    there.close()
    return result, error, caught[0] if caught else None


def test_what_does_not_fit_is_told_to_both():
    c = cache()
    s = c.open()
    write(s, 500)
    other = KVCache(layout(kv_heads=2), slots=2)
    _, here, there = exchange(s.export, other.import_sequence)
    assert "the importer's cache has another layout: layers is" in str(there)
    assert isinstance(here, Error)
    assert "another layout" in str(here)
    small = cache(budget=10 * PAGE)
    _, here, there = exchange(s.export, small.import_sequence)
    assert isinstance(here, BudgetExceeded)
    assert "the budget is spent" in str(there)
    assert small.stats().running_slots == 0
    small.wait_idle()
    assert small.stats().physical == 0
    short = KVCache(layout(max_len=100), slots=2)
    _, here, there = exchange(s.export, short.import_sequence)
    assert "max_len" in str(here)
    assert "max_len" in str(there)
    got, here, there = exchange(s.export, cache().import_sequence)
    assert here is there is None
    assert rows(got) == list(range(500))
    for one in (c, other, small, short, got.cache):
        one.check()


def test_what_is_parked_makes_room_for_an_import():
    c, other = cache(), cache(budget=100 * PAGE)
    s = c.open()
    write(s, 500)
    parked = other.open()
    parked.grow(700)
    parked.close()
    got, here, there = exchange(s.export, other.import_sequence)
    assert here is there is None
    assert rows(got) == list(range(500))
    other.check()


@pytest.mark.parametrize("message", [b"no json", b"[]", b"5", b'{"to": "x"}'])
def test_what_is_no_message_is_told(message):
    c = cache()
    here, there = socket.socketpair()
    there.sendall(len(message).to_bytes(4, "big") + message)
    with pytest.raises(Error, match="broke off"):
        c.import_sequence(here, timeout=1)
    assert c.stats().running_slots == 0


def test_silence_and_nonsense_end():
    c = cache()
    s = c.open()
    here, there = socket.socketpair()
    with pytest.raises(Error, match=r"broke off: it took longer than 0\.05 s"):
        c.import_sequence(here, timeout=0.05)
    with pytest.raises(Error, match="broke off"):
        s.export(there, timeout=0.05)  # reads what the importer had sent before it gave up
    with pytest.raises(Error, match="answers another request"):
        c.import_sequence(here, timeout=0.05)
    here, there = socket.socketpair()
    there.sendall(b"\xff" * 100)
    with pytest.raises(Error, match="is no message of vattn"):
        c.import_sequence(here, timeout=1)
    there.close()
    assert c.stats().running_slots == 1
    with pytest.raises(ValueError, match="exportable=True"):
        cache(exportable=False).open().export(here)
    c.check()


def test_only_the_same_user_is_served(monkeypatch):
    c = cache()
    here, _ = socket.socketpair()
    uid = os.geteuid()
    monkeypatch.setattr(ipc.os, "geteuid", lambda: uid + 1)
    with pytest.raises(Error, match=f"belongs to user {uid}"):
        c.import_sequence(here)
    c.check()


def test_a_refused_import_loses_nothing():
    k = 0
    while True:
        k += 1
        c, other = cache(), cache(mapper=False)
        s = c.open()
        write(s, 300)
        other.driver.fail_at(k)
        got, here, there = exchange(s.export, other.import_sequence)
        other.driver.fail_at(0)
        assert (here is None) == (there is None)
        if got:
            assert rows(got) == list(range(300))
            got.close()
        other.trim()
        assert other.stats().physical == 0
        other.check()
        c.check()
        if got:
            break
    assert k > 3
