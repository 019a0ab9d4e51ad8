"""Hostile clients and services, where events and queues are concerned."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from puppets import wait_until
from strangers import Stranger, memfd, service_that, welcome

import memdesc as md
from memdesc import _core
from memdesc.handover import close_all
from memdesc.portable import Portable
from memdesc.queues.layout import memory_for
from memdesc.services import protocol
from memdesc.services.queues import consumers, parts

PAGE = md.page_size
SIZE = 4 * PAGE
SOON = 20
IN = md.Direction.IN
POSITION = _core.RING_OFFSETS["position"]


@pytest.fixture
def service() -> Iterator[md.Service]:
    """A service with both kinds of queues and an honest client, served before and after."""
    with md.Service("gauge") as one, md.connect("gauge") as honest:
        samples = one.queue("samples", capacity=SIZE)
        commands = one.queue("commands", capacity=SIZE, direction=IN)
        with honest.queue("samples") as consumer, honest.queue("commands") as producer:
            client = commands.wait_client(SOON)
            yield one
            producer.enqueue(b"honest")
            assert commands.get(SOON) == (client, b"honest")
            while consumer.try_dequeue() is not None:  # what the test put
                pass
            samples.put(b"it")
            assert consumer.dequeue(SOON) == b"it"
            wait_until(lambda: one.clients() == [client])
    honest.task.close()  # pytest keeps the fixture's value a little longer


# --- Clients ------------------------------------------------------------------------------------

NONSENSE = [1, 7, SIZE + 8, 2**63, 2**64 - 1, 2**64 - 8]


@pytest.mark.parametrize("position", NONSENSE)
def test_a_client_that_corrupts_its_queue_is_dropped_alone(
    service: md.Service, position: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The consumer's position, and the producer's, in the queues of two clients."""
    samples, commands = service.queues()["samples"], service.queues()["commands"]
    assert isinstance(samples, md.ClientProducers)
    assert isinstance(commands, md.ClientConsumers)
    with md.connect("gauge") as one, md.connect("gauge") as two:
        consumer, producer = one.queue("samples"), two.queue("commands")
        consumer._descriptor.write_bytes(PAGE + POSITION, struct.pack("Q", position))
        producer._descriptor.write_bytes(POSITION, struct.pack("Q", position))
        producer._socket.send(b"x")  # type: ignore[union-attr]
        with caplog.at_level(logging.WARNING, "memdesc.services"):
            while len(samples.clients()) > 1:
                samples.put(bytes(SIZE // 2))  # it looks when there seems to be no room
            wait_until(lambda: commands.try_get() is None and len(commands.clients()) == 1)
            wait_until(lambda: one.closed and two.closed)
            for client, queue in ((consumer, "samples"), (producer, "commands")):
                assert client.name == queue
        logged = [record.message for record in caplog.records]
        assert logged == ["service.queue_corrupt"] * 2
        with pytest.raises(md.PeerGoneError):
            producer.enqueue(b"")


def test_a_size_that_reaches_beyond_what_was_published(service: md.Service) -> None:
    commands = service.queues()["commands"]
    assert isinstance(commands, md.ClientConsumers)
    with md.connect("gauge") as one:
        producer = one.queue("commands")
        producer.enqueue(b"good")
        producer._descriptor.write_bytes(2 * PAGE + 16, struct.pack("Q", SIZE))  # the next one's
        producer._descriptor.write_bytes(POSITION, struct.pack("Q", 32))
        assert commands.get(SOON)[1] == b"good"
        wait_until(lambda: commands.try_get() is None and len(commands.clients()) == 1)
        wait_until(lambda: one.closed)


def test_who_rings_without_end_is_dropped(
    service: md.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "_IDLE_RINGS", 5)
    commands = service.queues()["commands"]
    assert isinstance(commands, md.ClientConsumers)
    with md.connect("gauge") as one:
        producer = one.queue("commands")
        for number in range(20):  # who keeps to the rules is not
            producer.enqueue(b"%d" % number)
            assert commands.get(SOON)[1] == b"%d" % number
            assert commands.try_get() is None
        rings = 0
        while len(commands.clients()) == 2:
            rings += 1
            assert select.select([commands.fileno()], [], [], 0)[0] == []
            producer._socket.send(b"x")  # type: ignore[union-attr]
            assert select.select([commands.fileno()], [], [], SOON)[0]
            assert commands.try_get() is None
        assert rings == 5  # after one that found nothing, of the last entry
        wait_until(lambda: one.closed)
    with md.connect("gauge") as one:  # floods while the service waits for another
        producer = one.queue("commands")
        stop = threading.Event()

        def flood() -> None:
            try:
                while not stop.is_set():
                    producer._socket.send(b"x" * 4096)  # type: ignore[union-attr]
            except (OSError, AttributeError):
                pass  # dropped

        flooding = threading.Thread(target=flood)
        flooding.start()
        with pytest.raises(md.TimedOutError):
            commands.get(0.05)
        stop.set()
        producer.close()
        flooding.join(SOON)
        wait_until(lambda: commands.try_get() is None and len(commands.clients()) == 1)


def test_questions_without_end(service: md.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many queues as one may be opening at a time are made; the rest is refused at once."""
    monkeypatch.setattr(parts, "_OPENINGS", 3)
    with Stranger(service.path) as one:
        one.greet()
        gate = threading.Event()
        service._errands.add(lambda: gate.wait(SOON) and None)
        for number in range(8):
            one.send(protocol.OpenQueue(number, "samples"))
        refused = [one.receive()[0] for _ in range(5)]
        assert {(it.error, it.errno) for it in refused} == {("LimitError", errno.EDQUOT)}
        gate.set()
        answers = []
        for _ in range(3):
            answer, fds = one.receive()
            answers.append(answer)
            close_all(fds)  # it has no end of it
        assert isinstance(answers[0], protocol.QueueOpened)
        assert answers[0].produces is False
        kinds = {getattr(answer, "errno", None) for answer in answers}
        assert kinds <= {None, errno.EBUSY}
        # What it let go is made anew, and given up with it.
        one.send(protocol.OpenQueue(9, "samples"))
        answer, fds = one.receive()
        assert len(fds) == 2
        close_all(fds)


def test_a_rule_never_shows_what_there_is(service: md.Service) -> None:
    service.queue("secret", allow=lambda task: False)
    with Stranger(service.path) as one:
        one.greet()
        answers = [one.answer(protocol.OpenQueue(1, name)) for name in ("secret", "absent")]
        assert [(it.error, it.errno) for it in answers] == [
            ("ShareNotFoundError", errno.ENOENT)
        ] * 2


def test_messages_of_the_service_are_not_for_it(service: md.Service) -> None:
    told = protocol.Notify("a", 1, msgspec.Raw(b"\xc0"))
    form = Portable(1, "it", 3, False, ((0, 0, 1),))
    for message in (told, protocol.QueueOpened(1, True, form)):
        with Stranger(service.path) as one:
            one.greet()
            one.send(message)
            assert one.is_ended()


# --- Services -------------------------------------------------------------------------------------


def raised_by(
    talk: Callable[[Stranger], None], use: Callable[[md.Connection], object], path: Path
) -> BaseException:
    with service_that(lambda one: (welcome(one), talk(one))[1], path):
        with md.connect("hostile") as connection:
            with pytest.raises(md.MemdescError) as caught:
                use(connection)
    return caught.value  # the leak guard looks for what it left


def notify(value: bytes, name: str = "a", count: int = 1) -> bytes:
    """A notice as bytes: also such as the library would not make."""
    return msgspec.msgpack.encode(
        {"type": "Notify", "name": name, "count": count, "value": msgspec.Raw(value)}
    )


NOTICES = {
    "not asked for": notify(b"\xc0", "b"),
    "huge": notify(msgspec.msgpack.encode(bytes(5000))),
    "text that is none": notify(b"\xa2\xff\xff"),
    "endless": notify(b"\x91" * 4000),
    "cut off": notify(b"\x92\xc0"),
    "empty": notify(b""),
    "count of nothing": notify(b"\xc0", count=0),
    "count below": notify(b"\xc0", count=-1),
}


@pytest.mark.parametrize("what", NOTICES)
def test_notices_that_are_none_end_the_connection(runtime_dir: Path, what: str) -> None:
    def talk(one: Stranger) -> None:
        question = one.receive()[0]
        one.send(protocol.Done(question.id))
        one.send(NOTICES[what])

    error = raised_by(talk, lambda c: c.events("a").get(SOON), runtime_dir / "hostile")
    assert isinstance(error, md.ProtocolError)
    assert error.errno == errno.EPROTO


def test_a_service_that_tells_without_end_fills_nothing(runtime_dir: Path) -> None:
    """Ten thousand notices of names that were asked for are one value of each."""
    held: list[int] = []

    def talk(one: Stranger) -> None:
        for _ in range(2):
            one.send(protocol.Done(one.receive()[0].id))
        for number in range(10_000):
            one.send(notify(b"\xcd" + struct.pack(">H", number), "ab"[number % 2], 2**62))
        one.receive()  # Unlisten, of what is closed then
        one.receive()

    with service_that(lambda one: (welcome(one), talk(one))[1], runtime_dir / "hostile"):
        with md.connect("hostile") as connection:
            events = connection.events("a", "b")
            latest: dict[str, md.Event] = {}
            while {name: event.value for name, event in latest.items()} != {"a": 9998, "b": 9999}:
                held.append(len(events._waiting))
                event = events.get(SOON)
                latest[event.name] = event
            assert max(held) <= 2
            assert events.try_get() is None
            events.close()


def test_names_that_nobody_asked_for(runtime_dir: Path) -> None:
    def talk(one: Stranger) -> None:
        one.send(protocol.Done(one.receive()[0].id))
        for number in range(10_000):
            one.send(notify(b"\xc0", f"{number}"))

    error = raised_by(talk, lambda c: c.events("a").get(SOON), runtime_dir / "hostile")
    assert isinstance(error, (md.ProtocolError, md.PeerGoneError))


def queue_memory(*, magic: bool = True, size: int = 0, seals: int | None = None) -> int:
    size = size or memory_for(SIZE)
    fd = memfd(size) if seals is None else memfd(size, seals=seals)
    if magic:
        os.pwrite(fd, struct.pack("=Q", _core.RING_MAGIC), _core.RING_OFFSETS["magic"])
    return fd


def half(kind: int = socket.SOCK_STREAM, family: int = socket.AF_UNIX) -> int:
    if family != socket.AF_UNIX:
        return socket.socket(family, kind).detach()
    mine, theirs = socket.socketpair(family, kind)
    mine.close()
    return theirs.detach()


def read_only(fd: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    finally:
        os.close(fd)


def whole(size: int = 0) -> Portable:
    return Portable(1, "it", 3, True, ((0, 0, size or memory_for(SIZE)),))


LIES: dict[str, tuple[Portable, Callable[[], list[int]], type[BaseException]]] = {
    "nothing": (whole(), list, md.ProtocolError),
    "no socket": (whole(), lambda: [queue_memory()], md.ProtocolError),
    "no memory": (whole(), lambda: [half()], md.ProtocolError),
    "a pipe": (whole(), lambda: [queue_memory(), os.memfd_create("it")], md.ProtocolError),
    "datagrams": (whole(), lambda: [queue_memory(), half(socket.SOCK_DGRAM)], md.ProtocolError),
    "internet": (
        whole(),
        lambda: [queue_memory(), half(family=socket.AF_INET)],
        md.ProtocolError,
    ),
    "too many": (whole(), lambda: [queue_memory(), queue_memory(), half()], md.ProtocolError),
    "no queue": (whole(), lambda: [queue_memory(magic=False), half()], md.ProtocolError),
    "small": (whole(PAGE), lambda: [queue_memory(size=PAGE), half()], md.InvalidArgument),
    "smaller than said": (whole(), lambda: [queue_memory(size=PAGE), half()], md.ProtocolError),
    "not sealed": (whole(), lambda: [queue_memory(seals=0), half()], md.MappingError),
    "read-only": (whole(), lambda: [read_only(queue_memory()), half()], md.ProtocolError),
}


@pytest.mark.parametrize("produces", [False, True])
@pytest.mark.parametrize("what", LIES)
def test_queues_that_are_none(runtime_dir: Path, what: str, produces: bool) -> None:
    form, make, kind = LIES[what]

    def talk(one: Stranger) -> None:
        question = one.receive()[0]
        fds = make()
        try:
            one.send(protocol.QueueOpened(question.id, produces, form), fds)
        finally:
            close_all(fds)

    error = raised_by(talk, lambda c: c.queue("it", timeout=SOON), runtime_dir / "hostile")
    assert isinstance(error, kind)


def test_a_service_that_is_there_and_closes_its_end_or_takes_it_back(runtime_dir: Path) -> None:
    """Its word that it had closed its end does not keep a waiter when the connection ends."""
    gate = threading.Event()

    def talk(one: Stranger) -> None:
        question = one.receive()[0]
        memory, sock = queue_memory(), half()
        one.send(protocol.QueueOpened(question.id, False, whole()), [memory, sock])
        os.pwrite(memory, struct.pack("=I", 1), _core.RING_OFFSETS["closed"])
        gate.wait(SOON)
        one.sock.shutdown(socket.SHUT_RDWR)
        wait_until(ended.is_set)
        os.pwrite(memory, struct.pack("=I", 0), _core.RING_OFFSETS["closed"])
        close_all([memory, sock])
        taken_back.set()

    ended, taken_back = threading.Event(), threading.Event()
    with service_that(lambda one: (welcome(one), talk(one))[1], runtime_dir / "hostile"):
        with md.connect("hostile") as connection:
            consumer = connection.queue("it", timeout=SOON)
            gate.set()
            wait_until(lambda: connection.closed)
            ended.set()
            assert taken_back.wait(SOON)
            with pytest.raises(md.PeerGoneError):
                consumer.dequeue(SOON)
