"""Connections: how they come about, wait, end and are shared by threads."""

from __future__ import annotations

import errno
import os
import threading

import pytest
from puppets import memfds_mapped, wait_until

import memdesc as md
from memdesc.errors import TimedOutError
from memdesc.services import protocol

RW = md.Access.READ_WRITE


def test_no_service_appears():
    for timeout in (0, 0.05):
        with pytest.raises(md.ServiceNotFoundError) as caught:
            md.connect("nobody", timeout=timeout)
        assert caught.value.errno == errno.ENOENT


def test_a_service_that_appears_later_is_waited_for():
    made = []

    def appear():
        made.append(md.Service("late"))

    timer = threading.Timer(0.1, appear)
    timer.start()
    with md.connect("late", timeout=20) as connection:
        assert connection.task.pid == os.getpid()
    timer.join()
    made[0].close()


def test_a_share_that_appears_later_is_waited_for():
    with md.Service("camera") as service, md.connect("camera") as connection:
        buffer = md.BufferMemoryDescriptor(8)
        timer = threading.Timer(0.05, lambda: service.share("late", buffer))
        timer.start()
        assert len(connection.map("late", timeout=20)) == 8
        timer.join()


@pytest.mark.slow
def test_a_stopped_service_does_not_answer(puppet):
    one = puppet("s = md.Service('camera')")
    connection = md.connect("camera")
    one.stop()
    for call in (
        lambda: connection.shares(timeout=0.05),
        lambda: connection.map("it", timeout=0.05),
        lambda: md.connect("camera", timeout=0.1),
    ):
        with pytest.raises(TimedOutError) as caught:
            call()
        assert caught.value.errno == errno.ETIMEDOUT
    one.go_on()
    assert connection.shares(timeout=30) == []
    with md.connect("camera", timeout=30):
        connection.close()
    assert one.finish() == 0


@pytest.mark.slow
def test_a_full_backlog_is_no_absent_service(puppet):
    import socket

    one = puppet("s = md.Service('camera')")
    path = one.do("str(s.path)")
    one.stop()
    waiting = []
    for _ in range(200):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        waiting.append(sock)
        try:
            sock.connect(path)
        except BlockingIOError:
            break
    with pytest.raises(TimedOutError) as caught:
        md.connect("camera", timeout=0.05)
    assert caught.value.errno == errno.ETIMEDOUT
    for sock in waiting:
        sock.close()
    one.go_on()
    with md.connect("camera", timeout=30):
        pass
    assert one.finish() == 0


@pytest.mark.slow
def test_the_death_of_a_service_wakes_who_waits_and_leaves_the_memory(puppet):
    one = puppet(
        "s = md.Service('camera')",
        "b = md.BufferMemoryDescriptor(5000, name='kept'); b.array()[:] = 7; s.share('it', b)",
    )
    with md.connect("camera") as connection:
        mapping = connection.map("it")
        descriptor = connection.descriptor("it")
        errors = []

        def wait(call):
            try:
                call()
            except md.MemdescError as error:
                errors.append((type(error).__name__, error.errno))

        one.stop()
        calls = [connection.shares, lambda: connection.map("it"), connection.wait_mapping]
        threads = [threading.Thread(target=wait, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(connection._pending) == 2)
        one.kill()
        for thread in threads:
            thread.join(30)
        assert errors == [("PeerGoneError", errno.ECONNRESET)] * 3
        assert connection.closed
        for call in (*calls, lambda: connection.descriptor("it")):
            with pytest.raises(md.PeerGoneError):
                call()
        assert bytes(mapping) == b"\x07" * 5000
        assert descriptor.read_bytes(0, 3) == b"\x07" * 3
        assert bytes(descriptor.map()) == bytes(mapping)
        with pytest.raises(md.MappingError) as caught:
            md.BufferMemoryDescriptor(8).create_mapping_in_task(connection.task)
        assert caught.value.reason is md.MappingReason.TASK_GONE
        descriptor.close()
        mapping.unmap()
    with pytest.raises(md.ServiceNotFoundError):
        md.connect("camera", timeout=0)


def test_a_closed_connection():
    with md.Service("camera") as service:
        service.share("it", md.BufferMemoryDescriptor(8))
        connection = md.connect("camera")
        mapping = connection.map("it")
        client = service.wait_client(5)
        connection.close()
        connection.close()
        for call in (connection.shares, lambda: connection.map("it"), connection.wait_mapping):
            with pytest.raises(md.ClosedError):
                call()
        wait_until(lambda: client.closed)
        assert bytes(mapping) == bytes(8)
        assert "closed" in repr(connection)


def test_closing_wakes_who_waits():
    with md.Service("camera"):
        connection = md.connect("camera")
        caught = []

        def wait():
            try:
                connection.wait_mapping()
            except md.ClosedError as error:
                caught.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        connection.close()
        thread.join(20)
        assert len(caught) == 1


def test_many_threads_over_one_connection():
    buffers = [md.BufferMemoryDescriptor(4096, max_access=RW, name="eighth") for _ in range(8)]
    wrong = []
    with md.Service("camera") as service, md.connect("camera") as connection:
        for index, buffer in enumerate(buffers):
            buffer.write_bytes(0, bytes([index]) * 4096)
            service.share(str(index), buffer)

        def work(index):
            for _ in range(25):
                with connection.map(str(index)) as mapping:
                    if bytes(mapping) != bytes([index]) * 4096:
                        wrong.append(index)
                with connection.descriptor(str(index)) as descriptor:
                    if descriptor.read_bytes(0, 1) != bytes([index]):
                        wrong.append(index)
                if len(connection.shares()) != 8:
                    wrong.append("shares")

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    assert wrong == []
    assert memfds_mapped("self", "eighth") == 8  # the buffers' own


@pytest.mark.slow
def test_answers_and_timeouts_that_cross():
    """An answer that comes as its waiter gives up is undone, and no descriptor is left."""
    undone = []
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("it", md.BufferMemoryDescriptor(8))
        outcomes = {"mapped": 0, "late": 0}
        for turn in range(3000):
            question = protocol.OpenShare(connection.next_id(), "it")
            wait = 0.00001 * (turn % 40)
            try:
                _, fds = connection.request(
                    question, protocol.Opened, timeout=wait, undo=undone.append
                )
                os.close(fds[0])
                outcomes["mapped"] += 1
            except TimedOutError:
                outcomes["late"] += 1
        connection.shares(timeout=20)
        assert connection._late == connection._pending == {}
        assert outcomes["late"] == len(undone)
        assert outcomes["mapped"] > 0 < outcomes["late"]


def test_a_signal_handler_that_raises_gets_through():
    import signal

    class Interrupted(Exception):
        pass

    def handler(*_):
        raise Interrupted

    with md.Service("camera") as service, md.connect("camera") as connection:
        before = signal.signal(signal.SIGALRM, handler)
        try:
            for call in (connection.wait_mapping, service.wait_client, service.wait_client):
                with pytest.raises(Interrupted):
                    signal.setitimer(signal.ITIMER_REAL, 0.05)
                    while True:
                        call()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert connection.shares() == []


def test_layout_and_placement_of_map():
    buffer = md.BufferMemoryDescriptor(3 * 4096)
    with md.Service("camera") as service, md.connect("camera") as connection:
        service.share("it", buffer, shape=(3, 1024), dtype="<u4")
        whole = connection.map("it", prefault=True, guard_pages=1)
        assert whole.array().shape == (3, 1024)
        part = connection.map("it", offset=4096, length=4096)
        assert part.array().shape == (4096,)
        address = part.address
        part.unmap()
        fixed = connection.map("it", offset=4096, length=4096, at_address=address)
        assert fixed.address == address
        for wrong, reason in [
            ({"offset": 3 * 4096 + 1}, md.MappingReason.OUT_OF_RANGE),
            ({"length": 0}, md.MappingReason.ZERO_LENGTH),
            ({"access": RW}, md.MappingReason.ACCESS),
            ({"at_address": address}, md.MappingReason.ADDRESS_IN_USE),
            ({"at_address": 5}, md.MappingReason.ADDRESS_UNALIGNED),
        ]:
            with pytest.raises(md.MappingError) as caught:
                connection.map("it", **wrong)
            assert caught.value.reason is reason
