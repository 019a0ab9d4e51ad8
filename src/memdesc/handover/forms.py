"""The form in which descriptors travel: made of what is given, checked where it is taken.

It is a header, typed and checked (MessagePack, no pickle), and one file descriptor for each VM
object. The receiver believes none of it: sizes by fstat, seals by fcntl, counts by counting. The
giver keeps the object; the receiver's rights are those of the descriptor it gets.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from memdesc.descriptors.base import MemoryDescriptor, check_descriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.errors import (
    InvalidArgument,
    MappingError,
    MappingReason,
    MemdescError,
    ProtocolError,
)
from memdesc.mapping import Extent
from memdesc.memory.closing import close_all, discard, is_memory
from memdesc.memory.foreign import ForeignObject
from memdesc.vm.pages import MAX_LENGTH, Access, Direction

if TYPE_CHECKING:
    from memdesc.portable import Portable

MAX_OBJECTS = 253
"""File descriptors that one Unix message carries at most (SCM_MAX_FD)."""

MAX_PIECES = 4096
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


def check_giving(extents: Sequence[Extent], access: Access, *, enforced: bool) -> None:
    """Raise what giving them would, or whoever is given them; nothing is granted yet."""
    for extent in extents:
        extent.object.check_grant(access, enforced=enforced)


def take(
    pieces: Sequence[tuple[int, int, int]], fds: Sequence[int], access: Access, *, user: int
) -> list[Extent]:
    """Make extents of what a task of a user sent, checking all of it. Takes the descriptors over.

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
            objects.append(ForeignObject(left.pop(0), access, user=user))
        for index, offset, length in pieces:
            size = objects[index].size
            if offset < 0 or length < 1 or offset > size or length > size - offset:
                raise ProtocolError(
                    f"the message names {length:,} bytes at offset {offset:,} of an object of "
                    f"{size:,} bytes",
                    errno=errno.EPROTO,
                )
    except BaseException:
        discard(left, user)
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
    """Make a descriptor's portable form and its file descriptors (the caller closes them).

    Raises
    ------
    SealedError, MappingError
        It can not be granted so; CAN_SHRINK: no receiver would take it (EPERM).
    """
    check_descriptor(descriptor, "what is handed over")
    access = descriptor.max_access if access is None else Access(access)
    descriptor._check_map_range(0, None)
    extents = descriptor._extents(0, descriptor.length, access)
    pieces, fds = give(extents, access, enforced=enforced, user=user)
    if not all(map(is_memory, fds)):
        close_all(fds)
        raise MappingError(
            f"{descriptor.name!r} lies in a file that is no memory of the kernel's: who is given "
            "it can not know that its pages stay there, and refuses it; send its bytes",
            reason=MappingReason.CAN_SHRINK,
            errno=errno.EPERM,
        )
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


def unpack(portable: Portable, fds: Sequence[int], *, user: int) -> ReceivedMemoryDescriptor:
    """Make a descriptor of what a task of a user sent, checking it. Takes the descriptors over."""
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
        discard(fds, user)
        if isinstance(error, ProtocolError):
            raise
        raise ProtocolError(f"{portable.direction} is no direction", errno=errno.EPROTO) from error
    access = Access.READ_WRITE if portable.writable else Access.READ_ONLY
    extents = take(portable.pieces, fds, access, user=user)
    received = ReceivedMemoryDescriptor(extents, direction=direction, name=portable.name)
    if received.max_access is not access:
        received.close()
        raise ProtocolError(
            f"{portable.name!r} is said to be {access.value}, what came is "
            f"{received.max_access.value}",
            errno=errno.EPROTO,
        )
    return received
