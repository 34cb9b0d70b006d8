"""Handing a sequence to another process on the same device: file descriptors of its memory over a Unix socket.

The importer says what it takes, the exporter sends what there is: a header, the descriptors in bundles, and both say
when they are done. Each message but the descriptors' is a length and JSON. Whoever fails says why, and the other raises
it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

from vattn.arguments import shown
from vattn.errors import Error

_BUNDLE = 64  # descriptors in a message; the kernel takes 253
_LARGEST = 1 << 26  # bytes of a message
_PEER = struct.Struct("3i")  # pid, uid, gid

ExportedRuns = list[tuple[int, list[tuple[int, int]]]]


def require_socket(name: str, value: Any) -> None:
    """Raises TypeError or ValueError, with the argument's name, where it is no Unix socket."""
    if not isinstance(value, socket.socket):
        raise TypeError(f"{name} must be a connected Unix socket, not {shown(value)}")
    if value.family != socket.AF_UNIX or value.type != socket.SOCK_STREAM:
        raise ValueError(f"{name} must be a connected Unix socket, of streams, not {shown(value)}")


@contextlib.contextmanager
def telling(to: socket.socket, timeout: float) -> Iterator[None]:
    """Within it the peer is this user's, nothing takes longer than the timeout, and a failure here is told there."""
    before = to.gettimeout()
    to.settimeout(timeout)
    try:
        _, uid, _ = _PEER.unpack(to.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != os.geteuid():
            raise PermissionError(f"the process at the other end of the socket belongs to user {uid}, not to this one")
        yield
    except (OSError, EOFError, KeyError) as error:
        with contextlib.suppress(OSError):
            _send(to, {"error": str(error)})
        raise Error(f"the transfer of a sequence broke off: {error or type(error).__name__}") from error
    except BaseException as error:
        with contextlib.suppress(OSError):
            _send(to, {"error": str(error)})
        raise
    finally:
        with contextlib.suppress(OSError):
            to.settimeout(before)


def send(to: socket.socket, layout: dict[str, Any], length: int, runs: ExportedRuns) -> None:
    """Sends a sequence's memory; the descriptors stay the caller's. To be called within ``telling``."""
    request = _receive(to)
    if (wanted := request["layout"]) != layout:
        raise ValueError(f"the importer's cache has another layout: {_difference(wanted, layout)}")
    sizes = [(head, [nbytes for nbytes, _ in extents]) for head, extents in runs]
    _send(to, {"to": request["id"], "length": length, "runs": sizes})
    descriptors = [descriptor for _, extents in runs for _, descriptor in extents]
    for start in range(0, len(descriptors), _BUNDLE):
        socket.send_fds(to, [b"d"], descriptors[start : start + _BUNDLE])
    _receive(to)


@contextlib.contextmanager
def received(of: socket.socket, layout: dict[str, Any], *, timeout: float) -> Iterator[tuple[int, ExportedRuns]]:
    """The length and the memory of a sequence; when the block ends well, the exporter is told.

    The descriptors are closed at the end of the block.
    """
    descriptors: list[int] = []
    try:
        with telling(of, timeout):
            request = os.urandom(8).hex()
            _send(of, {"id": request, "layout": layout})
            header = _receive(of)
            if header["to"] != request:
                raise OSError("the exporter answers another request")
            length, sizes = _described(header)
            missing = sum(len(extents) for _, extents in sizes)
            while missing > 0:
                data, got, flags, _ = socket.recv_fds(of, 1, _BUNDLE, socket.MSG_CMSG_CLOEXEC)
                descriptors += got
                if flags & socket.MSG_CTRUNC:
                    raise OSError("this process may not open so many files")
                missing -= len(got)
                if not data or not got:
                    raise EOFError("the exporter has gone")
            left = iter(descriptors)
            yield length, [(head, [(size, next(left)) for size in extents]) for head, extents in sizes]
            with contextlib.suppress(OSError):  # the sequence is whole, also when the exporter has gone
                _send(of, {"done": True})
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _send(to: socket.socket, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode()
    to.sendall(struct.pack("!I", len(data)) + data)


def _receive(of: socket.socket) -> dict[str, Any]:
    (size,) = struct.unpack("!I", _exactly(of, 4))
    if size > _LARGEST:
        raise OSError(f"a message of {size} bytes is no message of vattn")
    try:
        message: dict[str, Any] = dict(json.loads(_exactly(of, size)))
    except (ValueError, TypeError) as error:
        raise OSError("what was received is no message of vattn") from error
    if "error" in message:
        raise OSError(f"the other process says: {message['error']}")
    return message


def _described(header: dict[str, Any]) -> tuple[int, list[tuple[int, list[int]]]]:
    """The length, and of each run the head and the bytes of its extents."""
    try:
        length = int(header["length"])
        sizes = [(int(head), [int(nbytes) for nbytes in extents]) for head, extents in header["runs"]]
    except (ValueError, TypeError) as error:
        raise OSError("what was received describes no sequence") from error
    if length < 0 or any(head < 0 or any(nbytes < 1 for nbytes in extents) for head, extents in sizes):
        raise OSError("what was received describes no sequence")
    return length, sizes


def _exactly(of: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = of.recv(size - len(data))
        if not more:
            raise EOFError("the other process has gone")
        data += more
    return data


def _difference(wanted: dict[str, Any], layout: dict[str, Any]) -> str:
    return ", ".join(
        f"{key} is {wanted.get(key)} there and {layout[key]} here" for key in layout if wanted.get(key) != layout[key]
    )
