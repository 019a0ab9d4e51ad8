"""The ring of the core: what it carries, how it fails, who waits, and what it leaves behind."""

from __future__ import annotations

import errno
import mmap
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from memdesc import _core
from memdesc.vm.pages import page_size

EVER = -1


def a_ring(entries: int = 4) -> _core.Uring:
    try:
        return _core.open_uring(entries, 4 * entries, 0)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip(f"no io_uring here: {error}")


@pytest.fixture
def ring() -> Iterator[_core.Uring]:
    made = a_ring()
    yield made
    if not made.closed:
        made.close()


@pytest.fixture
def memory() -> Iterator[mmap.mmap]:
    with mmap.mmap(-1, 4 * page_size) as pages:
        yield pages


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def at(memory: mmap.mmap) -> int:
    return _core.buffer_address(memory)[0]


def read(ring: _core.Uring, fd: int, address: int, nbytes: int, tag: int, buffer: int = -1) -> bool:
    return ring.prepare(False, fd, 0, address, nbytes, 0, tag, buffer)


def test_it_reads_and_writes(ring: _core.Uring, memory: mmap.mmap, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        memory[:5] = b"bytes"
        assert ring.prepare(True, fd, 0, at(memory), 5, 10, 7, -1)
        assert (ring.pending, ring.in_flight) == (1, 1)
        assert _core.uring_enter(ring, 1, EVER) == 1
        assert ring.reap() == [(7, 5)]
        assert (ring.pending, ring.in_flight) == (0, 0)
        assert ring.prepare(False, fd, 0, at(memory) + 100, 99, 10, 2**64 - 1, -1)
        _core.uring_enter(ring, 1, EVER)
        assert ring.reap() == [(2**64 - 1, 5)]
        assert memory[100:106] == b"bytes\0"
    finally:
        os.close(fd)


def test_registered_files_and_buffers(ring: _core.Uring, memory: mmap.mmap, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    _core.uring_register_files(ring, [-1, fd])
    os.close(fd)  # the ring has it
    _core.uring_register_buffers(ring, 3)
    _core.uring_update_buffer(ring, 2, at(memory), page_size)
    assert ring.prepare(False, 1, _core.URING_FIXED_FILE, at(memory) + 1, 9, 1, 1, 2)
    assert ring.prepare(
        False, 1, _core.URING_FIXED_FILE, at(memory) + page_size, 9, 1, 2, 2
    )  # not in the buffer
    assert ring.prepare(False, 0, _core.URING_FIXED_FILE, at(memory), 9, 1, 3, 2)
    _core.uring_enter(ring, 3, EVER)
    assert sorted(ring.reap()) == [(1, 9), (2, -errno.EFAULT), (3, -errno.EBADF)]
    assert memory[:11] == b"\x00123456789\0"
    _core.uring_update_buffer(ring, 2, 0, 0)
    assert ring.prepare(False, 1, _core.URING_FIXED_FILE, at(memory), 9, 1, 4, 2)
    _core.uring_enter(ring, 1, EVER)
    assert ring.reap() == [(4, -errno.EFAULT)]


def test_a_registered_page_can_not_be_sealed_until_it_is_unregistered(ring: _core.Uring) -> None:
    import fcntl

    fd = os.memfd_create("pinned", os.MFD_ALLOW_SEALING)
    os.truncate(fd, page_size)
    with mmap.mmap(fd, page_size) as pages:
        _core.uring_register_buffers(ring, 1)
        _core.uring_update_buffer(ring, 0, at(pages), page_size)
    with pytest.raises(OSError) as caught:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_WRITE)
    assert caught.value.errno == errno.EBUSY
    _core.uring_update_buffer(ring, 0, 0, 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _core.F_SEAL_WRITE)
    os.close(fd)


def test_it_takes_no_more_than_it_has_room_for(ring: _core.Uring, memory: mmap.mmap) -> None:
    assert ring.entries == 4
    null = os.open("/dev/zero", os.O_RDONLY)
    try:
        made = [read(ring, null, at(memory), 1, tag) for tag in range(6)]
        assert made == [True] * 4 + [False] * 2
        assert _core.uring_enter(ring, 4, EVER) == 4
        for _ in range(3):  # the room for completions is bounded too: 16, none reaped
            assert [read(ring, null, at(memory), 1, 9) for _ in range(4)] == [True] * 4
            _core.uring_enter(ring, 0, EVER)
        assert not read(ring, null, at(memory), 1, 9)
        assert ring.in_flight == 16
        assert len(ring.reap()) == 16
        assert read(ring, null, at(memory), 1, 9)
        _core.uring_enter(ring, 1, EVER)
        ring.reap()
    finally:
        os.close(null)


def test_waiting_is_without_the_gil(
    ring: _core.Uring, memory: mmap.mmap, pipe: tuple[int, int]
) -> None:
    read(ring, pipe[0], at(memory), 4, 1)
    _core.uring_enter(ring, 0, EVER)
    writer = threading.Thread(target=os.write, args=(pipe[1], b"now"))
    threading.Timer(0.05, writer.start).start()
    _core.uring_enter(ring, 1, EVER)  # would never end
    assert ring.reap() == [(1, 3)]
    writer.join()


def test_a_timeout_and_a_signal_end_the_waiting(
    ring: _core.Uring, memory: mmap.mmap, pipe: tuple[int, int]
) -> None:
    read(ring, pipe[0], at(memory), 4, 1)
    _core.uring_enter(ring, 0, EVER)
    with pytest.raises(OSError) as caught:
        _core.uring_enter(ring, 1, 1000)
    assert caught.value.errno == errno.ETIME

    def interrupt(*_: object) -> None:
        if not struck:  # the next one may come when nobody expects it
            struck.append(True)
            raise KeyboardInterrupt

    struck: list[bool] = []
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)  # again and again: it may not wait yet
        assert _core.uring_enter(ring, 1, EVER) == 0
        with pytest.raises(KeyboardInterrupt):
            signal.signal(signal.SIGALRM, interrupt)
            _core.uring_enter(ring, 1, EVER)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    os.write(pipe[1], b"end")
    _core.uring_enter(ring, 1, EVER)
    assert ring.reap() == [(1, 3)]


def test_what_waits_can_be_cancelled(
    ring: _core.Uring, memory: mmap.mmap, pipe: tuple[int, int]
) -> None:
    read(ring, pipe[0], at(memory), 4, 1)
    _core.uring_enter(ring, 0, EVER)
    with pytest.raises(ValueError, match="in flight"):
        ring.close()
    assert ring.prepare_cancel(1, 2)
    assert ring.prepare_cancel(99, 3)
    _core.uring_enter(ring, 3, EVER)
    assert sorted(ring.reap()) == [(1, -errno.ECANCELED), (2, 0), (3, -errno.ENOENT)]
    os.write(pipe[1], b"late")
    assert os.read(pipe[0], 4) == b"late"


def test_an_eventfd_tells_of_completions(ring: _core.Uring, memory: mmap.mmap) -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    null = os.open("/dev/zero", os.O_RDONLY)
    try:
        _core.uring_register_eventfd(ring, fd)
        read(ring, null, at(memory), 1, 1)
        _core.uring_enter(ring, 1, EVER)
        assert os.eventfd_read(fd) == 1
        ring.reap()
        _core.uring_register_eventfd(ring, -1)
        read(ring, null, at(memory), 1, 1)
        _core.uring_enter(ring, 1, EVER)
        ring.reap()
        with pytest.raises(BlockingIOError):
            os.eventfd_read(fd)
    finally:
        os.close(fd)
        os.close(null)


def test_let_go_it_cancels_what_is_in_flight(memory: mmap.mmap, pipe: tuple[int, int]) -> None:
    ring = a_ring()
    read(ring, pipe[0], at(memory), 4, 1)
    _core.uring_enter(ring, 0, EVER)
    read(ring, pipe[0], at(memory), 4, 2)  # never submitted
    del ring
    os.write(pipe[1], b"late")
    assert os.read(pipe[0], 4) == b"late"
    assert memory[:4] == bytes(4)


def test_a_fork_child_lets_go_and_the_parent_goes_on(
    memory: mmap.mmap, pipe: tuple[int, int]
) -> None:
    ring = a_ring()
    read(ring, pipe[0], at(memory), 4, 1)
    _core.uring_enter(ring, 0, EVER)
    child = os.fork()
    if not child:
        ring.close()  # no ValueError: nothing of it is this process's
        os._exit(0 if ring.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    os.write(pipe[1], b"more")
    _core.uring_enter(ring, 1, EVER)
    assert ring.reap() == [(1, 4)]
    assert memory[:4] == b"more"


def test_calls_fail_with_the_kernels_errno(ring: _core.Uring, memory: mmap.mmap) -> None:
    with pytest.raises(OSError) as caught:
        _core.open_uring(0, 8, 0)
    assert (caught.value.errno, caught.value.strerror[:14]) == (errno.EINVAL, "io_uring_setup")
    with pytest.raises(OSError) as caught:
        _core.open_uring(4, 8, 1 << 31)
    assert caught.value.errno == errno.EINVAL
    for call, number in [
        (lambda: _core.uring_update_buffer(ring, 0, at(memory), 1), errno.ENXIO),
        (lambda: _core.uring_register_buffers(ring, 0), errno.EINVAL),
        (lambda: _core.uring_register_files(ring, [999]), errno.EBADF),
        (lambda: _core.uring_register_eventfd(ring, 999), errno.EBADF),
    ]:
        with pytest.raises(OSError) as caught:
            call()
        assert (caught.value.errno, caught.value.strerror[:17]) == (number, "io_uring_register")
    with pytest.raises(ValueError):
        _core.uring_register_files(ring, [0] * 65)
    ring.close()
    with pytest.raises(ValueError, match="closed"):
        _core.uring_enter(ring, 0, EVER)
    with pytest.raises(ValueError, match="closed"):
        ring.reap()
    with pytest.raises(TypeError):
        _core.Uring()


def test_pread_and_pwrite(memory: mmap.mmap, tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    memory[:3] = b"abc"
    assert _core.pwrite(fd, at(memory), 3, 2) == 3
    assert _core.pread(fd, at(memory) + 10, 9, 0) == 5
    assert memory[10:15] == b"\0\0abc"
    os.close(fd)
    for call, name in ((_core.pread, "pread"), (_core.pwrite, "pwrite")):
        with pytest.raises(OSError) as caught:
            call(fd, at(memory), 3, 0)
        assert (caught.value.errno, caught.value.strerror.split(":")[0]) == (errno.EBADF, name)


def test_alignment_is_asked_of_files(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert _core.dio_alignment(fd) in (None, (0, 0))
    finally:
        os.close(fd)
    with pytest.raises(OSError) as caught:
        _core.dio_alignment(fd)
    assert (caught.value.errno, caught.value.strerror[:6]) == (errno.EBADF, "statx:")
