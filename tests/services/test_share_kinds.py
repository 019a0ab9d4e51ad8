"""What can be shared, whatever kind of descriptor it is; and what is refused to who shares it."""

from __future__ import annotations

import errno
import mmap
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import pytest

import memdesc as md

PAGE = md.page_size
DATA = bytes(range(256)) * (3 * PAGE // 256)


@pytest.fixture
def both() -> Iterator[tuple[md.Service, md.Connection]]:
    with md.Service("driver") as service, md.connect("driver") as connection:
        yield service, connection
    connection.task.close()  # pytest keeps the fixture's value a little longer


def filled(access: md.Access = md.Access.READ_ONLY) -> md.BufferMemoryDescriptor:
    buffer = md.BufferMemoryDescriptor(len(DATA), max_access=access)
    buffer.write_bytes(0, DATA)
    return buffer


def received(buffer: md.BufferMemoryDescriptor) -> md.ReceivedMemoryDescriptor:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        md.send_descriptor(ours, buffer)
        return md.receive_descriptor(theirs)


KINDS: dict[str, Callable[[md.BufferMemoryDescriptor], tuple[md.MemoryDescriptor, bytes]]] = {
    "buffer": lambda it: (it, DATA),
    "received": lambda it: (received(it), DATA),
    "snapshot": lambda it: (it.snapshot(), DATA),
    "part": lambda it: (md.SubMemoryDescriptor(it, 7, PAGE), DATA[7 : 7 + PAGE]),
    "part of a received one": lambda it: (
        md.SubMemoryDescriptor(received(it), PAGE, 5),
        DATA[PAGE : PAGE + 5],
    ),
    "several": lambda it: (
        md.MultiMemoryDescriptor([it, md.SubMemoryDescriptor(it, 0, PAGE)]),
        DATA + DATA[:PAGE],
    ),
    "view of it": lambda it: (md.MemoryDescriptor.with_buffer(it, md.Direction.OUT), DATA),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_shared(both, kind):
    service, connection = both
    buffer = filled()
    descriptor, data = KINDS[kind](buffer)
    service.share("it", descriptor, dtype="u1")
    buffer.write_bytes(0, b"later")  # of the same pages; not of a snapshot
    live = bytes(memoryview(descriptor)[: len(data)])
    assert live == (data if kind == "snapshot" else descriptor.read_bytes())
    with connection.map("it") as mapping:
        assert bytes(mapping) == live
        assert mapping.access is md.Access.READ_ONLY
        array = mapping.array()
        assert (array.dtype, array.shape) == (np.dtype("u1"), (len(data),))
        del array
    assert [share.nbytes for share in connection.shares()] == [len(data)]


def test_what_was_received_for_writing_is_passed_on_for_writing(both):
    service, connection = both
    buffer = filled(md.Access.READ_WRITE)
    service.share("it", received(buffer))
    with connection.map("it") as mapping:
        memoryview(mapping)[:3] = b"new"
    assert buffer.read_bytes(0, 3) == b"new"


def private() -> md.MemoryDescriptor:
    return md.MemoryDescriptor.with_buffer(bytearray(100), md.Direction.OUT)


def of_a_zone(stack: ExitStack) -> md.MemoryDescriptor:
    element = stack.enter_context(md.Zone("of the test", 256, 4 * PAGE).element())
    return stack.enter_context(md.MemoryDescriptor.with_buffer(element, md.Direction.OUT))


REFUSED: dict[str, tuple[Callable[[ExitStack], md.MemoryDescriptor], str]] = {
    "private memory": (lambda _: private(), "PRIVATE_MEMORY"),
    "a part of it": (lambda _: md.SubMemoryDescriptor(private(), 3, 4), "PRIVATE_MEMORY"),
    "among others": (lambda _: md.MultiMemoryDescriptor([filled(), private()]), "PRIVATE_MEMORY"),
    "zone memory": (of_a_zone, "ZONE_MEMORY"),
    "nothing": (
        lambda _: md.MemoryDescriptor.with_address_range(PAGE, PAGE, md.Direction.OUT),
        "NOT_MAPPED",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_nobody_can_map_is_refused_to_who_shares_it(both, what):
    service, connection = both
    make, reason = REFUSED[what]
    service.share("it", kept := filled())
    with ExitStack() as stack:
        descriptor = make(stack)
        with pytest.raises(md.MappingError) as caught:
            service.share("it", descriptor, enforced=False)
        assert caught.value.reason.name == reason
        del caught, descriptor
    with connection.map("it") as mapping:  # what was shared under the name before
        assert bytes(mapping) == DATA
    kept.close()


def test_nothing_is_sealed_before_a_client_comes(both):
    service, connection = both
    with filled() as buffer:
        before = buffer.memory.lifecycle.state
        service.share("it", buffer)
        assert buffer.memory.lifecycle.state is before
        connection.map("it").unmap()
        assert buffer.memory.lifecycle.state is not before


def test_what_no_client_would_take_is_refused_to_who_shares_it(both):
    service, connection = both
    anonymous = mmap.mmap(-1, PAGE)  # shared, but who has it could shorten it
    view = md.MemoryDescriptor.with_buffer(anonymous, md.Direction.OUT_IN)
    for enforced in (True, False):
        with pytest.raises(md.MappingError) as caught:
            service.share("it", view, enforced=enforced)
        # Without the privilege to open it, not even that is known.
        assert caught.value.reason.name in ("CAN_SHRINK", "NOT_PRIVILEGED")
        assert caught.value.errno == errno.EPERM
    part = filled(md.Access.READ_WRITE)
    mixed = md.MultiMemoryDescriptor([filled(), part])  # read-only at most, which one part is not
    with pytest.raises(md.SealedError) as refused:
        service.share("it", mixed)
    assert refused.value.errno == errno.EPERM
    assert part.statistics().state.value == "private"  # it was only asked
    assert service.shares() == []
    service.share("it", mixed, enforced=False)
    assert bytes(connection.map("it")) == DATA + DATA
    closed = filled()
    closed.close()
    with pytest.raises(md.ClosedError):
        service.share("it", closed)
