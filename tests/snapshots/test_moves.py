"""A source whose memory a snapshot shares, granted after all: it moves to new memory."""

from __future__ import annotations

import errno
import logging
import multiprocessing as mp
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from children import in_child
from huge_pool import huge_pages

import memdesc as md
from memdesc import (
    Access,
    AllocationError,
    BufferMemoryDescriptor,
    ClosedError,
    PageKind,
    SealedError,
    SnapshotMemoryDescriptor,
    SnapshotReason,
    _core,
    page_size,
    receive_descriptor,
    send_descriptor,
)
from memdesc.memory.lifecycle import State
from memdesc.testing.faults import failing

SIZE = 6 * page_size


@contextmanager
def a_source(
    size: int = SIZE, **how: object
) -> Iterator[tuple[BufferMemoryDescriptor, SnapshotMemoryDescriptor, bytes]]:
    """A buffer, its snapshot, and what both show."""
    with BufferMemoryDescriptor(size, **how) as buffer:  # type: ignore[arg-type]
        data = os.urandom(size)
        buffer.write_bytes(0, data)
        with buffer.snapshot() as frozen:
            assert frozen.copied_bytes == 0
            yield buffer, frozen, data


def map_again(buffer: BufferMemoryDescriptor) -> bytes:
    with buffer.map(unique=True) as mapping:
        return bytes(mapping)


def send(buffer: BufferMemoryDescriptor) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        send_descriptor(ours, buffer)
        with receive_descriptor(theirs) as received:
            return received.read_bytes()


def take_fd(buffer: BufferMemoryDescriptor) -> bytes:
    return os.pread(buffer.memory.fileno(), SIZE, 0)


def hand_over(buffer: BufferMemoryDescriptor) -> bytes:
    fd = buffer.memory.grant(buffer.max_access, user=os.geteuid())
    try:
        return os.pread(fd, SIZE, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize("max_access", Access)
@pytest.mark.parametrize("ask", [map_again, send, take_fd, hand_over])
def test_what_needs_an_object_of_its_own_moves_the_buffer(
    ask: Callable[[BufferMemoryDescriptor], bytes],
    max_access: Access,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with a_source(max_access=max_access, name="frames") as (buffer, frozen, data):
        view, address = memoryview(buffer), buffer.address
        view[3] ^= 255
        model = bytearray(data)
        model[3] ^= 255
        with caplog.at_level(logging.INFO, "memdesc.descriptors"):
            assert ask(buffer) == model
        assert (buffer.moves, buffer.moved_bytes, buffer.address) == (1, SIZE, address)
        moved = [(r.message, r.buffer, r.bytes) for r in caplog.records]  # type: ignore[attr-defined]
        assert moved == [("buffer.moved", "frames", SIZE)]
        view[5] ^= 255  # the view of before: it sees the new memory
        model[5] ^= 255
        assert ask(buffer) == model == buffer.read_bytes()
        assert buffer.moves == 1
        assert frozen.read_bytes() == data


def test_connected_tasks_follow_the_source_again() -> None:
    code = """
import sys, memdesc as md
with md.connect(sys.argv[1], timeout=20) as service:
    live, frozen = service.map("live"), service.map("frozen")
    for line in sys.stdin:
        print(live.array()[0], frozen.array()[0], flush=True)
"""
    with a_source() as (buffer, frozen, data), md.Service("camera") as camera:
        camera.share("frozen", frozen)
        camera.share("live", buffer)
        command = [sys.executable, "-c", code, "camera"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as child:  # type: ignore[call-overload]
            try:
                for value in (1, 2):
                    buffer.write_bytes(0, bytes([value]))
                    child.stdin.write("\n")
                    child.stdin.flush()
                    assert child.stdout.readline().split() == [str(value), str(data[0])]
            finally:
                child.kill()
        assert buffer.moves == 1


def read_in_child(frozen: md.MemoryDescriptor, queue: mp.Queue[tuple[bytes, bool]]) -> None:
    try:
        frozen.write_bytes(0, b"x")
        wrote = True
    except SealedError:
        wrote = False
    queue.put((bytes(frozen.map()), wrote))


@pytest.mark.slow
def test_snapshots_travel_through_multiprocessing() -> None:
    context = mp.get_context("spawn")
    with a_source() as (buffer, _, data):
        buffer.write_bytes(2 * page_size, b"later")
        with buffer.snapshot() as later:
            assert later.extent_count == 3
            queue = context.Queue()
            child = context.Process(target=read_in_child, args=(later, queue))
            child.start()
            seen, wrote = queue.get(timeout=60)
            child.join()
            queue.close()
            queue.join_thread()
            assert seen == later.read_bytes() == buffer.read_bytes() != data
            assert not wrote
        assert buffer.moves == 0  # sharing the snapshot never moves its source


def test_moved_it_is_private_and_can_be_snapshotted_without_copying_again() -> None:
    with a_source() as (buffer, first, data):
        for number in range(3):
            map_again(buffer)
            assert buffer.memory.lifecycle.state is State.PRIVATE
            buffer.write_bytes(0, bytes([number]))
            with buffer.snapshot() as later:
                assert (later.copied_bytes, later.reason) == (0, None)
                buffer.write_bytes(0, b"x")
                assert later.read_bytes() == bytes([number]) + data[1:]
        assert buffer.moves == 3
        assert first.read_bytes() == data


def test_granted_after_the_move_it_is_as_any_shared_buffer() -> None:
    with a_source() as (buffer, _, _):
        os.close(buffer.memory.grant(Access.READ_ONLY, user=os.geteuid()))
        assert buffer.memory.lifecycle.state is State.SHARED_READ
        with pytest.raises(SealedError):
            buffer.memory.grant(Access.READ_WRITE, user=os.geteuid())
        with buffer.snapshot() as copied:
            assert copied.reason is SnapshotReason.SHARED


def test_described_by_its_addresses_it_is_private_memory_until_it_moves() -> None:
    with a_source() as (buffer, _, data):
        by_view = md.MemoryDescriptor.with_buffer(buffer.array(), md.Direction.OUT)
        by_address = md.MemoryDescriptor.with_address_range(buffer.address, SIZE, md.Direction.OUT)
        for described in (by_view, by_address):
            with pytest.raises(md.MappingError) as caught:
                described.map(unique=True)
            assert caught.value.reason is md.MappingReason.PRIVATE_MEMORY
            assert described.read_bytes() == data
        map_again(buffer)
        for described in (by_view, by_address):
            with described.map(unique=True) as mapping:
                assert bytes(mapping) == data
            described.close()


def test_closed_it_can_not_be_granted() -> None:
    with a_source() as (buffer, _, _):
        memory = buffer.memory
        buffer.close()
        with pytest.raises(ClosedError):
            memory.grant(Access.READ_ONLY, user=os.geteuid())
        assert buffer.moves == 0


@pytest.mark.parametrize("call", ["map_memory", "madvise", "exchange_memory"])
def test_a_move_that_fails_changes_nothing(call: str) -> None:
    with a_source() as (buffer, frozen, data):
        view = memoryview(buffer)
        view[0] ^= 255
        with failing(call, errno.ENOMEM, times=None) as fault:
            with pytest.raises(AllocationError) as caught:
                buffer.memory.grant(Access.READ_ONLY, user=os.geteuid())
            assert fault.failures
        assert caught.value.errno == errno.ENOMEM
        assert buffer.memory.lifecycle.state is State.DETACHED
        assert buffer.moves == 0
        view[1] ^= 255
        model = bytes([data[0] ^ 255, data[1] ^ 255]) + data[2:]
        with buffer.snapshot() as later:
            assert (later.copied_bytes, later.read_bytes()) == (page_size, model)
        assert map_again(buffer) == model
        assert frozen.read_bytes() == data


@pytest.mark.parametrize("why", [errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EMFILE])
def test_without_userfaultfd_it_moves_all_the_same(why: int) -> None:
    with a_source() as (buffer, frozen, data), failing("watch_stores", why) as fault:
        buffer.write_bytes(0, b"x")
        assert map_again(buffer) == b"x" + data[1:]
        assert fault.failures == 1
        assert frozen.read_bytes() == data


def test_memory_that_can_not_be_watched_moves_all_the_same() -> None:
    with a_source() as (buffer, _, data), failing("exchange_memory", errno.EINVAL) as fault:
        try:
            os.close(_core.watch_stores(buffer.address, SIZE))
        except OSError as error:
            pytest.skip(f"no userfaultfd for stores here: {error.strerror}")
        assert map_again(buffer) == data
        assert fault.calls == 2


def test_interrupted_in_the_middle_it_is_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    with a_source() as (buffer, frozen, data):
        buffer.write_bytes(0, b"x")
        exchange = _core.exchange_memory

        def interrupted(*arguments: int) -> None:
            exchange(*arguments)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(_core, "exchange_memory", interrupted)
            map_again(buffer)
        buffer.write_bytes(1, b"y")
        model = b"xy" + data[2:]
        with buffer.snapshot() as later:
            assert (later.reason, later.copied_bytes) == (SnapshotReason.CHANGED, SIZE)
            assert later.read_bytes() == model
        assert map_again(buffer) == model == buffer.read_bytes()
        assert frozen.read_bytes() == data


def test_what_is_wired_of_the_view_is_wired_after_the_move() -> None:
    with a_source() as (buffer, _, data):
        part = md.MemoryDescriptor.with_buffer(buffer.array()[page_size:], md.Direction.OUT_IN)
        with part.prepared():
            assert map_again(buffer) == data
            with open("/proc/self/status") as status:
                locked = next(line for line in status if line.startswith("VmLck:"))
            assert int(locked.split()[1]) * 1024 >= SIZE - page_size
        part.close()


def test_a_fork_child_has_its_own_source_and_the_same_snapshot() -> None:
    with a_source() as (buffer, frozen, data):
        buffer.write_bytes(0, b"before")

        def child() -> tuple[bytes, bytes, bytes, int]:
            buffer.write_bytes(page_size, b"child")
            with buffer.snapshot() as mine:
                return mine.read_bytes(), frozen.read_bytes(), map_again(buffer), mine.copied_bytes

        at_fork = b"before" + data[6:]
        in_it = at_fork[:page_size] + b"child" + at_fork[page_size + 5 :]
        assert in_child(child) == (in_it, data, in_it, 2 * page_size)
        assert buffer.read_bytes() == at_fork
        assert map_again(buffer) == at_fork


@pytest.mark.slow
def test_huge_pages_move_too() -> None:
    huge = PageKind.HUGE.page_size
    with huge_pages(9), a_source(2 * huge, pages=PageKind.HUGE) as (buffer, frozen, data):
        buffer.write_bytes(huge + 5, b"changed")
        assert map_again(buffer)[huge + 5 : huge + 12] == b"changed"
        assert buffer.page_kind is PageKind.HUGE
        assert frozen.read_bytes() == data
        frozen.close()
        del frozen
