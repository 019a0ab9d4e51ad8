"""Descriptors over Unix sockets, and as arguments of `multiprocessing`.

What travels is a header, typed and checked (MessagePack, no pickle), and one file descriptor for
each VM object. The receiver believes none of it: sizes by fstat, seals by fcntl, counts by
counting. The giver keeps the object; the receiver's rights are those of the descriptor it gets.

A message on a socket is one send with all descriptors: ``b"mdsc"``, the header's length (u32,
little endian), the header.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket as sockets
import struct
import weakref
from collections.abc import Sequence
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import TYPE_CHECKING, Any

from memdesc.descriptors.address_range import AddressRangeDescriptor, PythonBufferDescriptor
from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import (
    InvalidArgument,
    MappingError,
    MappingReason,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    TimedOutError,
)
from memdesc.mapping import Extent
from memdesc.memory.closing import close_all as close_all, discard as discard
from memdesc.memory.foreign import ForeignObject
from memdesc.vm.pages import MAX_LENGTH, Access, Direction
from memdesc.vm.task import Task

if TYPE_CHECKING:
    from memdesc.portable import Portable

MAX_OBJECTS = 253
"""File descriptors that one Unix message carries at most (SCM_MAX_FD)."""

MAX_PIECES = 4096
MAX_HEADER = 128 << 10
_PREFIX = struct.Struct("<4sI")
_MAGIC = b"mdsc"
_VERSION = 1


def portable_type() -> type[Portable]:
    """The header's type; msgspec is imported only when something travels."""
    from memdesc.portable import Portable

    return Portable


def give(
    extents: Sequence[Extent], access: Access, *, enforced: bool, user: int
) -> tuple[list[tuple[int, int, int]], list[int]]:
    """Grant extents to a task of a user: ([(object index, offset, length)], descriptors).

    The caller sends the descriptors and then closes them. Seals are put on here.

    Raises
    ------
    SealedError, MappingError
        The grant is refused (TOO_MANY_FILES: EMFILE); nothing is left open.
    """
    index: dict[int, int] = {}
    fds: list[int] = []
    pieces = []
    try:
        for extent in extents:
            key = id(extent.object)
            if key not in index:
                if len(fds) == MAX_OBJECTS:
                    raise InvalidArgument(
                        f"the range lies in more than {MAX_OBJECTS} VM objects, the most that one "
                        "message carries: hand it over in parts",
                        errno=errno.E2BIG,
                    )
                fds.append(extent.object.grant(access, enforced=enforced, user=user))
                index[key] = len(fds) - 1
            pieces.append((index[key], extent.offset, extent.length))
        if len(pieces) > MAX_PIECES:
            raise InvalidArgument(
                f"the range is in {len(pieces):,} pieces, more than the {MAX_PIECES:,} that one "
                "message tells of: hand it over in parts",
                errno=errno.E2BIG,
            )
    except OSError as error:
        close_all(fds)
        if error.errno in (errno.EMFILE, errno.ENFILE) and not isinstance(error, MemdescError):
            raise too_many_files(error) from error
        raise
    except BaseException:
        close_all(fds)
        raise
    return pieces, fds


def take(
    pieces: Sequence[tuple[int, int, int]], fds: Sequence[int], access: Access
) -> list[Extent]:
    """Make extents of what a peer sent, checking all of it. Takes the descriptors over.

    Raises
    ------
    ProtocolError
        The pieces and the descriptors do not belong together (EPROTO).
    MappingError
        An object is not sealed, or too small for what was said of it.
    """
    left = list(fds)
    objects: list[ForeignObject] = []
    try:
        used = {index for index, _, _ in pieces}
        if used != set(range(len(fds))):
            raise ProtocolError(
                f"{len(fds)} descriptors came with a message that names objects {sorted(used)}",
                errno=errno.EPROTO,
            )
        while left:
            objects.append(ForeignObject(left.pop(0), access))
        for index, offset, length in pieces:
            size = objects[index].size
            if offset < 0 or length < 1 or offset > size or length > size - offset:
                raise ProtocolError(
                    f"the message names {length:,} bytes at offset {offset:,} of an object of "
                    f"{size:,} bytes",
                    errno=errno.EPROTO,
                )
    except BaseException:
        discard(left)
        for object_ in objects:
            object_.close()
        raise
    return [Extent(objects[index], offset, length) for index, offset, length in pieces]


def too_many_files(error: OSError | None) -> MappingError:
    """Say that descriptors could not be had here, could not be sent, or did not arrive."""
    number = errno.EMFILE if error is None else error.errno
    what = (
        f"too many descriptors sent by user {os.geteuid()} are still on their way: let the "
        "receivers read"
        if number == errno.ETOOMANYREFS
        else f"task {os.getpid()} has no file descriptor left: close some there"
    )
    return MappingError(
        f"{what}, or raise `ulimit -n`", reason=MappingReason.TOO_MANY_FILES, errno=number
    )


def pack(
    descriptor: MemoryDescriptor, access: Access | None, *, enforced: bool, user: int
) -> tuple[Portable, list[int]]:
    """Make a descriptor's portable form and its file descriptors (the caller closes them)."""
    check_descriptor(descriptor, "what is handed over")
    access = descriptor.max_access if access is None else Access(access)
    descriptor._check_map_range(0, None)
    extents = descriptor._extents(0, descriptor.length, access)
    pieces, fds = give(extents, access, enforced=enforced, user=user)
    portable = portable_type()(
        version=_VERSION,
        name=travelling(descriptor.name),
        direction=descriptor.direction.value,
        writable=access.writable,
        pieces=tuple(pieces),
    )
    return portable, fds


def travelling(name: str) -> str:
    """Give a descriptor's name as it can travel: that of several can be long, any be no text."""
    return name.encode(errors="replace").decode()[:1024]


def unpack(portable: Portable, fds: Sequence[int]) -> ReceivedMemoryDescriptor:
    """Make a descriptor of a portable form, checking all of it. Takes the descriptors over."""
    try:
        if portable.version != _VERSION:
            raise ProtocolError(
                f"the descriptor is of form {portable.version}, this library reads {_VERSION}: "
                "use the same version of memdesc on both sides",
                errno=errno.EPROTO,
            )
        if sum(length for _, _, length in portable.pieces) > MAX_LENGTH or not portable.pieces:
            raise ProtocolError("the descriptor's lengths make no sense", errno=errno.EPROTO)
        direction = Direction(portable.direction)
    except (ProtocolError, ValueError) as error:
        discard(fds)
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"{portable.direction} is no direction", errno=errno.EPROTO) from error
    access = Access.READ_WRITE if portable.writable else Access.READ_ONLY
    extents = take(portable.pieces, fds, access)
    received = ReceivedMemoryDescriptor(extents, direction=direction, name=portable.name)
    if received.max_access is not access:
        received.close()
        raise ProtocolError(
            f"{portable.name!r} is said to be {access.value}, what came is "
            f"{received.max_access.value}",
            errno=errno.EPROTO,
        )
    return received


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
    portable, fds = pack(descriptor, access, enforced=enforced, user=_peer_user(sock))
    try:
        header = msgspec.msgpack.encode(portable)
        send_with_fds(sock, _PREFIX.pack(_MAGIC, len(header)) + header, fds)
    finally:
        close_all(fds)


def _check_socket(sock: object) -> None:
    if not isinstance(sock, sockets.socket):
        raise InvalidArgument(
            f"sock is of type {type(sock).__name__}: give a connected socket.socket of AF_UNIX "
            "(socket.socket(fileno=…) makes one of a descriptor)"
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
    PeerGoneError, TimedOutError
    """
    import msgspec

    from memdesc.portable import UNREADABLE

    _check_socket(sock)
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
        discard(fds)
        raise
    return unpack(portable, fds)


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
        raise PeerGoneError(f"sending: the other side has gone ({error})", errno=error.errno) from (
            error
        )


def receive_with_fds(sock: sockets.socket, most: int, least: int) -> tuple[bytes, list[int]]:
    """Receive at least `least` bytes and every descriptor that came with them.

    Raises
    ------
    ProtocolError
        Descriptors were lost on the way (MSG_CTRUNC: this process has none left, EMFILE).
    PeerGoneError
        The stream ended.
    """
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
                raise PeerGoneError("the other side has gone", errno=errno.ECONNRESET)
    except (TimeoutError, BlockingIOError) as error:
        discard(fds)
        raise TimedOutError("nothing came in time", errno=errno.ETIMEDOUT) from error
    except ConnectionResetError as error:
        discard(fds)
        raise PeerGoneError("the other side has gone", errno=error.errno) from error
    except BaseException:
        discard(fds)
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
    """One recvmsg: (bytes, descriptors, whether the kernel dropped some of either)."""
    room = sockets.CMSG_SPACE(MAX_OBJECTS * 4)
    data, ancillary, flags, _ = sock.recvmsg(most, room, sockets.MSG_CMSG_CLOEXEC)
    dropped = bool(flags & (sockets.MSG_CTRUNC | sockets.MSG_TRUNC))
    return data, _descriptors_in(ancillary), dropped


def discard_unread(sock: sockets.socket) -> None:
    """Discard the descriptors that lie in a socket without a peer, before it is closed.

    Else the kernel would close them with it, and who closes it would wait for the stranger.
    """
    room = sockets.CMSG_SPACE(12) + sockets.CMSG_SPACE(MAX_OBJECTS * 4)
    with contextlib.suppress(OSError):
        # With every packet, also an empty one, its sender is told now; not with the end.
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_PASSCRED, 1)
        while True:
            _, ancillary, _, _ = sock.recvmsg(1, room, sockets.MSG_CMSG_CLOEXEC)
            if not ancillary:
                break
            discard(_descriptors_in(ancillary))


def _descriptors_in(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if (level, kind) == (sockets.SOL_SOCKET, sockets.SCM_RIGHTS):
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    return list(fds)


def _peer_user(sock: sockets.socket) -> int:
    with Task.from_socket(sock) as task:
        return task.credentials.uid


# -- multiprocessing -------------------------------------------------------------------------------


def _reduce(descriptor: MemoryDescriptor) -> Any:
    """What `multiprocessing` sends of a descriptor: its portable form, and descriptors by DupFd."""
    import msgspec

    portable, fds = pack(descriptor, None, enforced=True, user=os.geteuid())
    try:
        carried = [reduction.DupFd(fd) for fd in fds]
    finally:
        starting = get_spawning_popen()
        if starting is None:
            close_all(fds)  # the resource sharer made duplicates
        else:
            # A child being started inherits these very numbers, after we return.
            weakref.finalize(starting, close_all, fds)
    return _rebuild, (msgspec.msgpack.encode(portable), carried)


def _rebuild(header: bytes, carried: list[Any]) -> ReceivedMemoryDescriptor:
    import msgspec

    portable = msgspec.msgpack.decode(header, type=portable_type())
    return unpack(portable, [handle.detach() for handle in carried])


# The one thing done at import: two lines in a table of multiprocessing's, so that descriptors are
# arguments of its processes, queues and pipes. Plain pickle refuses them (see the base class).
for _kind in (
    BufferMemoryDescriptor,
    AddressRangeDescriptor,
    PythonBufferDescriptor,
    SubMemoryDescriptor,
    MultiMemoryDescriptor,
    ReceivedMemoryDescriptor,
    SnapshotMemoryDescriptor,
):
    reduction.ForkingPickler.register(_kind, _reduce)
