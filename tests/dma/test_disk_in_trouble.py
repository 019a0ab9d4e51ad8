"""Disks that fail, files that go, interrupts, forks: afterwards nothing is held or in flight."""

from __future__ import annotations

import errno
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from children import NOBODY, become, in_child, limit_locking
from disk_tools import KIB, MIB, a_file, known, needs_uring
from fuse_disk import NoDisk, failing_disk, pattern

import memdesc as md
from memdesc import BufferMemoryDescriptor
from memdesc.dma import DirectFile, Way, rings
from memdesc.testing import failing

SMALL = {"queue_depth": 2, "block_size": 64 * KIB}


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(MIB, recycle=False) as made:
        yield made


def check_usable(buffer: BufferMemoryDescriptor, path: Path) -> None:
    """Nothing is held for a device, and the next transfer is as any."""
    assert buffer.memory.lifecycle.registrations == 0
    assert rings._parked == []
    with DirectFile(path) as disk:
        disk.read_into(buffer)
    assert buffer.read_bytes() == known(MIB)


# --- Devices that fail ------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "no ring"])
def test_eio_in_the_middle(tmp_path: Path, buffer: BufferMemoryDescriptor, ring: bool) -> None:
    (tmp_path / "mount").mkdir()
    bad = 5 * 64 * KIB + 100
    try:
        with failing_disk(tmp_path / "mount", MIB, bad=bad) as (path, _):
            with DirectFile(path, "r+", **SMALL) as disk:
                with failing("open_uring", errno.EPERM, times=0 if ring else None):
                    with pytest.raises(md.TransferError) as caught:
                        disk.read_into(buffer)
                    error = caught.value
                    assert (error.errno, error.expected) == (errno.EIO, MIB)
                    assert error.file_offset is not None
                    assert error.completed == error.file_offset
                    assert bad - 64 * KIB <= error.completed <= bad
                    assert buffer.read_bytes(0, error.completed) == pattern(0, error.completed)
                    assert disk.read_into(buffer, length=4 * 64 * KIB).nbytes == 4 * 64 * KIB
                    with pytest.raises(md.TransferError) as caught:
                        disk.write_from(buffer)
                    assert caught.value.errno == errno.EIO
                    assert caught.value.completed <= bad
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    check_usable(buffer, a_file(tmp_path, MIB))


def test_a_disk_that_goes_away(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    (tmp_path / "mount").mkdir()
    try:
        with failing_disk(tmp_path / "mount", MIB) as (path, server):

            def kill(done: int, total: int) -> None:
                server.kill()
                server.wait()

            with DirectFile(path, **SMALL) as disk, pytest.raises(md.TransferError) as caught:
                disk.read_into(buffer, progress=kill)
            assert caught.value.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    check_usable(buffer, a_file(tmp_path, MIB))


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EFAULT])
def test_failing_without_a_ring(
    tmp_path: Path, buffer: BufferMemoryDescriptor, number: int
) -> None:
    """For users who may not mount a failing disk."""
    path = a_file(tmp_path, MIB)
    with DirectFile(path, "r+", **SMALL) as disk, failing("open_uring", errno.EPERM, times=None):
        with failing("pread", number, after=3) as fault, pytest.raises(md.TransferError) as caught:
            disk.read_into(buffer)
        assert (fault.failures, caught.value.errno) == (1, number)
        assert (caught.value.completed, caught.value.file_offset) == (192 * KIB, 192 * KIB)
        assert buffer.read_bytes(0, 192 * KIB) == known(192 * KIB)
        with failing("pwrite", number, after=1), pytest.raises(md.TransferError) as caught:
            disk.write_from(buffer, file_offset=1, length=100_000, offset=1)
        assert caught.value.completed == 0  # the edge at its head comes last
        with failing("pread", errno.EINTR, times=2) as fault:
            assert disk.read_into(buffer).nbytes == MIB
        assert fault.failures == 2
    path.write_bytes(known(MIB))
    check_usable(buffer, path)


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "no ring"])
def test_a_file_that_may_not_grow(tmp_path: Path, ring: bool) -> None:
    def write() -> tuple[int | None, int]:
        with DirectFile(tmp_path / "large", "w", **SMALL) as disk:
            with BufferMemoryDescriptor(MIB) as buffer:
                resource.setrlimit(resource.RLIMIT_FSIZE, (256 * KIB, 256 * KIB))
                with failing("open_uring", errno.EPERM, times=0 if ring else None):
                    with pytest.raises(md.TransferError) as caught:
                        disk.write_from(buffer)
        return caught.value.errno, caught.value.completed

    assert in_child(write) == (errno.EFBIG, 256 * KIB)


def test_a_full_disk(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    full = tmp_path / "full"
    full.mkdir()
    if os.system(f"mount -t tmpfs -o size=512k none {full} 2>/dev/null"):
        pytest.skip("a small file system can not be mounted by this user")
    try:
        with DirectFile(full / "file", "w", **SMALL) as disk:
            with pytest.raises(md.TransferError) as caught:
                disk.write_from(buffer)
        assert caught.value.errno == errno.ENOSPC
        assert 0 <= caught.value.completed <= 512 * KIB
        assert "free space" in str(caught.value)
    finally:
        assert os.system(f"umount {full}") == 0
    check_usable(buffer, a_file(tmp_path, MIB))


def test_an_unreadable_file() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        path = Path(folder, "secret")
        path.write_bytes(b"secret")
        path.chmod(0)

        def read() -> None:
            with pytest.raises(PermissionError):
                DirectFile(path)

        in_child(read, before=(lambda: become(NOBODY)) if os.geteuid() == 0 else None)


# --- Interrupts -------------------------------------------------------------------------------


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "no ring"])
def test_what_progress_raises_cancels(
    tmp_path: Path, buffer: BufferMemoryDescriptor, ring: bool
) -> None:
    path, told = a_file(tmp_path, MIB), []

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            raise LookupError("enough")

    with failing("open_uring", errno.EPERM, times=0 if ring else None):
        with DirectFile(path, **SMALL) as disk:
            with pytest.raises(LookupError, match="enough"):
                disk.read_into(buffer, progress=progress)
            assert len(told) == 2
            assert all(0 < done <= total == MIB for done, total in told)
            disk.read_into(buffer, progress=progress)
            assert told[-1] == (MIB, MIB)
    check_usable(buffer, path)


def test_a_signal_handlers_exception_cancels(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    path = a_file(tmp_path, MIB)
    with DirectFile(path, **SMALL) as disk, pytest.raises(KeyboardInterrupt):
        disk.read_into(buffer, progress=lambda *_: signal.raise_signal(signal.SIGINT))
    check_usable(buffer, path)


def test_a_read_that_hangs_can_be_interrupted(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    needs_uring()
    (tmp_path / "mount").mkdir()
    try:
        with failing_disk(tmp_path / "mount", MIB, hang=300 * KIB) as (path, _):
            main = threading.main_thread().ident
            timer = threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT])
            with DirectFile(path, **SMALL) as disk:
                with pytest.raises(KeyboardInterrupt):
                    timer.start()
                    disk.read_into(buffer)
                timer.join()
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    check_usable(buffer, a_file(tmp_path, MIB))


def test_a_second_interrupt_leaves_a_dead_device_alone(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    """The memory stays held until the device gives it back."""
    needs_uring()
    (tmp_path / "mount").mkdir()
    life = buffer.memory.lifecycle
    try:
        with failing_disk(tmp_path / "mount", MIB, hang=300 * KIB, stubborn=True) as (path, server):
            ended = threading.Event()

            def interrupt() -> None:
                while not ended.wait(0.05):
                    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

            interrupter = threading.Thread(target=interrupt)
            with DirectFile(path, **SMALL) as disk:
                try:
                    interrupter.start()
                    disk.read_into(buffer)
                except KeyboardInterrupt:
                    ended.set()
                interrupter.join()
                assert len(rings._parked) == 1
                assert life.registrations == 1
                with buffer.snapshot() as frozen:
                    assert frozen.reason is md.SnapshotReason.REGISTERED
            server.kill()
            server.wait()
            deadline = time.monotonic() + 30
            while rings._parked and time.monotonic() < deadline:
                with DirectFile(a_file(tmp_path, MIB)) as disk:  # who opens a ring looks
                    disk.read_into(buffer)
            assert life.registrations == 0
    except NoDisk as error:
        pytest.skip(f"no FUSE here: {error}")
    check_usable(buffer, a_file(tmp_path, MIB))


# --- Closing, fork ----------------------------------------------------------------------------


def test_closing_during_a_transfer_lets_it_end(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    path = a_file(tmp_path, MIB)
    disk = DirectFile(path, **SMALL)
    fds = set(os.listdir("/proc/self/fd"))

    def close(done: int, total: int) -> None:
        disk.close()
        buffer.close()

    view = memoryview(buffer)
    assert disk.read_into(buffer, progress=close).nbytes == MIB
    assert bytes(view) == known(MIB)
    with pytest.raises(md.ClosedError):
        disk.read_into(buffer)
    assert len(set(os.listdir("/proc/self/fd")) - fds) == 0


def test_forking_during_a_transfer(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    path = a_file(tmp_path, MIB)
    children: list[str] = []

    def look() -> str:
        rings_left = [
            link
            for fd in os.listdir("/proc/self/fd")
            if (link := _link(fd)) in ("anon_inode:[io_uring]", str(path))
        ]
        with pytest.raises(md.ClosedError):
            disk.read_into(buffer)
        with DirectFile(path) as own:
            own.read_into(buffer)
        return f"{rings_left} {disk.closed} {buffer.read_bytes() == known(MIB)}"

    def fork(done: int, total: int) -> None:
        if not children:
            children.append(in_child(look))

    with DirectFile(path, register=True, **SMALL) as disk:
        disk.read_into(buffer, progress=fork)
        assert buffer.read_bytes() == known(MIB)
        assert children == ["[] True True"]
    check_usable(buffer, path)


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "no ring"])
def test_a_child_that_comes_back_into_its_parents_transfer(tmp_path: Path, ring: bool) -> None:
    """It is told so, and does not touch what is in flight."""
    path = a_file(tmp_path, MIB)

    def transfer() -> str:
        pids: list[int] = []

        def fork(done: int, total: int) -> None:
            if not pids:
                pids.append(os.fork())

        with DirectFile(path, **SMALL) as disk, BufferMemoryDescriptor(MIB) as buffer:
            with failing("open_uring", errno.EPERM, times=0 if ring else None):
                try:
                    disk.read_into(buffer, progress=fork)
                except md.ClosedError:
                    os._exit(7 if pids == [0] else 8)
                if pids == [0]:
                    os._exit(9)
                told = os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1])
                return f"{told} {buffer.read_bytes() == known(MIB)}"

    assert in_child(transfer) == "7 True"


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


# --- Limits, and the proof --------------------------------------------------------------------


def test_past_the_limit_on_locked_memory_it_goes_on_unregistered(tmp_path: Path) -> None:
    needs_uring()
    path = a_file(tmp_path, MIB)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != Path("/tmp"):
            folder.chmod(folder.stat().st_mode | 0o055)
    file = os.open(path, os.O_RDONLY)

    def read() -> tuple[int, int, str]:
        limit_locking(512 * KIB)
        with DirectFile(f"/proc/self/fd/{file}", register=True) as disk:
            with BufferMemoryDescriptor(MIB) as large, BufferMemoryDescriptor(64 * KIB) as small:
                result = disk.read_into(large)
                assert large.read_bytes() == known(MIB)
                registered = disk.read_into(small).registered_bytes
        return result.registered_bytes, registered, " ".join(result.reasons)

    try:
        large, small, why = in_child(read)
    finally:
        os.close(file)
    assert (large, small) == (0, 64 * KIB)
    assert "ENOMEM" in why
    assert "RLIMIT_MEMLOCK" in why


@pytest.mark.slow
def test_the_frames_that_the_disk_wrote_are_those_that_another_process_reads(
    tmp_path: Path,
) -> None:
    from puppets import Puppet

    from memdesc.vm.physical import frames, same_pages
    from memdesc.vm.probe import probe_feature
    from memdesc.vm.task import Task

    path = a_file(tmp_path, MIB)
    with md.Service("disk") as service, BufferMemoryDescriptor(MIB) as buffer:
        service.share("frames", buffer)
        with Puppet() as reader:
            reader.do("service = md.connect('disk'); mapping = service.map('frames')")
            address = reader.do("mapping.address")
            with DirectFile(path) as disk:
                result = disk.read_into(buffer)
            assert result.nbytes == MIB
            if result.way in (Way.URING_DIRECT, Way.PREAD_DIRECT):
                assert result.bounced_bytes == 0
            assert reader.do("__import__('hashlib').sha256(mapping).hexdigest()") == _sha(
                known(MIB)
            )
            with Task(reader.pid) as task, Task.current() as own:
                proof = same_pages(own, buffer.address, task, address, MIB)
                assert proof.same
                if probe_feature("page_frames").available:
                    assert proof.proof == "frames"
                    assert None not in frames(task, address, MIB)
            reader.do("del mapping; service.close()")


def _sha(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
