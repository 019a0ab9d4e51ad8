"""copyin, copyout and copyinstr: on the own task and on a C program that knows nothing of us.

The rules are XNU's, as bsd/tests/copyio_tests.c asserts them of
osfmk/arm64/copyio.c; each test names the one that it carries over. Without a counterpart:

=============================================  ==================================================
XNU                                            Here
=============================================  ==================================================
more than 64 MiB is EINVAL                     no largest size: copied in steps
a tag in the top byte is EINVAL (arm64)        such an address is past the end of a task: EFAULT
a kernel thread may copy kernel addresses      nobody may: EFAULT
a bad kernel-side address panics               the buffer here is a Python object
copyin_atomic32/64, copyout_atomic32/64,       Linux has none: process_vm_* copies bytes; put
copyin_atomic32_wait_if_equals                 such words into shared memory
copyoutstr                                     copyout of the string with its NUL
copyinstr looks at the whole range first       looks at what the string touches: short strings at
                                               the end of a mapping are found
copyinstr counts 0 bytes on EFAULT             counts those before the fault
=============================================  ==================================================
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from typing import Any

import pytest
from children import in_child

# ruff: noqa: F811 (fixtures are imported, and named again where they are used)
from copy_targets import (  # noqa: F401
    NONE,
    PATTERN,
    READ,
    SIZE,
    WRITE,
    OwnTask,
    Program,
    Target,
    child,
    faults,
    program,
    target,
)
from hypothesis import given, settings, strategies as st

from memdesc import _core, copyio
from memdesc.copyio import (
    copyin,
    copyin_into,
    copyinstr,
    copyout,
)
from memdesc.errors import (
    AllocationError,
    InvalidArgument,
    StringTooLongError,
)
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.vm.task import Task

# ── Copying in and out ───────────────────────────────────────────────────────────────────────


def test_sixteen_pages_are_equal(target: Target) -> None:
    # copyio_tests.c: copyin_test, copyout_test (16 pages there and back)
    assert copyin(target.task, target.address, SIZE) == PATTERN
    buffer = bytearray(SIZE)
    assert copyin_into(target.task, target.address, buffer) == SIZE
    assert buffer == PATTERN
    turned = PATTERN[::-1]
    assert copyout(turned, target.task, target.address) == SIZE
    assert target.read(0, SIZE) == turned


@given(st.integers(0, SIZE - 1), st.integers(0, 3 * page_size))
@settings(max_examples=50, deadline=None)
def test_any_offset_and_size(offset: int, nbytes: int) -> None:
    target = OwnTask()
    nbytes = min(nbytes, SIZE - offset)
    place = target.address + offset
    assert copyin(target.task, place, nbytes) == PATTERN[offset : offset + nbytes]
    assert copyout(bytes(nbytes), target.task, place) == nbytes
    after = PATTERN[:offset] + bytes(nbytes) + PATTERN[offset + nbytes :]
    assert target.read(0, SIZE) == after
    target.close()


@pytest.mark.parametrize("address", [0, 1 << 40, 1 << 63, (1 << 64) - 1])
def test_no_bytes_look_at_no_address(target: Target, address: int) -> None:
    # copyio_tests.c: size 0 with an unmapped address or NULL succeeds
    assert copyin(target.task, address, 0) == b""
    assert copyin_into(target.task, address, bytearray()) == 0
    assert copyout(b"", target.task, address) == 0


def test_unmapped(target: Target) -> None:
    # copyio_tests.c: unmapped address → EFAULT
    target.unmap(3)
    hole = target.address + 3 * page_size
    faults(lambda: copyin(target.task, hole, 100), 100, 0)
    faults(lambda: copyout(b"x" * 100, target.task, hole), 100, 0)
    faults(lambda: copyin(target.task, 0, 1), 1, 0)


@pytest.mark.parametrize("hole", [1, 7, 15])
def test_partly_unmapped_keeps_what_came_before(target: Target, hole: int) -> None:
    # copyio_tests.c: partly unmapped → EFAULT; arm64 _bcopyin: no rollback
    target.unmap(hole)
    before = hole * page_size - 5
    buffer = bytearray(SIZE - 5)
    faults(lambda: copyin_into(target.task, target.address + 5, buffer), SIZE - 5, before)
    assert buffer == PATTERN[5 : 5 + before] + bytes(SIZE - 5 - before)
    faults(lambda: copyin(target.task, target.address + 5, SIZE - 5), SIZE - 5, before)
    faults(lambda: copyout(bytes(SIZE - 5), target.task, target.address + 5), SIZE - 5, before)
    assert target.read(0, hole * page_size) == PATTERN[:5] + bytes(before)


def test_past_the_end_of_the_mapping(target: Target) -> None:
    # copyio_tests.c: past the end → EFAULT
    last = target.address + SIZE - 10
    faults(lambda: copyin(target.task, last, 11), 11, 10)
    faults(lambda: copyout(b"x" * 11, target.task, last), 11, 10)
    assert target.read(SIZE - 10, 10) == b"x" * 10


@pytest.mark.parametrize("address", [(1 << 63) - 8, 1 << 63, 0xFFFF_8000_0000_0000, (1 << 64) - 8])
def test_addresses_of_the_kernel_and_wrapping_ranges(target: Target, address: int) -> None:
    # copyio.c (arm64): a range that wraps or ends past the map → EFAULT before any byte
    faults(lambda: copyin(target.task, address, 16), 16, 0)
    faults(lambda: copyout(b"x" * 16, target.task, address), 16, 0)
    faults(lambda: copyinstr(target.task, address + 8, 16), 16, 0)


def test_a_range_far_past_the_end_moves_nothing(target: Target) -> None:
    with failing("process_vm_readv", errno.EIO) as fault:
        buffer = bytearray(64)
        faults(lambda: copyin_into(target.task, (1 << 63) - 32, buffer), 64, 0)
    assert fault.calls == 0


def test_read_only_memory(target: Target) -> None:
    # copyio_tests.c: copyout to read-only memory → EFAULT; copyin from it works
    target.protect(2, READ)
    place = target.address + page_size
    faults(lambda: copyout(bytes(2 * page_size), target.task, place), 2 * page_size, page_size)
    after = PATTERN[2 * page_size : 3 * page_size]
    assert copyin(target.task, place + page_size, page_size) == after


def test_write_only_memory(target: Target) -> None:
    # copyio_tests.c: copyin from write-only memory → EFAULT. The kernel goes by the region's
    # rights: it refuses also where the processor (x86) could read what is writable.
    target.protect(2, WRITE)
    place = target.address + 2 * page_size
    faults(lambda: copyin(target.task, place, 8), 8, 0)
    assert copyout(b"12345678", target.task, place) == 8
    target.protect(2, READ)
    assert target.read(2 * page_size, 8) == b"12345678"


def test_memory_without_access(target: Target) -> None:
    target.protect(0, NONE)
    faults(lambda: copyin(target.task, target.address, 8), 8, 0)
    faults(lambda: copyout(b"12345678", target.task, target.address), 8, 0)


def test_pages_that_are_not_there_yet_are_brought_in() -> None:
    # copyio_tests.c: faults are resolved (zero fill, copy on write)
    memory = _core.map_memory(
        0, 4 * page_size, READ | WRITE, _core.MAP_PRIVATE | _core.MAP_ANONYMOUS, -1, 0
    )
    with Task.current() as task:
        assert copyin(task, memory.address, 2 * page_size) == bytes(2 * page_size)
        assert copyout(b"new", task, memory.address + 3 * page_size) == 3
        assert copyin(task, memory.address + 3 * page_size, 4) == b"new\0"


def test_a_write_to_private_memory_breaks_its_sharing(child: Program) -> None:
    def in_a_fork() -> bytes:
        buffer = (ctypes.c_char * 8)(*b"original"[:8])
        pid = os.fork()
        if pid == 0:
            signal.pause()
        try:
            with Task(pid) as task:
                copyout(b"childs", task, ctypes.addressof(buffer))
                return buffer.raw + copyin(task, ctypes.addressof(buffer), 8)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    assert in_child(in_a_fork) == b"originalchildsal"


@pytest.mark.slow
def test_more_than_the_kernel_takes_at_once() -> None:
    # XNU: more than 64 MiB is EINVAL. Linux takes 2 GiB less a page per call; we go on.
    size = (2 << 30) + page_size
    zeros = _core.map_memory(
        0,
        size,
        READ,
        _core.MAP_PRIVATE | _core.MAP_ANONYMOUS | 0x4000,
        -1,
        0,  # NORESERVE
    )
    # Room for it, by one piece of shared memory mapped again and again.
    fd, piece = os.memfd_create("room"), 64 << 20
    os.ftruncate(fd, piece)
    room = _core.reserve_memory(size + piece)
    for at in range(0, size, piece):
        _core.place_memory(room, at, piece, READ | WRITE, _core.MAP_SHARED, fd, 0)
    os.close(fd)
    window = _core.Window(room, 0, size, True)
    memoryview(window)[piece - 1] = 1
    with Task.current() as task:
        assert copyin_into(task, zeros.address, window) == size
        assert memoryview(window)[piece - 1] == 0
        assert copyout(window, task, room.address) == size


def test_signals_are_honoured_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    # In steps of a page; a real signal arrives during the third.
    monkeypatch.setattr(copyio.transfer, "STEP", page_size)
    readv, calls = _core.process_vm_readv, []

    def counted(pid: int, buffer: Any, address: int) -> int:
        moved = readv(pid, buffer, address)
        calls.append(moved)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return moved

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_core, "process_vm_readv", counted)
    before = signal.signal(signal.SIGUSR1, interrupt)
    source, buffer = OwnTask(), bytearray(SIZE)
    try:
        with pytest.raises(KeyboardInterrupt):
            copyin_into(source.task, source.address, buffer)
    finally:
        signal.signal(signal.SIGUSR1, before)
        source.close()
    assert calls == [page_size] * 3
    assert buffer == PATTERN[: 3 * page_size] + bytes(SIZE - 3 * page_size)


def test_short_counts_are_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    readv, source = _core.process_vm_readv, OwnTask()
    monkeypatch.setattr(
        _core, "process_vm_readv", lambda pid, buffer, at: readv(pid, buffer[:1000], at)
    )
    assert copyin(source.task, source.address, SIZE) == PATTERN
    source.close()


def test_buffers_of_other_shapes() -> None:
    import numpy as np

    source = OwnTask()
    table = np.zeros((4, 5), dtype="<u4")
    assert copyin_into(source.task, source.address, table) == 80
    assert table.tobytes() == PATTERN[:80]
    assert copyout(table[1:3], source.task, source.address) == 40
    assert source.read(0, 40) == PATTERN[20:60]
    assert copyin(source.task, np.uint64(source.address), np.int32(4)) == PATTERN[20:24]
    assert copyout(np.zeros((0, 3)), source.task, 0) == 0
    source.close()


@pytest.mark.parametrize(
    "buffer",
    [b"read-only", memoryview(bytearray(8))[::2], "text", 8, None],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_buffer_to_copy_into(buffer: Any) -> None:
    source = OwnTask()
    with pytest.raises(InvalidArgument):
        copyin_into(source.task, source.address, buffer)
    source.close()


@pytest.mark.parametrize(("address", "nbytes"), [(4096, -1), (-4096, 1), (0.5, 1), (4096, "1")])
def test_what_is_no_place_or_size(address: Any, nbytes: Any) -> None:
    with Task.current() as task:
        with pytest.raises(InvalidArgument):
            copyin(task, address, nbytes)
        with pytest.raises(InvalidArgument):
            copyinstr(task, address, nbytes)


def test_more_bytes_than_there_is_room_for() -> None:
    with Task.current() as task, pytest.raises(AllocationError) as caught:
        copyin(task, 4096, 1 << 60)
    assert caught.value.errno == errno.ENOMEM


# ── Strings ──────────────────────────────────────────────────────────────────────────────────


def put(target: Target, offset: int, text: bytes) -> int:
    place = target.address + offset
    copyout(text, target.task, place)
    return place


def test_a_whole_string(target: Target) -> None:
    # copyio_tests.c: copyinstr_test, the full string (the count there includes the NUL)
    place = put(target, 100, b"a string\0and more\0")
    assert copyinstr(target.task, place, 4096) == b"a string"
    assert copyinstr(target.task, place, 9) == b"a string"
    assert copyinstr(target.task, put(target, 50, b"\0"), 1) == b""


def test_a_string_longer_than_the_maximum(target: Target) -> None:
    # copyio_tests.c: truncated → ENAMETOOLONG, with the data that fits
    place = put(target, 100, b"a string\0")
    with pytest.raises(StringTooLongError) as caught:
        copyinstr(target.task, place, 8)
    error = caught.value
    assert (error.errno, error.data, error.completed) == (errno.ENAMETOOLONG, b"a string", 8)


def test_a_maximum_of_nothing(target: Target) -> None:
    # copyio.c (arm64): max 0 → ENAMETOOLONG; the address is not looked at
    with pytest.raises(StringTooLongError) as caught:
        copyinstr(target.task, 0, 0)
    assert (caught.value.errno, caught.value.data) == (errno.ENAMETOOLONG, b"")


def test_an_unterminated_string_at_the_end_of_a_mapping(target: Target) -> None:
    # copyio_tests.c: unterminated at the end → EFAULT (arm64 counts 0, we what came before)
    place = put(target, SIZE - 6, b"no end")
    faults(lambda: copyinstr(target.task, place, 7), 7, 6)
    faults(lambda: copyinstr(target.task, place, 1 << 40), 1 << 40, 6)
    with pytest.raises(StringTooLongError) as caught:
        copyinstr(target.task, place, 6)
    assert caught.value.data == b"no end"
    faults(lambda: copyinstr(target.task, target.address + SIZE, 10), 10, 0)


def test_a_short_string_at_the_end_of_a_mapping(target: Target) -> None:
    # Differs from XNU, which looks at all of address..address+max first: EFAULT there.
    place = put(target, SIZE - 6, b"short\0")
    assert copyinstr(target.task, place, 1 << 40) == b"short"


def test_a_string_over_several_pages(target: Target) -> None:
    text = b"x" * (2 * page_size + 17)
    place = put(target, page_size - 3, text + b"\0")
    assert copyinstr(target.task, place, SIZE) == text


@given(st.binary(max_size=12), st.integers(0, 14), st.integers(-12, 12))
@settings(max_examples=80, deadline=None)
def test_any_string_around_a_page_border(text: bytes, maximum: int, shift: int) -> None:
    target = OwnTask()
    place = put(target, page_size + shift, text + b"\1\1\1")
    expected = (text + b"\1\1\1" + PATTERN[page_size + shift + len(text) + 3 :])[:maximum]
    if b"\0" in expected:
        assert copyinstr(target.task, place, maximum) == expected[: expected.index(b"\0")]
    else:
        with pytest.raises(StringTooLongError) as caught:
            copyinstr(target.task, place, maximum)
        assert caught.value.data == expected
    target.close()


@pytest.mark.parametrize("task", [1, "self", None])
def test_what_is_no_task_is_refused(task: Any) -> None:
    for copy in (
        lambda: copyio.copyin(task, 0, 1),
        lambda: copyio.copyout(b"1", task, 0),
        lambda: copyio.copyinstr(task, 0, 1),
    ):
        with pytest.raises(InvalidArgument):
            copy()
