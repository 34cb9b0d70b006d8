"""Valid and broken inputs of the protocol that transfers sequences between processes, to test both of its ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import socket
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vattn import Error, KVCache, KVLayout, Sequence
from vattn.memory import ipc

PAGE = 4096
LENGTH = 40  # positions of the exported sequence; its rows take 3 pages in a single plane
NAME = "00" * 8  # the id of every request within ``fixed_names``
CORPUS = Path(__file__).parent / "corpus" / "protocol.json"


@dataclass
class Input:
    """What a peer sends.

    Attributes:
        side: the end that receives it, ``"import"`` or ``"export"``.
        items: in order, bytes, or the file descriptors that are sent together, as keys of ``Peers.files``.
        name: the id of the test, for inputs of the corpus.
    """

    side: str
    items: list[bytes | list[str]] = field(default_factory=list)
    name: str = ""


def cache(**options: Any) -> KVCache:
    layout = KVLayout.uniform(
        layers=2, kv_heads=1, head_dim=16, max_len=1000, granularity=PAGE, dtype="float32", **options
    )
    return KVCache(layout, slots=2, exportable=True, mapper=False, budget=64 * PAGE)


def message(value: Any) -> bytes:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("!I", len(data)) + data


class Peers:
    """Both ends of the protocol in one process, and file descriptors to send."""

    def __init__(self) -> None:
        self.importer, self.exporter = cache(), cache()
        self.sequence = self.exporter.open()
        self.sequence.grow(LENGTH)
        self.sequence.k(0)[:] = 1
        self.layout = self.exporter._slots.exported_layout()
        self.extents = self.exporter.map()[self.sequence.slot]["runs"][0]["extents"]
        self.files = {"memory": self._memory(), "unsealed": self._memory(sealed=False), "short": self._memory(1)}
        self.files["long"] = self._memory(8)
        self.files["write-sealed"] = self._memory(more=fcntl.F_SEAL_WRITE)
        self.files["file"] = os.open(__file__, os.O_RDONLY)
        self.files["null"] = os.open("/dev/null", os.O_RDWR)
        self.files["folder"] = os.open("/", os.O_RDONLY)
        self.files["pipe"], self._other = os.pipe()

    def close(self) -> None:
        for file in (*self.files.values(), self._other):
            os.close(file)
        self.importer.close()
        self.exporter.close()

    def _memory(self, pages: int | None = None, *, sealed: bool = True, more: int = 0) -> int:
        file = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.posix_fallocate(file, 0, self.extents[0] if pages is None else pages * PAGE)
        if sealed:
            fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL | more)
        return file

    def header(self) -> dict[str, Any]:
        """Returns the header for a sequence of ``LENGTH`` positions, each of whose extents is a ``memory`` file."""
        count = -(-LENGTH * self.importer.layout.planes[0].row_bytes // self.extents[0])
        return {"to": NAME, "length": LENGTH, "runs": [[0, [self.extents[0]] * count]]}

    def valid(self, side: str) -> Input:
        if side == "export":
            return Input(side, [message({"id": NAME, "layout": self.layout}), message({"done": True})])
        header = self.header()
        return Input(side, [message(header), ["memory"] * len(header["runs"][0][1])])

    def meet(self, given: Input, timeout: float = 20) -> Sequence | str:
        """Gives an input to the end that it is meant for.

        Returns:
            The imported sequence, ``"exported"``, or the text of a ``vattn.Error`` or of the refusal of another layout.

        Raises:
            Exception: the end raised any other exception.
        """
        here, there = socket.socketpair()
        with here, there:
            there.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                for item in given.items:
                    if isinstance(item, bytes):
                        there.sendall(item)
                    else:
                        socket.send_fds(there, [b"d"], [self.files[kind] for kind in item])
            there.shutdown(socket.SHUT_WR)
            try:
                if given.side == "import":
                    return self.importer.import_sequence(here, timeout=timeout)
                self.sequence.export(here, timeout=timeout)
                return "exported"
            except Error as error:
                return f"{type(error).__name__}: {error}"
            except ValueError as error:
                if "the importer's cache has another layout" in str(error):
                    return str(error)
                raise

    def read(self, sequence: Sequence) -> None:
        """Reads all rows of an imported sequence, which crashes the process if a row has no memory, and closes it."""
        assert sequence.length <= 1000
        for layer in range(2):
            torch.stack([sequence.k(layer), sequence.v(layer)]).sum()
        sequence.close()


WEIRD: list[Any] = [
    None, True, False, -1, 0, 1, 2**31, 2**62, 2**63, 2**64, 2**70, 10**400, 0.5, float("inf"), float("nan"), -0.0, "",
    "x", NAME, "9" * 5000, "\ud800", [], [[]], [0], [[0, []]], [[0, [PAGE]]], [[0, [0]]], {}, {"error": 3},
    {"to": NAME}, [None] * 300, [[0, [1]] * 50], "e" * 70000,
]  # fmt: skip


def _somewhere(value: Any, chance: random.Random, change: Any) -> Any:
    """Returns a copy of a JSON value in which ``change`` has replaced a part chosen at random, or the whole value."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        return {**value, key: _somewhere(value[key], chance, change)}
    if isinstance(value, list) and value and chance.random() < 0.75:
        at = chance.randrange(len(value))
        return [*value[:at], _somewhere(value[at], chance, change), *value[at + 1 :]]
    return change(value)


def mutated(peers: Peers, chance: random.Random) -> Input:
    """Returns a valid input with random mutations. One in a hundred is left valid."""
    side = chance.choice(["import", "import", "export"])
    given = peers.valid(side)
    if chance.random() < 0.01:
        return given
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        at = chance.randrange(len(given.items))
        item = given.items[at]
        kind = chance.randrange(9)
        if isinstance(item, list):
            if kind < 3:
                given.items[at] = item[: chance.randrange(len(item) + 1)]
            elif kind < 5:
                given.items[at] = item + chance.choices(list(peers.files), k=chance.randrange(1, 70))
            else:
                given.items[at] = [chance.choice(list(peers.files)) if chance.random() < 0.5 else f for f in item]
            given.items[at] = given.items[at] or b"d"
        elif kind < 4:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(item[4:])
                given.items[at] = message(_somewhere(value, chance, lambda _: chance.choice(WEIRD)))
        elif kind == 4:
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(item[4:])
                if isinstance(value, dict) and value:
                    value.pop(chance.choice(list(value)))
                given.items[at] = message(value)
        elif kind == 5:
            raw = bytearray(item)
            for _ in range(chance.randrange(1, 6)):
                if raw:
                    raw[chance.randrange(len(raw))] = chance.randrange(256)
            given.items[at] = bytes(raw)
        elif kind == 6:
            given.items[at] = item[: chance.randrange(len(item) + 1)]
        elif kind == 7:
            depth = chance.choice([10, 1000, 100_000])
            given.items[at] = message(chance.choice([b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth]))
        else:
            extra = chance.choice([chance.randbytes(chance.randrange(200)), *given.items])
            given.items.insert(chance.randrange(len(given.items) + 1), extra)
    return given


def corpus() -> list[Input]:
    """Returns the inputs that once raised an unexpected exception or crashed the process."""
    return [
        Input(
            entry["side"],
            [i if isinstance(i, list) else message(i.encode()) for i in entry["items"]],
            entry["name"],
        )
        for entry in json.loads(CORPUS.read_text())
    ]


@contextlib.contextmanager
def fixed_names() -> Any:
    """Within this context all requests have the same id, ``NAME``, so that inputs made beforehand can answer them."""
    before, ipc.os = ipc.os, _Named()
    try:
        yield
    finally:
        ipc.os = before


class _Named:
    """The module ``os``, except that its random bytes are zeros."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def urandom(self, count: int) -> bytes:
        return bytes(count)


def run(count: int, seed: int) -> dict[str, int]:
    """Gives ``count`` random inputs to the two ends, and returns how many were imported, exported and refused.

    Raises:
        AssertionError: an input had any other outcome.
    """
    chance, outcomes = random.Random(seed), {"imported": 0, "exported": 0, "refused": 0}
    peers = Peers()
    with fixed_names():
        for index in range(count):
            given = mutated(peers, chance)
            try:
                result = peers.meet(given)
                if isinstance(result, Sequence):
                    peers.read(result)
            except Exception as error:
                raise AssertionError(f"input {index} of seed {seed}: {given}") from error
            outcome = "imported" if isinstance(result, Sequence) else result if result == "exported" else "refused"
            outcomes[outcome] += 1
            if index % 500 == 499:
                peers.importer.check()
                peers.exporter.check()
    assert peers.importer.stats().running_slots == 0
    assert peers.exporter.stats().running_slots == 1
    peers.importer.trim()
    assert peers.importer.stats().physical == 0
    peers.close()
    return outcomes
