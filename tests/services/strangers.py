"""Strangers: raw sockets that speak the protocol by hand, well or badly."""

from __future__ import annotations

import array
import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from memdesc import _core
from memdesc.handover import close_all, receive_once
from memdesc.services import protocol


class Stranger:
    """One end of a connection, without the library behind it."""

    def __init__(self, path: Path | None = None, sock: socket.socket | None = None) -> None:
        self.sock = sock or socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if path is not None:
            self.sock.connect(str(path))  # waits where the backlog is full
        self.sock.settimeout(20)

    def greet(self) -> Stranger:
        self.send(protocol.Hello(protocol.VERSION))
        assert isinstance(self.receive()[0], protocol.Welcome)
        return self

    def send(self, message: Any, fds: list[int] | None = None) -> None:
        data = message if isinstance(message, bytes) else protocol.encode(message)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights, socket.MSG_NOSIGNAL)

    def receive(self) -> tuple[Any, list[int]]:
        data, fds, _ = receive_once(self.sock, protocol.MAX_MESSAGE)
        if not data:
            raise ConnectionResetError("the other side ended the connection")
        return protocol.decode(data), fds

    def answer(self, message: Any) -> Any:
        """Send, and give the answer; descriptors of it are closed."""
        self.send(message)
        reply, fds = self.receive()
        close_all(fds)
        return reply

    def is_ended(self) -> bool:
        """Wait for the other side to end it; False if it sends something instead."""
        try:
            data, fds, _ = receive_once(self.sock, protocol.MAX_MESSAGE)
        except ConnectionResetError:
            return True
        close_all(fds)
        return not data

    def close(self) -> None:
        self.sock.close()

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def memfd(size: int, *, seals: int = _core.F_SEAL_SHRINK | _core.F_SEAL_GROW) -> int:
    """Make a sparse memfd with these seals."""
    fd = os.memfd_create("stranger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def push(pieces: list[tuple[int, int, int]], **fields: Any) -> protocol.PushMapping:
    """A message that asks to map; what is not said is as usual."""
    usual: dict[str, Any] = {
        "id": 1,
        "token": 1,
        "name": "",
        "writable": False,
        "pieces": tuple(pieces),
        "offset": 0,
        "at_address": None,
        "guard_pages": 0,
        "prefault": False,
    }
    return protocol.PushMapping(**{**usual, **fields})


@contextmanager
def service_that(answers: Callable[[Stranger], None], path: Path) -> Iterator[None]:
    """Listen; do as told with the first client, after its greeting was received."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with Stranger(sock=listener.accept()[0]) as one:
            try:
                assert one.receive()[0] == protocol.Hello(protocol.VERSION)
                answers(one)
                while not one.is_ended():
                    pass
            except OSError:  # the client let go
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        listener.close()
        thread.join(30)
        path.unlink()
        assert not thread.is_alive()


def welcome(one: Stranger) -> None:
    one.send(protocol.Welcome(protocol.VERSION, "camera"))
