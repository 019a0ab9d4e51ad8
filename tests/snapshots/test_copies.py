"""Snapshots that copy: of what, and why. The contents are the same as without copying."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from children import NOBODY, become, in_child

from memdesc import (
    Access,
    AllocationError,
    BufferMemoryDescriptor,
    Direction,
    MemdescError,
    MemoryDescriptor,
    MultiMemoryDescriptor,
    SealedError,
    SnapshotReason,
    SubMemoryDescriptor,
    Task,
    _core,
    page_size,
    receive_descriptor,
    send_descriptor,
)
from memdesc.memory.lifecycle import State
from memdesc.testing.faults import failing

SIZE = 6 * page_size


@contextmanager
def a_buffer(**how: object) -> Iterator[tuple[BufferMemoryDescriptor, bytes]]:
    with BufferMemoryDescriptor(SIZE, **how) as buffer:  # type: ignore[arg-type]
        data = os.urandom(SIZE)
        buffer.write_bytes(0, data)
        yield buffer, data


def check_copied(
    source: MemoryDescriptor, data: bytes, reason: SnapshotReason, *, write: bool = True
) -> None:
    """A snapshot of all of it is a copy for that reason, and stays when the source is stored to."""
    with source.snapshot() as frozen:
        assert (frozen.reason, frozen.copied_bytes) == (reason, len(data))
        assert frozen.read_bytes() == data == bytes(frozen.map())
        if write:
            source.write_bytes(1, b"stored")
            assert source.read_bytes(1, 6) == b"stored"
        assert frozen.read_bytes() == data
        with pytest.raises(SealedError):
            frozen.write_bytes(0, b"x")


def grant(buffer: BufferMemoryDescriptor) -> None:
    os.close(buffer.memory.grant(buffer.max_access, user=os.geteuid()))


MARKS: list[tuple[SnapshotReason, Callable[[BufferMemoryDescriptor], object]]] = [
    (SnapshotReason.SHARED, grant),
    (SnapshotReason.FORKED, lambda buffer: in_child(lambda: None)),
    (
        SnapshotReason.REGISTERED,
        lambda buffer: buffer.memory.lifecycle.register(State),
    ),
    (SnapshotReason.EXPOSED, lambda buffer: buffer.memory.fileno()),
    (SnapshotReason.WIRED, lambda buffer: buffer.prepare()),
    (SnapshotReason.MAPPED, lambda buffer: buffer.map(unique=True)),
]


@pytest.mark.parametrize("max_access", Access)
@pytest.mark.parametrize(("reason", "mark"), MARKS, ids=lambda value: getattr(value, "name", ""))
def test_what_was_seen_or_is_held_is_copied(
    reason: SnapshotReason, mark: Callable[[BufferMemoryDescriptor], object], max_access: Access
) -> None:
    with a_buffer(max_access=max_access) as (buffer, data):
        kept = mark(buffer)
        state = buffer.memory.lifecycle.state
        check_copied(buffer, data, reason)
        assert buffer.memory.lifecycle.state is state is not State.DETACHED
        del kept


def test_a_mapping_that_is_gone_is_no_reason() -> None:
    with a_buffer() as (buffer, _):
        with buffer.map(unique=True) as mapping:
            view = mapping.array()
        with buffer.snapshot() as frozen:
            assert frozen.reason is SnapshotReason.MAPPED  # the view keeps it
            buffer.write_bytes(0, b"followed")
            assert bytes(view[:8]) == b"followed"
        del view, mapping
        with buffer.snapshot() as frozen:
            assert frozen.reason is None


def test_a_stranger_who_opened_it_is_seen() -> None:
    with a_buffer() as (buffer, data):
        path = f"/proc/{os.getpid()}/fd/{buffer.memory.own_fd()}"
        with open(path, "rb") as stranger:
            check_copied(buffer, data, SnapshotReason.MAPPED)
            stranger.seek(0)
            assert stranger.read(7)[1:] == b"stored"
        with buffer.snapshot() as frozen:
            assert frozen.reason is None


def test_a_claim_on_a_part_of_the_view_is_a_reason() -> None:
    with a_buffer() as (buffer, data):
        part = MemoryDescriptor.with_buffer(buffer.array()[page_size:], Direction.OUT_IN)
        with part.prepared():
            check_copied(buffer, data, SnapshotReason.WIRED)
        with buffer.snapshot() as frozen:
            assert frozen.reason is None
        part.close()


def test_all_memory_locked_is_a_reason() -> None:
    def lock_all() -> tuple[str | None, bytes, bool]:
        libc = ctypes.CDLL(None, use_errno=True)
        with a_buffer() as (buffer, data):
            if libc.mlockall(2):  # MCL_FUTURE
                pytest.skip(f"mlockall: {os.strerror(ctypes.get_errno())}")
            try:
                with buffer.snapshot() as frozen:
                    same = frozen.read_bytes() == data
                    name = frozen.reason.name if frozen.reason else None
            finally:
                libc.munlockall()
            buffer.write_bytes(0, b"x")
            return name, buffer.read_bytes(0, 1), same

    assert in_child(lock_all) == ("WIRED", b"x", True)


@pytest.mark.parametrize("locked", [False, True])
def test_who_became_another_user_may_not_see_his_own_page_table(locked: bool) -> None:
    def take() -> list[str | None]:
        libc = ctypes.CDLL(None, use_errno=True)
        reasons = []
        with a_buffer() as (before, _), before.snapshot():
            before.write_bytes(0, b"later")
            become(NOBODY)
            if os.access("/proc/self/pagemap", os.R_OK):
                pytest.skip("this kernel shows it all the same")
            with a_buffer() as (buffer, _):
                if locked and libc.mlockall(2):  # MCL_FUTURE
                    pytest.skip(f"mlockall: {os.strerror(ctypes.get_errno())}")
                for number in range(2):
                    with buffer.snapshot() as frozen:
                        reasons.append(frozen.reason and frozen.reason.name)
                        assert frozen.read_bytes() == buffer.read_bytes()
                    buffer.write_bytes(number, b"x")
                libc.munlockall()
                assert buffer.read_bytes(0, 2) == b"xx"
            with before.snapshot() as frozen:
                reasons.append(frozen.reason and frozen.reason.name)
                assert frozen.read_bytes(0, 5) == b"later"
        return reasons

    expected = ["WIRED", "WIRED", "SCATTERED"] if locked else [None, "SCATTERED", "SCATTERED"]
    assert in_child(take) == expected


# ── Everything that is not a buffer ──────────────────────────────────────────────────────────


def test_a_part() -> None:
    with a_buffer() as (buffer, data):
        with SubMemoryDescriptor(buffer, 3, page_size) as part:
            check_copied(part, data[3:][:page_size], SnapshotReason.NOT_OWNED)
        assert buffer.memory.lifecycle.state is State.PRIVATE


def test_several() -> None:
    with a_buffer() as (first, one), a_buffer() as (second, two):
        members = [SubMemoryDescriptor(first, 1, 3), second, SubMemoryDescriptor(first, 5, 9)]
        with MultiMemoryDescriptor(members) as several:  # it could not even be mapped
            check_copied(several, one[1:4] + two + one[5:14], SnapshotReason.NOT_OWNED)


def test_a_python_buffer() -> None:
    data = bytearray(os.urandom(SIZE))
    with MemoryDescriptor.with_buffer(data, Direction.OUT_IN) as described:
        check_copied(described, bytes(data), SnapshotReason.NOT_OWNED)


def test_addresses_of_this_task() -> None:
    memory = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory[:] = data = os.urandom(SIZE)
    address = _core.buffer_address(memory)[0] + 5
    with MemoryDescriptor.with_address_range(address, SIZE - 9, Direction.OUT_IN) as described:
        check_copied(described, data[5:-4], SnapshotReason.NOT_OWNED)


def test_addresses_of_another_task() -> None:
    code = """
import ctypes, sys
data = ctypes.create_string_buffer(b"theirs" * 5000, 30000)
print(ctypes.addressof(data), flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as child, Task(child.pid) as task:  # type: ignore[call-overload]
        address = int(child.stdout.readline())
        with MemoryDescriptor.with_address_range(address, 30000, Direction.OUT_IN, task) as there:
            try:
                check_copied(there, b"theirs" * 5000, SnapshotReason.NOT_OWNED)
            except PermissionError as error:
                pytest.skip(f"another task's memory can not be read here: {error}")
            finally:
                child.stdin.close()


@pytest.mark.parametrize("max_access", Access)
def test_what_was_received(max_access: Access) -> None:
    with a_buffer(max_access=max_access) as (buffer, data):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            send_descriptor(ours, buffer)
            received = receive_descriptor(theirs)
        with received:
            write = max_access.writable
            check_copied(received, data, SnapshotReason.NOT_OWNED, write=write)


# ── What goes wrong ──────────────────────────────────────────────────────────────────────────


def test_no_memory_for_a_copy() -> None:
    with a_buffer() as (buffer, data):
        grant(buffer)
        for call in ("map_memory", "madvise"):
            with failing(call, errno.ENOMEM, times=None) as fault:
                with pytest.raises(MemdescError) as caught:
                    buffer.snapshot()
                assert fault.failures
            assert caught.value.errno == errno.ENOMEM
        assert buffer.read_bytes() == data
        check_copied(buffer, data, SnapshotReason.SHARED)


@pytest.mark.parametrize("call", ["map_memory", "move_memory"])
def test_no_address_space_to_share_the_pages(call: str) -> None:
    with a_buffer() as (buffer, data):
        with failing(call, errno.ENOMEM) as fault:
            with buffer.snapshot() as frozen:
                assert frozen.reason is SnapshotReason.NO_MEMORY
                assert frozen.read_bytes() == data
            assert fault.failures == 1
        assert buffer.memory.lifecycle.state is State.PRIVATE
        buffer.write_bytes(0, b"x")
        grant(buffer)  # it has its object still
        with buffer.map() as mapping:
            assert bytes(mapping) == b"x" + data[1:]


def test_a_fault_while_copying_leaves_the_source() -> None:
    with a_buffer() as (buffer, data):
        grant(buffer)
        with failing("copy_words", errno.EFAULT) as fault, pytest.raises(OSError):
            buffer.snapshot()
        assert fault.failures == 1
        check_copied(buffer, data, SnapshotReason.SHARED)


def test_a_fault_while_copying_changes_leaves_the_source(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_space(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with a_buffer() as (buffer, data), buffer.snapshot() as frozen:
        buffer.write_bytes(0, b"x")
        for call in ("copy_words", "reserve_memory"):
            with failing(call, errno.ENOMEM, times=None), pytest.raises(OSError):
                buffer.snapshot()
        with monkeypatch.context() as patch, pytest.raises(AllocationError) as caught:
            patch.setattr(os, "pwrite", no_space)
            buffer.snapshot()
        assert caught.value.errno == errno.ENOSPC
        with buffer.snapshot() as later:
            assert later.read_bytes() == b"x" + data[1:]
        assert frozen.read_bytes() == data


def test_a_snapshot_that_can_not_be_mapped_leaves_the_source() -> None:
    with a_buffer() as (buffer, data):
        with failing("map_memory", errno.ENOMEM, after=1) as fault, pytest.raises(MemdescError):
            buffer.snapshot()
        assert fault.failures == 1
        buffer.write_bytes(0, b"x")
        with buffer.snapshot() as frozen:  # what was frozen is what it is compared with
            assert frozen.read_bytes() == b"x" + data[1:]
            assert frozen.copied_bytes == page_size


def test_a_writable_mapping_that_no_book_knows_of_holds_up_the_seal() -> None:
    with a_buffer() as (buffer, data):
        second = _core.duplicate_memory(buffer.address, SIZE)  # shares even the description
        window = memoryview(_core.Window(second, 0, SIZE, True))
        with buffer.snapshot() as frozen:
            assert (frozen.reason, frozen.copied_bytes) == (SnapshotReason.PINNED, SIZE)
            window[0] ^= 1
            buffer.write_bytes(1, b"stored")
            assert frozen.read_bytes() == data
        model = buffer.read_bytes()
        window.release()
        del second, window
        with buffer.snapshot() as frozen:  # nothing in the way any more
            assert frozen.reason is SnapshotReason.CHANGED
            assert frozen.read_bytes() == model
        grant(buffer)
        assert buffer.read_bytes() == model


@pytest.mark.slow
def test_a_copy_too_large_for_this_machine_is_refused() -> None:
    def with_little_space() -> int | None:
        import resource

        with BufferMemoryDescriptor(64 << 20) as buffer:
            grant(buffer)
            with open("/proc/self/statm") as statm:
                used = int(statm.read().split()[0]) * page_size
            resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), used + (32 << 20)))
            with pytest.raises((AllocationError, MemoryError)) as caught:
                buffer.snapshot()
            return getattr(caught.value, "errno", None)

    assert in_child(with_little_space) == errno.ENOMEM
