"""What a peer gave: its rights, passing it on, and that nothing of it is believed."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import socket
from typing import Any

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    MultiMemoryDescriptor,
    ReceivedMemoryDescriptor,
    SealedError,
    SubMemoryDescriptor,
    _core,
    page_size,
    receive_descriptor,
    send_descriptor,
)
from memdesc.memory.foreign import ForeignObject
from memdesc.testing import failing
from memdesc.testing._kind import region

P = page_size


def handed(descriptor: MemoryDescriptor, **how: Any) -> ReceivedMemoryDescriptor:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_descriptor(ours, descriptor, **how)
        return receive_descriptor(theirs)


def test_it_tells_what_was_given() -> None:
    given = BufferMemoryDescriptor(5000, direction=Direction.IN, name="given")
    received = handed(given)
    assert (received.length, received.name, received.direction) == (5000, "given", Direction.IN)
    assert (received.max_access, received.enforced) == (Access.READ_ONLY, True)


def test_read_only_holds_against_everything_but_the_owner() -> None:
    given = BufferMemoryDescriptor(P)
    received = handed(given)
    with pytest.raises(SealedError) as caught:
        received.write_bytes(0, b"1")
    assert caught.value.errno == errno.EACCES
    with pytest.raises(MappingError) as refused:
        received.map(access=Access.READ_WRITE)
    assert refused.value.reason is MappingReason.ACCESS
    assert memoryview(received).readonly
    with received.map() as mapping, pytest.raises(PermissionError):
        _core.mprotect(mapping.address, P, _core.PROT_READ | _core.PROT_WRITE)
    given.write_bytes(0, b"owner")
    assert received.read_bytes(0, 5) == b"owner"


def test_a_courtesy_is_told_as_one() -> None:
    given = BufferMemoryDescriptor(P, max_access=Access.READ_WRITE)
    with pytest.raises(SealedError):
        handed(given, access=Access.READ_ONLY)
    received = handed(given, access=Access.READ_ONLY, enforced=False)
    assert (received.max_access, received.enforced) == (Access.READ_ONLY, False)
    with pytest.raises(MappingError) as caught:
        handed(received)
    assert caught.value.reason is MappingReason.NOT_ENFORCED
    assert handed(received, enforced=False).max_access is Access.READ_ONLY


@pytest.mark.parametrize("access", list(Access))
def test_passed_on_it_is_still_the_same_memory(access: Access) -> None:
    given = BufferMemoryDescriptor(3 * P + 5, max_access=access)
    third = handed(SubMemoryDescriptor(handed(given), P - 1, P + 2))
    given.write_bytes(P - 1, b"through")
    assert third.read_bytes(0, 7) == b"through"
    assert (third.length, third.max_access, third.enforced) == (P + 2, access, True)
    shown = memoryview(third)
    assert bytes(shown[:7]) == b"through"


def test_it_outlives_its_giver() -> None:
    given = BufferMemoryDescriptor(100)
    given.write_bytes(0, b"stays")
    received = handed(given)
    given.close()
    del given
    gc.collect()
    assert received.read_bytes(0, 5) == b"stays"
    with received.map() as mapping:
        assert bytes(mapping)[:5] == b"stays"


def test_a_part_travels_with_the_whole_pages_around_it_and_shows_only_itself() -> None:
    given = BufferMemoryDescriptor(3 * P)
    given.write_bytes(0, b"x" * 3 * P)
    received = handed(SubMemoryDescriptor(given, P + 3, 10))
    with received.map() as mapping:
        assert (mapping.length, mapping.address % P) == (10, 3)
        found = region(mapping.address)
        assert found is not None
        assert (found.length, found.offset) == (P, P)


def test_several_objects_travel_as_one() -> None:
    members = [BufferMemoryDescriptor(P, name=str(number)) for number in range(5)]
    for number, member in enumerate(members):
        member.write_bytes(0, bytes([number]) * P)
    several = MultiMemoryDescriptor([*members, members[0]])
    received = handed(several)
    assert received.read_bytes() == several.read_bytes() == bytes(memoryview(received))
    members[0].write_bytes(0, b"Z")
    assert received.read_bytes(5 * P, 1) == b"Z"


def test_what_one_message_can_not_carry() -> None:
    members = [BufferMemoryDescriptor(P, lazy=True) for _ in range(254)]
    with pytest.raises(InvalidArgument) as caught:
        handed(MultiMemoryDescriptor(members))
    assert caught.value.errno == errno.E2BIG


def test_private_memory_is_not_handed_over() -> None:
    with pytest.raises(MappingError) as caught:
        handed(MemoryDescriptor.with_buffer(bytearray(100), Direction.OUT))
    assert caught.value.reason is MappingReason.PRIVATE_MEMORY


def test_an_array_of_ours_is_handed_over_by_its_address() -> None:
    given = BufferMemoryDescriptor(3 * P)
    received = handed(MemoryDescriptor.with_buffer(given.array()[P + 9 :], Direction.OUT))
    given.write_bytes(P + 9, b"array")
    assert received.read_bytes(0, 5) == b"array"
    assert received.max_access is Access.READ_ONLY


def test_it_writes_by_pwrite_and_not_through_a_mapping() -> None:
    given = BufferMemoryDescriptor(2 * P, max_access=Access.READ_WRITE)
    received = handed(given)
    with failing("map_memory", errno.EPERM, times=None) as fault:
        received.write_bytes(P - 2, b"bytes")
        assert received.read_bytes(P - 2, 5) == b"bytes"
    assert fault.calls == 0
    assert given.read_bytes(P - 2, 5) == b"bytes"


# ── Objects that are not believed ────────────────────────────────────────────────────────────


def memfd(size: int = P, seals: int = fcntl.F_SEAL_SHRINK) -> int:
    fd = os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.truncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def foreign(fd: int, access: Access = Access.READ_WRITE) -> MappingReason:
    """What becomes of a descriptor that is not what it should be; it is closed then."""
    with pytest.raises(MappingError) as caught:
        ForeignObject(fd, access)
    with pytest.raises(OSError) as closed:
        os.fstat(fd)
    assert closed.value.errno == errno.EBADF
    return caught.value.reason


def test_descriptors_that_are_no_memory() -> None:
    reader, writer = os.pipe()
    assert foreign(writer) in (MappingReason.ACCESS, MappingReason.CAN_SHRINK)
    assert foreign(reader) in (MappingReason.ACCESS, MappingReason.CAN_SHRINK)
    assert foreign(os.open("/dev/null", os.O_RDWR)) in (
        MappingReason.ACCESS,
        MappingReason.CAN_SHRINK,
    )
    assert foreign(os.open("/", os.O_PATH)) is MappingReason.ACCESS


def test_without_the_seal_that_keeps_the_pages_there() -> None:
    assert foreign(memfd(seals=0)) is MappingReason.CAN_SHRINK
    assert foreign(memfd(seals=fcntl.F_SEAL_GROW)) is MappingReason.CAN_SHRINK


def test_rights_are_the_least_of_mode_and_seals_and_word() -> None:
    sealed = fcntl.F_SEAL_SHRINK | _core.F_SEAL_FUTURE_WRITE
    for seals, word, most in [
        (fcntl.F_SEAL_SHRINK, Access.READ_WRITE, Access.READ_WRITE),
        (fcntl.F_SEAL_SHRINK, Access.READ_ONLY, Access.READ_ONLY),
        (sealed, Access.READ_WRITE, Access.READ_ONLY),
    ]:
        object_ = ForeignObject(memfd(seals=seals), word)
        assert object_.max_access is most
        object_.close()


def test_the_objects_size_is_asked_of_the_kernel() -> None:
    from memdesc.mapping import Extent, map_extents

    object_ = ForeignObject(memfd(P), Access.READ_ONLY)
    with pytest.raises(MappingError) as caught:
        map_extents([Extent(object_, 0, P + 1)], Access.READ_ONLY)
    assert caught.value.reason is MappingReason.OUT_OF_RANGE
    object_.close()
