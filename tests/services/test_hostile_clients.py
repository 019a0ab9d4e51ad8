"""Hostile clients: a service goes on serving the others, leaks nothing and never waits for them."""

from __future__ import annotations

import errno
import gc
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from puppets import count_fds, memfds_mapped, wait_until
from strangers import Stranger, memfd, push

import memdesc as md
from memdesc import _core
from memdesc.handover import close_all
from memdesc.mapping import Placement
from memdesc.portable import Portable
from memdesc.services import accepting, channel, protocol

PAGE = md.page_size
SHARED = 100


@pytest.fixture
def service() -> Iterator[md.Service]:
    """A service with a share and one honest client, who is served before and after."""
    with md.Service("camera", limits=md.Limits(mappings=4)) as one, md.connect("camera") as honest:
        one.share("it", md.BufferMemoryDescriptor(SHARED, name="honest"))
        honest.map("it").unmap()
        before = collected_fds()  # what others left goes now, not in the middle
        yield one
        assert bytes(honest.map("it")) == bytes(SHARED)
        wait_until(lambda: len(one.clients()) == 1 and not one._strangers)
        wait_until(lambda: collected_fds() <= before, timeout=10)
        assert memfds_mapped("self", "stranger") == 0


def collected_fds() -> int:
    gc.collect()  # errors that the test caught hold frames, and these the clients
    return count_fds()


@contextmanager
def stranger(service: md.Service) -> Iterator[Stranger]:
    with Stranger(service.path) as one:
        yield one


def packed(**fields: object) -> bytes:
    return msgspec.msgpack.encode(fields)


GARBAGE = {
    "one byte": b"\x00",
    "noise": bytes(range(256)) * 100,
    "text": b"GET / HTTP/1.1\r\n\r\n",
    "unknown type": packed(type="Explode", id=1),
    "no type": packed(id=1),
    "not a map": msgspec.msgpack.encode([1, 2, 3]),
    "missing field": packed(type="OpenShare", id=1),
    "wrong field": packed(type="OpenShare", id="1", name="it"),
    "negative id": packed(type="OpenShare", id=-1, name="it"),
    "huge id": packed(type="OpenShare", id=2**64 - 1, name="it"),
    "long name": packed(type="OpenShare", id=1, name="x" * 1025),
    "not text": packed(type="OpenShare", id=1, name=b"\xff\xfe"),
    "text that is none": packed(type="OpenShare", id=1, name="its").replace(b"its", b"\xff" * 3),
    "deep": b"\x91" * 50_000,
    "deep in a field": b"\x82\xa4type\xaaListShares\xa1z" + b"\x91" * 50_000,
    "claims 4 GiB": b"\xdd\xff\xff\xff\xff",
    "claims a long text": b"\xdb\xff\xff\xff\xff",
    "two messages": protocol.encode(protocol.ListShares(1)) * 2,
    "too long": b"\x00" * (protocol.MAX_MESSAGE + 1),
    "no pieces": packed(
        type="PushMapping",
        id=1,
        token=1,
        name="",
        writable=False,
        pieces=[],
        offset=0,
        at_address=None,
        guard_pages=0,
        prefault=False,
    ),
    "answer not asked for": protocol.encode(protocol.Done(77)),
    "mapped not asked for": protocol.encode(protocol.Mapped(77, 0x1000)),
    "failed not asked for": protocol.encode(protocol.Failed(0, "AccessDeniedError", "no")),
    "opened not asked for": protocol.encode(
        protocol.Opened(
            5, protocol.Share("it", 1, False), Portable(1, "it", 3, False, ((0, 0, 1),))
        )
    ),
    "service's word": protocol.encode(protocol.Welcome(1, "camera")),
    "second greeting": protocol.encode(protocol.Hello(protocol.VERSION)),
}


@pytest.mark.parametrize("what", GARBAGE)
def test_what_is_not_of_the_protocol_ends_the_connection(service, what):
    with stranger(service) as one:
        one.greet()
        one.send(GARBAGE[what])
        assert one.is_ended()


@pytest.mark.parametrize(
    "first",
    [
        protocol.ListShares(1),
        protocol.OpenShare(1, "it"),
        protocol.Hello(protocol.VERSION + 1),
        protocol.Done(1),
        b"noise",
        b"",
    ],
)
def test_who_does_not_greet_first_is_let_go(service, first):
    with stranger(service) as one:
        one.send(first)
        assert one.is_ended()


def test_those_who_never_greet_make_room_for_others(service):
    silent = [Stranger(service.path) for _ in range(accepting.STRANGERS + 20)]
    for _ in range(2):
        with md.connect("camera", timeout=20) as connection:
            assert len(connection.map("it")) == SHARED
    wait_until(lambda: len(service._strangers) <= accepting.STRANGERS)
    assert silent[0].is_ended()
    silent[-1].greet()
    for one in silent:
        one.close()


def test_slow_drip(service):
    """A packet is a message: half of one is none."""
    data = protocol.encode(protocol.Hello(protocol.VERSION))
    with stranger(service) as one:
        one.send(data[:1])
        assert one.is_ended()
    with stranger(service) as one, md.connect("camera") as honest:
        for _ in range(20):
            assert len(honest.shares()) == 1
        one.greet()


@pytest.mark.slow
def test_thousands_of_connections(service):
    for _ in range(1500):
        Stranger(service.path).close()
    for index in range(500):
        with stranger(service) as one:
            one.send(GARBAGE["noise"] if index % 2 else protocol.Hello(protocol.VERSION))
    with md.connect("camera", timeout=30) as connection:
        assert len(connection.shares()) == 1


@pytest.mark.parametrize("count", [1, 253])
@pytest.mark.parametrize(
    "message",
    [
        protocol.Hello(protocol.VERSION),
        protocol.ListShares(1),
        protocol.OpenShare(1, "nothing"),
        protocol.PullMapping(1, 5),
        protocol.ReleaseMapping(5),
        protocol.MappingEnded(5),
        b"noise",
    ],
    ids=lambda message: type(message).__name__,
)
def test_descriptors_with_what_takes_none(service, message, count):
    fds = [memfd(0) for _ in range(count)]
    before = count_fds()
    try:
        with stranger(service) as one:
            if not isinstance(message, protocol.Hello):
                one.greet()
            for _ in range(3):
                try:
                    one.send(message, fds)
                except (BrokenPipeError, ConnectionResetError):
                    break
            try:
                one.send(protocol.ListShares(9))
                one.receive()
            except OSError:
                pass
        wait_until(lambda: count_fds() <= before)
    finally:
        close_all(fds)


def flood(one: Stranger, message: bytes, most: int) -> int:
    """Send as much as goes, reading nothing; give how much that was."""
    one.sock.setblocking(False)
    for count in range(most):
        try:
            one.sock.send(message, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            one.sock.setblocking(True)
            one.sock.settimeout(20)
        except (BrokenPipeError, ConnectionResetError):
            return count
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    "message", [protocol.OpenShare(1, "it"), protocol.ListShares(1), protocol.OpenShare(1, "no")]
)
def test_who_asks_and_never_reads_is_dropped(service, message):
    high = count_fds()
    with stranger(service) as one:
        one.greet()
        client = service.wait_client(20)
        while client.task != md.Task.current() or client not in service.clients()[1:]:
            client = service.wait_client(20)
        sent = flood(one, protocol.encode(message), 50_000)
        assert sent < 50_000
        assert count_fds() <= high + channel._QUEUE_FDS + 8
        wait_until(lambda: client.closed)


def answer_to(service: md.Service, message: protocol.PushMapping, fds: list[int]) -> object:
    """What the service answers to a pushed mapping; None where it ended the connection."""
    try:
        with stranger(service) as one:
            one.greet()
            one.send(message, fds)
            try:
                return one.receive()[0]
            except ConnectionResetError:
                return None
    finally:
        close_all(fds)


PIECE = (0, 0, PAGE)


@pytest.mark.parametrize(
    ("make", "pieces", "reason"),
    [
        (lambda: [memfd(PAGE, seals=0)], [PIECE], "CAN_SHRINK"),
        (lambda: [memfd(PAGE, seals=_core.F_SEAL_GROW)], [PIECE], "CAN_SHRINK"),
        (lambda: [os.open("/dev/null", os.O_RDONLY)], [PIECE], "CAN_SHRINK"),
        (lambda: [os.open("/", os.O_RDONLY)], [PIECE], "CAN_SHRINK"),
        (lambda: [os.open("/etc/passwd", os.O_RDONLY)], [(0, 0, 1)], "CAN_SHRINK"),
        (lambda: [socket.socket().detach()], [PIECE], "CAN_SHRINK"),
        (lambda: [os.eventfd(0)], [PIECE], "CAN_SHRINK"),
        (lambda: [memfd(2 * PAGE)], [(0, 1, PAGE), (0, PAGE, PAGE)], "NOT_CONGRUENT"),
        (lambda: [memfd(1 << 46)], [(0, 0, 1 << 46)], "REFUSED"),
        (lambda: [memfd(PAGE)], [PIECE] * 5, "REFUSED"),
        (lambda: [memfd(1 << 62)], [(0, 0, 1 << 62)] * 3, "REFUSED"),
    ],
)
def test_mappings_that_are_refused(service, make, pieces, reason):
    answer = answer_to(service, push(pieces), make())
    assert isinstance(answer, protocol.Failed)
    assert (answer.error, answer.reason) == ("MappingError", reason)


@pytest.mark.parametrize(
    ("count", "pieces"),
    [
        (0, [PIECE]),
        (1, [(1, 0, PAGE)]),
        (2, [PIECE]),
        (1, [(0, 0, PAGE + 1)]),
        (1, [(0, PAGE, 1)]),
        (1, [(0, 2**63 - 1, 1)]),
        (1, [(0, 0, 0)]),
        (1, [(2**62, 0, PAGE)]),
        (253, [PIECE]),
    ],
)
def test_mappings_that_make_no_sense_end_the_connection(service, count, pieces):
    fds = [memfd(PAGE) for _ in range(count)]
    assert answer_to(service, push(pieces), fds) is None


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"at_address": 1}, "MappingError"),
        ({"at_address": 2**63 - PAGE}, "MappingError"),
        ({"guard_pages": 2**63 - 1}, "InvalidArgument"),
        ({"guard_pages": 1, "at_address": PAGE * 16}, "MappingError"),
        ({"prefault": True}, "MappingError"),
    ],
)
def test_placements_that_are_refused(service, fields, error):
    answer = answer_to(service, push([PIECE], **fields), [memfd(PAGE)])
    assert isinstance(answer, protocol.Failed)
    assert answer.error == error


def test_prefault_of_what_nobody_paid_for(service):
    """A sparse GiB that the service would be charged for page by page."""
    answer = answer_to(service, push([(0, 0, 1 << 30)], prefault=True), [memfd(1 << 30)])
    assert isinstance(answer, protocol.Failed)
    assert (answer.reason, answer.errno) == ("REFUSED", errno.EDQUOT)


def test_a_writable_mapping_of_what_came_read_only(service):
    fd = memfd(PAGE)
    read_only = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    os.close(fd)
    answer = answer_to(service, push([PIECE], writable=True), [read_only])
    assert isinstance(answer, protocol.Failed)
    assert answer.reason == "ACCESS"


def test_tokens(service):
    with stranger(service) as one:
        one.greet()
        client = service.clients()[1]
        for token in (1, 2):
            fd = memfd(PAGE)
            one.send(push([PIECE], id=token, token=token), [fd])
            os.close(fd)
            assert isinstance(one.receive()[0], protocol.Mapped)
        assert len(client.mappings()) == 2
        assert one.answer(protocol.PullMapping(3, 999)) == protocol.Done(3)
        one.send(protocol.ReleaseMapping(999))
        one.send(protocol.MappingEnded(999))
        one.send(protocol.ReleaseMapping(1))
        assert one.answer(protocol.PullMapping(4, 1)) == protocol.Done(4)
        assert len(client.mappings()) == 1
        assert one.answer(protocol.PullMapping(5, 2)) == protocol.MappingEnded(2)
        assert one.receive()[0] == protocol.Done(5)
        for _ in range(2):  # a token is free again once its mapping went; reuse ends it all
            fd = memfd(PAGE)
            one.send(push([PIECE], id=6, token=2), [fd])
            os.close(fd)
        assert isinstance(one.receive()[0], protocol.Mapped)
        assert one.is_ended()
        wait_until(lambda: client.closed and client.mappings() == [])


def test_a_mapping_of_a_client_that_is_gone_stays_readable(service):
    fd = memfd(PAGE)
    os.pwrite(fd, b"given", 0)
    with stranger(service) as one:
        one.greet()
        client = service.clients()[1]
        one.send(push([PIECE]), [fd])
        one.receive()
        mapping = client.wait_mapping(20)
    os.close(fd)
    wait_until(lambda: client.closed)
    assert bytes(mapping)[:5] == b"given"
    mapping.unmap()


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        (0, "FALSE_ANSWER"),
        (0x1000, "FALSE_ANSWER"),
        (2**63 - 1, "FALSE_ANSWER"),
        ("code", "FALSE_ANSWER"),
    ],
)
def test_a_client_that_lies_about_the_address(service, address, reason):
    """The client is this very process here: its maps may be read by everyone's privilege."""
    buffer = md.BufferMemoryDescriptor(PAGE, name="lied")
    with stranger(service) as one:
        one.greet()
        client = service.clients()[1]
        if address == "code":
            with open("/proc/self/maps") as maps:
                address = int(maps.readline().split("-")[0], 16)
        outcome = push_from_a_thread(client, buffer)
        message, fds = one.receive()
        close_all(fds)
        one.send(protocol.Mapped(message.id, address))
        error = outcome()
        assert (error.reason.name, error.errno) == (reason, errno.EPROTO)
        assert one.receive()[0] == protocol.ReleaseMapping(message.token)
        assert client._in_peer == set()


def test_a_client_whose_maps_are_held_up(service, monkeypatch):
    """What becomes of the look itself: cli/test_held_up.py."""

    def held_up(*_):
        raise md.TimedOutError("held up", errno=errno.ETIMEDOUT)

    monkeypatch.setattr("memdesc.services.pushing.regions", held_up)
    monkeypatch.setattr("memdesc.services.pushing.regions_in", held_up)
    with stranger(service) as one:
        one.greet()
        client = service.clients()[1]
        outcome = push_from_a_thread(client, md.BufferMemoryDescriptor(PAGE))
        message, fds = one.receive()
        close_all(fds)
        one.send(protocol.Mapped(message.id, PAGE))
        error = outcome()
        assert (error.reason.name, error.errno) == ("NOT_ANSWERING", errno.ETIMEDOUT)
        assert one.receive()[0] == protocol.ReleaseMapping(message.token)
        assert client._in_peer == set()


def push_from_a_thread(client, buffer, **options):
    """Map into it from another thread; give what waits for the error."""
    import threading

    caught: list[md.MappingError] = []

    def work() -> None:
        try:
            client.map_in_peer(
                buffer._extents(0, buffer.length, md.Access.READ_ONLY),
                access=md.Access.READ_ONLY,
                enforced=True,
                placement=Placement(),
                offset=0,
                owner=buffer,
                timeout=20,
            )
        except md.MappingError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def outcome() -> md.MappingError:
        thread.join(30)
        assert caught
        return caught[0].with_traceback(None)

    return outcome


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (lambda id: protocol.Done(id), "PEER_GONE"),
        (lambda id: protocol.Shares(id, (), False), "PEER_GONE"),
        (lambda id: protocol.Failed(id, "SystemExit", "no"), "PEER_GONE"),
        (lambda id: protocol.Failed(id, "MappingError", "no", 5, "NONSENSE"), "REFUSED"),
        (lambda id: protocol.Failed(id, "MappingError", "no", 5, None), "REFUSED"),
        (lambda id: protocol.Failed(id, "MappingError", "no", 5, "NO_SPACE"), "NO_SPACE"),
        (lambda _: b"noise", "PEER_GONE"),
        (lambda _: b"", "PEER_GONE"),
    ],
)
def test_a_client_that_answers_nonsense(service, reply, reason):
    buffer = md.BufferMemoryDescriptor(PAGE)
    with stranger(service) as one:
        one.greet()
        outcome = push_from_a_thread(service.clients()[1], buffer)
        message, fds = one.receive()
        close_all(fds)
        one.send(reply(message.id))
        assert outcome().reason.name == reason


def test_a_client_that_never_reads_what_is_pushed(service):
    """Pushes fail, the client stays: it may be stopped. Nothing piles up."""
    buffer = md.BufferMemoryDescriptor(PAGE)
    with stranger(service) as one:
        one.greet()
        client = service.clients()[1]
        high = count_fds()
        for _ in range(600):
            with pytest.raises(md.MappingError) as caught:
                client.map_in_peer(
                    buffer._extents(0, PAGE, md.Access.READ_ONLY),
                    access=md.Access.READ_ONLY,
                    enforced=True,
                    placement=Placement(),
                    offset=0,
                    owner=buffer,
                    timeout=0,
                )
            assert caught.value.reason is md.MappingReason.NOT_ANSWERING
        assert not client.closed
        assert count_fds() <= high + channel._QUEUE_FDS
        assert client._in_peer == set()
