"""A fuzzer's input as a client of a service: packets and descriptors, well formed or not."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path

import msgspec
from messages import Bytes, message

from memdesc import _core
from memdesc.handover import close_all, receive_once
from memdesc.services import protocol

SEALED = _core.F_SEAL_SHRINK | _core.F_SEAL_GROW
QUESTION = 2**40
"""The id of the last request of each input."""


def memfd(seals: int, size: int = 8192) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def read_only() -> int:
    fd = memfd(SEALED)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return again


DESCRIPTORS: list[Callable[[], int]] = [
    lambda: memfd(SEALED),
    lambda: memfd(SEALED | _core.F_SEAL_SEAL),
    lambda: memfd(SEALED, 1 << 46),
    lambda: memfd(0),
    read_only,
    lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    lambda: os.open("/", os.O_RDONLY | os.O_CLOEXEC),
    lambda: os.eventfd(0),
    lambda: socket.socket(socket.AF_UNIX).detach(),
]


class Client:
    """Acts out one input. `patience`: seconds that it waits for what must come."""

    def __init__(self, path: Path, patience: float) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(patience)
        self.sock.connect(str(path))

    def act(self, data: Bytes) -> bool:
        """Do what the input says; False if the service ended the connection meanwhile."""
        try:
            if data.number() % 8:
                self.send(protocol.encode(protocol.Hello(protocol.VERSION)), [])
            while data:
                self.step(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def step(self, data: Bytes) -> None:
        kind = data.number()
        if kind < 200:
            self.send(message(data), self.descriptors(data))
        elif kind < 240:
            self.send(data.some(data.number() + 256 * data.number(2)), self.descriptors(data))
        elif kind < 248:
            self.send(bytes([data.number()]) * 1024 * data.number(130), [])
        else:
            self.read(blocking=False)

    def descriptors(self, data: Bytes) -> list[int]:
        kind = data.number()
        count = 0 if kind < 160 else 1 if kind < 240 else kind % 4 if kind < 255 else 253
        return [data.pick(DESCRIPTORS)() for _ in range(count)]

    def send(self, packet: bytes, fds: list[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self.sock.sendmsg([packet], rights, socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:  # this side's kernel does not take it
                raise
        finally:
            close_all(fds)

    def read(self, *, blocking: bool) -> bytes:
        """Take one packet; no bytes if there is none, or the service ended it."""
        before = self.sock.gettimeout()
        if not blocking:
            self.sock.setblocking(False)
        try:
            packet, fds, _ = receive_once(self.sock, protocol.MAX_MESSAGE)
        except (BlockingIOError, ConnectionResetError):
            return b""
        finally:
            self.sock.settimeout(before)
        close_all(fds)
        return packet

    def finish(self) -> None:
        """Ask one thing more, and wait for the answer or the end of the connection."""
        ask = protocol.encode(protocol.ListShares(QUESTION))
        try:
            self.send(ask, [])
            while packet := self.read(blocking=True):
                answer = msgspec.msgpack.decode(packet)
                if isinstance(answer, dict) and answer.get("id") == QUESTION:
                    return
        except (BrokenPipeError, ConnectionResetError):
            return

    def close(self) -> None:
        self.sock.close()


def run(path: Path, data: bytes, patience: float = 20) -> None:
    """Be the client that an input describes, from its connection to its end."""
    client = Client(path, patience)
    try:
        if client.act(Bytes(data)):
            client.finish()
    finally:
        client.close()
