"""Descriptors over Unix sockets of the program's own.

A message is one send with all descriptors: ``b"mdsc"``, the header's length (u32, little endian),
the header.
"""

from __future__ import annotations

import array
import errno
import socket as sockets
import struct
from collections.abc import Sequence

from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import (
    InvalidArgument,
    PeerGoneError,
    ProtocolError,
    TimedOutError,
    describe_errno,
)
from memdesc.handover.forms import MAX_OBJECTS, pack, portable_type, unpack
from memdesc.memory.closing import check_held_up, close_all, discard
from memdesc.vm.pages import Access
from memdesc.vm.task import peer_credentials

MAX_HEADER = 128 << 10
_PREFIX = struct.Struct("<4sI")
_MAGIC = b"mdsc"


def send_descriptor(
    sock: sockets.socket,
    descriptor: MemoryDescriptor,
    *,
    access: Access | None = None,
    enforced: bool = True,
) -> None:
    """Hand a descriptor to whoever holds the other end of a Unix stream or seqpacket socket.

    Parameters
    ----------
    sock : socket.socket
        Connected, AF_UNIX; blocking, or with its own timeout.
    descriptor : MemoryDescriptor
        Stays ours; what the receiver gets is a descriptor of the same pages.
    access : Access, optional
        What the receiver may do; by default the most that `max_access` allows.
    enforced : bool
        False accepts a read-only grant of READ_WRITE memory as a courtesy.

    Raises
    ------
    SealedError, MappingError
        It can not be granted so; nothing was sent.
    PeerGoneError
        EPIPE, ECONNRESET.
    TimedOutError
        The socket's timeout ran out.

    Notes
    -----
    Linux: sendmsg with SCM_RIGHTS. The receiver's user is read from SO_PEERCRED.
    """
    import msgspec

    _check_socket(sock)
    portable, fds = pack(descriptor, access, enforced=enforced, user=peer_credentials(sock)[1])
    try:
        header = msgspec.msgpack.encode(portable)
        send_with_fds(sock, _PREFIX.pack(_MAGIC, len(header)) + header, fds)
    finally:
        close_all(fds)


def _check_socket(sock: object) -> None:
    if not isinstance(sock, sockets.socket):
        raise InvalidArgument(
            f"sock is of type {type(sock).__name__}: give a connected socket.socket of AF_UNIX "
            "(socket.socket(fileno=…) makes one of a descriptor)",
            errno=errno.EINVAL,
        )


def receive_descriptor(sock: sockets.socket) -> ReceivedMemoryDescriptor:
    """Take the descriptor that the other end sent by `send_descriptor`.

    Raises
    ------
    ProtocolError
        What came is not of the protocol: wrong header, fewer or more descriptors than it says,
        objects too small. Everything that came was closed.
    MappingError
        CAN_SHRINK: an object without the seals that keep its pages there.
    AccessDeniedError
        Tasks of the peer's user sent files that can not be closed, and too many of them (EDQUOT).
    PeerGoneError, TimedOutError
    """
    import msgspec

    from memdesc.portable import UNREADABLE

    _check_socket(sock)
    user = peer_credentials(sock)[1]
    data, fds = receive_with_fds(sock, _PREFIX.size + MAX_HEADER, _PREFIX.size)
    try:
        magic, length = _PREFIX.unpack_from(data)
        if magic != _MAGIC or length > MAX_HEADER or len(data) > _PREFIX.size + length:
            raise ProtocolError(
                f"what came does not begin as a descriptor does ({data[:8]!r})", errno=errno.EPROTO
            )
        while len(data) < _PREFIX.size + length:
            more, extra = receive_with_fds(sock, _PREFIX.size + length - len(data), 1)
            fds += extra
            _check_count(fds)
            data += more
        try:
            portable = msgspec.msgpack.decode(data[_PREFIX.size :], type=portable_type())
        except UNREADABLE as error:
            raise ProtocolError(
                f"the descriptor's header can not be read: {error}", errno=errno.EPROTO
            ) from error
    except BaseException:
        discard(fds, user)
        raise
    return unpack(portable, fds, user=user)


def send_with_fds(sock: sockets.socket, data: bytes, fds: Sequence[int]) -> None:
    """Send all of `data`, the descriptors with its first byte."""
    try:
        ancillary = [(sockets.SOL_SOCKET, sockets.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = sock.sendmsg([data], ancillary, sockets.MSG_NOSIGNAL)
        if sent < len(data):
            sock.sendall(data[sent:])
    except (TimeoutError, BlockingIOError) as error:
        raise TimedOutError(
            f"sending {len(data)} bytes: the other side did not read in time",
            errno=errno.ETIMEDOUT,
        ) from error
    except (BrokenPipeError, ConnectionResetError) as error:
        raise PeerGoneError(
            f"sending {len(data)} bytes: the other side has closed its socket, or has ended "
            f"({describe_errno(error)})",
            errno=error.errno,
        ) from error


def receive_with_fds(sock: sockets.socket, most: int, least: int) -> tuple[bytes, list[int]]:
    """Receive at least `least` bytes and every descriptor that came with them.

    Raises
    ------
    ProtocolError
        Descriptors were lost on the way (MSG_CTRUNC: this process has none left, EMFILE).
    PeerGoneError
        The stream ended.
    AccessDeniedError
        As `receive_once`.
    """
    user = peer_credentials(sock)[1]
    data = b""
    fds: list[int] = []
    try:
        while len(data) < least:
            piece, came, truncated = receive_once(sock, most - len(data))
            fds += came
            data += piece
            _check_count(fds)
            if truncated:
                raise ProtocolError(
                    "descriptors sent with the message did not arrive: this process has none "
                    "left (raise `ulimit -n`)",
                    errno=errno.EMFILE,
                )
            if not piece:
                raise _nobody_sends(errno.ECONNRESET)
    except (TimeoutError, BlockingIOError) as error:
        discard(fds, user)
        raise TimedOutError(
            "receiving: the other side sent nothing in time", errno=errno.ETIMEDOUT
        ) from error
    except ConnectionResetError as error:
        discard(fds, user)
        raise _nobody_sends(error.errno) from error
    except BaseException:
        discard(fds, user)
        raise
    return data, fds


def _check_count(fds: Sequence[int]) -> None:
    """Stop a peer that sends descriptors with every byte, before it fills this process's table."""
    if len(fds) > MAX_OBJECTS:
        raise ProtocolError(
            f"{len(fds)} descriptors came with one message, which carries {MAX_OBJECTS} at most",
            errno=errno.EPROTO,
        )


def receive_once(sock: sockets.socket, most: int) -> tuple[bytes, list[int], bool]:
    """One recvmsg: (bytes, descriptors, whether the kernel dropped some of either).

    Raises
    ------
    AccessDeniedError
        Too many descriptors that tasks of the peer's user sent are not closed yet (EDQUOT).
    """
    check_held_up(sock)
    room = sockets.CMSG_SPACE(MAX_OBJECTS * 4)
    data, ancillary, flags, _ = sock.recvmsg(most, room, sockets.MSG_CMSG_CLOEXEC)
    dropped = bool(flags & (sockets.MSG_CTRUNC | sockets.MSG_TRUNC))
    return data, _descriptors_in(ancillary), dropped


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (sockets.SOL_SOCKET, sockets.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def _nobody_sends(number: int | None) -> PeerGoneError:
    return PeerGoneError(
        "receiving: the other side closed its socket, or ended, before it sent all of it",
        errno=number,
    )
