"""Strangers that try to hold up the I/O thread, to have us pay, or to be kept for ever."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from puppets import count_fds, wait_until
from strangers import Stranger, memfd, push

import memdesc as md
from memdesc.loop import Loop
from memdesc.memory.closing import discard
from memdesc.services import protocol

PAGE = md.page_size


@contextmanager
def slow_to_close() -> Iterator[int]:
    """A socket whose last close() waits an hour for a reader, who does not read."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        reader, _ = server.accept()
    sock.setblocking(False)
    try:
        while True:
            sock.send(bytes(1 << 16))
    except BlockingIOError:
        pass
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
    try:
        yield sock.detach()  # whoever is given it closes it
    finally:
        # Reset, which ends the waiting.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        reader.close()


@pytest.fixture(autouse=True)
def all_closed() -> Iterator[None]:
    yield
    wait_until(lambda: not closers())


def closers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "memdesc-close"]


@pytest.mark.parametrize("before", [[], [b"\xc1"]], ids=["at once", "behind what ends it"])
@pytest.mark.parametrize("message", [push([(0, 0, PAGE)]), b"\xc1", protocol.Done(77), b""])
def test_a_file_that_is_slow_to_close_holds_up_nobody(message: object, before: list[bytes]) -> None:
    with md.Service("camera") as service, Stranger(service.path).greet() as one:
        with md.connect("camera") as other, slow_to_close() as fd:
            held = threading.Event(), threading.Event()

            def hold() -> None:
                held[0].set()
                held[1].wait(20)

            service._loop.post(hold)  # so that it finds all of it at once
            held[0].wait(20)
            for garbage in before:
                one.send(garbage)
            one.send(message, [fd])
            os.close(fd)
            one.close()
            held[1].set()
            wait_until(lambda: len(closers()) == 1)
            assert other.shares(timeout=20) == []


def test_others_are_closed_beside_those_that_are_stuck() -> None:
    with slow_to_close() as one, slow_to_close() as another:
        discard([one])
        before = count_fds()
        discard([*os.pipe(), memfd(PAGE), os.open("/", os.O_PATH)])
        discard([another])
        wait_until(lambda: len(closers()) == 2 and count_fds() < before)


PUSHES = {
    "the part of an object that was not touched": ([2], [(0, PAGE, PAGE)]),
    "one object, where another was touched": ([8, 0], [(0, 0, PAGE), (1, 0, PAGE)]),
    "the last page": ([3], [(0, 0, 4 * PAGE)]),
}


@pytest.mark.parametrize("case", PUSHES)
def test_pages_that_their_owner_did_not_pay_for_are_not_faulted_in(case: str) -> None:
    touched, pieces = PUSHES[case]
    fds = [memfd(8 * PAGE) for _ in touched]
    if case.startswith("the part"):
        os.pwrite(fds[0], bytes(PAGE), 0)
        os.pwrite(fds[0], bytes(PAGE), 3 * PAGE)
    else:
        for fd, count in zip(fds, touched, strict=True):
            os.pwrite(fd, bytes(count * PAGE), 0)
    paid = [os.fstat(fd).st_blocks for fd in fds]
    try:
        with md.Service("camera") as service, Stranger(service.path).greet() as one:
            one.send(push(pieces, prefault=True), fds)
            answer, _ = one.receive()
            assert isinstance(answer, protocol.Failed)
            assert (answer.reason, answer.errno) == ("REFUSED", errno.EDQUOT)
            for fd, (_, offset, length) in zip(fds, pieces, strict=False):
                os.pwrite(fd, b"x" * length, offset)
            one.send(push(pieces, id=2, token=2, prefault=True), fds)
            assert isinstance(one.receive()[0], protocol.Mapped)
        assert paid != [os.fstat(fd).st_blocks for fd in fds]
    finally:
        for fd in fds:
            os.close(fd)


def test_lazy_memory_is_paid_for_by_its_owner_before_it_is_faulted_in_elsewhere(puppet) -> None:
    with (
        md.Service("camera") as service,
        md.BufferMemoryDescriptor(8 * PAGE, lazy=True) as lazy,
    ):
        puppet("c = md.connect('camera')")
        client = service.wait_client(20)
        lazy.write_bytes(0, b"x" * PAGE * 3)
        part = lazy.create_mapping_in_task(client.task, offset=PAGE, length=4 * PAGE, prefault=True)
        assert part.verified in (True, None)
        assert lazy.page_counts().resident == 5


@pytest.mark.parametrize("names", [["a" * 249] * 3, ["\udc80"]], ids=["long", "no text"])
def test_whatever_a_descriptor_is_called_it_travels(names: list[str]) -> None:
    buffers = [md.BufferMemoryDescriptor(PAGE, name=name) for name in names]
    several = md.MultiMemoryDescriptor([md.MultiMemoryDescriptor(buffers)] * 3)
    with md.Service("camera") as service:
        service.share("several", several)
        with md.connect("camera") as connection:
            client = service.wait_client(20)
            assert connection.descriptor("several").length == several.length
            pushed = several.create_mapping_in_task(client.task, connection=client)
            assert pushed.length == several.length


@pytest.mark.parametrize("dtype", ["V0", "S", "U0", "(2,)u1"])
def test_an_array_of_nothing_is_no_layout(dtype: str) -> None:
    with md.Service("camera") as service, md.BufferMemoryDescriptor(PAGE) as buffer:
        for shape in (None, (3,)):
            with pytest.raises(md.InvalidArgument):
                service.share("it", buffer, shape=shape, dtype=dtype)
            with pytest.raises(md.InvalidArgument):
                buffer.array(shape, dtype)


def test_a_client_that_could_not_be_watched_takes_no_number_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with md.Service("camera") as service:
        watch, refused = Loop.watch, []

        def once(self: Loop, fd: int, call: object) -> None:
            if not refused and os.readlink(f"/proc/self/fd/{fd}").startswith("anon_inode:[pidfd]"):
                refused.append(fd)
                raise OSError(errno.ENOSPC, "epoll_ctl: as past fs.epoll.max_user_watches")
            watch(self, fd, call)  # type: ignore[arg-type]

        monkeypatch.setattr(Loop, "watch", once)
        with Stranger(service.path) as one:
            assert one.is_ended()
        assert refused
        for _ in range(3):  # the numbers of the first one's descriptors come up again
            with Stranger(service.path) as one:
                one.greet()


def test_descriptors_with_an_answer_that_needs_none_are_closed() -> None:
    with md.Service("camera") as service, Stranger(service.path).greet() as one:
        client = service.wait_client(20)
        before = count_fds()

        def answer() -> None:
            question, _ = one.receive()
            fds = [*os.pipe(), memfd(PAGE)]
            one.send(protocol.Done(question.id), fds)
            for fd in fds:
                os.close(fd)

        thread = threading.Thread(target=answer)
        thread.start()
        pull = protocol.PullMapping(client.next_id(), 1)
        assert client.request(pull, protocol.Done)[1] == []
        thread.join()
        wait_until(lambda: count_fds() <= before)
