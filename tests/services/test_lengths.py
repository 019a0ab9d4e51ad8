"""Buffers that grow or change their length while they are shared: their clients learn of it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator

import pytest
from children import in_child
from puppets import Puppet, wait_until
from strangers import Stranger

import memdesc as md
from memdesc.errors import TimedOutError
from memdesc.services import protocol

PAGE = md.page_size
Both = tuple[md.Service, md.Connection, md.BufferMemoryDescriptor]


@pytest.fixture
def shared() -> Iterator[Both]:
    """A service, a client of it, and what they share: 100 bytes that can grow to 100 pages."""
    with (
        md.BufferMemoryDescriptor(100, reserve=100 * PAGE) as buffer,
        md.Service("camera") as service,
        md.connect("camera") as connection,
    ):
        service.share("frames", buffer)
        yield service, connection, buffer
    connection.task.close()  # pytest keeps the fixture's value a little longer


def growing(buffer: md.BufferMemoryDescriptor, *capacities: int) -> None:
    for capacity in capacities:
        buffer.grow(capacity)


CHANGES: list[tuple[Callable[[md.Service, md.BufferMemoryDescriptor], object], int]] = [
    (lambda _, buffer: buffer.grow(3 * PAGE), 3 * PAGE),
    (lambda _, buffer: buffer.set_length(7), 7),
    (lambda _, buffer: growing(buffer, 200, 300, 400), 400),
    (lambda service, _: service.share("frames", md.BufferMemoryDescriptor(9)), 9),
]


@pytest.mark.parametrize(("change", "length"), CHANGES)
def test_a_change_ends_the_wait(shared: Both, change: Callable[..., object], length: int) -> None:
    service, connection, buffer = shared
    known = len(connection.map("frames"))
    timer = threading.Timer(0.05, change, (service, buffer))
    timer.start()
    while (told := connection.wait_length("frames", known, timeout=20)) != length:
        known = told  # one that lay in between
    timer.join()
    assert len(connection.map("frames")) == length
    assert [share.nbytes for share in connection.shares()] == [length]


def test_what_is_known_already_is_told_at_once(shared: Both) -> None:
    _, connection, buffer = shared
    assert connection.wait_length("frames", 0, timeout=20) == 100
    buffer.grow(200)
    assert len(connection.map("frames")) == 200
    with pytest.raises(TimedOutError):  # what was heard before the mapping is no news
        connection.wait_length("frames", 200, timeout=0.05)


def test_mappings_made_before_stay_and_new_ones_see_the_rest(shared: Both) -> None:
    _, connection, buffer = shared
    received = connection.descriptor("frames")
    with connection.map("frames") as before:
        address = before.address
        buffer.write_bytes(0, b"first")
        buffer.grow(50 * PAGE)
        buffer.write_bytes(50 * PAGE - 4, b"last")
        assert (len(before), before.address, bytes(memoryview(before)[:5])) == (
            100,
            address,
            b"first",
        )
        assert received.length == 100
        with pytest.raises(md.RangeError):
            received.read_bytes(0, 101)
        with connection.map("frames") as after:
            assert (bytes(memoryview(after)[:5]), bytes(memoryview(after)[-4:])) == (
                b"first",
                b"last",
            )
    received.close()


def test_in_another_process(shared: Both) -> None:
    _, _, buffer = shared
    with Puppet() as client:
        client.do("c = md.connect('camera')")
        client.do("m = c.map('frames')")
        client.do("n = c.wait_length('frames', 1)")
        assert client.do("n") == 100
        buffer.grow(2 * PAGE)
        buffer.write_bytes(2 * PAGE - 1, b"!")
        client.do("n = c.wait_length('frames', 100, timeout=20)")
        client.do("m = c.map('frames')")
        assert client.do("(n, len(m), bytes(memoryview(m)[-1:]).decode())") == [
            2 * PAGE,
            2 * PAGE,
            "!",
        ]


def test_nothing_changes_in_the_time_given(shared: Both) -> None:
    _, connection, _ = shared
    for timeout in (0, 0.02):
        with pytest.raises(TimedOutError) as caught:
            connection.wait_length("frames", 100, timeout=timeout)
        assert caught.value.errno == errno.ETIMEDOUT


def test_what_is_not_shared(shared: Both) -> None:
    _, connection, _ = shared
    with pytest.raises(md.ShareNotFoundError):
        connection.wait_length("nothing", 0, timeout=0)
    with pytest.raises(md.InvalidArgument):
        connection.wait_length("", 0, timeout=0)


def test_the_end_of_the_service_ends_the_wait(shared: Both) -> None:
    service, connection, _ = shared
    timer = threading.Timer(0.05, service.close)
    timer.start()
    with pytest.raises((md.PeerGoneError, md.ClosedError)):
        connection.wait_length("frames", 100, timeout=20)
    timer.join()


def test_what_is_shared_no_longer_is_told_no_more(shared: Both) -> None:
    service, connection, buffer = shared
    assert connection.wait_length("frames", 0, timeout=20) == 100
    service.unshare("frames")
    buffer.grow(200)
    with pytest.raises(TimedOutError):
        connection.wait_length("frames", 100, timeout=0.05)


def test_a_client_that_does_not_read_holds_nobody_up_and_hears_the_latest(
    shared: Both,
) -> None:
    """It is told of one change, and of one more when it has read: never a queue of them."""
    service, _, buffer = shared
    with Stranger(service.path) as slow:
        slow.greet()
        assert slow.answer(protocol.WatchLength(1, "frames")) == protocol.Length(1, "frames", 100)
        sent = 0
        while True:  # fill the socket with what it asked for and does not read
            slow.send(protocol.ListShares(2 + sent))
            sent += 1
            client = next(c for c in service.clients() if c._told)
            if client._queue:
                break
            assert sent < 100_000
        for capacity in range(101, 2000):
            buffer.grow(capacity)
        changes: list[protocol.LengthChanged] = []
        answers = 0
        while not changes or changes[-1].nbytes != 1999:
            message, _ = slow.receive()
            if isinstance(message, protocol.LengthChanged):
                changes.append(message)
            else:
                answers += 1
        assert answers == sent
        assert len(changes) <= 2


def test_in_a_fork_child_nobody_is_told(shared: Both) -> None:
    _, connection, buffer = shared
    connection.wait_length("frames", 0, timeout=20)

    def child() -> int:
        buffer.set_length(50)
        return buffer.length

    assert in_child(child) == 50
    assert buffer.length == 100
    with pytest.raises(TimedOutError):
        connection.wait_length("frames", 100, timeout=0.05)


def test_a_service_that_was_dropped_is_told_nothing() -> None:
    with md.BufferMemoryDescriptor(100, reserve=PAGE) as buffer:
        with md.Service("camera") as service:
            service.share("frames", buffer)
        buffer.grow(200)
        del service
        buffer.grow(300)
        assert buffer.length == 300


def test_a_length_that_was_not_asked_for_ends_the_connection(shared: Both) -> None:
    service, connection, _ = shared
    client = service.clients()[0]
    client.send(protocol.LengthChanged("frames", 7))
    wait_until(lambda: connection.closed)
    with pytest.raises(md.MemdescError):
        connection.wait_length("frames", 100, timeout=1)
    assert os.getpid() == connection.task.pid


def test_an_array_of_a_dtype_alone_is_as_long_as_the_memory():
    with md.BufferMemoryDescriptor(1024, reserve=1 << 16) as buffer, md.Service("log") as service:
        service.share("flat", buffer, dtype="<u4")
        service.share("square", buffer, shape=(16, 16), dtype="<u4")
        with md.connect("log") as client:
            before = client.map("flat").array()
            buffer.grow(4096)
            buffer.array(dtype="<u4")[-1] = 7
            assert client.wait_length("flat", 1024, timeout=20) == 4096
            after = client.map("flat").array()
            assert (before.shape, after.shape, after[-1]) == ((256,), (1024,), 7)
            assert client.map("square").array().shape == (16, 16)
            assert [(s.shape, s.dtype) for s in client.shares()] == [
                (None, "<u4"),
                ((16, 16), "<u4"),
            ]
