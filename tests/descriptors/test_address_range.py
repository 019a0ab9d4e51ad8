"""Memory that lies in a task already: by address, here and in a stranger, and Python's buffers."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import mmap
import os
import subprocess
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memdesc import (
    Access,
    BufferMemoryDescriptor,
    ClosedError,
    CopyError,
    Direction,
    InvalidArgument,
    MappingError,
    MappingReason,
    MemoryDescriptor,
    NotPrivilegedError,
    SealedError,
    Task,
    TaskGoneError,
    WiringError,
    WiringReason,
    _core,
    copyin,
    copyout,
    page_size,
)
from memdesc.testing import failing
from memdesc.testing._kind import locked_pages, region

P = page_size
BOTH = _core.PROT_READ | _core.PROT_WRITE
SHARED = _core.MAP_SHARED | _core.MAP_ANONYMOUS
PRIVATE = _core.MAP_PRIVATE | _core.MAP_ANONYMOUS

describe = MemoryDescriptor.with_address_range
describe_buffer = MemoryDescriptor.with_buffer


def memory(pages: int, flags: int = SHARED, prot: int = BOTH) -> _core.MappedMemory:
    return _core.map_memory(0, pages * P, prot, flags, -1, 0)


def reason(descriptor: MemoryDescriptor, **how: Any) -> MappingReason:
    with pytest.raises(MappingError) as caught:
        descriptor.map(**how)
    assert caught.value.errno
    return caught.value.reason


# ── What can not be described ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (P, 0),
        (P, -1),
        (P, 2**63),
        (-1, 1),
        (2**63 - 1, 1),
        (2**64, 1),
        (2**63 - 2 * P, 2 * P),
        (1.0, 1),
        (P, "1"),
        (None, 1),
    ],
)
def test_no_such_range(address: Any, length: Any) -> None:
    with pytest.raises(InvalidArgument):
        describe(address, length, Direction.OUT)


def test_nothing_is_looked_at_until_it_is_used() -> None:
    # XNU: unmapped virtual ranges are accepted (IOMemoryDescriptor.cpp:2262).
    nowhere = describe(P, 100, Direction.OUT_IN)
    assert (nowhere.length, nowhere.prepare_count) == (100, 0)
    assert reason(nowhere) is MappingReason.NOT_MAPPED
    with pytest.raises(CopyError) as caught:
        nowhere.read_bytes()
    assert (caught.value.errno, caught.value.completed) == (errno.EFAULT, 0)
    with pytest.raises(CopyError):
        nowhere.write_bytes(0, b"1")
    with pytest.raises(WiringError) as unwired:
        nowhere.prepare()
    assert unwired.value.reason is WiringReason.NOT_MAPPED
    assert nowhere.prepare_count == 0


# ── Memory of this task ──────────────────────────────────────────────────────────────────────


def test_a_second_mapping_of_our_own_shared_memory_needs_no_privilege() -> None:
    made = memory(4)
    mine = describe(made.address + 10, 2 * P, Direction.OUT_IN)
    with mine.map(unique=True) as second:
        assert second.address % P == 10
        assert not made.address <= second.address < made.address + made.length
        second.array()[:4] = list(b"seen")
        assert copyin(Task.current(), made.address + 10, 4) == b"seen"
        assert region(second.address).object == region(made.address).object  # type: ignore[union-attr]


@pytest.mark.parametrize(("call", "number"), [("duplicate_memory", errno.ENOMEM)])
def test_a_second_mapping_that_the_kernel_refuses(call: str, number: int) -> None:
    made = memory(1)
    mine = describe(made.address, P, Direction.OUT_IN)
    with failing(call, number):
        assert reason(mine) is MappingReason.NO_SPACE
    with failing("mprotect", errno.ENOMEM):
        assert reason(mine, access=Access.READ_ONLY) is MappingReason.NO_SPACE
    with failing("madvise", errno.EFAULT):
        assert reason(mine, prefault=True) is MappingReason.NO_MEMORY


def test_the_rights_are_those_of_the_region_at_that_time() -> None:
    made = memory(2)
    mine = describe(made.address, P, Direction.OUT_IN)
    assert mine.max_access is Access.READ_WRITE
    _core.mprotect(made.address, P, _core.PROT_READ)
    assert mine.max_access is Access.READ_ONLY
    assert reason(mine, access=Access.READ_WRITE) is MappingReason.ACCESS
    with mine.map() as mapping:
        assert memoryview(mapping).readonly
    with pytest.raises(CopyError):
        mine.write_bytes(0, b"1")
    _core.mprotect(made.address, P, _core.PROT_NONE)
    assert reason(mine, unique=True) is MappingReason.ACCESS
    with pytest.raises(WiringError) as caught:
        mine.prepare(Direction.OUT)
    assert caught.value.reason is WiringReason.PROTECTION


def test_memory_that_can_only_be_read_is_not_prepared_for_writing() -> None:
    # XNU: KERN_PROTECTION_FAILURE for a write-prepare of read-only memory.
    made = memory(1, PRIVATE, _core.PROT_READ)
    mine = describe(made.address, P, Direction.IN)
    before = locked_pages()
    with pytest.raises(WiringError) as caught:
        mine.prepare()
    assert (caught.value.reason, mine.prepare_count) == (WiringReason.PROTECTION, 0)
    mine.prepare(Direction.OUT)
    assert locked_pages() - before == 1
    mine.complete()


def test_a_hole_in_the_range() -> None:
    room = _core.reserve_memory(5 * P)
    for page in (1, 3):
        _core.place_memory(room, page * P, P, BOTH, SHARED, -1, 0)
    assert ctypes.CDLL(None).munmap(ctypes.c_void_p(room.address + 2 * P), ctypes.c_size_t(P)) == 0
    try:
        mine = describe(room.address + P, 3 * P, Direction.OUT_IN)
        before = locked_pages()
        assert reason(mine) is MappingReason.NOT_MAPPED
        with pytest.raises(WiringError) as caught:
            mine.prepare()
        assert caught.value.reason is WiringReason.NOT_MAPPED
        assert locked_pages() == before
        with pytest.raises(CopyError) as partly:
            mine.read_bytes()
        assert (partly.value.expected, partly.value.completed) == (3 * P, P)
    finally:
        _core.place_memory(room, 2 * P, P, BOTH, PRIVATE, -1, 0)


def test_one_object_in_several_regions_is_one_object() -> None:
    # Split by mprotect, as the kernel does it: contiguous in the object, so the seed's rule holds.
    with BufferMemoryDescriptor(4 * P, max_access=Access.READ_WRITE) as ours:
        ours.write_bytes(0, b"".join(bytes([65 + page]) * P for page in range(4)))
        with ours.map(unique=True) as other:
            _core.mprotect(other.address + P, P, _core.PROT_READ)
            split = describe(other.address, 4 * P, Direction.OUT_IN)
            assert split.max_access is Access.READ_ONLY
            with split.map() as mapping:
                assert bytes(mapping) == ours.read_bytes()
            assert reason(split, access=Access.READ_WRITE) is MappingReason.ACCESS


def test_two_objects_are_mapped_only_when_that_is_said() -> None:
    one, two = BufferMemoryDescriptor(P), BufferMemoryDescriptor(2 * P)
    one.write_bytes(0, b"1" * P)
    two.write_bytes(0, b"2" * 2 * P)
    room = _core.reserve_memory(3 * P)
    for buffer, at in ((one, 0), (two, P)):
        fd = buffer.memory.open(Access.READ_ONLY)
        try:
            _core.place_memory(room, at, buffer.length, _core.PROT_READ, _core.MAP_SHARED, fd, 0)
        finally:
            os.close(fd)
    start, length = room.address + 7, 3 * P - 9
    assert reason(describe(start, length, Direction.OUT)) is MappingReason.SEVERAL_OBJECTS
    several = describe(start, length, Direction.OUT, allow_several_objects=True)
    with several.map(guard_pages=1) as mapping:
        assert bytes(mapping) == b"1" * (P - 7) + b"2" * (2 * P - 2)
    assert several.read_bytes(P - 8, 2) == b"12"


def test_another_part_of_one_object_is_not_contiguous() -> None:
    with BufferMemoryDescriptor(3 * P) as ours:
        room = _core.reserve_memory(2 * P)
        fd = ours.memory.open(Access.READ_ONLY)
        try:
            for at, offset in ((0, 2 * P), (P, 0)):
                _core.place_memory(room, at, P, _core.PROT_READ, _core.MAP_SHARED, fd, offset)
        finally:
            os.close(fd)
        swapped = describe(room.address, 2 * P, Direction.OUT)
        assert reason(swapped) is MappingReason.SEVERAL_OBJECTS
        ours.write_bytes(0, b"a" * P + b"b" * P + b"c" * P)
        both = describe(room.address, 2 * P, Direction.OUT, allow_several_objects=True)
        with both.map() as mapping:
            assert bytes(mapping) == b"c" * P + b"a" * P


def test_ours_is_recognised_by_its_address_and_keeps_its_rules() -> None:
    with BufferMemoryDescriptor(P) as ours:  # READ_ONLY for all but its owner's own view
        found = describe(ours.address, P, Direction.OUT_IN)
        os.close(ours.memory.grant(Access.READ_ONLY, user=os.geteuid()))
        # The region is writable here, but its seals allow no second writable mapping.
        assert reason(found, access=Access.READ_WRITE, unique=True) is MappingReason.ACCESS
        with found.map(access=Access.READ_ONLY) as mapping:
            ours.write_bytes(0, b"through")
            assert bytes(mapping)[:7] == b"through"


def test_special_regions_are_not_mapped() -> None:
    vdso = next(line for line in Path("/proc/self/maps").read_text().splitlines() if "vdso" in line)
    start = int(vdso.partition("-")[0], 16)
    assert reason(describe(start, 16, Direction.OUT)) is MappingReason.PRIVATE_MEMORY


def test_a_file_can_shrink_unless_its_size_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"f" * 2 * P)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 2 * P) as mapped:
        address = _core.buffer_address(mapped)[0]
        guarded = {"guard_pages": 1}  # a mapping of the object, not of the region
        doubted = describe(address, 2 * P, Direction.OUT_IN)
        assert reason(doubted, **guarded) is MappingReason.CAN_SHRINK
        trusted = describe(address, 2 * P, Direction.OUT_IN, trust_size=True)
        with trusted.map(**guarded) as mapping:  # type: ignore[arg-type]
            mapping.array()[0] = ord("!")
            assert mapped[:2] == b"!f"


def test_a_memfd_without_the_seal_can_shrink() -> None:
    fd = os.memfd_create("unsealed", os.MFD_CLOEXEC)
    try:
        os.truncate(fd, P)
        mapped = _core.map_memory(0, P, BOTH, _core.MAP_SHARED, fd, 0)
        doubted = describe(mapped.address, P, Direction.OUT)
        assert reason(doubted, guard_pages=1) is MappingReason.CAN_SHRINK
        trusted = describe(mapped.address, P, Direction.OUT, trust_size=True)
        with trusted.map(guard_pages=1) as mapping:
            assert bytes(mapping) == bytes(P)
    finally:
        os.close(fd)


# ── Python's buffers ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("buffer", "access"),
    [
        (b"bytes", Access.READ_ONLY),
        (bytearray(5), Access.READ_WRITE),
        (array("d", [1.0, 2.0]), Access.READ_WRITE),
        (memoryview(bytearray(9))[2:5], Access.READ_WRITE),
        (memoryview(b"read-only"), Access.READ_ONLY),
        ((ctypes.c_int * 4)(1, 2, 3, 4), Access.READ_WRITE),
    ],
)
def test_any_contiguous_buffer_is_described(buffer: Any, access: Access) -> None:
    with describe_buffer(buffer, Direction.OUT) as described:
        view = memoryview(buffer)
        assert (described.length, described.max_access) == (view.nbytes, access)
        assert described.read_bytes() == view.tobytes()
        if access is Access.READ_ONLY:
            with pytest.raises(SealedError):
                described.write_bytes(0, b"1")
            with pytest.raises(MappingError) as caught:
                described.map(access=Access.READ_WRITE)
            assert caught.value.reason is MappingReason.ACCESS


def test_what_is_not_contiguous_or_no_buffer() -> None:
    import numpy as np

    wrong: list[Any] = [
        memoryview(bytearray(10))[::2],
        np.arange(12).reshape(3, 4)[:, 1],
        np.arange(12).reshape(3, 4).T,  # contiguous, but not in C's order
        "text",
        5,
        None,
        bytearray(),
        np.empty((0, 3)),
    ]
    for buffer in wrong:
        with pytest.raises(InvalidArgument):
            describe_buffer(buffer, Direction.OUT)


def test_arrays_of_any_shape() -> None:
    import numpy as np

    numbers = np.arange(12, dtype="<i4").reshape(3, 4)
    assert describe_buffer(numbers, Direction.OUT).read_bytes() == numbers.tobytes()
    described = describe_buffer(numbers[1:], Direction.OUT_IN)
    assert described.length == 32
    described.write_bytes(0, b"\xff" * 4)
    assert numbers[1, 0] == -1


def test_the_buffer_lives_as_long_as_what_describes_it() -> None:
    owner = bytearray(b"kept")
    described = describe_buffer(owner, Direction.OUT)
    with pytest.raises(BufferError):
        owner.append(1)  # exported: it can not move
    view = memoryview(described)
    del described
    gc.collect()
    with pytest.raises(BufferError):
        owner.append(1)
    assert bytes(view) == b"kept"
    view.release()
    del view
    gc.collect()
    owner.append(1)


def test_our_own_array_gives_no_more_than_its_buffer() -> None:
    import numpy as np

    readable = BufferMemoryDescriptor(2 * P)
    writable = BufferMemoryDescriptor(2 * P, max_access=Access.READ_WRITE)
    for buffer, most in ((readable, Access.READ_ONLY), (writable, Access.READ_WRITE)):
        pixels = buffer.array((2, P), "u1")
        assert pixels.flags.writeable
        described = describe_buffer(pixels[1], Direction.OUT_IN)
        assert described.max_access is most
        with described.map(unique=True) as mapping:
            pixels[1, :3] = np.frombuffer(b"abc", "u1")
            assert bytes(mapping)[:3] == b"abc"
            assert mapping.access is most
        assert reason(describe_buffer(bytearray(9), Direction.OUT), unique=True) is (
            MappingReason.PRIVATE_MEMORY
        )


# ── Memory of a stranger ─────────────────────────────────────────────────────────────────────

STRANGER = """
import ctypes, json, mmap, os, sys
P, keep = mmap.PAGESIZE, []
def at(m): return ctypes.addressof(ctypes.c_char.from_buffer(m))
def shared(pages):
    m = mmap.mmap(-1, pages * P); keep.append(m); return at(m)
listing2 = shared(4)
ctypes.memmove(listing2, b"Listing 2", 9)
malloc = ctypes.create_string_buffer(b"private", 4 * P); keep.append(malloc)
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int,
                      ctypes.c_long]
room = libc.mmap(None, 2 * P, 3, 0x22, -1, 0)
for page in (0, 1):  # two objects, one beside the other: MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED
    libc.mmap(room + page * P, P, 3, 0x31, -1, 0)
ctypes.memmove(room, b"1" * P + b"2" * P, 2 * P)
fd = os.memfd_create("kept", os.MFD_ALLOW_SEALING); os.truncate(fd, P)
import fcntl; fcntl.fcntl(fd, 1033, 2)  # F_ADD_SEALS, F_SEAL_SHRINK
memfd = mmap.mmap(fd, P); keep.append(memfd)
loose = os.memfd_create("loose"); os.truncate(loose, P)
unsealed = mmap.mmap(loose, P); keep.append(unsealed)
print(json.dumps(dict(listing2=listing2, malloc=ctypes.addressof(malloc), two=room, memfd=at(memfd),
                      unsealed=at(unsealed))), flush=True)
for line in sys.stdin:
    address, length = map(int, line.split())
    print(ctypes.string_at(address, length).hex(), flush=True)
"""


class Stranger:
    """A program that knows nothing of us, has mapped this and that, and reads itself on demand."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", STRANGER]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdout
        self.places: dict[str, int] = json.loads(self.process.stdout.readline())
        self.task = Task(self.process.pid)

    def read(self, address: int, length: int) -> bytes:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{address} {length}\n")
        self.process.stdin.flush()
        return bytes.fromhex(self.process.stdout.readline())

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.task.close()


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    one = Stranger()
    yield one
    one.end()


def or_skip(act: Callable[[], Any]) -> Any:
    """Do what needs a privilege; where it is denied that is the outcome, and the test is over."""
    try:
        return act()
    except MappingError as error:
        if error.reason is MappingReason.NOT_PRIVILEGED:
            pytest.skip("denied here" + str(error).partition("can not be opened")[2])
        raise
    except NotPrivilegedError as error:
        pytest.skip("denied here" + str(error).partition("can not be opened")[2])


def test_a_strangers_shared_memory_is_mapped(stranger: Stranger) -> None:
    at = stranger.places["listing2"]
    theirs = describe(at + 1, 3 * P, Direction.OUT_IN, stranger.task)
    with or_skip(theirs.map) as mapping:
        assert mapping.access is Access.READ_WRITE
        assert bytes(mapping)[:8] == b"isting 2"
        mapping.array()[2 * P : 2 * P + 4] = list(b"ours")
        assert stranger.read(at + 1 + 2 * P, 4) == b"ours"
        counts = theirs.page_counts()
        assert counts.total == 4
        assert 2 <= counts.resident <= 4
    # Another task's memory, once mapped, is wired through that mapping.
    before = locked_pages()
    with theirs.prepared():
        assert locked_pages() - before == 4
    assert locked_pages() == before


def test_a_stranger_that_ends_leaves_us_what_we_mapped(stranger: Stranger) -> None:
    theirs = describe(stranger.places["listing2"], 9, Direction.OUT, stranger.task)
    mapping = or_skip(theirs.map)
    stranger.process.kill()
    stranger.process.wait()
    assert bytes(mapping) == b"Listing 2"
    assert reason(theirs, unique=True) is MappingReason.TASK_GONE
    with pytest.raises(TaskGoneError):
        theirs.read_bytes()
    assert theirs.max_access is Access.READ_ONLY  # nothing can be seen any more
    mapping.unmap()


def test_a_stranger_that_has_ended_before(stranger: Stranger) -> None:
    stranger.process.kill()
    stranger.process.wait()
    theirs = describe(stranger.places["listing2"], P, Direction.OUT, stranger.task)
    assert reason(theirs) is MappingReason.TASK_GONE
    with pytest.raises(TaskGoneError):
        theirs.write_bytes(0, b"1")
    with pytest.raises(WiringError) as caught:
        theirs.prepare()
    assert caught.value.reason is WiringReason.OTHER_TASK


@pytest.mark.parametrize(
    ("place", "length", "why"),
    [
        ("malloc", 7, MappingReason.PRIVATE_MEMORY),
        ("two", 2 * P, MappingReason.SEVERAL_OBJECTS),
    ],
)
def test_what_of_a_stranger_is_not_mapped(
    stranger: Stranger, place: str, length: int, why: MappingReason
) -> None:
    theirs = describe(stranger.places[place], length, Direction.OUT_IN, stranger.task)
    or_skip(lambda: copyin(stranger.task, stranger.places[place], 1))
    assert reason(theirs) is why
    with pytest.raises(MappingError):
        memoryview(theirs)
    with pytest.raises(WiringError) as caught:
        theirs.prepare()
    assert caught.value.reason is WiringReason.OTHER_TASK


def test_private_memory_of_a_stranger_is_copied(stranger: Stranger) -> None:
    theirs = describe(stranger.places["malloc"], 4 * P, Direction.OUT_IN, stranger.task)
    assert or_skip(lambda: theirs.read_bytes(0, 7)) == b"private"
    theirs.write_bytes(3 * P, b"written")
    assert stranger.read(stranger.places["malloc"] + 3 * P, 7) == b"written"
    assert copyout(b"P", stranger.task, stranger.places["malloc"]) == 1
    assert theirs.read_bytes(0, 7) == b"Private"


def test_two_objects_of_a_stranger_in_one_view(stranger: Stranger) -> None:
    at = stranger.places["two"]
    theirs = describe(at + 5, 2 * P - 10, Direction.OUT, stranger.task, allow_several_objects=True)
    with or_skip(theirs.map) as mapping:
        assert bytes(mapping) == b"1" * (P - 5) + b"2" * (P - 5)


def test_an_object_that_the_stranger_holds_open(stranger: Stranger) -> None:
    """By pidfd_getfd where map_files is denied."""
    theirs = describe(stranger.places["memfd"], P, Direction.OUT_IN, stranger.task)
    with or_skip(theirs.map) as mapping:
        mapping.array()[:2] = list(b"fd")
        assert stranger.read(stranger.places["memfd"], 2) == b"fd"


def test_an_object_that_the_stranger_could_truncate(stranger: Stranger) -> None:
    at = stranger.places["unsealed"]
    theirs = describe(at, P, Direction.OUT_IN, stranger.task)
    or_skip(describe(at, P, Direction.OUT_IN, stranger.task, trust_size=True).map)
    assert reason(theirs) is MappingReason.CAN_SHRINK


def test_closed_it_holds_nothing_of_the_stranger(stranger: Stranger) -> None:
    theirs = describe(stranger.places["listing2"], P, Direction.OUT, stranger.task)
    theirs.close()
    for use in (theirs.map, theirs.read_bytes, theirs.prepare, theirs.page_counts):
        with pytest.raises(ClosedError):
            use()


def test_a_pid_is_no_task() -> None:
    with pytest.raises(InvalidArgument):
        MemoryDescriptor.with_address_range(0, 1, Direction.OUT, os.getpid())  # type: ignore[arg-type]
