"""Strangers who call badly: an error, or the end of their connection; the others notice nothing."""

from __future__ import annotations

import errno
import os
import resource
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from puppets import wait_until

import memdesc as md
from memdesc import _core
from memdesc.handover import close_all, receive_once
from memdesc.portable import Portable
from memdesc.services import protocol
from memdesc.services.calls.workers import Workers
from memdesc.services.protocol.calls import (
    EXT_ARRAY,
    EXT_BYTES,
    EXT_DESCRIPTOR,
    EXT_VIEW,
    Given,
    Lent,
)

PAGE = md.page_size
encode = msgspec.msgpack.encode
Ext = msgspec.msgpack.Ext


class Stranger:
    """A raw socket that greets and then says what it is told."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.settimeout(20)
        self.sock.connect(str(path))
        self.say(protocol.Hello(protocol.VERSION))
        assert isinstance(self.hear(), protocol.Welcome)

    def say(self, message: Any, fds: list[int] | None = None) -> None:
        socket.send_fds(self.sock, [protocol.encode(message)], fds or [])

    def hear(self) -> Any:
        """The next message; None at the end."""
        try:
            data, fds, _ = receive_once(self.sock, protocol.MAX_MESSAGE)
        except ConnectionResetError:
            return None
        close_all(fds)
        return protocol.decode(data) if data else None

    def call(self, *arguments: Any, fds: list[int] | None = None, **fields: Any) -> Any:
        """Call `take` with these; give the answer."""
        usual: dict[str, Any] = {"id": 1, "method": "take", "memory": (), "record": None}
        record = fields.pop("arguments", encode((arguments, {})))
        self.say(protocol.Call(arguments=msgspec.Raw(record), **(usual | fields)), fds)
        return self.hear()


def given(size: int = PAGE, pieces: Any = None, **fields: Any) -> Given:
    portable = {"version": 1, "name": "", "direction": 2, "writable": False} | fields
    return Given(1, Portable(pieces=pieces or ((0, 0, size),), **portable))


@contextmanager
def sealed(size: int = PAGE, seals: int = _core.F_SEAL_SHRINK | _core.F_SEAL_GROW) -> Iterator[int]:
    import fcntl

    fd = os.memfd_create("stranger", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        if seals:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def stranger(service: md.Service) -> Iterator[Stranger]:
    @service.method
    def take(x: object = None) -> str:
        return type(x).__name__

    @service.method
    def text(x: bytes) -> int:
        return len(x)

    one = Stranger(service.path)
    yield one
    one.sock.close()


def test_a_stranger_who_calls_well_is_answered(stranger: Stranger) -> None:
    """By hand, as a program in another language would."""
    answer = stranger.call([1, 2])
    assert (answer.id, msgspec.msgpack.decode(answer.value)) == (1, "list")
    with sealed() as fd:
        answer = stranger.call(Ext(EXT_BYTES, encode(0)), id=2, memory=(given(),), fds=[fd])
    assert msgspec.msgpack.decode(answer.value) == "bytes"
    form = encode(("<u2", (2, 3), bytes(12)))
    assert msgspec.msgpack.decode(stranger.call(Ext(EXT_ARRAY, form)).value) == "ndarray"


@pytest.mark.parametrize(
    ("code", "data"),
    [
        (EXT_BYTES, encode(7)),  # no such memory
        (EXT_BYTES, encode(-1)),
        (EXT_BYTES, encode("0")),
        (EXT_BYTES, b""),
        (EXT_DESCRIPTOR, encode(1 << 60)),
        (EXT_ARRAY, encode(("<u2", (2, 3), bytes(11)))),  # one byte too few
        (EXT_ARRAY, encode(("O", (1,), bytes(8)))),
        (EXT_ARRAY, encode(("<u2,(", (1,), bytes(8)))),
        (EXT_ARRAY, encode(("<u2", (1 << 40, 1 << 40), bytes(8)))),
        (EXT_ARRAY, encode(("<u2", (1,), 3))),
        (EXT_ARRAY, encode(("V0", (1,), bytes(8)))),
        (EXT_ARRAY, b"\xc1"),
        (99, b"x"),
        (-1, b"\xff" * 15),
    ],
)
def test_records_that_make_no_sense_are_refused(stranger: Stranger, code: int, data: bytes) -> None:
    for number, method in enumerate(("take", "text")):
        answer = stranger.call(Ext(code, data), id=number + 1, method=method)
        assert isinstance(answer, protocol.Failed)
        assert answer.error in ("InvalidArgument", "RangeError", "ProtocolError")
    assert isinstance(stranger.call(1), protocol.Returned)


@pytest.mark.parametrize(
    "record",
    [
        b"\xc0",
        encode(1),
        encode(([1],)),
        encode(([1], {}, 3)),
        encode(([1], {"x": 1})),
        encode(([], {7: 1})),
        encode(([], {"": 1})),
        b"\x92" + b"\x91" * 60_000 + b"\xc0\x80",  # nested without end
        b"\x92\x91\xa1\xff\x80",  # text that is none
        b"\x92\xdd\xff\xff\xff\xff",
    ],
)
def test_arguments_that_are_none_are_refused_or_end_it(
    service: md.Service, stranger: Stranger, record: bytes
) -> None:
    answer = stranger.call(arguments=record)
    # What is no MessagePack at all ends the connection, as it would in any other message.
    assert answer is None or answer.error == "InvalidArgument"
    with md.connect("calls") as other:
        assert other.call("take", 1) == "int"
        other.close()


def test_memory_that_is_not_what_it_is_said_to_be(stranger: Stranger) -> None:
    view = Ext(EXT_BYTES, encode(0))
    cases: list[tuple[Given, int, int]] = [
        (given(2 * PAGE), PAGE, _core.F_SEAL_SHRINK | _core.F_SEAL_GROW),  # too small
        (given(), PAGE, 0),  # could be truncated
        (given(pieces=((1, 0, PAGE),)), PAGE, _core.F_SEAL_SHRINK),
        (given(pieces=((0, 1 << 62, PAGE),)), PAGE, _core.F_SEAL_SHRINK),
        (given(version=9), PAGE, _core.F_SEAL_SHRINK),
        (given(direction=77), PAGE, _core.F_SEAL_SHRINK),
        (given(writable=True), PAGE, _core.F_SEAL_SHRINK | _core.F_SEAL_WRITE),
    ]
    for number, (memory, size, seals) in enumerate(cases):
        with sealed(size, seals) as fd:
            answer = stranger.call(view, id=number, memory=(memory,), fds=[fd])
        assert answer.error in ("ProtocolError", "MappingError"), (number, answer)
    with open(os.devnull) as null:
        answer = stranger.call(view, memory=(given(),), fds=[null.fileno()])
    assert answer.error == "MappingError"


@pytest.mark.parametrize("code", [EXT_BYTES, EXT_VIEW, EXT_ARRAY])
def test_memory_that_is_named_again_and_again_is_there_once(
    service: md.Service, stranger: Stranger, code: int
) -> None:
    """A reference takes three bytes of a record, what it names a hundred MB, perhaps."""
    places: list[set[int]] = []

    @service.method
    def where(x: object) -> None:
        assert isinstance(x, list)
        places.append({_core.buffer_address(one)[0] for one in x})

    name = Ext(code, encode(("u1", (PAGE,), 0) if code == EXT_ARRAY else 0))
    room = bytearray(PAGE)
    lent = Lent(_core.buffer_address(room)[0], PAGE, 2)
    with sealed() as fd:
        stranger.call([name] * 1000, method="where", memory=(given(),), fds=[fd])
    stranger.call([name] * 1000, method="where", memory=(lent,))
    assert [len(one) for one in places] == [1, 1]


def test_ranges_beside_the_calls_in_flight_are_bounded(
    service: md.Service, stranger: Stranger
) -> None:
    """Each is a mapping, of which a task has about 65,530."""
    gate = threading.Event()

    @service.method
    def hold(x: memoryview) -> None:
        assert gate.wait(30)

    many = given(pieces=((0, 0, PAGE),) * 4096)
    view = Ext(EXT_VIEW, encode(0))
    with sealed() as fd:
        record = msgspec.Raw(encode(((view,), {})))
        stranger.say(protocol.Call(1, "hold", record, (many,)), [fd])
        answer = stranger.call(view, id=2, memory=(given(),), fds=[fd])
        assert (answer.error, answer.errno) == ("LimitError", errno.EDQUOT)
        gate.set()
        assert isinstance(stranger.hear(), protocol.Returned)
        assert isinstance(stranger.call(view, memory=(given(),), fds=[fd]), protocol.Returned)


def test_memory_that_nobody_paid_for_is_not_copied(stranger: Stranger) -> None:
    """A sparse file costs its owner nothing; copied, it would be this task's end."""
    view = Ext(EXT_BYTES, encode(0))
    physical = os.sysconf("SC_PHYS_PAGES") * PAGE
    for size, error in ((physical - PAGE, "AllocationError"), (1 << 45, "LimitError")):
        with sealed(size) as fd:
            answer = stranger.call(view, method="text", memory=(given(size),), fds=[fd])
        assert answer.error == error, answer
    size = (64 << 20) + PAGE
    with sealed(size) as fd:
        answer = stranger.call(arguments=encode(None), memory=(given(size),), fds=[fd], record=0)
    assert (answer.error, answer.errno) == ("InvalidArgument", errno.E2BIG)


def test_descriptors_beside_the_calls_of_one_task_are_bounded(
    service: md.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is connected: a quarter of all that the service may have."""
    gate = threading.Event()
    record = msgspec.Raw(encode(((), {})))

    @service.method
    def hold() -> None:
        assert gate.wait(30)

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, hard))
    with sealed() as fd, ExitStack() as stack:
        strangers = [Stranger(service.path) for _ in range(5)]
        for one in strangers:
            stack.callback(one.sock.close)
        for one in strangers[:4]:
            one.say(protocol.Call(1, "hold", record, (given(),) * 64), [fd] * 64)
            one.say(protocol.Call(2, "nope", record))
            assert one.hear().error == "MethodNotFoundError"  # so the first has been taken
        last = strangers[4]
        last.say(protocol.Call(1, "hold", record, (given(),)), [fd])
        assert (answer := last.hear()).errno == errno.EDQUOT, answer
        last.say(protocol.Call(2, "hold", record))
        gate.set()
        assert isinstance(last.hear(), protocol.Returned)
        strangers[0].sock.close()
        for one in strangers[1:4]:
            assert isinstance(one.hear(), protocol.Returned)
        wait_until(lambda: not service._held._held)
        last.say(protocol.Call(3, "hold", record, (given(),)), [fd])
        assert isinstance(last.hear(), protocol.Returned)


def test_lent_memory_that_is_not_there(stranger: Stranger) -> None:
    view = Ext(EXT_BYTES, encode(0))
    for lent, error in [
        (Lent(4096, 100, 2), "CopyError"),
        (Lent((1 << 63) - 1, 100, 2), "InvalidArgument"),
        (Lent(0, 0, 2), "InvalidArgument"),
        (Lent(4096, 1 << 50, 2), "LimitError"),
    ]:
        answer = stranger.call(view, memory=(lent,))
        assert answer.error == error, answer
    # to be filled where nothing is
    answer = stranger.call(1, memory=(Lent(4096, 100, 1),), into=0)
    assert answer.error == "InvalidArgument"  # text is not stored
    answer = stranger.call(1, memory=(), into=0)
    assert answer.error == "ProtocolError"


@pytest.mark.parametrize("files", [0, 2])
def test_descriptors_that_are_not_named_end_the_connection(
    service: md.Service, stranger: Stranger, files: int
) -> None:
    with sealed() as fd:
        assert stranger.call(1, memory=(given(),), fds=[fd] * files) is None


def test_one_number_for_two_calls_ends_the_connection(
    service: md.Service, stranger: Stranger
) -> None:
    gate = threading.Event()

    @service.method
    def wait() -> None:
        assert gate.wait(30)

    record = msgspec.Raw(encode(((), {})))
    stranger.say(protocol.Call(5, "wait", record))
    stranger.say(protocol.Cancel(77))  # of no call: ignored
    stranger.say(protocol.Call(5, "wait", record))
    assert stranger.hear() is None
    gate.set()


def test_calling_and_cancelling_without_end_queues_nothing(
    service: md.Service, stranger: Stranger
) -> None:
    gate = threading.Event()

    @service.method
    def wait() -> None:
        assert gate.wait(30)

    record = msgspec.Raw(encode(((), {})))
    answers = 0
    for number in range(500):
        stranger.say(protocol.Call(number, "wait", record))
        stranger.say(protocol.Cancel(number))
        if number >= 4:  # half of the workers are busy; all others are withdrawn at once
            answer = stranger.hear()
            assert answer.errno == errno.ECANCELED
            answers += 1
    (client,) = service.clients()
    assert len(client._calls) <= 4
    gate.set()
    assert answers == 496


def test_tens_of_thousands_of_jobs_are_withdrawn_at_once() -> None:
    """A task with many connections that is killed: the I/O thread takes them back one by one."""

    class Job:
        compared = 0

        def __eq__(self, other: object) -> bool:
            Job.compared += 1
            return self is other

        __hash__ = object.__hash__

        def __call__(self) -> None:
            pass

    gate, begun = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        assert gate.wait(30)

    workers = Workers(2)
    try:
        workers.submit("hostile", hold)  # half of them
        assert begun.wait(30)
        jobs = [Job() for _ in range(1000)]
        for job in jobs:
            workers.submit("hostile", job)
        assert all(workers.withdraw("hostile", job) for job in reversed(jobs))
        assert not workers.withdraw("hostile", jobs[0])
        assert Job.compared < 10_000
    finally:
        gate.set()
        workers.close()


def test_a_client_answers_no_calls_and_takes_no_lent_memory(tmp_path: Path) -> None:
    """A service that answers with what only a client may say, or with memory of the client's."""
    path = tmp_path / "bad"

    def outcome(reply: Callable[[int], Any]) -> BaseException | None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(20)
                sock.recv(1000)
                sock.send(protocol.encode(protocol.Welcome(protocol.VERSION, "bad")))
                number = protocol.decode(sock.recv(10_000)).id  # type: ignore[union-attr]
                sock.send(protocol.encode(reply(number)))
                sock.recv(1000)  # until the client lets go

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with md.connect(str(path)) as connection:
                try:
                    connection.call("take", timeout=20)
                except md.MemdescError as error:
                    return error
                return None
        finally:
            thread.join(30)
            listener.close()
            path.unlink()

    nil = msgspec.Raw(encode(None))
    assert outcome(lambda number: protocol.Returned(number, nil)) is None
    for reply in (
        lambda number: protocol.Returned(number, nil, (Lent(4096, 9, 2),)),
        lambda number: protocol.Returned(number, nil, (given(),)),
        lambda number: protocol.Returned(number, nil, (), 3),
        lambda number: protocol.Returned(number, msgspec.Raw(encode(Ext(99, b"")))),
        lambda number: protocol.Call(number, "take", nil),
        lambda number: protocol.Cancel(number),
        lambda number: protocol.Done(number),
    ):
        error = outcome(reply)
        assert isinstance(error, (md.ProtocolError, md.InvalidArgument)), error


def test_arrays_of_a_stranger_are_read_only(service: md.Service, stranger: Stranger) -> None:
    seen: list[Any] = []

    @service.method
    def keep(x: np.ndarray[Any, Any]) -> None:
        seen.append(x)

    form = Ext(EXT_ARRAY, encode(("u1", (PAGE,), 0)))
    with sealed() as fd:
        writable = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
        try:
            memory = (given(writable=True),)
            answer = stranger.call(form, method="keep", memory=memory, fds=[writable])
        finally:
            os.close(writable)
    assert isinstance(answer, protocol.Returned), answer
    assert not seen[0].flags.writeable
