"""Passes a sequence to another process on the same device: file descriptors of its memory over a Unix socket.

The importer sends a request with its layout. The exporter answers with a header and the descriptors, in bundles, and
waits until the importer confirms that it is done. Each message but those with descriptors is a length and JSON. A side
that fails sends the reason, and the other side raises it. Neither side trusts the other: data that is no message of
this protocol ends the transfer with an Error, and so does a transfer that takes longer in total than its timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

from vattn.arguments import shown
from vattn.errors import Error

_BUNDLE = 64  # descriptors in a message; the kernel allows 253
_LARGEST = 1 << 23  # the most bytes of a message
_MOST = 1 << 62  # the largest number in a message
_PEER = struct.Struct("3i")  # pid, uid, gid

# For each plane: the head of the run in bytes, and the bytes and the file descriptor of each of its extents.
ExportedRuns = list[tuple[int, list[tuple[int, int]]]]


class _BrokenOff(Exception):
    """The transfer cannot go on; the message says why. A timeout is a ``TimeoutError`` instead."""


class Peer:
    """The process at the other end of a connected Unix socket, for one transfer.

    Args:
        connection: the socket.
        timeout: seconds that the whole transfer may take.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self._socket = connection
        self._timeout = timeout
        self._end = time.monotonic() + timeout

    def in_time(self) -> socket.socket:
        """Returns the socket with its timeout set to the time that is left.

        Raises:
            TimeoutError: no time is left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket

    def require_same_user(self) -> None:
        _, uid, _ = _PEER.unpack(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid == -1:
            raise _BrokenOff("the socket is not connected to a process")
        if uid != os.geteuid():
            raise _BrokenOff(f"the process at the other end of the socket belongs to user {uid}, not to this one")

    def tell(self, error: BaseException) -> None:
        """Sends the reason why the transfer has failed, as far as that is possible without waiting."""
        with contextlib.suppress(OSError):
            self._socket.setblocking(False)
            self._socket.sendall(_encoded({"error": str(error)[:500]}))


def require_socket(name: str, value: Any) -> None:
    """Raises TypeError or ValueError, which name the argument, if ``value`` is no Unix stream socket."""
    if not isinstance(value, socket.socket):
        raise TypeError(f"{name} must be a connected Unix socket, not {shown(value)}")
    if value.family != socket.AF_UNIX or value.type != socket.SOCK_STREAM:
        raise ValueError(f"{name} must be a connected Unix socket, of streams, not {shown(value)}")


@contextlib.contextmanager
def telling(connection: socket.socket, timeout: float) -> Iterator[Peer]:
    """Checks that the peer belongs to this user, and sends it the reason if the block fails or takes too long.

    Yields:
        The peer.

    Raises:
        Error: the connection or the other process failed, the transfer took too long, or the user is another one.
    """
    before = connection.gettimeout()
    peer = Peer(connection, timeout)
    try:
        peer.require_same_user()
        yield peer
    except (OSError, _BrokenOff) as error:
        peer.tell(error)
        why = f"it took longer than {timeout:g} s" if isinstance(error, TimeoutError) else str(error)
        raise Error(f"the transfer of a sequence broke off: {why or type(error).__name__}") from error
    except BaseException as error:
        peer.tell(error)
        raise
    finally:
        with contextlib.suppress(OSError):
            connection.settimeout(before)


def send(peer: Peer, layout: dict[str, Any], length: int, runs: ExportedRuns) -> None:
    """Sends a sequence's memory and waits for the confirmation; called within ``telling``.

    Args:
        peer: the importer.
        layout: what the importer's cache must have in common with this one.
        length: positions of the sequence.
        runs: its memory; the caller keeps the file descriptors and closes them.

    Raises:
        ValueError: the importer's cache has another layout.
    """
    request = _receive(peer)
    wanted, name = request.get("layout"), request.get("id")
    if not isinstance(wanted, dict) or not isinstance(name, str) or len(name) > 64:
        raise _BrokenOff("what was received asks for no sequence")
    if wanted != layout:
        raise ValueError(f"the importer's cache has another layout: {_difference(wanted, layout)}")
    sizes = [(head, [nbytes for nbytes, _ in extents]) for head, extents in runs]
    _send(peer, {"to": name, "length": length, "runs": sizes})
    descriptors = [descriptor for _, extents in runs for _, descriptor in extents]
    for start in range(0, len(descriptors), _BUNDLE):
        socket.send_fds(peer.in_time(), [b"d"], descriptors[start : start + _BUNDLE])
    if _receive(peer).get("done") is not True:
        raise _BrokenOff("the importer does not say that it is done")


@contextlib.contextmanager
def received(of: socket.socket, layout: dict[str, Any], *, timeout: float) -> Iterator[tuple[int, ExportedRuns]]:
    """Receives a sequence; when the block ends without an error, confirms to the exporter that it is done.

    Yields:
        The length in positions, and the memory, whose file descriptors are closed when the block ends.
    """
    descriptors: list[int] = []
    try:
        with telling(of, timeout) as peer:
            request = os.urandom(8).hex()
            _send(peer, {"id": request, "layout": layout})
            header = _receive(peer)
            if header.get("to") != request:
                raise _BrokenOff("the exporter answers another request")
            length, sizes = _described(header)
            _receive_descriptors(peer, descriptors, sum(len(extents) for _, extents in sizes))
            left = iter(descriptors)
            yield length, [(head, [(size, next(left)) for size in extents]) for head, extents in sizes]
            with contextlib.suppress(OSError):  # the sequence is complete even if the exporter has gone
                _send(peer, {"done": True})
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _receive_descriptors(peer: Peer, descriptors: list[int], count: int) -> None:
    """Appends ``count`` received descriptors to a list, so that the caller can close them even if this raises."""
    while len(descriptors) < count:
        data, got, flags, _ = socket.recv_fds(peer.in_time(), 1, _BUNDLE, socket.MSG_CMSG_CLOEXEC)
        descriptors += got
        if flags & socket.MSG_CTRUNC:
            raise _BrokenOff("this process may not open so many files")
        if not data:
            raise _BrokenOff("the exporter has gone")
        if not got or len(descriptors) > count:
            raise _BrokenOff("what was received is not the memory that was described")


def _encoded(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    return struct.pack("!I", len(data)) + data


def _send(to: Peer, message: dict[str, Any]) -> None:
    to.in_time().sendall(_encoded(message))


def _receive(of: Peer) -> dict[str, Any]:
    (size,) = struct.unpack("!I", _exactly(of, 4))
    if size > _LARGEST:
        raise _BrokenOff(f"a message of {size} bytes is no message of vattn")
    try:
        message = json.loads(_exactly(of, size))
    except (ValueError, RecursionError) as error:
        raise _BrokenOff("what was received is no message of vattn") from error
    if not isinstance(message, dict):
        raise _BrokenOff("what was received is no message of vattn")
    if "error" in message:
        raise _BrokenOff(f"the other process says: {str(message['error'])[:500]}")
    return message


def _described(header: dict[str, Any]) -> tuple[int, list[tuple[int, list[int]]]]:
    """Returns the length from a header, and for each run its head and the sizes of its extents, in bytes."""
    runs = header.get("runs")
    if not isinstance(runs, list) or not all(
        isinstance(run, list) and len(run) == 2 and isinstance(run[1], list) for run in runs
    ):
        raise _BrokenOff("what was received describes no sequence")
    return _count(header.get("length")), [(_count(head), list(map(_count, extents))) for head, extents in runs]


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST:
        raise _BrokenOff("what was received describes no sequence")
    return value


def _exactly(of: Peer, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = of.in_time().recv(min(size - len(data), 1 << 20))
        if not more:
            raise _BrokenOff("the other process has gone")
        data += more
    return bytes(data)


def _difference(wanted: dict[str, Any], layout: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} is {shown(wanted.get(key))} there and {shown(layout[key])} here"
        for key in layout
        if wanted.get(key) != layout[key]
    )
