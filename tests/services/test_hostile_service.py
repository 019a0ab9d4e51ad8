"""Hostile services: their clients get an error of the family, keep nothing and go on."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from letting_go import lets_go, no_collector
from puppets import wait_until
from strangers import Stranger, memfd, push, service_that, welcome

import memdesc as md
from memdesc.handover import close_all
from memdesc.portable import Portable
from memdesc.services import protocol

PAGE = md.page_size
Reply = Callable[[int], tuple[object, list[int]]]


def share(nbytes: int = PAGE, **fields: object) -> protocol.Share:
    return protocol.Share("it", nbytes, fields.pop("writable", False), **fields)  # type: ignore[arg-type]


def portable(pieces: list[tuple[int, int, int]], writable: bool = False, **fields: int) -> Portable:
    return Portable(
        fields.get("version", 1), "it", fields.get("direction", 3), writable, tuple(pieces)
    )


def outcome(reply: Reply, path: Path) -> BaseException:
    """What `map` raises when the service answers it like that; nothing is left open."""

    def answers(one: Stranger) -> None:
        welcome(one)
        question, _ = one.receive()
        message, fds = reply(question.id)
        try:
            one.send(message, fds)
        finally:
            close_all(fds)

    with service_that(answers, path):
        with md.connect("hostile") as connection:
            with pytest.raises(md.MemdescError) as caught:
                connection.map("it", timeout=20)
    return caught.value  # the leak guard looks for what it left


def opened(
    said: protocol.Share, form: Portable, make: Callable[[], list[int]] = lambda: [memfd(PAGE)]
) -> Reply:
    return lambda number: (protocol.Opened(number, said, form), make())


def read_only() -> list[int]:
    fd = memfd(PAGE)
    try:
        return [os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)]
    finally:
        os.close(fd)


WHOLE = [(0, 0, PAGE)]


@pytest.mark.parametrize(
    ("reply", "kind", "number"),
    [
        (opened(share(PAGE + 1), portable(WHOLE)), md.ProtocolError, errno.EPROTO),
        (opened(share(1), portable(WHOLE)), md.ProtocolError, errno.EPROTO),
        (opened(share(), portable(WHOLE, True)), md.ProtocolError, errno.EPROTO),
        (opened(share(writable=True), portable(WHOLE)), md.ProtocolError, errno.EPROTO),
        (
            opened(share(writable=True), portable(WHOLE, True), read_only),
            md.ProtocolError,
            errno.EPROTO,
        ),
        (opened(share(), portable([(0, 0, PAGE + 1)])), md.ProtocolError, errno.EPROTO),
        (opened(share(), portable(WHOLE), list), md.ProtocolError, errno.EPROTO),
        (
            opened(share(), portable(WHOLE), lambda: [memfd(PAGE), memfd(PAGE)]),
            md.ProtocolError,
            errno.EPROTO,
        ),
        (opened(share(0), portable([])), md.ProtocolError, errno.EPROTO),
        (opened(share(), portable(WHOLE, version=2)), md.ProtocolError, errno.EPROTO),
        (opened(share(), portable(WHOLE, direction=99)), md.ProtocolError, errno.EPROTO),
        (
            opened(share(), portable(WHOLE), lambda: [memfd(PAGE, seals=0)]),
            md.MappingError,
            errno.EPERM,
        ),
        (lambda number: (protocol.Done(number), []), md.ProtocolError, errno.EPROTO),
        (lambda number: (protocol.Mapped(number, 1), [memfd(1)]), md.ProtocolError, errno.EPROTO),
        (lambda number: (protocol.Done(number + 1), []), md.ProtocolError, errno.EPROTO),
        (lambda _: (b"noise", []), md.ProtocolError, errno.EPROTO),
        (lambda _: (protocol.Hello(1), []), md.ProtocolError, errno.EPROTO),
        (lambda _: (protocol.ListShares(1), []), md.ProtocolError, errno.EPROTO),
        (lambda _: (b"", []), md.PeerGoneError, errno.ECONNRESET),
        (
            lambda number: (protocol.Failed(number, "KeyboardInterrupt", "x"), []),
            md.ProtocolError,
            None,
        ),
        (
            lambda number: (protocol.Failed(number, "MemdescError", "x", 7), [memfd(1)]),
            md.MemdescError,
            7,
        ),
    ],
)
def test_answers_that_lie(runtime_dir, reply, kind, number):
    error = outcome(reply, runtime_dir / "hostile")
    assert isinstance(error, kind)
    assert error.errno == number


@pytest.mark.parametrize(
    "reply",
    [opened(share(0), portable([])), lambda number: (protocol.Done(number), [])],
)
def test_who_lied_keeps_nothing_alive(runtime_dir, reply):
    def answers(one: Stranger) -> None:
        welcome(one)
        message, fds = reply(one.receive()[0].id)
        one.send(message, fds)
        close_all(fds)

    with service_that(answers, runtime_dir / "hostile"), md.connect("hostile") as connection:
        with no_collector():
            assert lets_go(lambda: connection.map("it", timeout=20), md.ProtocolError)


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (share(shape=(2**62, 2**62), dtype="|u1"), md.RangeError),
        (share(shape=(PAGE + 1,), dtype="|u1"), md.RangeError),
        (share(shape=(1,), dtype="|O"), md.InvalidArgument),
        (share(shape=(1,), dtype="nonsense"), (TypeError, md.InvalidArgument)),
        (share(shape=(1,), dtype="|V99999999"), md.RangeError),
    ],
)
def test_layouts_that_lie(runtime_dir, said, kind):
    """The bytes are there as they are; only the array is refused."""

    def answers(one: Stranger) -> None:
        welcome(one)
        question, _ = one.receive()
        fd = memfd(PAGE)
        one.send(protocol.Opened(question.id, said, portable(WHOLE)), [fd])
        os.close(fd)

    with service_that(answers, runtime_dir / "hostile"), md.connect("hostile") as connection:
        mapping = connection.map("it")
        assert bytes(mapping) == bytes(PAGE)
        with pytest.raises(kind):
            mapping.array()


@pytest.mark.parametrize(
    ("greeting", "kind"),
    [
        (protocol.Welcome(protocol.VERSION + 1, "camera"), md.ProtocolError),
        (protocol.Done(0), md.ProtocolError),
        (protocol.Opened(0, share(), portable(WHOLE)), md.ProtocolError),
        (b"noise", md.ProtocolError),
        (b"", md.PeerGoneError),
        (protocol.Failed(0, "AccessDeniedError", "no", 13), md.AccessDeniedError),
        (protocol.Failed(0, "SystemExit", "no", 13), md.ProtocolError),
    ],
)
def test_greetings_that_lie(runtime_dir, greeting, kind):
    with service_that(lambda one: one.send(greeting), runtime_dir / "hostile"):
        with pytest.raises(kind):
            md.connect("hostile", timeout=20)


def test_no_greeting(runtime_dir):
    def silent(one: Stranger) -> None:
        one.is_ended()

    with service_that(silent, runtime_dir / "hostile"):
        with pytest.raises(md.TimedOutError) as caught:
            md.connect("hostile", timeout=0.05)
        assert caught.value.errno == errno.ETIMEDOUT


def test_a_list_without_end(runtime_dir):
    def answers(one: Stranger) -> None:
        welcome(one)
        while True:
            question, _ = one.receive()
            one.send(protocol.Shares(question.id, (share(),), True))

    with service_that(answers, runtime_dir / "hostile"), md.connect("hostile") as connection:
        with pytest.raises(md.TimedOutError):
            connection.shares(timeout=0.1)


def test_what_it_pushes_is_bounded(runtime_dir):
    """By its limits, and by what it has paid for; refused, one by one."""
    answers: list[object] = []

    def pour(one: Stranger) -> None:
        welcome(one)
        for number in range(1, 6):
            fd = memfd(PAGE)
            one.send(push([(0, 0, PAGE)], id=number, token=number), [fd])
            os.close(fd)
            answers.append(one.receive()[0])
        fd = memfd(1 << 40)
        one.send(push([(0, 0, 1 << 40)], id=6, token=6, prefault=True), [fd])
        os.close(fd)
        answers.append(one.receive()[0])

    with service_that(pour, runtime_dir / "hostile"):
        with md.connect("hostile", limits=md.Limits(mappings=3)) as connection:
            wait_until(lambda: len(answers) == 6)
            assert len(connection.mappings()) == 3
            for mapping in connection.mappings():
                mapping.unmap()
    assert [type(answer).__name__ for answer in answers] == ["Mapped"] * 3 + ["Failed"] * 3
    assert [answer.reason for answer in answers[3:]] == ["REFUSED"] * 3


def test_a_thread_is_not_needed_to_be_hostile(runtime_dir):
    """It closes at once, again and again: each attempt is an error, none leaks."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(f"{runtime_dir}/hostile")
        listener.listen()

        def close_at_once() -> None:
            for _ in range(20):
                listener.accept()[0].close()

        thread = threading.Thread(target=close_at_once)
        thread.start()
        for _ in range(20):
            with pytest.raises(md.PeerGoneError):
                md.connect("hostile", timeout=20)
        thread.join(20)
    (runtime_dir / "hostile").unlink()


def test_a_list_of_shares_without_end_is_not_read_for_ever(runtime_dir: Path) -> None:
    def answers(one: Stranger) -> None:
        welcome(one)
        page = tuple(protocol.Share("same", 1, False) for _ in range(128))
        while True:
            one.send(protocol.Shares(one.receive()[0].id, page, True))

    with service_that(answers, runtime_dir / "hostile"):
        with md.connect("hostile") as connection:
            with pytest.raises(md.ProtocolError):
                connection.shares(timeout=None)
