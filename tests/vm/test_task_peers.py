"""Tasks taken from a Unix socket: who is on the other side."""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess

import pytest
from children import become, in_child
from programs import Start

from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    MemdescError,
    NotPrivilegedError,
    TaskGoneError,
)
from memdesc.vm import task as module
from memdesc.vm.task import SO_PEERPIDFD, Credentials, Task


def test_the_peer_of_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, Task.from_socket(ours) as task:
        assert task.is_current
        assert task.credentials == Credentials(os.getpid(), os.geteuid(), os.getegid())


_CONNECT = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])"


def _accept_from(start: Start, path: str) -> tuple[subprocess.Popen[str], socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        child = start(_CONNECT, path)
        os.unlink(path)
        return child, listener.accept()[0]


@pytest.mark.parametrize("has_peerpidfd", [True, False])
def test_the_peer_is_the_one_that_connected(
    start: Start, runtime_dir: object, monkeypatch: pytest.MonkeyPatch, has_peerpidfd: bool
) -> None:
    child, accepted = _accept_from(start, f"{runtime_dir}/s")
    if not has_peerpidfd:
        monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)  # unknown to the kernel: ENOPROTOOPT
    with accepted, Task.from_socket(accepted) as task:
        assert task.pid == child.pid
        assert task.credentials == Credentials(child.pid, os.geteuid(), os.getegid())


@pytest.mark.parametrize("has_peerpidfd", [True, False])
def test_a_peer_that_has_ended(
    start: Start, runtime_dir: object, monkeypatch: pytest.MonkeyPatch, has_peerpidfd: bool
) -> None:
    child, accepted = _accept_from(start, f"{runtime_dir}/s")
    if not has_peerpidfd:
        monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)
    child.kill()
    child.wait()
    with accepted, pytest.raises(TaskGoneError) as caught:
        Task.from_socket(accepted)
    assert caught.value.errno == errno.ESRCH


def test_credentials_are_those_at_the_time_of_connecting() -> None:
    ours, theirs = socket.socketpair()

    def look() -> tuple[Credentials, Credentials]:
        become(65534)
        with Task.from_socket(ours) as peer, Task.current() as own:
            return peer.credentials, own.credentials

    with ours, theirs:
        peer, own = in_child(look)
    assert peer == Credentials(os.getpid(), os.geteuid(), os.getegid())
    assert own.uid == 65534


def test_sockets_without_a_peer() -> None:
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(InvalidArgument) as caught:
        Task.from_socket(sock)
    assert caught.value.errno == errno.ENOTCONN
    with socket.socket(socket.AF_INET) as sock, pytest.raises(InvalidArgument):
        Task.from_socket(sock)


class _Refusing(socket.socket):
    """A socket whose SO_PEERPIDFD the kernel refuses."""

    refusal = 0

    def getsockopt(self, level: int, name: int, *size: int) -> object:  # type: ignore[override]
        if name == SO_PEERPIDFD:
            raise OSError(self.refusal, os.strerror(self.refusal))
        return super().getsockopt(level, name, *size)


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (errno.EINVAL, TaskGoneError),
        (errno.ESRCH, TaskGoneError),
        (errno.EMFILE, AllocationError),
        (errno.EPERM, NotPrivilegedError),
        (errno.ENODATA, MemdescError),
    ],
)
def test_each_refusal_of_the_peers_pidfd(refusal: int, expected: type[MemdescError]) -> None:
    ours, theirs = socket.socketpair()
    with theirs, _Refusing(fileno=ours.detach()) as sock:
        sock.refusal = refusal
        with pytest.raises(expected) as caught:
            Task.from_socket(sock)
    assert type(caught.value) is expected


def test_a_peer_in_another_pid_namespace_has_no_pid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SO_PEERPIDFD", 9999)
    monkeypatch.setattr(module, "peer_credentials", lambda sock: (0, 1000, 1000))
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(NotPrivilegedError):
        Task.from_socket(ours)


def test_the_layout_of_the_peers_credentials() -> None:
    assert struct.calcsize("iII") == module._UCRED.size == 12  # unix(7): struct ucred
