"""Descriptors from a peer that lies: always an exception of the family, and nothing left open."""

from __future__ import annotations

import array
import errno
import fcntl
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import msgspec
import pytest
from children import in_child
from hypothesis import given, settings, strategies as st

from memdesc import (
    Access,
    MappingError,
    MappingReason,
    MemdescError,
    PeerGoneError,
    ProtocolError,
    ReceivedMemoryDescriptor,
    SealedError,
    TimedOutError,
    _core,
    page_size,
    receive_descriptor,
)

SIZE = 2 * page_size
SIZE_SEALS = _core.F_SEAL_GROW | _core.F_SEAL_SHRINK


def a_memfd(seals: int = SIZE_SEALS, size: int = SIZE, *, writable: bool = True) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    if writable:
        return fd
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(fd)
    return reader


def a_pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


OBJECTS: dict[str, Callable[[], int]] = {
    "writable": a_memfd,
    "read-only": lambda: a_memfd(writable=False),
    "sealed": lambda: a_memfd(SIZE_SEALS | _core.F_SEAL_FUTURE_WRITE),
    "unsealed": lambda: a_memfd(0),
    "empty": lambda: a_memfd(size=0),
    "odd size": lambda: a_memfd(size=page_size + 1),
    "endless": lambda: a_memfd(size=2**63 - 1),
    "pipe": a_pipe,
    "path": lambda: os.open("/", os.O_PATH),
    "device": lambda: os.open("/dev/zero", os.O_RDWR),
}
NUMBERS = st.one_of(
    st.sampled_from([0, 1, page_size - 1, page_size, page_size + 1, SIZE, SIZE + 1, 1 << 40]),
    st.sampled_from([2**62, 2**63 - page_size, 2**63 - 2, 2**63 - 1, 2**63, 2**64 - 1]),
    st.integers(0, 2 * SIZE),
)
INDICES = st.one_of(st.integers(0, 4), st.sampled_from([253, 2**63 - 1]))
PIECES = st.lists(st.tuples(INDICES, NUMBERS, NUMBERS), max_size=6)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=9)
    | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)


def message(header: bytes, length: int | None = None, magic: bytes = b"mdsc") -> bytes:
    return struct.pack("<4sI", magic, len(header) if length is None else length) + header


def portable(pieces: Sequence[Any] = ((0, 0, SIZE),), **other: Any) -> bytes:
    fields = {"version": 1, "name": "x", "direction": 3, "writable": True, "pieces": pieces}
    return msgspec.msgpack.encode(fields | other)


def ancillary(fds: Sequence[int]) -> list[tuple[int, int, array.array[int]]]:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))
    return [rights] if fds else []


@contextmanager
def sent(
    *parts: tuple[bytes, Sequence[str]], kind: int = socket.SOCK_STREAM
) -> Iterator[socket.socket]:
    """The receiving end of a socket on which a peer sent that, and hung up."""
    left, right = socket.socketpair(socket.AF_UNIX, kind)
    with right:
        with left:
            for data, names in parts:
                fds = [OBJECTS[name]() for name in names]
                try:
                    left.sendmsg([data], ancillary(fds))
                finally:
                    for fd in fds:
                        os.close(fd)
        right.settimeout(5)
        yield right


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def use(received: ReceivedMemoryDescriptor) -> None:
    """What a program does with a descriptor; each of it may raise, of the family only."""
    end = received.length - 1
    for call in (
        lambda: received.read_bytes(0, min(received.length, 64)),
        lambda: received.read_bytes(end, 1),
        lambda: received.write_bytes(end, b"x"),
        lambda: bytes(memoryview(received.map())[:16]),
        lambda: received.map(access=Access.READ_WRITE),
        lambda: received.map(offset=end, length=1, guard_pages=1),
        lambda: received.array((1,), "u1"),
        lambda: received.page_counts() if received.length < 1 << 30 else None,
    ):
        with suppress(MemdescError):
            call()


@settings(deadline=None, max_examples=300)
@given(
    pieces=PIECES,
    names=st.lists(st.sampled_from(sorted(OBJECTS)), max_size=5),
    other=st.fixed_dictionaries(
        {},
        optional={
            "version": NUMBERS,
            "direction": NUMBERS,
            "writable": st.booleans(),
            "name": st.text(max_size=20) | st.just("a" * 2000) | st.just("nul\0\x1b[31m\n"),
        },
    ),
)
def test_no_header_does_more_than_raise(
    pieces: list[tuple[int, int, int]], names: list[str], other: dict[str, Any]
) -> None:
    before = open_files()
    with sent((message(portable(pieces, **other)), names)) as sock:
        try:
            received = receive_descriptor(sock)
        except MemdescError:
            pass
        else:
            with received:
                use(received)
            del received
    assert open_files() <= before  # what earlier tests left may go meanwhile


@settings(deadline=None, max_examples=200)
@given(
    pieces=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 3)), min_size=1, max_size=5
    )
)
def test_what_is_honest_and_odd_is_read_right(pieces: list[tuple[int, int, int]]) -> None:
    """Ranges that overlap and repeat: either taken, byte for byte, or refused."""
    fds = [a_memfd() for _ in range(max(index for index, _, _ in pieces) + 1)]
    for number, fd in enumerate(fds):
        os.pwrite(fd, bytes((number * 16 + at) % 256 for at in range(SIZE)), 0)
    left, right = socket.socketpair()
    with left, right:
        left.sendmsg([message(portable(pieces))], ancillary(fds))
        try:
            received = receive_descriptor(right)
        except ProtocolError:
            assert {index for index, _, _ in pieces} != set(range(len(fds)))
        else:
            wanted = b"".join(os.pread(fds[index], n, at) for index, at, n in pieces)
            with received:
                assert received.read_bytes() == wanted
                try:
                    assert bytes(memoryview(received.map())) == wanted
                except MappingError as error:
                    assert error.reason is MappingReason.NOT_CONGRUENT
            del received
    for fd in fds:
        os.close(fd)


@settings(deadline=None, max_examples=200)
@given(header=st.binary(max_size=80) | ANYTHING.map(msgspec.msgpack.encode), fds=st.integers(0, 3))
def test_no_bytes_do_more_than_raise(header: bytes, fds: int) -> None:
    before = open_files()
    with sent((message(header), ["writable"] * fds)) as sock, pytest.raises(MemdescError):
        receive_descriptor(sock)
    assert open_files() <= before  # what earlier tests left may go meanwhile


@pytest.mark.parametrize(
    ("data", "fds"),
    [
        (b"", 0),
        (b"m", 1),
        (message(portable(), magic=b"evil"), 1),
        (message(portable(), length=2**32 - 1), 1),
        (message(portable(), length=3), 1),
        (message(portable(), length=5000), 1),
        (message(portable()), 0),
        (message(portable()), 2),
        (message(portable()), 253),
        (message(portable([(1, 0, SIZE)])), 1),
        (message(portable([])), 0),
        (message(portable([(0, 0, SIZE)] * 4097)), 1),
        (message(portable([(0, 2**63 - 1, 2**63 - 1)])), 1),
        (message(portable([(0, 0, 2**63 - 1)] * 3)), 1),
        (message(portable([(0, 0, 0)])), 1),
        (message(portable([(0, SIZE, 1)])), 1),
        (message(portable(direction=4)), 1),
        (message(portable(version=2)), 1),
        (message(portable(name="its").replace(b"its", b"\xff\xfe\xfd")), 1),
        (message(b"\x81\xa1z" + b"\x91" * 50_000), 1),
    ],
)
def test_each_lie(data: bytes, fds: int) -> None:
    with sent((data or b"m", ["writable"] * fds)) as sock:
        with pytest.raises((ProtocolError, PeerGoneError)) as caught:
            receive_descriptor(sock)
    assert caught.value.errno in (errno.EPROTO, errno.ECONNRESET)


def test_thousands_of_pieces_are_one_descriptor_or_an_error() -> None:
    pieces = [(0, page_size * (n % 2), page_size) for n in range(4096)]
    with sent((message(portable(pieces)), ["writable"])) as sock:
        with receive_descriptor(sock) as received:
            assert received.length == 4096 * page_size
            received.write_bytes(0, b"seen 2048 times")
            mapping = received.map()
            assert bytes(memoryview(mapping)[2 * page_size * 2047 :][:4]) == b"seen"
            del mapping, received


def test_descriptors_in_every_packet_do_not_fill_the_table() -> None:
    """A header that comes byte by byte, each with as many descriptors as a message carries."""
    fd = a_memfd()
    left, right = socket.socketpair()
    with left, right:
        right.settimeout(5)
        for at in range(8):  # fewer than a header has, so that the receiver waits for more
            left.sendmsg([message(portable())[at : at + 1]], ancillary([fd] * 100))
        before = open_files()
        with pytest.raises(ProtocolError) as caught:
            receive_descriptor(right)
        assert caught.value.errno == errno.EPROTO
        assert "300 descriptors" in str(caught.value)
        assert open_files() <= before  # what earlier tests left may go meanwhile
    os.close(fd)


def test_no_room_for_the_descriptors() -> None:
    """They are lost on the way (MSG_CTRUNC): those that did come are closed."""

    def receive() -> tuple[str, int | None, int]:
        with sent((message(portable()), ["writable"] * 20)) as sock:
            spare = []
            with suppress(OSError):
                while True:
                    spare.append(os.open(os.devnull, os.O_RDONLY))
            for fd in spare[:3]:
                os.close(fd)
            try:
                receive_descriptor(sock)
            except MemdescError as error:
                kind, number = type(error).__name__, error.errno
            free = 0
            with suppress(OSError):
                while True:
                    spare.append(os.open(os.devnull, os.O_RDONLY))
                    free += 1
        return kind, number, free

    limit = (64, 64)
    outcome = in_child(receive, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit))
    assert outcome == ("ProtocolError", errno.EMFILE, 3)


def test_a_peer_that_says_nothing() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.settimeout(0.05)
        with pytest.raises(TimedOutError):
            receive_descriptor(right)
        left.sendmsg([b"mdsc"], ancillary([0]))
        with pytest.raises(TimedOutError):
            receive_descriptor(right)
        left.close()
        with pytest.raises(PeerGoneError):
            receive_descriptor(right)


def test_a_giver_that_seals_it_afterwards() -> None:
    """What was writable no longer is: an error of ours at the next write and the next mapping."""
    fd = a_memfd()
    left, right = socket.socketpair()
    with left, right:
        left.sendmsg([message(portable())], ancillary([fd]))
        received = receive_descriptor(right)
    with received:
        received.write_bytes(0, b"goes")
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_FUTURE_WRITE)
        with pytest.raises(SealedError) as refused:
            received.write_bytes(0, b"not")
        assert refused.value.errno == errno.EPERM
        with pytest.raises(MappingError) as caught:
            received.map(access=Access.READ_WRITE)
        assert caught.value.reason is MappingReason.ACCESS
        assert received.read_bytes(0, 4) == b"goes"
    os.close(fd)
