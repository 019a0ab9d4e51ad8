"""Services: what they share, whom they admit, and what they see of their clients."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from children import NOBODY, become, in_child
from puppets import wait_until

import memdesc as md
from memdesc.errors import TimedOutError
from memdesc.services import connection as module

RW = md.Access.READ_WRITE
RO = md.Access.READ_ONLY


def refused(error, number):
    assert error.value.errno == number


def test_share_map_list():
    frames = md.BufferMemoryDescriptor(24, name="frames")
    frames.array((2, 3), "<i4")[:] = [[1, 2, 3], [4, 5, 6]]
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("frames", frames, shape=(2, 3), dtype="<i4")
        service.share("raw", frames)
        shares = connection.shares()
        assert [(s.name, s.nbytes, s.writable, s.shape, s.dtype) for s in shares] == [
            ("frames", 24, False, (2, 3), "<i4"),
            ("raw", 24, False, None, None),
        ]
        assert service.shares() == shares
        pixels = connection.map("frames").array()
        assert pixels.tolist() == [[1, 2, 3], [4, 5, 6]]
        assert not pixels.flags.writeable
        frames.array((2, 3), "<i4")[1, 2] = 60
        assert pixels[1, 2] == 60
        assert connection.map("raw").array().dtype == np.uint8
        part = connection.map("frames", offset=4, length=8)
        assert (part.length, part.array(dtype="<i4").tolist()) == (8, [2, 3])


def test_what_is_not_shared():
    with md.Service("camera") as service, md.connect("camera") as connection:
        for ask in (connection.map, connection.descriptor):
            with pytest.raises(md.ShareNotFoundError) as caught:
                ask("nothing", timeout=0)
            refused(caught, errno.ENOENT)
        with pytest.raises(md.ShareNotFoundError) as caught:
            service.unshare("nothing")
        refused(caught, errno.ENOENT)
        assert connection.shares() == []


def test_unshare_and_replace_leave_what_is_mapped():
    one, two = (md.BufferMemoryDescriptor(8, name=name) for name in ("one", "two"))
    one.write_bytes(0, b"one")
    two.write_bytes(0, b"two")
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("it", one)
        first = connection.map("it")
        service.share("it", two)
        second = connection.map("it")
        service.unshare("it")
        with pytest.raises(md.ShareNotFoundError):
            connection.map("it", timeout=0)
        assert (bytes(first)[:3], bytes(second)[:3]) == (b"one", b"two")


def test_a_name_that_can_not_travel_is_refused_where_it_is_given():
    buffer = md.BufferMemoryDescriptor(8)
    with md.Service("camera") as service, md.connect("camera") as connection:
        for name in ("", "x" * 1025, "\ud800", 5):
            with pytest.raises(md.InvalidArgument):
                service.share(name, buffer)
            with pytest.raises(md.InvalidArgument):
                connection.map(name)
        service.share("ü" * 1024, buffer)
        assert len(connection.map("ü" * 1024)) == 8


def test_a_list_longer_than_a_message():
    buffer = md.BufferMemoryDescriptor(8)
    names = [f"{index:04}" + "€" * 1020 for index in range(300)]
    with md.Service("camera") as service, md.connect("camera") as connection:
        for name in names:
            service.share(name, buffer)
        assert [share.name for share in connection.shares()] == names


def test_access_of_a_share():
    readable = md.BufferMemoryDescriptor(8)
    writable = md.BufferMemoryDescriptor(8, max_access=RW)
    with md.Service("camera") as service, md.connect("camera") as connection:
        with pytest.raises(md.SealedError) as caught:
            service.share("x", readable, access=RW)
        refused(caught, errno.EACCES)
        with pytest.raises(md.SealedError) as caught:
            service.share("x", writable, access=RO)
        refused(caught, errno.EACCES)
        assert service.shares() == []
        service.share("both", writable)
        service.share("courtesy", writable, access=RO, enforced=False)
        connection.map("both").array()[:] = 9
        assert writable.read_bytes() == b"\x09" * 8
        courtesy = connection.descriptor("courtesy")
        assert (courtesy.max_access, courtesy.enforced) == (RO, False)
        with pytest.raises(md.MappingError) as mapping:
            connection.map("courtesy", access=RW)
        assert mapping.value.reason is md.MappingReason.ACCESS
        courtesy.close()


def test_a_layout_that_does_not_fit_or_can_not_travel():
    buffer = md.BufferMemoryDescriptor(100)
    with md.Service("camera") as service:
        with pytest.raises(md.RangeError):
            service.share("x", buffer, shape=(101,))
        for dtype in ("O", [("a", "i4")]):
            with pytest.raises(md.InvalidArgument):
                service.share("x", buffer, dtype=dtype)
        assert service.shares() == []


def test_share_rule_hides_from_some(caplog):
    buffer = md.BufferMemoryDescriptor(8)
    seen = []

    def rule(task):
        seen.append(task.pid)
        return False

    def broken(task):
        raise RuntimeError("a bug")

    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("open", buffer)
        service.share("hidden", buffer, allow=rule)
        service.share("broken", buffer, allow=broken)
        assert [share.name for share in connection.shares()] == ["open"]
        for name in ("hidden", "broken"):
            with pytest.raises(md.ShareNotFoundError):
                connection.map(name, timeout=0)
        assert set(seen) == {os.getpid()}
    caplog.clear()  # records hold the frames


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_a_rule_that_raises_admits_nobody(caplog, error):
    def rule(task):
        raise error("a bug")

    with md.Service("camera", allow=rule) as service:
        with caplog.at_level(logging.ERROR, "memdesc.services"):
            with pytest.raises(md.AccessDeniedError) as caught:
                md.connect("camera")
        refused(caught, errno.EACCES)
        assert caplog.records[0].getMessage() == "service.rule_failed"
        assert service.clients() == []
    caplog.clear()  # records hold the frames


def test_a_rule_decides_by_the_kernels_word():
    asked = []

    def rule(task):
        asked.append((task.pid, task.credentials.uid))
        return len(asked) > 1

    with md.Service("camera", allow=rule):
        with pytest.raises(md.AccessDeniedError):
            md.connect("camera")
        with md.connect("camera"):
            pass
    assert asked == [(os.getpid(), os.geteuid())] * 2


def connect_as_nobody(path, sleep=time.sleep):
    """What another user's attempt gives: the class of the error, or what he could map."""

    def child():
        module.time = SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
        try:
            with md.connect(path, timeout=2) as connection:
                return bytes(connection.map("it"))[:3]
        except md.MemdescError as error:
            return type(error).__name__, error.errno

    return in_child(child, before=lambda: become(NOBODY))


@pytest.mark.slow
def test_another_user_is_refused_unless_the_rule_admits_him():
    buffer = md.BufferMemoryDescriptor(8)
    buffer.write_bytes(0, b"for")
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        Path(folder).chmod(0o755)
        for rule, expected in [
            (None, ("AccessDeniedError", errno.EACCES)),
            (
                lambda task: task.credentials.uid == os.geteuid(),
                ("AccessDeniedError", errno.EACCES),
            ),
            (lambda task: task.credentials.uid == NOBODY, b"for"),
        ]:
            with md.Service(f"{folder}/camera", allow=rule) as service:
                service.share("it", buffer)
                assert connect_as_nobody(service.path.as_posix()) == expected


@pytest.mark.slow
def test_another_user_comes_while_the_socket_is_being_opened_to_him():
    """Between bind and chmod the socket is its owner's alone: he who comes then asks again."""
    buffer = md.BufferMemoryDescriptor(8)
    buffer.write_bytes(0, b"for")
    theirs, ours = socket.socketpair()
    with theirs, ours, tempfile.TemporaryDirectory(prefix="md-") as folder:
        Path(folder).chmod(0o755)
        with md.Service(f"{folder}/camera", allow=lambda task: True) as service:
            service.share("it", buffer)
            service.path.chmod(0o600)

            def wait_for_the_owner(_):
                theirs.send(b"refused")
                theirs.recv(1)

            def open_it():
                if ours.recv(7):
                    service.path.chmod(0o666)
                    ours.send(b"!")

            thread = threading.Thread(target=open_it)
            thread.start()
            outcome = connect_as_nobody(service.path.as_posix(), wait_for_the_owner)
            theirs.shutdown(socket.SHUT_RDWR)
            thread.join()
    assert outcome == b"for"


@pytest.mark.slow
def test_a_socket_that_lets_another_user_in_is_not_enough():
    """The mode of the file is the outer door; credentials are looked at all the same."""
    with tempfile.TemporaryDirectory(prefix="md-") as folder:
        Path(folder).chmod(0o755)
        with md.Service(f"{folder}/camera") as service:
            service.path.chmod(0o666)
            outcome = connect_as_nobody(service.path.as_posix())
    assert outcome == ("AccessDeniedError", errno.EACCES)


def test_wait_client():
    with md.Service("camera") as service:
        with pytest.raises(TimedOutError) as caught:
            service.wait_client(0.01)
        refused(caught, errno.ETIMEDOUT)
        with md.connect("camera"):
            client = service.wait_client(5)
            assert client.task == md.Task.current()
            assert service.clients() == [client]
            with pytest.raises(TimedOutError):
                service.wait_client(0)
        wait_until(lambda: service.clients() == [])


def test_closing_wakes_who_waits():
    service = md.Service("camera")
    caught = []

    def wait():
        try:
            service.wait_client()
        except md.ClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    service.close()
    thread.join(10)
    assert len(caught) == 1


def test_a_closed_service():
    buffer = md.BufferMemoryDescriptor(8)
    service = md.Service("camera")
    service.share("it", buffer)
    connection = md.connect("camera")
    mapping = connection.map("it")
    assert not service.closed
    service.close()
    service.close()
    assert service.closed
    wait_until(lambda: connection.closed)
    for call in (
        lambda: service.share("x", buffer),
        lambda: service.unshare("it"),
        lambda: service.wait_client(0),
    ):
        with pytest.raises(md.ClosedError):
            call()
    with pytest.raises(md.PeerGoneError):
        connection.map("it")
    with pytest.raises(md.ServiceNotFoundError):
        md.connect("camera", timeout=0)
    assert bytes(mapping) == bytes(8)
    assert "closed" in repr(service)
    connection.close()


def test_a_service_closed_while_clients_pour_in():
    """None is left connected to what is closed."""
    for _ in range(5):
        service = md.Service("camera")
        stop = threading.Event()
        connections: list[md.Connection] = []

        def pour(stop=stop, connections=connections):
            while not stop.is_set():
                try:
                    connections.append(md.connect("camera", timeout=0))
                except md.MemdescError:
                    pass

        threads = [threading.Thread(target=pour) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda connections=connections: len(connections) > 5)
        service.close()
        stop.set()
        for thread in threads:
            thread.join(30)
        for connection in connections:
            wait_until(lambda connection=connection: connection.closed)
