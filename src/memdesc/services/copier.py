"""Copying through a connection: what copyin and copyout fall back to where the kernel denies them.

The other side copies from or into its own memory for us, if its program said `allow_copy=True`:
the kernel denied us that memory, and only its task may decide otherwise. It reads and writes as
copyin of its own memory does, so a bad address is EFAULT there, never a crash.
"""

from __future__ import annotations

import errno
import os
import weakref
from typing import TYPE_CHECKING, Any

from memdesc import _core
from memdesc.errors import AccessDeniedError, PeerGoneError
from memdesc.services import protocol

if TYPE_CHECKING:
    from memdesc.services.requests import Requester

_TIMEOUT = 5.0


class PeerCopier:
    """A connection as a `memdesc.copyio.Copier`. Holds it weakly: it must not keep it open."""

    def __init__(self, channel: Requester) -> None:
        self._channel = weakref.ref(channel)

    def read(self, address: int, buffer: memoryview) -> int:
        """Have the peer read its memory; fewer bytes than asked for where a page is missing."""
        done = 0
        while done < len(buffer):
            most = min(len(buffer) - done, protocol.MAX_COPY)
            data = self._read(address + done, most)[:most]
            buffer[done : done + len(data)] = data
            done += len(data)
            if len(data) < most:
                break
        return done

    def write(self, address: int, data: memoryview) -> int:
        """Have the peer write its memory; fewer bytes than given where a page is missing."""
        done = 0
        while done < len(data):
            part = bytes(data[done : done + protocol.MAX_COPY])
            written = min(self._write(address + done, part), len(part))
            done += written
            if written < len(part):
                break
        return done

    def _read(self, address: int, nbytes: int) -> bytes:
        channel = self._connected()
        question = protocol.ReadMemory(channel.next_id(), address, nbytes)
        return channel.request(question, protocol.MemoryRead, timeout=_TIMEOUT)[0].data

    def _write(self, address: int, data: bytes) -> int:
        channel = self._connected()
        question = protocol.WriteMemory(channel.next_id(), address, data)
        return channel.request(question, protocol.MemoryWritten, timeout=_TIMEOUT)[0].nbytes

    def _connected(self) -> Requester:
        channel = self._channel()
        if channel is None:
            raise PeerGoneError("the connection was dropped", errno=errno.ECONNRESET)
        return channel


def read_own(message: protocol.ReadMemory, *, allowed: bool) -> tuple[Any, list[int]]:
    """Answer a peer that wants our memory."""
    _check_allowed(allowed)
    room = bytearray(message.nbytes)
    return protocol.MemoryRead(
        message.id, bytes(room[: _copied(message.address, room, read=True)])
    ), []


def write_own(message: protocol.WriteMemory, *, allowed: bool) -> tuple[Any, list[int]]:
    """Answer a peer that wants to write our memory."""
    _check_allowed(allowed)
    written = _copied(message.address, message.data, read=False)
    return protocol.MemoryWritten(message.id, written), []


def _check_allowed(allowed: bool) -> None:
    if not allowed:
        raise AccessDeniedError(
            f"task {os.getpid()} lets no one copy its memory through the connection: the kernel "
            "denied it, and its program did not say allow_copy=True",
            errno=errno.EACCES,
        )


def _copied(address: int, data: bytes | bytearray, *, read: bool) -> int:
    call = _core.process_vm_readv if read else _core.process_vm_writev
    try:
        return call(os.getpid(), data, address) if data else 0
    except OSError as error:
        if error.errno == errno.EFAULT:
            return 0
        raise
