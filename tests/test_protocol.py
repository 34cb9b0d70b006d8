"""Whatever a hostile or broken peer sends, a transfer ends in time with a ``vattn.Error``, and leaks nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time

import protocol
import pytest

from vattn import Error

INPUTS = int(os.environ.get("VATTN_TEST_PROTOCOL_INPUTS", "10000"))


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.thorough
@pytest.mark.frees
def test_ten_thousand_inputs():
    protocol.run(10, seed=99)  # opens the descriptors that stay open
    gc.collect()
    before = descriptors()
    outcomes = protocol.run(INPUTS, seed=1)
    assert sum(outcomes.values()) == INPUTS
    assert all(outcomes.values())  # the valid inputs among them are imported and exported
    gc.collect()
    assert descriptors() == before


@pytest.mark.parametrize("given", protocol.corpus(), ids=lambda given: given.name)
def test_inputs_that_once_broke(given):
    peers = protocol.Peers()
    with protocol.fixed_names():
        peers.meet(given)  # fills the pool, whose memory has descriptors too
        before = descriptors()
        result = peers.meet(given)
    assert isinstance(result, str)
    assert result != "exported"
    assert descriptors() == before
    peers.importer.check()
    peers.exporter.check()
    peers.close()


def test_valid_inputs_go_through():
    peers = protocol.Peers()
    with protocol.fixed_names():
        assert peers.meet(peers.valid("export")) == "exported"
        peers.read(peers.meet(peers.valid("import")))
    peers.close()


@pytest.mark.parametrize("side", ["import", "export"])
def test_a_peer_that_drips_is_given_up_in_time(side):
    peers = protocol.Peers()
    here, there = socket.socketpair()
    done = threading.Event()

    def drip():
        data = protocol.message({"to": "x" * 1000, "id": "x", "layout": {}})
        for i in range(len(data)):
            if done.wait(0.05):
                return
            there.sendall(data[i : i + 1])

    thread = threading.Thread(target=drip)
    thread.start()
    meet = peers.importer.import_sequence if side == "import" else peers.sequence.export
    start = time.monotonic()
    try:
        with pytest.raises(Error, match=r"it took longer than 0\.4 s"):
            meet(here, timeout=0.4)
    finally:
        done.set()
        thread.join()
    assert time.monotonic() - start < 5  # a byte comes every 0.05 s, for a minute
    here.close()
    there.close()
    peers.close()


def test_a_peer_that_does_not_read_is_given_up_in_time():
    peers = protocol.Peers()
    here, there = socket.socketpair()
    here.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while here.send(b"x" * 65536):
            pass
    here.setblocking(True)
    with pytest.raises(Error, match=r"it took longer than 0\.2 s"):
        peers.importer.import_sequence(here, timeout=0.2)
    assert here.gettimeout() is None
    here.close()
    there.close()
    peers.close()


def test_an_exporter_that_cuts_its_memory_short_harms_nobody():
    """If the exporter could truncate its memory, reading the rows would crash the importer."""
    code = textwrap.dedent(
        """
        import fcntl, os, socket, threading
        import torch
        import protocol
        peers = protocol.Peers()
        with protocol.fixed_names():
            sequence = peers.meet(peers.valid("import"))
            for kind in ("memory", "unsealed"):
                try:
                    os.ftruncate(peers.files[kind], 0)
                except PermissionError:
                    assert kind == "memory"
            peers.read(sequence)
            # The same of memory that vattn exports: who gets it cannot cut it short.
            here, there = socket.socketpair()
            result = []
            thread = threading.Thread(target=lambda: result.append(peers.importer.import_sequence(there)))
            thread.start()
            peers.sequence.export(here)
            thread.join()
            runs = peers.exporter._arena.export_rows(peers.sequence.handle.name, 0)
            for _, extents in runs:
                for _, file in extents:
                    try:
                        os.ftruncate(file, 0)
                    except PermissionError:
                        pass
                    else:
                        raise AssertionError("exported memory could be cut short")
                    os.close(file)
            assert bool((result[0].k(0) == 1).all())
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=os.path.dirname(__file__))
