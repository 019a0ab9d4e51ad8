"""Strangers that try to hold up the I/O thread, to have us pay, or to be kept for ever."""

from __future__ import annotations

import errno
import os
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from children import NOBODY
from fuse_disk import NoDisk, failing_disk
from puppets import Puppet, count_fds, wait_until
from strangers import Stranger, memfd, push

import memdesc as md
from memdesc.handover.holder import Holder
from memdesc.loop import Loop
from memdesc.memory import closing
from memdesc.memory.closing import MOST_HELD_UP, discard
from memdesc.queues.notify import SO_PASSRIGHTS, clear, notification_pair
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


@contextmanager
def held(loop: Loop) -> Iterator[None]:
    """Have the I/O thread do nothing meanwhile."""
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        done.wait(20)

    loop.post(hold)
    begun.wait(20)
    try:
        yield
    finally:
        done.set()


@pytest.mark.parametrize("before", [[], [b"\xc1"]], ids=["at once", "behind what ends it"])
@pytest.mark.parametrize("message", [push([(0, 0, PAGE)]), b"\xc1", protocol.Done(77), b""])
def test_a_file_that_is_slow_to_close_holds_up_nobody(message: object, before: list[bytes]) -> None:
    with md.Service("camera") as service, Stranger(service.path).greet() as one:
        with md.connect("camera") as other, slow_to_close() as fd:
            with held(service._loop):  # so that it finds all of it at once
                for garbage in before:
                    one.send(garbage)
                one.send(message, [fd])
                os.close(fd)
                one.close()
            wait_until(lambda: len(closers()) == 1)
            assert other.shares(timeout=20) == []


def test_others_are_closed_beside_those_that_are_stuck() -> None:
    another_user = os.geteuid() + 1
    with slow_to_close() as one, slow_to_close() as another:
        discard([one], os.geteuid())
        before = count_fds()
        discard([*os.pipe(), memfd(PAGE), os.open("/", os.O_PATH)], another_user)
        discard([another], another_user)
        wait_until(lambda: len(closers()) == 2 and count_fds() < before)


def test_who_waits_for_a_service_that_ends_leaves_it_nothing_to_close() -> None:
    with md.Service("camera") as service, slow_to_close() as fd:
        service._loop.run(service._stop)  # he is not let in any more
        with Stranger(service.path) as one:
            one.send(b"", [fd])
            os.close(fd)
            service.close()
            assert one.is_ended()
        wait_until(lambda: len(closers()) == 1)


def test_who_is_turned_away_leaves_nothing_to_close() -> None:
    with md.Service("camera") as service, slow_to_close() as fd:
        service._loop.run(service._stop)
        with Stranger(service.path) as one:
            one.send(b"x", [fd])
            os.close(fd)
            service._loop.run(service._listener.turn_away)
            assert one.is_ended()
        service._loop.run(service._go_on)
        with md.connect("camera") as other:
            assert other.shares(timeout=20) == []


def test_a_holder_that_hangs_up_has_nothing_to_close() -> None:
    holder = Holder(b"\0memdesc-test-" + os.urandom(8).hex().encode(), None)
    with slow_to_close() as fd, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        with held(holder._loop):
            sock.connect(holder.address)
            for fds in ([], [fd]):
                socket.send_fds(sock, [b"wrong"], fds)
            os.close(fd)
        wait_until(lambda: len(closers()) == 1)
        holder._loop.run(holder.end_when_idle)
        wait_until(lambda: holder.closed)


def test_nobody_sends_descriptors_by_a_queue_s_socket() -> None:
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, 0)
        except OSError as error:
            pytest.skip(f"Linux before 6.16: {error}")
    for ours, theirs in (notification_pair(), notification_pair()[::-1]):
        with ours, theirs:
            with pytest.raises(PermissionError):
                socket.send_fds(theirs, [b"x"], [0])
            theirs.send(b"x")
            assert clear(ours)


def test_nothing_is_received_of_who_holds_up_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, md.BufferMemoryDescriptor(PAGE) as buffer, md.Service("camera"):
        with md.connect("camera") as connection, slow_to_close() as fd:
            monkeypatch.setattr(closing, "MOST_HELD_UP", 0)
            monkeypatch.setattr(closing, "SOON", 0.0)
            discard([fd], os.geteuid())
            md.send_descriptor(theirs, buffer)
            for refused in (
                lambda: md.receive_descriptor(ours),
                connection.shares,
                lambda: md.connect("camera"),
            ):
                with pytest.raises(md.AccessDeniedError) as caught:
                    refused()
                assert caught.value.errno == errno.EDQUOT
        wait_until(lambda: not closing.held_up())
        md.receive_descriptor(ours).close()  # as it lay there
        md.connect("camera").close()


def test_who_sent_many_at_once_is_not_refused_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """But no more than a message brings: what waits takes descriptors of this process."""
    monkeypatch.setattr(closing, "SOON", 60.0)
    monkeypatch.setattr(closing, "MOST_AT_ONCE", 40)
    with md.Service("camera"), md.connect("camera") as connection, slow_to_close() as fd:
        discard([fd, *(os.open(os.devnull, os.O_RDONLY) for _ in range(30))], os.geteuid())
        wait_until(lambda: closing.held_up() == {os.geteuid(): 31})
        assert connection.shares(timeout=20) == []
        discard([os.open(os.devnull, os.O_RDONLY) for _ in range(10)], os.geteuid())
        with pytest.raises(md.AccessDeniedError):
            connection.shares(timeout=20)
    wait_until(lambda: not closing.held_up())


def test_a_file_that_says_an_error_when_it_is_closed(tmp_path: Path) -> None:
    """The server of a file may be gone: the others are closed all the same."""
    before = count_fds()
    try:
        with failing_disk(tmp_path, PAGE, sticky=os.getpid()) as (path, server):
            fds = [os.open(path, os.O_RDONLY) for _ in range(3)]
            server.kill()
            server.wait()
            discard(fds, os.geteuid())
            wait_until(lambda: count_fds() <= before + 1)  # the server's output
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    wait_until(lambda: not closing.held_up())


SEND = """
import socket, struct
from memdesc.services import protocol
kept = []
def connect():
    one = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    one.settimeout(20)
    one.connect({path!r})
    one.send(protocol.encode(protocol.Hello(protocol.VERSION)))
    kept.append(one)
    return one
def send(one, fds):
    try:
        socket.send_fds(one, [b"{{}}"], fds)
    except ConnectionError:  # it was ended meanwhile
        pass
def files(path, count):
    return [os.open(path, os.O_RDONLY) for _ in range(count)]
def lingering(count):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)  # less than is sent
        for _ in range(count):
            writer = socket.socket()
            writer.connect(server.getsockname())
            kept.append(server.accept()[0])
            writer.setblocking(False)
            try:
                while True:
                    writer.send(bytes(1 << 14))
            except BlockingIOError:
                pass
            writer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 3600))
            yield writer.detach()
def become(uid):
    os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
"""


@contextmanager
def slow_files(one: Puppet, kind: str, count: int, folder: Path) -> Iterator[None]:
    """Let a puppet have `fds`, so many files whose closing this process can not end."""
    if kind == "sockets":
        one.do(f"fds = list(lingering({count}))")
        yield
        one.kill()  # which resets them
        return
    try:
        with failing_disk(folder, PAGE, sticky=os.getpid()) as (path, _):
            one.do(f"fds = files({str(path)!r}, {count})")
            yield
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sockets", "files"])
def test_who_holds_up_closings_is_refused_until_they_end(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "SOON", 0.0)
    uid = os.geteuid()
    with tempfile.TemporaryDirectory(prefix="md-") as folder, Puppet() as one:
        Path(folder).chmod(0o755)
        name = f"{folder}/camera"
        one.do(SEND.format(path=name))
        with (
            md.Service(name, allow=lambda task: True) as service,
            md.connect(name) as other,
            slow_files(one, kind, 3 * MOST_HELD_UP, tmp_path),
        ):
            if uid == 0:
                one.do(f"become({NOBODY})")
                uid = NOBODY
            # One by one, each by a connection of its own, which ends by what it says.
            for index in range(MOST_HELD_UP + 1):
                with held(service._loop):  # this process is to be the last to close it
                    one.do(f"send(connect(), [fds[{index}]]); os.close(fds[{index}])")
                wait_until(lambda want=index + 1: closing.held_up().get(uid) == want)
            assert len(closers()) == 1
            one.do("c = connect()")
            assert one.do("protocol.decode(c.recv(1 << 16)).errno") == errno.EDQUOT
            # What he sends now is not received, but closed with the sockets that it lies in.
            before = count_fds()
            one.do("several = [connect() for _ in range(4)]")
            one.do(f"for n, c in enumerate(several): send(c, fds[{MOST_HELD_UP + 1} + 4 * n:][:4])")
            assert one.do("all(c.recv(4096) and c.recv(4096) == b'' for c in several)")
            wait_until(lambda: len(service.clients()) == 1)
            assert closing.held_up()[uid] <= MOST_HELD_UP + 1 + 4
            wait_until(lambda: count_fds() <= before + 4)
            assert len(closers()) == 1
            if uid != os.geteuid():
                assert other.shares(timeout=20) == []
                with md.connect(name) as another:
                    assert another.shares(timeout=20) == []
        wait_until(lambda: not closing.held_up())
        with md.Service(name, allow=lambda task: True), md.connect(name):
            pass


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


@pytest.mark.parametrize("kind", [socket.SOCK_SEQPACKET, socket.SOCK_STREAM])
def test_of_whatever_kind_a_socket_is_it_comes_to_its_end(kind: socket.SocketKind) -> None:
    for sent in (b"", b"unread" * 10):
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        with ours, theirs:
            if sent:
                theirs.send(sent)
            done = threading.Thread(target=closing.close_socket, args=(ours,), daemon=True)
            done.start()
            done.join(60)
            assert not done.is_alive()
            assert ours.fileno() == -1


def test_an_interrupt_as_the_thread_is_started_leaves_the_rest_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(_: threading.Thread) -> None:
        raise KeyboardInterrupt

    user = 4_000_000_000
    ours, theirs = socket.socketpair()
    theirs.close()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            discard([ours.detach()], user)
    assert closing.held_up().keys() >= {user}
    wait_until(lambda: user not in closing.held_up())
