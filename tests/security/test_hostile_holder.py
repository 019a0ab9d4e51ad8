"""What keeps handles on their way, attacked by a task of its own user, or held up by any."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import socket
import threading
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
from children import NOBODY, become, die_with_parent, in_child, kill, start
from puppets import count_fds, end_holder, wait_until

import memdesc as md
from memdesc import _core
from memdesc.handover import holder as holders, transit
from memdesc.handover.holder import ANSWER, COUNT, KEEP, NO, NO_FILES, TOKEN, YES, Holder, peer_of
from memdesc.interop import multiprocessing as handles
from memdesc.memory import closing

PAGE = md.page_size
NOTHING = handles.Transit(0, 0, 0)
STRANGER = 12345
CLONE_NEWUSER = 0x10000000

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")


@pytest.fixture(autouse=True)
def no_holder() -> Iterator[None]:
    end_holder()
    yield
    handles.forget_in_transit()
    end_holder()


def dumped() -> bytes:
    return bytes(ForkingPickler.dumps(md.BufferMemoryDescriptor(PAGE, recycle=False)))


def holder() -> Holder:
    """This process's, which keeps nothing yet."""
    dumped()
    handles.forget_in_transit()
    found = transit.ways.holder
    assert found is not None
    return found


def stranger(address: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(address)  # which waits where many do
    sock.settimeout(60)
    return sock


def leave(sock: socket.socket, fd: int, token: bytes) -> bytes:
    """Leave a descriptor; the answer's letter, or nothing where it hung up."""
    socket.send_fds(sock, [KEEP + token], [fd])
    return sock.recv(ANSWER)[:1]


@pytest.mark.parametrize("others", [0, 15, 30])
def test_who_connects_without_end_leaves_the_program_its_descriptors(others: int) -> None:
    def work() -> tuple[bytes, list[int]]:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        before = [os.dup(0) for _ in range(others)]
        keeps = holder()

        def flood() -> bytes:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(400, hard), hard))
            honest = stranger(keeps.address)
            came = [leave(honest, os.memfd_create("kept"), os.urandom(TOKEN))]
            idle = [stranger(keeps.address) for _ in range(min(400, hard) - 40 - others)]
            came.append(leave(idle[-1], os.memfd_create("kept"), os.urandom(TOKEN)))
            while came[-1] == YES:
                fd = os.memfd_create("kept")
                came.append(leave(idle[-1], fd, os.urandom(TOKEN)))
                os.close(fd)
            return came[0] + came[1] + came[-1]

        letters, spare = in_child(flood), [os.dup(0) for _ in range(10)]
        for fd in before:
            os.close(fd)
        return letters, spare

    letters, spare = in_child(work)
    assert letters == YES + YES + NO_FILES
    assert len(spare) == 10


def test_a_link_that_was_hung_up_for_others_is_made_again() -> None:
    keeps = holder()

    def send() -> int:
        dumped()
        wait_until(lambda: all(link.closed for link in transit.ways._links.values()))
        return len(dumped())

    dropped = threading.Thread(target=lambda: _drop_one(keeps))
    dropped.start()
    assert in_child(send) > 0
    dropped.join(60)
    assert handles.in_transit().handles == 2


def _drop_one(keeps: Holder) -> None:
    wait_until(lambda: bool(keeps._tokens and keeps._links))
    keeps._loop.run(lambda: keeps._hang_up(next(iter(keeps._links))))


def test_a_token_is_for_one_handle() -> None:
    keeps = holder()
    fds = count_fds()
    with stranger(keeps.address) as sock:
        one, two = os.memfd_create("one"), os.memfd_create("two")
        assert leave(sock, one, b"t" * TOKEN) == YES
        assert leave(sock, two, b"t" * TOKEN) == b""
        os.close(one), os.close(two)
    assert handles.forget_in_transit().objects == 1
    assert handles.in_transit() == NOTHING
    wait_until(lambda: count_fds() <= fds)


@pytest.mark.parametrize("what", ["pipe", "file", "path"])
def test_what_is_no_memory_is_not_kept(what: str, tmp_path: Path) -> None:
    """Who asks a file of a FUSE server for its size waits for that; so does who closes it."""
    if what == "pipe":
        fd, other = os.pipe()
        os.close(other)
    elif what == "file":
        fd = os.open(tmp_path, os.O_RDONLY)
    else:
        memory = os.memfd_create("kept")
        fd = os.open(f"/proc/self/fd/{memory}", os.O_PATH)
        os.close(memory)
    with stranger(holder().address) as sock:
        assert leave(sock, fd, os.urandom(TOKEN)) == b""
    os.close(fd)
    assert handles.in_transit() == NOTHING


def test_what_no_receiver_would_take_is_refused_where_it_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as mapped:
        address = _core.buffer_address(mapped)[0]
        there = md.MemoryDescriptor.with_address_range(
            address, PAGE, md.Direction.OUT_IN, trust_size=True
        )
        with there, pytest.raises(md.MappingError) as no:
            ForkingPickler.dumps(there)
    if no.value.reason is not md.MappingReason.CAN_SHRINK:
        pytest.skip(f"the kernel does not let this user open what it has mapped: {no.value}")
    assert no.value.errno == errno.EPERM
    assert handles.in_transit() == NOTHING


def full_backlog() -> tuple[socket.socket, bytes, list[socket.socket]]:
    """Who listens and takes nobody in, as a stopped holder; and who waits there, of any user."""
    address = new_address()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen(0)
    return listener, address, filled(address)


def new_address() -> bytes:
    return transit.PREFIX + os.urandom(16).hex().encode()


def filled(address: bytes) -> list[socket.socket]:
    """As many who wait there as may."""
    waiting = []
    with pytest.raises(BlockingIOError):
        while True:
            waiting.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            waiting[-1].setblocking(False)
            waiting[-1].connect(address)
    return waiting


def test_where_too_many_wait_one_waits_too_but_not_for_ever() -> None:
    listener, address, waiting = full_backlog()
    with pytest.raises(md.TimedOutError) as late:
        transit.Link(address, 0.05).open()
    assert late.value.errno == errno.ETIMEDOUT
    begun = threading.Event()

    def take_in() -> None:
        begun.wait(60)
        listener.accept()[0].close()

    thread = threading.Thread(target=take_in)
    thread.start()
    threading.Timer(0.02, begun.set).start()
    link = transit.Link(address, 60)
    link.open()
    assert link.pid == os.getpid()
    thread.join(60)
    link.close()
    for sock in (listener, *waiting):
        sock.close()


def test_a_stopped_holder_holds_up_none_but_those_who_want_it() -> None:
    address, (ready, told) = new_address(), os.pipe()

    def keep() -> None:
        Holder(address, None)
        os.write(told, b"!")
        signal.pause()

    pid = start(keep)
    assert heard(ready) == b"!"
    os.kill(pid, signal.SIGSTOP)
    os.waitpid(pid, os.WUNTRACED)
    waiting, errors = filled(address), []

    def want() -> None:
        try:
            transit.take(address, bytes(TOKEN))
        except md.PeerGoneError as error:
            errors.append(error)

    thread = threading.Thread(target=want)
    thread.start()
    wait_until(lambda: address in transit.ways._links)
    assert ForkingPickler.loads(dumped()).length == PAGE
    assert thread.is_alive()
    kill(pid)
    thread.join(60)
    assert [error.errno for error in errors] == [errno.ECONNREFUSED]
    for sock in waiting:
        sock.close()
    os.close(ready), os.close(told)


def test_a_way_is_not_closed_under_the_thread_that_asks_there() -> None:
    address, errors = new_address(), []

    def want() -> None:
        try:
            transit.take(address, bytes(TOKEN))
        except md.PeerGoneError as error:
            errors.append(error.errno)

    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen(1)
        thread = threading.Thread(target=want)
        thread.start()
        link, _ = listener.accept()
        link.settimeout(60)
        assert len(link.recv(100)) == 1 + TOKEN
        transit.ways.close()
        link.send(NO + bytes(ANSWER - 1))
        thread.join(60)
        assert errors == [errno.ENOENT]
        assert link.recv(1) == b"", "it was closed then"
        link.close()


def heard(fd: int) -> bytes:
    """What a child tells, if it does."""
    assert select.select([fd], [], [], 60)[0]
    return os.read(fd, 1)


def knocks(address: bytes) -> int:
    """How often a stranger is hung up before nobody looks at him."""
    for count in range(10_000):
        with stranger(address) as sock:
            sock.settimeout(0.1 if count else 60)
            try:
                assert sock.recv(1) == b""
            except TimeoutError:
                return count
    raise AssertionError("the holder does nothing else")


def test_strangers_are_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    keeps = holder()
    with monkeypatch.context() as patched:
        patched.setattr(holders, "_PAUSE", 3600.0)
        assert in_child(lambda: knocks(keeps.address), before=lambda: become(STRANGER)) > 0
    keeps._loop.run(keeps._watch)
    assert in_child(lambda: counted(keeps.address)) == (0, 0, 0)


@pytest.mark.slow
def test_own_processes_get_in_beside_strangers_who_knock_without_end() -> None:
    in_child(lambda: None, before=lambda: become(STRANGER))  # or skip
    keeps = holder()
    ready, told = os.pipe()

    def knock() -> None:
        become(STRANGER)
        die_with_parent()
        os.write(told, b"!")
        while True:
            with contextlib.suppress(OSError):
                stranger(keeps.address).close()

    pids = [start(knock) for _ in range(2)]
    try:
        assert heard(ready) + heard(ready) == b"!!"
        assert [in_child(lambda: counted(keeps.address)) for _ in range(2)] == [(0, 0, 0)] * 2
    finally:
        for pid in pids:
            kill(pid)
        os.close(ready), os.close(told)


def test_who_has_no_number_in_a_user_namespace_is_no_user_of_it() -> None:
    """There all of them are told as 65534, which is a user there, too."""
    address = new_address()
    (ready, told), (go, gone) = os.pipe(), os.pipe()

    def keep() -> None:
        os.write(told, b"n" if ctypes.CDLL(None).unshare(CLONE_NEWUSER) else b"y")
        assert os.read(go, 1)
        become(NOBODY)
        Holder(address, None)
        assert in_child(lambda: counted(address)) == (0, 0, 0)
        os.write(told, b"!")
        signal.pause()

    def knock() -> bytes:
        with stranger(address) as sock:
            with pytest.raises(md.AccessDeniedError):
                counted(address)
            try:
                sock.send(COUNT)
                return sock.recv(ANSWER)
            except (BrokenPipeError, ConnectionResetError):  # it hung up before, or meanwhile
                return b""

    pid = start(keep)
    try:
        if heard(ready) == b"n":
            pytest.skip("this user can make no user namespace")
        try:
            for table in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{table}").write_text(f"{NOBODY} 165534 1")
        except PermissionError as error:
            pytest.skip(f"this user can give another one no number there: {error}")
        os.write(gone, b"!")
        assert heard(ready) == b"!"
        assert in_child(knock, before=lambda: become(STRANGER)) == b""
    finally:
        kill(pid)
        for fd in (ready, told, go, gone):
            os.close(fd)


def counted(address: bytes) -> tuple[int, ...]:
    with contextlib.closing(transit.Link(address)) as link:
        return tuple(link.counts())


def test_what_an_argument_is_kept_for_is_collected_in_a_fork_child(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Owner:
        """A process that is being started."""

    owner = [Owner()]
    holder()
    form = dumped()
    (token,) = transit.ways.holder._tokens  # type: ignore[union-attr]
    transit.forget_with(owner[0], token)
    assert in_child(lambda: owner.clear()) is None
    assert capfd.readouterr().err == ""
    assert ForkingPickler.loads(form).length == PAGE


@pytest.mark.parametrize("uid", [2**31, 2**32 - 2])
def test_users_of_large_numbers(uid: int) -> None:
    def ask() -> tuple[int, bool]:
        one, two = socket.socketpair()
        with one, two:
            return peer_of(one)[1], len(ForkingPickler.dumps(_made())) > 0

    assert in_child(lambda: in_child(ask), before=lambda: become(uid)) == (uid, True)


def _made() -> Any:
    return md.BufferMemoryDescriptor(PAGE)


def test_what_no_thread_could_close_the_next_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fds = count_fds()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails)
        closing.discard(list(os.pipe()), os.geteuid())
    assert count_fds() == fds + 2
    closing.discard(list(os.pipe()), os.geteuid())
    wait_until(lambda: count_fds() <= fds)
