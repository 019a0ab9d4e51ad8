"""Descriptors as handles: what `multiprocessing` makes of them, and whoever else carries bytes.

A handle is a descriptor's portable form, and where its file descriptors wait (`transit`): a few
hundred bytes, for one taking. What travels as one need not be a descriptor: arrays do, too
(`memdesc.interop.multiprocessing`). Whoever reduces another kind of object makes a handle of the
descriptor behind it (`leave`), and in the receiver's process the object of what was taken (`take`).
"""

from __future__ import annotations

import os
from multiprocessing import reduction
from multiprocessing.context import get_spawning_popen
from typing import Any, NamedTuple

from memdesc.descriptors.address_range import AddressRangeDescriptor, PythonBufferDescriptor
from memdesc.descriptors.base import MemoryDescriptor
from memdesc.descriptors.buffer import BufferMemoryDescriptor
from memdesc.descriptors.multi import MultiMemoryDescriptor
from memdesc.descriptors.received import ReceivedMemoryDescriptor
from memdesc.descriptors.snapshot import SnapshotMemoryDescriptor
from memdesc.descriptors.sub import SubMemoryDescriptor
from memdesc.errors import MemdescError
from memdesc.handover import endings as endings  # which sees to what is sent
from memdesc.handover.forms import pack, portable_type, unpack
from memdesc.vm.pages import Access


class HandleLostError(MemdescError, RuntimeError):
    """What was sent as a handle can not be had here; its cause says why.

    No OSError: that a worker of `multiprocessing.Pool` takes for the end of its pipe, silently.
    """


class Handle(NamedTuple):
    """What travels of a descriptor: a plain tuple, in which pickle finds only bytes."""

    header: bytes
    address: bytes
    token: bytes


def leave(descriptor: MemoryDescriptor, access: Access | None, *, enforced: bool) -> Handle:
    """Leave a descriptor's file descriptors with the holder of this family, for one receiver.

    Parameters
    ----------
    descriptor : MemoryDescriptor
        Stays ours.
    access : Access, optional
        What the receiver may do; by default the most that `max_access` allows.
    enforced : bool
        False accepts a read-only grant of READ_WRITE memory as a courtesy.

    Raises
    ------
    SealedError, MappingError
        It can not be granted so; TOO_MANY_FILES: here or at the holder no descriptor is left.
    LimitError
        More bytes would be on their way than the holder's process allows (EDQUOT).
    PeerGoneError, TimedOutError
        The holder ended just now, or does not answer.
    """
    import msgspec

    from memdesc.handover import transit

    portable, fds = pack(descriptor, access, enforced=enforced, user=os.geteuid())
    address, token = transit.leave(fds)
    starting = get_spawning_popen()
    if starting is not None:  # arguments of a process, which nobody takes if it does not start
        transit.forget_with(starting, token)
    return Handle(msgspec.msgpack.encode(portable), address, token)


def take(handle: Handle, what: str) -> ReceivedMemoryDescriptor:
    """Take what was left, once; `what` that was to be is for the error.

    Raises
    ------
    HandleLostError
        With the errno of its cause.
    """
    import msgspec

    from memdesc.handover import transit

    header, address, token = handle
    try:
        portable = msgspec.msgpack.decode(header, type=portable_type())
        return unpack(portable, transit.take(address, token), user=os.geteuid())
    except OSError as error:
        raise lost(what, error) from error


def lost(what: str, error: OSError) -> HandleLostError:
    """Say that something which was sent can not be had here, and why."""
    return HandleLostError(
        f"{what} that was sent to task {os.getpid()} can not be had: {error}", errno=error.errno
    )


def _reduce(descriptor: MemoryDescriptor) -> Any:
    return _rebuild, tuple(leave(descriptor, None, enforced=True))


def _rebuild(header: bytes, address: bytes, token: bytes) -> ReceivedMemoryDescriptor:
    return take(Handle(header, address, token), "a descriptor")


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
