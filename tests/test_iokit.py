"""The model's own spelling: Listing 1 to the letter, its constants, and the table of names."""

from __future__ import annotations

import ctypes
import errno
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import memdesc as md
from memdesc import iokit
from memdesc.errors import DoubleFreeError, MemdescError
from memdesc.iokit import (
    IOBufferMemoryDescriptor,
    IOMemoryDescriptor,
    IOMemoryMap,
    IOMultiMemoryDescriptor,
    IOSubMemoryDescriptor,
    current_task,
    kIODirectionIn,
    kIODirectionNone,
    kIODirectionOut,
    kIODirectionOutIn,
    kIOMapAnywhere,
    kIOMapGuardedLarge,
    kIOMapGuardedSmall,
    kIOMapReadOnly,
    kIOMapReference,
    kIOMapUnique,
    kIOMemoryKernelUserShared,
    kIOMemoryPageable,
    kIOReturnBadArgument,
    kIOReturnBusy,
    kIOReturnCannotWire,
    kIOReturnNoResources,
    kIOReturnNotReady,
    kIOReturnNotWritable,
    kIOReturnSuccess,
    kIOReturnUnsupported,
    page_size,
    values,
)
from memdesc.testing.faults import failing
from memdesc.vm.pages import Access

DOC = Path(__file__).parent.parent / "docs" / "iokit.md"

# As the seed has it. Its language is C++; the three signs that Python spells otherwise are changed.
LISTING_1 = """
IOBufferMemoryDescriptor* memDesc;

memDesc = IOBufferMemoryDescriptor::withOptions(
              kIODirectionOutIn | kIOMemoryKernelUserShared,
              alloc_bytes, page_size );
"""


def made(descriptor: IOBufferMemoryDescriptor | None) -> IOBufferMemoryDescriptor:
    assert descriptor is not None
    return descriptor


def buffer(capacity: int = 100, options: int = kIODirectionOutIn) -> IOBufferMemoryDescriptor:
    return made(IOBufferMemoryDescriptor.withOptions(options, capacity, page_size))


def test_listing_1_runs_in_python() -> None:
    python = LISTING_1.replace("::", ".").replace(";", "")
    python = python.replace("IOBufferMemoryDescriptor* memDesc\n", "")
    names: dict[str, Any] = {"alloc_bytes": 54321, **vars(iokit)}
    exec(python, names)
    descriptor = made(names["memDesc"])
    assert descriptor.getLength() == descriptor.getCapacity() == 54321
    assert descriptor.getDirection() == kIODirectionOutIn
    assert descriptor.descriptor.max_access is Access.READ_WRITE
    assert descriptor.descriptor.address % page_size == 0


CLIENT = """
import memdesc as md
with md.connect("driver") as connection:
    mapping = connection.wait_mapping(20)
    memoryview(mapping)[:5] = b"world"
    connection.task.wait(20)
"""


def test_listing_1_is_mapped_in_a_client_task_and_both_see_it() -> None:
    descriptor = buffer(54321, kIODirectionOutIn | kIOMemoryKernelUserShared)
    assert descriptor.writeBytes(0, b"hello", 5) == 5
    with md.Service("driver") as service:
        client = subprocess.Popen([sys.executable, "-c", CLIENT])
        try:
            task = service.wait_client(20).task
            there = descriptor.createMappingInTask(task, 0, kIOMapAnywhere)
            assert there is not None
            assert there.getAddressTask() == task
            assert there.getAddress() == there.getVirtualAddress() != 0
            assert there.getLength() == 54321
            assert there.getMemoryDescriptor() is descriptor
            until_equal(descriptor, b"world")

            why: list[MemdescError] = []
            read_only = kIOMapAnywhere | kIOMapReadOnly
            assert descriptor.createMappingInTask(task, 0, read_only, why=why) is None
            assert isinstance(why[0], md.MappingError | md.SealedError)
        finally:
            client.kill()
            client.wait()


def until_equal(descriptor: IOMemoryDescriptor, expected: bytes) -> None:
    seen = bytearray(len(expected))
    for _ in range(4000):
        descriptor.readBytes(0, seen, len(seen))
        if seen == expected:
            return
        current_task().wait(0.005)
    raise AssertionError(f"{expected!r} was not seen")


# xnu-11417: IOMemoryDescriptor.h:60-65 and 112-132, IOBufferMemoryDescriptor.h:35-53,
# IOMapTypes.h:36-84, IOReturn.h:140-198, mach/kern_return.h.
VALUES = {
    "kIODirectionNone": 0,
    "kIODirectionIn": 1,
    "kIODirectionOut": 2,
    "kIODirectionOutIn": 3,
    "kIODirectionInOut": 3,
    "kIOMemoryThreadSafe": 0x100000,
    "kIOMemoryPhysicallyContiguous": 0x10,
    "kIOMemoryPageable": 0x20,
    "kIOMemoryUnshared": 0,
    "kIOMemoryKernelUserShared": 0x10000,
    "kIOMapAnywhere": 1,
    "kIOMapReadOnly": 0x1000,
    "kIOMapReference": 0x02000000,
    "kIOMapUnique": 0x04000000,
    "kIOMapPrefault": 0x10000000,
    "kIOMapGuardedSmall": 0x40000000,
    "kIOMapGuardedLarge": 0x80000000,
    "kIOReturnSuccess": 0,
    "kIOReturnError": 0xE00002BC,
    "kIOReturnNoMemory": 0xE00002BD,
    "kIOReturnNoResources": 0xE00002BE,
    "kIOReturnNotPrivileged": 0xE00002C1,
    "kIOReturnBadArgument": 0xE00002C2,
    "kIOReturnUnsupported": 0xE00002C7,
    "kIOReturnNotWritable": 0xE00002CF,
    "kIOReturnBusy": 0xE00002D5,
    "kIOReturnTimeout": 0xE00002D6,
    "kIOReturnNotReady": 0xE00002D8,
    "kIOReturnNotAttached": 0xE00002D9,
    "kIOReturnCannotWire": 0xE00002DE,
    "KERN_PROTECTION_FAILURE": 2,
}


def test_each_constant_has_the_models_value() -> None:
    constants = {name: value for name, value in vars(iokit).items() if re.match("kIO|KERN_", name)}
    assert constants == VALUES


# -- the table of docs/iokit.md --------------------------------------------------------------------


def rows() -> Iterator[tuple[str, str, bool]]:
    """Each row of the tables: the I/O Kit name, our cell, whether iokit is said to have it."""
    for line in DOC.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] not in ("I/O Kit", "---"):
            assert len(cells) == 3 and cells[2] in ("", "✓"), line
            yield cells[0], cells[1], cells[2] == "✓"


def find(name: str) -> Any:
    """What a dotted name under memdesc stands for; fails where it stands for nothing."""
    found: Any = md
    path = "memdesc"
    for part in name.removeprefix("memdesc.").split("."):
        path += f".{part}"
        if inspect.ismodule(found) and not hasattr(found, part):
            found = importlib.import_module(path)
        elif inspect.isclass(found) and part in annotations_of(found):
            found = annotations_of(found)[part]
        else:
            found = getattr(found, part)
    return found


def annotations_of(kind: type) -> dict[str, Any]:
    """The attributes that a class announces and its instances have."""
    return {
        name: value
        for base in kind.__mro__
        for name, value in inspect.get_annotations(base).items()
    }


def test_every_name_of_ours_in_the_table_exists() -> None:
    names = [name for _, ours, _ in rows() for name in re.findall(r"`([^`]+)`", ours)]
    assert len(names) > 80
    for name in names:
        match = re.fullmatch(r"([\w.]+)(?:\((\w+)=\))?", name)
        assert match, name
        found = find(match[1])
        assert match[2] is None or match[2] in inspect.signature(found).parameters, name


def test_the_table_tells_truly_what_iokit_has() -> None:
    said: dict[str, bool] = {}
    for name, _, there in rows():
        plain = re.fullmatch(r"`([\w:]+)`", name)
        if plain is None:
            assert not there, name
            continue
        said[plain[1].replace("::", ".")] = there
    for name, there in said.items():
        found: Any = iokit
        for part in name.split("."):
            found = getattr(found, part, None)
        assert (found is not None) is there, name
    classes = [
        kind
        for kind in vars(iokit).values()
        if inspect.isclass(kind)
        and kind.__module__.startswith("memdesc.iokit")
        and kind.__name__[0] != "_"
    ]
    ours = [f"{kind.__name__}.{name}" for kind in classes for name in vars(kind) if name[0] != "_"]
    assert [name for name in ours if not said.get(name)] == []
    assert [name for name in VALUES if not said.get(name)] == []


def test_each_row_says_ours_or_later_or_why_not() -> None:
    by_itself = {"no exception", "BufferError: views are alive"}  # Python's own, not ours
    for name, ours, _ in rows():
        told = ours.startswith(("later", "none, because ", "the default")) or "`" in ours
        assert told or ours in by_itself or "with block" in ours, name


# -- behaviour, as far as the spelling goes --------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "capacity", "alignment", "kind"),
    [
        (kIODirectionOutIn, 0, 1, md.InvalidArgument),  # IOBMD:194
        (kIODirectionOutIn, -1, 1, md.InvalidArgument),
        (kIODirectionOutIn, 1 << 63, 1, md.InvalidArgument),  # IOBMD:255, 266
        (kIODirectionOutIn, 100, 3, md.InvalidArgument),
        (kIODirectionOutIn | 0x40, 100, 1, md.UnsupportedError),  # purgeable
        (kIODirectionOutIn | 0x10, 100, 1, md.UnsupportedError),  # contiguous
    ],
)
def test_null_comes_with_the_reason_beside_it(
    options: int, capacity: int, alignment: int, kind: type[MemdescError]
) -> None:
    why: list[MemdescError] = []
    assert IOBufferMemoryDescriptor.withOptions(options, capacity, alignment, why) is None
    (reason,) = why
    assert type(reason) is kind
    assert IOBufferMemoryDescriptor.withOptions(options, capacity, alignment) is None


def test_buffers_are_made_in_every_way() -> None:
    assert buffer().descriptor.max_access is Access.READ_ONLY
    lazy = buffer(10 * page_size, kIODirectionOut | kIOMemoryPageable)
    assert lazy.descriptor.page_counts().resident == 0
    assert buffer(10 * page_size).descriptor.page_counts().resident == 10

    of_bytes = made(IOBufferMemoryDescriptor.withBytes(b"abcdef", 4, kIODirectionIn))
    assert (of_bytes.getLength(), of_bytes.getDirection()) == (4, kIODirectionIn)
    assert of_bytes.getBytesNoCopy() == b"abcd"
    with pytest.raises(md.RangeError):
        IOBufferMemoryDescriptor.withBytes(b"abcdef", 7, kIODirectionIn)

    assert made(IOBufferMemoryDescriptor.withCapacity(10, kIODirectionNone)).getCapacity() == 10
    why: list[MemdescError] = []
    assert IOBufferMemoryDescriptor.withCapacity(10, kIODirectionOut, True, why) is None
    assert isinstance(why[0], md.UnsupportedError)

    here = IOBufferMemoryDescriptor.inTaskWithOptions(iokit.kernel_task, kIODirectionOut, 10)
    assert made(here).getLength() == 10
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child, md.Task(child.pid) as task:
        assert (
            IOBufferMemoryDescriptor.inTaskWithOptions(task, kIODirectionOut, 10, why=why) is None
        )
    assert isinstance(why[1], md.UnsupportedError)


def test_length_and_appending() -> None:
    descriptor = buffer(10)
    descriptor.setLength(4)
    assert (descriptor.getLength(), descriptor.getCapacity()) == (4, 10)
    assert descriptor.appendBytes(b"abcdef", 6) is True
    assert descriptor.getBytesNoCopy(4, 6) == b"abcdef"
    assert descriptor.appendBytes(b"g", 1) is False
    assert descriptor.getLength() == 10
    with pytest.raises(md.RangeError):
        descriptor.setLength(11)


def test_bytes_without_copying() -> None:
    descriptor = buffer(10)
    whole = descriptor.getBytesNoCopy()
    assert whole is not None
    whole[2:5] = b"abc"
    assert descriptor.getBytesNoCopy(2, 3) == b"abc"
    # IOBMD:854-888: NULL unless start < length and start + len <= length.
    assert descriptor.getBytesNoCopy(10, 0) is None
    assert descriptor.getBytesNoCopy(8, 3) is None
    assert descriptor.getBytesNoCopy(-1, 1) is None


def test_reading_and_writing_answer_with_counts() -> None:
    descriptor = buffer(10)
    into = bytearray(5)
    assert descriptor.writeBytes(3, b"abcdef", 4) == 4
    assert (descriptor.readBytes(3, into, 5), into) == (5, b"abcd\0")
    # IOMD:2535-2684: out of range 0 and nothing copied; offset == length is 0; NULL writes zeros.
    for offset in (6, 11, -1, 1 << 62):
        assert descriptor.writeBytes(offset, b"12345", 5) == 0
        assert descriptor.readBytes(offset, into, 5) == 0
    assert descriptor.readBytes(10, into, 0) == 0
    assert into == b"abcd\0"
    assert descriptor.writeBytes(3, None, 4) == 4
    assert descriptor.getBytesNoCopy() == bytes(10)
    with pytest.raises(md.RangeError):
        descriptor.readBytes(0, into, 6)


def test_writing_into_a_hole_answers_what_was_written_before_it() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    address = libc.mmap(None, 2 * page_size, 3, 0x22, -1, 0)
    assert libc.munmap(address + page_size, page_size) == 0
    try:
        task = current_task()
        over = IOMemoryDescriptor.withAddressRange(
            address + page_size - 3, 10, kIODirectionOutIn, task
        )
        assert over is not None
        assert over.writeBytes(0, b"0123456789", 10) == 3
        assert over.readBytes(0, bytearray(10), 10) == 0
        assert over.readBytes(0, into := bytearray(3), 3) == 3
        assert into == b"012"
        assert over.prepare() == kIOReturnCannotWire
    finally:
        libc.munmap(address, page_size)


def test_prepare_and_complete_answer_with_codes() -> None:
    descriptor = buffer()
    assert descriptor.complete() == kIOReturnNotReady
    with failing("mlock", errno.ENOMEM):
        assert descriptor.prepare() == kIOReturnNoResources
    assert descriptor.prepare(0x20) == kIOReturnUnsupported  # kIODirectionPrepareNonCoherent
    assert descriptor.descriptor.prepare_count == 0
    if descriptor.prepare(kIODirectionOut) != kIOReturnSuccess:
        pytest.skip("this process may not lock one page")
    # IOMD:4143-4148: wired for reading only, a nested prepare that wants to write is refused.
    assert descriptor.prepare(kIODirectionIn) == kIOReturnNotWritable
    assert descriptor.prepare(kIODirectionOut) == kIOReturnSuccess
    assert descriptor.writeBytes(0, b"a", 1) == 0
    assert descriptor.complete() == descriptor.complete(kIODirectionOut) == kIOReturnSuccess
    assert descriptor.writeBytes(0, b"a", 1) == 1
    assert descriptor.complete() == kIOReturnNotReady


def mapped(mapping: IOMemoryMap | None) -> IOMemoryMap:
    assert mapping is not None
    return mapping


def test_mapping_options() -> None:
    descriptor = buffer(3 * page_size, kIODirectionOutIn | kIOMemoryKernelUserShared)
    task = current_task()
    first = mapped(descriptor.createMappingInTask(task, 0, kIOMapAnywhere))
    again = mapped(descriptor.map())
    assert again.getAddress() == first.getAddress()
    part = descriptor.createMappingInTask(task, 0, kIOMapAnywhere | kIOMapReference, 100, 50)
    assert mapped(part).getAddress() == first.getAddress() + 100
    assert mapped(part).getLength() == 50
    unique = mapped(descriptor.createMappingInTask(task, 0, kIOMapAnywhere | kIOMapUnique))
    assert unique.getAddress() != first.getAddress()

    read_only = mapped(descriptor.map(kIOMapReadOnly))
    assert memoryview(read_only.mapping).readonly
    for guards in (kIOMapGuardedSmall, kIOMapGuardedLarge):
        assert mapped(descriptor.map(guards)).getLength() == 3 * page_size

    address = unique.getAddress()
    unique.release()
    assert (unique.getAddress(), unique.getAddressTask()) == (0, None)
    fixed = descriptor.createMappingInTask(task, address, 0)
    assert mapped(fixed).getAddress() == address


@pytest.mark.parametrize(
    ("options", "at", "offset", "length", "reason"),
    [
        (kIOMapAnywhere | kIOMapReference, 0, 0, 0, md.MappingReason.NO_SUCH_MAPPING),
        # IOMD:5788: a length of 0 is the descriptor's, also with an offset; then it leaves it.
        (kIOMapAnywhere, 0, 1, 0, md.MappingReason.OUT_OF_RANGE),
        (kIOMapAnywhere, 0, 50, 51, md.MappingReason.OUT_OF_RANGE),
        (kIOMapGuardedSmall, page_size, 0, 0, md.MappingReason.GUARDS_NEED_ANYWHERE),
        (0, 1, 0, 0, md.MappingReason.ADDRESS_UNALIGNED),
    ],
)
def test_a_mapping_that_is_null_has_its_reason(
    options: int, at: int, offset: int, length: int, reason: md.MappingReason
) -> None:
    why: list[MemdescError] = []
    assert buffer().createMappingInTask(current_task(), at, options, offset, length, why) is None
    (error,) = why
    assert isinstance(error, md.MappingError)
    assert error.reason is reason


def test_a_mapping_into_no_task_or_with_unknown_options_is_null() -> None:
    why: list[MemdescError] = []
    assert buffer().createMappingInTask(None, 0, kIOMapAnywhere, why=why) is None
    overwrite = 0x20000000
    assert buffer().map(overwrite, why) is None
    assert [type(error) for error in why] == [md.InvalidArgument, md.UnsupportedError]


def test_unmapping_waits_for_views() -> None:
    mapping = mapped(buffer().map())
    view = memoryview(mapping.mapping)
    assert mapping.unmap() == kIOReturnBusy
    view.release()
    assert mapping.unmap() == mapping.unmap() == kIOReturnSuccess


def test_ranges_parts_and_several() -> None:
    descriptor = buffer(2 * page_size)
    descriptor.writeBytes(page_size, b"second", 6)
    part = IOSubMemoryDescriptor.withSubRange(descriptor, page_size, 6, kIODirectionOut)
    assert part is not None
    assert (part.getLength(), part.getDirection()) == (6, kIODirectionOut)
    both = IOMultiMemoryDescriptor.withDescriptors([descriptor, part], 2, kIODirectionOutIn)
    assert both is not None
    into = bytearray(6)
    assert (both.readBytes(2 * page_size, into, 6), into) == (6, b"second")

    why: list[MemdescError] = []
    assert IOSubMemoryDescriptor.withSubRange(descriptor, 1, 2 * page_size, 0, why) is None
    assert IOMultiMemoryDescriptor.withDescriptors([], 0, kIODirectionOut, why=why) is None
    assert (
        IOMemoryDescriptor.withAddressRange(4096, 0, kIODirectionOut, current_task(), why) is None
    )
    assert IOMemoryDescriptor.withAddressRange(4096, 1, kIODirectionOut, None, why) is None
    assert [type(error) for error in why] == [
        md.RangeError,
        md.InvalidArgument,
        md.InvalidArgument,
        md.UnsupportedError,
    ]

    memory = bytearray(b"in this task")
    here = IOMemoryDescriptor.withAddress(memory, 7, kIODirectionOutIn)
    assert here is not None
    assert here.writeBytes(0, b"IN", 2) == 2
    assert memory == b"IN this task"
    here.release()
    assert here.prepare() == kIOReturnNotReady


def test_the_kernels_copies_answer_with_errno() -> None:
    task = current_task()
    theirs = ctypes.create_string_buffer(b"a string", 64)
    address = ctypes.addressof(theirs)
    into = bytearray(16)
    assert iokit.copyin(address, into, 8, task) == 0
    assert into == b"a string" + bytes(8)
    assert iokit.copyout(b"another", address, 7, task) == 0
    assert theirs.value == b"anotherg"
    assert iokit.copyin(0, into, 1, task) == iokit.copyout(into, 0, 1, task) == errno.EFAULT
    assert iokit.copyin(0, into, 0, task) == 0  # arm64 copyio.c:301: nothing is looked at
    with pytest.raises(md.RangeError):
        iokit.copyin(address, into, 17, task)

    done: list[int] = []
    assert iokit.copyinstr(address, into, 16, done, task) == 0
    assert into[:9] == b"anotherg\0"
    assert iokit.copyinstr(address, into, 4, done, task) == errno.ENAMETOOLONG
    assert iokit.copyinstr(address, into, 0, done, task) == errno.ENAMETOOLONG
    assert iokit.copyinstr(0, into, 4, done, task) == errno.EFAULT
    assert done == [9, 4, 0, 0]  # arm64 copyio.c:414-440

    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child, md.Task(child.pid) as gone:
        child.kill()
        child.wait()
        assert iokit.copyin(address, into, 1, gone) == errno.ESRCH


@pytest.mark.parametrize(
    "allocate",
    [
        iokit.IOMalloc,
        lambda size, **why: iokit.IOMallocAligned(size, 100, **why),
        lambda size, **why: iokit.IOMallocPageable(size, 100, **why),
    ],
)
def test_blocks_come_and_go(allocate: Callable[..., Any]) -> None:
    block = allocate(5000)
    assert not any(memoryview(block))
    with pytest.raises(md.InvalidArgument):
        iokit.IOFree(block, 1 << 20)
    iokit.IOFree(block, 5000)
    with pytest.raises(DoubleFreeError):
        iokit.IOFree(block, 5000)
    why: list[MemdescError] = []
    assert allocate(0, why=why) is None
    assert isinstance(why[0], md.InvalidArgument)
    assert allocate(0) is None


def test_an_alignment_is_rounded_up_to_a_power_of_two() -> None:
    block = iokit.IOMallocAligned(10, 100)
    assert block is not None
    assert block.address % 128 == 0
    iokit.IOFreeAligned(block, 10)


def test_the_physical_address_comes_beside_the_block() -> None:
    physical: list[int] = []
    why: list[MemdescError] = []
    block = iokit.IOMallocContiguous(page_size, 1, physical, why=why)
    if block is None:
        assert isinstance(why[0], md.NotPrivilegedError | md.WiringError)
        pytest.skip(str(why[0]))
    assert isinstance(block, md.PageBlock)
    assert physical == [block.physical_address]
    iokit.IOFreeContiguous(block, page_size)


def test_whole_pages_of_an_aligned_block_can_be_shared() -> None:
    block = iokit.IOMallocAligned(2 * page_size, page_size)
    assert block is not None
    described = IOMemoryDescriptor.withAddress(block, 2 * page_size, kIODirectionOut)
    assert described is not None
    mapping = described.createMappingInTask(
        current_task(), 0, kIOMapAnywhere | kIOMapReadOnly | kIOMapUnique
    )
    assert mapping is not None
    assert mapping.getLength() == 2 * page_size


def test_codes_stand_for_exceptions() -> None:
    descriptor = buffer()
    with failing("mlock", errno.EPERM):
        assert descriptor.prepare() == iokit.kIOReturnNotPrivileged
    for raised, code in [
        (md.RangeError("a"), kIOReturnBadArgument),
        (md.TimedOutError("a"), iokit.kIOReturnTimeout),
        (md.PeerGoneError("a"), iokit.kIOReturnNotAttached),
        (md.AllocationError("a"), iokit.kIOReturnNoMemory),
        (md.ProtocolError("a"), iokit.kIOReturnError),
    ]:

        def fail(error: MemdescError = raised) -> None:
            raise error

        assert values.code_of(fail) == code
    assert set(values._WIRING_CODES) == set(md.WiringReason)
