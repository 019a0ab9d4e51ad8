"""DirectFile: bytes arrive where they belong, by the way that it says."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from disk_tools import KIB, MIB, a_file, best_way, has_uring, known, needs_direct, needs_uring
from hypothesis import HealthCheck, given, settings, strategies as st

import memdesc as md
from memdesc import Access, BufferMemoryDescriptor, Direction, MemoryDescriptor
from memdesc.dma import DirectFile, Way
from memdesc.memory.lifecycle import State
from memdesc.testing import failing
from memdesc.vm.pages import page_size


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(MIB, recycle=False) as made:
        yield made


def marks(buffer: BufferMemoryDescriptor) -> int:
    return buffer.memory.lifecycle.registrations


# --- Bytes ------------------------------------------------------------------------------------


def test_an_aligned_read_bounces_nothing(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    with DirectFile(a_file(tmp_path, MIB), block_size=64 * KIB) as disk:
        needs_direct(disk)
        result = disk.read_into(buffer)
        assert buffer.read_bytes() == known(MIB)
        assert (result.nbytes, result.bounced_bytes, result.requests) == (MIB, 0, 16)
        assert (result.counts, result.way) == ((MIB,), best_way(disk))
        assert bool(result.reasons) is not has_uring()
    assert marks(buffer) == 0


def test_an_aligned_write_bounces_nothing_and_is_read_back(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    buffer.write_bytes(0, known(MIB, 2))
    with DirectFile(tmp_path / "new", "x") as disk:
        result = disk.write_from(buffer)
        disk.sync()
        assert (result.nbytes, result.way) == (MIB, best_way(disk))
        if disk._file.direct >= 0:
            assert result.bounced_bytes == 0
        assert disk.size == MIB
    assert (tmp_path / "new").read_bytes() == known(MIB, 2)


CASES = st.tuples(
    st.integers(0, 70_000), st.integers(0, 70_000), st.integers(0, 140_000), st.booleans()
)


@pytest.mark.slow
@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.lists(CASES, min_size=1, max_size=4),
    st.sampled_from([1, 3, 32]),
    st.sampled_from([page_size, 64 * KIB]),
    st.booleans(),
    st.booleans(),
)
def test_any_offsets_against_a_model(
    cases: list[tuple[int, int, int, bool]],
    depth: int,
    block: int,
    register: bool,
    ring: bool,
) -> None:
    """Reads and writes one after the other; file and memory are as two bytearrays would be."""
    file, memory = bytearray(known(100_000)), bytearray(known(MIB // 4, 3))
    with tempfile.TemporaryDirectory() as folder, BufferMemoryDescriptor(len(memory)) as buffer:
        path = a_file(Path(folder), len(file))
        buffer.write_bytes(0, memory)
        how = {"queue_depth": depth, "block_size": block, "register": register}
        with DirectFile(path, "r+", **how) as disk:
            with failing("open_uring", errno.EPERM, times=0 if ring else None):
                for file_offset, offset, length, writing in cases:
                    if writing:
                        result = disk.write_from(buffer, file_offset, length, offset)
                        if length and file_offset > len(file):
                            file += bytes(file_offset - len(file))
                        file[file_offset : file_offset + length] = memory[offset : offset + length]
                        assert result.nbytes == length
                    elif file_offset > len(file):
                        with pytest.raises(md.RangeError):
                            disk.read_into(buffer, file_offset, length, offset)
                    else:
                        result = disk.read_into(buffer, file_offset, length, offset)
                        there = file[file_offset : file_offset + length]
                        assert result.nbytes == len(there)
                        memory[offset : offset + len(there)] = there
                        # What lies behind the end of the file, in the last block, is undefined.
                        memory[offset + len(there) : offset + length] = buffer.read_bytes(
                            offset + len(there), length - len(there)
                        )
                    assert result.bounced_bytes <= result.nbytes
            assert disk.size == len(file)
        assert buffer.read_bytes() == bytes(memory)
        assert path.read_bytes() == bytes(file)


def test_only_edges_are_bounced(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    with DirectFile(a_file(tmp_path, MIB)) as disk:
        needs_direct(disk)
        _, block = disk.alignment
        result = disk.read_into(buffer, file_offset=1, length=MIB // 2, offset=1)
        assert buffer.read_bytes(1, MIB // 2) == known(MIB)[1 : 1 + MIB // 2]
        assert result.bounced_bytes == block
        assert result.way in (Way.URING_DIRECT, Way.PREAD_DIRECT)
        skewed = disk.read_into(buffer, file_offset=1, length=8192, offset=0)
        assert skewed.bounced_bytes == 8192
        assert skewed.way in (Way.URING_BUFFERED, Way.PREAD_BUFFERED)
        assert any("aligned" in reason for reason in skewed.reasons)


def test_nothing_outside_of_the_range_is_touched(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    size = 100_000
    with DirectFile(a_file(tmp_path, size)) as disk:
        disk.read_into(buffer, length=size - 1, offset=page_size)
    assert buffer.read_bytes(page_size, size - 1) == known(size)[:-1]
    assert not any(buffer.read_bytes(0, page_size))
    assert not any(buffer.read_bytes(page_size + size - 1))


def test_the_end_of_the_file(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    size = 3 * page_size + 5
    with DirectFile(a_file(tmp_path, size)) as disk:
        result = disk.read_into(buffer)
        assert (result.nbytes, buffer.read_bytes(0, size)) == (size, known(size))
        assert disk.read_into(buffer, file_offset=size).nbytes == 0
        assert disk.read_into(buffer, length=0).nbytes == 0
        result = disk.read_into(buffer, file_offset=2 * page_size, length=5 * page_size)
        assert result.nbytes == page_size + 5
        with pytest.raises(md.RangeError) as caught:
            disk.read_into(buffer, file_offset=size + 1)
        assert caught.value.errno == errno.EINVAL
    (tmp_path / "empty").touch()
    with DirectFile(tmp_path / "empty") as disk:
        assert disk.read_into(buffer).nbytes == 0


def test_a_file_that_shrinks_meanwhile_ends_earlier(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    path = a_file(tmp_path, MIB)
    left = MIB // 2 + 100

    def shrink(done: int, total: int) -> None:
        os.truncate(path, left)

    with DirectFile(path, queue_depth=1, block_size=64 * KIB) as disk:
        result = disk.read_into(buffer, progress=shrink)
        assert result.nbytes == left
        assert buffer.read_bytes(0, left) == known(MIB)[:left]
        assert disk.read_into(buffer).nbytes == left


def test_several_in_one_submission(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    content = known(MIB)
    with DirectFile(a_file(tmp_path, MIB)) as disk, BufferMemoryDescriptor(page_size) as other:
        asks = [(buffer, at * 8192, 8192, MIB - (at + 1) * 8192) for at in range(64)]
        result = disk.read_many([*asks, (other, MIB - 100, None, 0)])
        assert result.counts == (*([8192] * 64), 100)
        assert result.nbytes == 64 * 8192 + 100
        for _, file_offset, length, offset in asks:
            assert buffer.read_bytes(offset, length) == content[file_offset : file_offset + length]
        assert other.read_bytes(0, 100) == content[-100:]
        assert disk.read_many([]).counts == ()
        with DirectFile(tmp_path / "out", "w") as out:
            assert out.write_many([(buffer, 0, 100, 0), (other, 100, 100, 0)]).nbytes == 200
    written = (tmp_path / "out").read_bytes()
    assert written == buffer.read_bytes(0, 100) + content[-100:]


# --- Every kind of descriptor -----------------------------------------------------------------


def test_parts_and_several_as_one(tmp_path: Path) -> None:
    content = known(64 * KIB)
    with (
        DirectFile(a_file(tmp_path, 64 * KIB)) as disk,
        BufferMemoryDescriptor(20_000) as one,
        BufferMemoryDescriptor(3 * page_size) as two,
    ):
        odd = md.MultiMemoryDescriptor([md.SubMemoryDescriptor(one, 100, 10_001), two])
        assert disk.read_into(odd, file_offset=7).nbytes == 10_001 + 3 * page_size
        assert one.read_bytes(100, 10_001) == content[7:10_008]
        assert two.read_bytes() == content[10_008:][: 3 * page_size]
        even = md.MultiMemoryDescriptor([two, md.SubMemoryDescriptor(one, 0, page_size)])
        part = md.SubMemoryDescriptor(even, page_size, 3 * page_size)
        result = disk.read_into(part, file_offset=page_size)
        if disk._file.direct >= 0:
            assert result.bounced_bytes == 0
        assert two.read_bytes(page_size) == content[page_size : 3 * page_size]
        assert one.read_bytes(0, page_size) == content[3 * page_size : 4 * page_size]
        assert (marks(one), marks(two)) == (0, 0)


def test_memory_of_python_and_of_addresses(tmp_path: Path) -> None:
    with DirectFile(a_file(tmp_path, 10_000)) as disk:
        plain = bytearray(10_000)
        disk.read_into(MemoryDescriptor.with_buffer(plain, Direction.IN))
        assert plain == known(10_000)
        with BufferMemoryDescriptor(10_000) as buffer:
            view = MemoryDescriptor.with_buffer(memoryview(buffer), Direction.IN)
            disk.read_into(view)
            assert buffer.read_bytes() == known(10_000)
            buffer.write_bytes(0, bytes(100))
            there = MemoryDescriptor.with_address_range(buffer.address, 10_000, Direction.IN)
            disk.read_into(there)
            assert buffer.read_bytes() == known(10_000)
            there.close()
        with pytest.raises(md.SealedError) as caught:
            disk.read_into(MemoryDescriptor.with_buffer(bytes(10_000), Direction.IN))
        assert caught.value.errno == errno.EACCES


def received(buffer: BufferMemoryDescriptor) -> MemoryDescriptor:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        md.send_descriptor(ours, buffer)
        return md.receive_descriptor(theirs)


def test_memory_that_a_peer_gave(tmp_path: Path) -> None:
    with DirectFile(a_file(tmp_path, 10_000), "r+", register=True) as disk:
        with BufferMemoryDescriptor(10_000, max_access=Access.READ_WRITE) as buffer:
            with received(buffer) as theirs:
                disk.read_into(theirs)
                assert buffer.read_bytes() == known(10_000)
        with BufferMemoryDescriptor(10_000) as buffer, received(buffer) as theirs:
            buffer.write_bytes(0, b"from the owner")
            with pytest.raises(md.SealedError) as caught:
                disk.read_into(theirs)
            assert caught.value.errno == errno.EACCES
            disk.write_from(theirs)  # reading it is what was granted
        assert disk.registrations == 0
    assert (tmp_path / "file1").read_bytes()[:14] == b"from the owner"


def test_what_is_read_only_is_not_read_into(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    with DirectFile(a_file(tmp_path, 100)) as disk:
        with buffer.prepared(Direction.OUT), pytest.raises(md.WiringError) as caught:
            disk.read_into(buffer)
        assert caught.value.reason is md.WiringReason.NOT_WRITABLE
        with buffer.snapshot() as frozen, pytest.raises(md.SealedError):
            disk.read_into(frozen)


def test_a_snapshot_is_written_and_stays_what_it_was(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    buffer.write_bytes(0, known(MIB, 4))
    with buffer.snapshot() as frozen:
        assert frozen.copied_bytes == 0
        assert buffer.memory.lifecycle.state is State.DETACHED
        with pytest.raises(md.InvalidArgument):  # the device would write what is about to move
            with DirectFile(a_file(tmp_path, MIB)) as disk:
                disk.read_into(MemoryDescriptor.with_buffer(memoryview(buffer), Direction.IN))
        with DirectFile(a_file(tmp_path, MIB)) as disk:
            disk.read_into(buffer)
        assert (buffer.moves, buffer.read_bytes()) == (1, known(MIB))
        with DirectFile(tmp_path / "frozen", "w") as disk:
            disk.write_from(frozen)
    assert (tmp_path / "frozen").read_bytes() == known(MIB, 4)


def test_a_snapshot_in_the_middle_of_a_transfer_copies(
    tmp_path: Path, buffer: BufferMemoryDescriptor
) -> None:
    taken: list[md.SnapshotMemoryDescriptor] = []

    def snapshot(done: int, total: int) -> None:
        if not taken:
            assert marks(buffer) == 1
            taken.append(buffer.snapshot())

    with DirectFile(a_file(tmp_path, MIB), queue_depth=2, block_size=64 * KIB) as disk:
        disk.read_into(buffer, progress=snapshot)
    assert taken[0].reason is md.SnapshotReason.REGISTERED
    taken[0].close()
    assert buffer.read_bytes() == known(MIB)
    assert marks(buffer) == 0


# --- Registered buffers -----------------------------------------------------------------------


def test_registered_as_long_as_the_descriptor_lives(tmp_path: Path) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, MIB), register=True) as disk:
        buffer = BufferMemoryDescriptor(MIB, recycle=False)
        life = buffer.memory.lifecycle
        result = disk.read_into(buffer)
        assert result.registered_bytes == MIB, result.reasons
        part = md.SubMemoryDescriptor(buffer, page_size, page_size)
        assert disk.read_into(part).registered_bytes == page_size
        assert (disk.registrations, life.registrations) == (1, 1)
        with buffer.snapshot() as frozen:
            assert frozen.reason is md.SnapshotReason.REGISTERED
        del buffer, part
        assert (disk.registrations, life.registrations) == (0, 0)
        other = BufferMemoryDescriptor(MIB, recycle=False)
        disk.read_into(other)
        other.close()
        assert disk.read_many([]).nbytes == 0  # the next transfer sees that it was closed
        assert disk.registrations == 0
        last = BufferMemoryDescriptor(MIB, recycle=False)
        disk.read_into(last)
        life = last.memory.lifecycle
        assert life.registrations == 1
    assert life.registrations == 0
    last.close()


def test_a_buffer_that_grew_is_registered_anew(tmp_path: Path) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, MIB), register=True) as disk:
        with BufferMemoryDescriptor(MIB // 2, reserve=MIB) as buffer:
            assert disk.read_into(buffer).registered_bytes == MIB // 2
            buffer.grow(MIB)
            assert disk.read_into(buffer).registered_bytes == MIB
            assert buffer.read_bytes() == known(MIB)
            assert (disk.registrations, marks(buffer)) == (1, 1)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EPERM])
def test_what_can_not_be_registered_is_transferred_all_the_same(
    tmp_path: Path, buffer: BufferMemoryDescriptor, number: int
) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, MIB), register=True) as disk:
        with failing("uring_update_buffer", number) as fault:
            result = disk.read_into(buffer)
        assert (fault.failures, result.registered_bytes, result.nbytes) == (1, 0, MIB)
        assert any(errno.errorcode[number] in reason for reason in result.reasons)
        assert disk.read_into(buffer).registered_bytes == 0  # not tried again
        assert (disk.registrations, marks(buffer)) == (0, 0)


# --- Ways down --------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.ENOMEM, errno.EMFILE])
def test_without_a_ring(tmp_path: Path, buffer: BufferMemoryDescriptor, number: int) -> None:
    with DirectFile(a_file(tmp_path, MIB), "r+") as disk:
        with failing("open_uring", number, times=None) as fault:
            result = disk.read_into(buffer)
            assert fault.failures == 1
            assert buffer.read_bytes() == known(MIB)
            assert result.way in (Way.PREAD_DIRECT, Way.PREAD_BUFFERED)
            assert errno.errorcode[number] in result.reasons[0]
            written = disk.write_from(buffer, file_offset=3, length=100)
            assert (written.nbytes, written.bounced_bytes) == (100, 100)


def test_an_older_kernel_takes_fewer_flags(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, MIB)) as disk, failing("open_uring", errno.EINVAL) as fault:
        assert disk.read_into(buffer).way is best_way(disk)
        assert (fault.calls, fault.failures) == (3, 1)  # best_way tries as well


def test_without_registered_files(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    needs_uring()
    with DirectFile(a_file(tmp_path, MIB)) as disk:
        with failing("uring_register_files", errno.EMFILE) as fault:
            assert disk.read_into(buffer, 1).nbytes == MIB - 1
        assert fault.failures == 1
    assert buffer.read_bytes(0, MIB - 1) == known(MIB)[1:]


def test_a_file_without_o_direct(buffer: BufferMemoryDescriptor) -> None:
    with DirectFile("/proc/self/limits") as disk:  # what the kernel makes up has no disk
        result = disk.read_into(buffer)
        assert result.way in (Way.URING_BUFFERED, Way.PREAD_BUFFERED)
        assert result.bounced_bytes == result.nbytes > 100
        assert "O_DIRECT" in " ".join(result.reasons)
    assert b"Max open files" in buffer.read_bytes(0, result.nbytes)


def test_a_kernel_that_does_not_tell_alignments(
    tmp_path: Path, buffer: BufferMemoryDescriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdesc._core.dio_alignment", lambda fd: None)
    with DirectFile(a_file(tmp_path, MIB)) as disk:
        assert disk.alignment == (page_size, page_size)
        assert disk.read_into(buffer, 512, page_size, 512).bounced_bytes == page_size
        assert buffer.read_bytes(512, page_size) == known(MIB)[512 : 512 + page_size]


def test_a_kernel_that_wants_more_than_it_said(
    tmp_path: Path, buffer: BufferMemoryDescriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memdesc._core.dio_alignment", lambda fd: (1, 1))
    with DirectFile(a_file(tmp_path, MIB)) as disk:
        needs_direct(disk)
        result = disk.read_into(buffer, 1, 10_000, 3)
        assert (result.nbytes, result.bounced_bytes) == (10_000, 10_000)
        assert any("EINVAL" in reason for reason in result.reasons)
        assert buffer.read_bytes(3, 10_000) == known(MIB)[1:10_001]


# --- Arguments --------------------------------------------------------------------------------


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(md.InvalidArgument):
            DirectFile(path)
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "none", "r+")
    with pytest.raises(IsADirectoryError):
        DirectFile(tmp_path, "r+")
    with pytest.raises(FileExistsError):
        DirectFile(a_file(tmp_path, 1), "x")


def test_arguments_outside_their_ranges(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    path = a_file(tmp_path, 100)
    for wrong in (
        {"mode": "a"},
        {"queue_depth": 0},
        {"queue_depth": 1025},
        {"block_size": 0},
        {"block_size": page_size + 1},
        {"block_size": 2 << 30},
    ):
        with pytest.raises(md.InvalidArgument):
            DirectFile(path, **wrong)  # type: ignore[arg-type]
    with DirectFile(path) as disk:
        for asked in ((buffer, 0, MIB + 1, 0), (buffer, 0, 1, MIB), (buffer, 0, None, -1)):
            with pytest.raises(md.RangeError):
                disk.read_into(*asked)
        for asked in ((buffer, -1, 1, 0), (buffer, 2**63 - 1, 1, 0), (b"bytes", 0, 1, 0)):
            with pytest.raises(md.InvalidArgument):
                disk.read_into(*asked)  # type: ignore[arg-type]
        with pytest.raises(md.InvalidArgument) as caught:
            disk.write_from(buffer)
        assert caught.value.errno == errno.EBADF
    assert path.read_bytes() == known(100)


def test_closed(tmp_path: Path, buffer: BufferMemoryDescriptor) -> None:
    disk = DirectFile(a_file(tmp_path, 100))
    assert "queue depth 32" in repr(disk)
    disk.close()
    disk.close()
    assert disk.closed
    assert "closed" in repr(disk)
    for use in (lambda: disk.read_into(buffer), lambda: disk.size, disk.sync):
        with pytest.raises(md.ClosedError):
            use()
    with DirectFile(tmp_path / "file1") as disk:
        buffer.close()
        with pytest.raises(md.ClosedError):
            disk.read_into(buffer)


def test_threads_beside_one_another(tmp_path: Path) -> None:
    content = known(4 * MIB)
    with (
        DirectFile(a_file(tmp_path, 4 * MIB), block_size=64 * KIB) as disk,
        BufferMemoryDescriptor(4 * MIB) as buffer,
    ):
        threads = [
            threading.Thread(target=disk.read_into, args=(buffer, at, MIB, at))
            for at in range(0, 4 * MIB, MIB)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert buffer.read_bytes() == content
        assert marks(buffer) == 0
