"""DMACommand: segments against a model that counts single pages, and the rules of IODMACommand."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from itertools import pairwise

import pytest
from children import in_child, limit_locking
from disk_tools import needs_uring
from hypothesis import given, strategies as st

import memdesc as md
from memdesc import BufferMemoryDescriptor, Direction, MemoryDescriptor, SegmentReason, _core
from memdesc.dma import DMACommand, DMASpecification, PhysicalSegment
from memdesc.dma.segments import part_of_runs, segments_of
from memdesc.testing import failing
from memdesc.vm.pages import page_size
from memdesc.vm.physical import frames
from memdesc.vm.probe import probe_feature
from memdesc.vm.task import Task


@pytest.fixture
def sees_frames() -> None:
    feature = probe_feature("page_frames")
    if not feature.available:
        pytest.skip(f"page frames need {feature.needs}, which was denied")
    needs_uring()


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(64 * page_size, recycle=False) as made:
        yield made


def held(buffer: BufferMemoryDescriptor) -> tuple[int, int]:
    return buffer.prepare_count, buffer.memory.lifecycle.registrations


# --- Arithmetic -------------------------------------------------------------------------------

PAGE = 16  # bytes: small, so that every border is met
RUNS = st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True)


def merged(pages: list[int], skip: int, length: int) -> list[PhysicalSegment]:
    """What `physical_runs` would give for pages of 16 bytes."""
    runs: list[PhysicalSegment] = []
    for byte in bytes_of(pages)[skip : skip + length]:
        if runs and sum(runs[-1]) == byte:
            runs[-1] = PhysicalSegment(runs[-1].address, runs[-1].length + 1)
        else:
            runs.append(PhysicalSegment(byte, 1))
    return runs


def bytes_of(pages: list[int]) -> list[int]:
    return [page * PAGE + at for page in pages for at in range(PAGE)]


def specification(**what: int | None) -> DMASpecification:
    """Also of so few bits as the pages of the model need."""
    bits = what.pop("address_bits", 64)
    made = DMASpecification(**what)  # type: ignore[arg-type]
    object.__setattr__(made, "address_bits", bits)
    return made


@pytest.mark.slow
@given(RUNS, st.data())
def test_segments_are_the_bytes_one_by_one(pages: list[int], data: st.DataObject) -> None:
    skip = data.draw(st.integers(0, len(pages) * PAGE - 1))
    length = data.draw(st.integers(1, len(pages) * PAGE - skip))
    alignment = data.draw(st.sampled_from([1, 2, 4, 16]))
    length_alignment = data.draw(st.sampled_from([1, 2, 8]))
    granule = max(alignment, length_alignment)
    longest = data.draw(st.none() | st.integers(granule, 100))
    bits = data.draw(st.sampled_from([7, 9, 64]))
    offset = data.draw(st.integers(0, length - 1))
    asked = specification(
        alignment=alignment,
        length_alignment=length_alignment,
        max_segment_length=longest,
        address_bits=bits,
    )
    runs = list(part_of_runs(merged(pages, skip, length), offset, length - offset))
    wanted = bytes_of(pages)[skip : skip + length][offset:]
    assert [byte for run in runs for byte in range(run.address, sum(run))] == wanted
    given_out: list[PhysicalSegment] = []
    try:
        for segment in segments_of(runs, asked, offset):
            given_out.append(segment)
    except md.SegmentError as error:
        at = sum(segment.length for segment in given_out)
        assert (error.offset, error.address) == (offset + at, wanted[at])
        run = naive_run(wanted, at, longest, granule)
        broken = {
            SegmentReason.ADDRESS_BITS: run[-1] >= 1 << bits,
            SegmentReason.ALIGNMENT: run[0] % alignment != 0,
            SegmentReason.LENGTH_ALIGNMENT: len(run) % length_alignment != 0,
        }
        assert broken[error.reason]
    else:
        found = [byte for segment in given_out for byte in range(segment.address, sum(segment))]
        assert found == wanted
        for segment in given_out:
            assert segment.address % alignment == segment.length % length_alignment == 0
            assert longest is None or segment.length <= longest
            assert sum(segment) <= 1 << bits
        at = 0
        for segment in given_out:  # none is shorter than it must be
            assert segment.length == len(naive_run(wanted, at, longest, granule))
            at += segment.length


def naive_run(wanted: list[int], at: int, longest: int | None, granule: int) -> list[int]:
    """The longest segment that may begin at a byte, found by adding single bytes."""
    run = [wanted[at]]
    for byte in wanted[at + 1 :]:
        if byte != run[-1] + 1:
            return run
        if longest is not None and len(run) == longest:
            break
        run.append(byte)
    else:
        return run
    while len(run) % granule:  # cut by us: another one follows, which must begin aligned
        run.pop()
    return run


@pytest.mark.parametrize(
    "wrong",
    [
        {"address_bits": 11},
        {"address_bits": 65},
        {"alignment": 3},
        {"length_alignment": 0},
        {"max_segment_length": 0},
        {"max_transfer_length": 0},
        {"max_segment_length": 511, "length_alignment": 512},
    ],
)
def test_specifications_that_nothing_meets(wrong: dict[str, int]) -> None:
    with pytest.raises(md.InvalidArgument):
        DMASpecification(**wrong)  # type: ignore[arg-type]


# --- Real memory ------------------------------------------------------------------------------


def test_segments_are_the_frames(sees_frames: None, buffer: BufferMemoryDescriptor) -> None:
    with DMACommand(buffer) as command:
        segments = list(command.segments())
        with Task.current() as task:
            found = frames(task, buffer.address, buffer.length)
        flat = [
            address
            for segment in segments
            for address in range(segment.address, sum(segment), page_size)
        ]
        assert flat == [frame * page_size for frame in found if frame is not None]
        assert all(sum(a) != b.address for a, b in pairwise(segments))
        assert buffer.physical_segments() == segments
        middle = list(command.segments(5 * page_size + 100))
        assert middle[0].address == flat[5] + 100
        assert sum(segment.length for segment in middle) == buffer.length - 5 * page_size - 100
        assert held(buffer) == (1, 1)
    assert held(buffer) == (0, 0)
    with pytest.raises(md.NotPreparedError):
        command.segments()


def test_parts_of_several(sees_frames: None, buffer: BufferMemoryDescriptor) -> None:
    with BufferMemoryDescriptor(page_size + 10, recycle=False) as other:
        several = md.MultiMemoryDescriptor([md.SubMemoryDescriptor(buffer, 100, 5000), other])
        command = DMACommand(several)
        command.prepare(50, 5000)
        segments = list(command.segments())
        assert sum(segment.length for segment in segments) == 5000
        first = frames(Task.current(), buffer.address + 150, 1)[0]
        last = frames(Task.current(), other.address + 49, 1)[0]
        assert first is not None
        assert last is not None
        assert segments[0].address == first * page_size + 150
        assert sum(segments[-1]) == last * page_size + 50
        command.complete()
        assert held(buffer) == held(other) == (0, 0)


def test_huge_pages_are_one_segment(sees_frames: None) -> None:
    from huge_pool import huge_pages

    with huge_pages(1), BufferMemoryDescriptor(2 << 20, pages=md.PageKind.HUGE) as huge:
        with DMACommand(huge, DMASpecification(alignment=2 << 20)) as command:
            assert [length for _, length in command.segments()] == [2 << 20]


def test_pinned_it_can_not_be_sealed_away_and_snapshots_copy(
    sees_frames: None, buffer: BufferMemoryDescriptor
) -> None:
    command = DMACommand(buffer)
    command.prepare(0, page_size)
    with buffer.snapshot() as frozen:
        assert frozen.reason is md.SnapshotReason.REGISTERED
    command.complete()
    with buffer.snapshot() as frozen:
        assert frozen.copied_bytes == 0
        with DMACommand(buffer):  # moves it to memory of its own
            assert buffer.moves == 1
        with pytest.raises(md.WiringError) as caught:
            DMACommand(frozen).prepare()
        assert caught.value.reason is md.WiringReason.PROTECTION
        assert frozen.prepare_count == 0


# --- The rules --------------------------------------------------------------------------------


def test_prepare_nests_for_one_range(sees_frames: None, buffer: BufferMemoryDescriptor) -> None:
    command = DMACommand(buffer)
    command.prepare(page_size)
    command.prepare(page_size, buffer.length - page_size)
    for other in ((0, None), (page_size, page_size)):
        with pytest.raises(md.InvalidArgument) as caught:
            command.prepare(*other)
        assert caught.value.errno == errno.EBUSY
    assert command.active == 2
    command.complete()
    assert held(buffer) == (1, 1)
    command.complete()
    assert (command.active, held(buffer)) == (0, (0, 0))
    with pytest.raises(md.NotPreparedError):
        command.complete()
    command.prepare()  # again, for another range
    with pytest.raises(md.RangeError) as caught:
        command.segments(buffer.length)
    assert caught.value.errno == errno.EOVERFLOW
    del command, caught  # lets go
    assert held(buffer) == (0, 0)


@pytest.mark.parametrize(
    ("asked", "range_", "error", "number"),
    [
        ({"max_transfer_length": page_size}, (0, None), md.RangeError, errno.ENOSPC),
        ({"length_alignment": 512}, (0, 100), md.InvalidArgument, errno.EINVAL),
        ({}, (0, 0), md.InvalidArgument, errno.EINVAL),
        ({}, (0, 65 * page_size), md.RangeError, errno.EINVAL),
    ],
)
def test_a_prepare_that_fails_leaves_nothing_active(
    buffer: BufferMemoryDescriptor,
    asked: dict[str, int],
    range_: tuple[int, int | None],
    error: type[md.MemdescError],
    number: int,
) -> None:
    """The trap of the model: there the command stays active."""
    command = DMACommand(buffer, DMASpecification(**asked))  # type: ignore[arg-type]
    with pytest.raises(error) as caught:
        command.prepare(*range_)
    assert caught.value.errno == number
    assert (command.active, held(buffer)) == (0, (0, 0))
    with pytest.raises(md.NotPreparedError):
        command.complete()


@pytest.mark.parametrize(
    ("asked", "range_", "reason", "number"),
    [
        ({"address_bits": 12}, (0, None), SegmentReason.ADDRESS_BITS, errno.EMSGSIZE),
        ({"alignment": 512}, (8, None), SegmentReason.ALIGNMENT, errno.EINVAL),
        (
            {"length_alignment": page_size},
            (8, page_size),
            SegmentReason.LENGTH_ALIGNMENT,
            errno.EINVAL,
        ),
    ],
)
def test_a_constraint_that_is_not_met_is_named(
    sees_frames: None,
    asked: dict[str, int],
    range_: tuple[int, int | None],
    reason: SegmentReason,
    number: int,
) -> None:
    with BufferMemoryDescriptor(64 * page_size, pages=md.PageKind.BASE, recycle=False) as buffer:
        command = DMACommand(buffer, DMASpecification(**asked))  # type: ignore[arg-type]
        if reason is SegmentReason.LENGTH_ALIGNMENT:
            with DMACommand(buffer) as look:
                if next(look.segments()).length > page_size:
                    pytest.skip("the pages happen to be contiguous")
        with pytest.raises(md.SegmentError) as caught:
            command.prepare(*range_)
        assert (caught.value.reason, caught.value.errno) == (reason, number)
        assert (command.active, held(buffer)) == (0, (0, 0))


def test_pages_that_were_replaced_are_found_on_completion(sees_frames: None) -> None:
    with open(os.memfd_create("theirs"), "r+b") as file:
        file.truncate(page_size)
        with mmap.mmap(file.fileno(), page_size) as pages:
            address = _core.buffer_address(pages)[0]
            memory = MemoryDescriptor.with_address_range(address, page_size, Direction.IN)
            command = DMACommand(memory)
            command.prepare()
            _core.fallocate(file.fileno(), 3, 0, page_size)  # as a peer may punch it out
            pages[0] = 1
            with pytest.raises(md.SegmentError) as caught:
                command.complete()
            assert caught.value.reason is SegmentReason.MOVED
            assert (command.active, memory.prepare_count) == (0, 0)
            memory.close()


def test_without_the_privilege_it_says_so(buffer: BufferMemoryDescriptor) -> None:
    needs_uring()

    def ask() -> list[int | None]:
        limit_locking(8 << 20)
        told: list[int | None] = []
        with BufferMemoryDescriptor(4 * page_size) as own:
            own.prepare()
            for call in (DMACommand(own).prepare, own.physical_segments):
                try:
                    call()
                except md.NotPrivilegedError as error:
                    told.append(error.errno)
            own.complete()
            assert held(own) == (0, 0)
        return told

    told = in_child(ask)
    assert len(told) == 2
    assert set(told) <= {errno.EPERM, errno.EACCES}


def test_past_the_limit_on_locked_memory() -> None:
    needs_uring()

    def pin() -> str:
        limit_locking(1 << 20)
        with BufferMemoryDescriptor(768 << 10) as buffer:
            command = DMACommand(buffer)
            with failing("mlock", errno.ENOMEM, times=0):
                try:
                    command.prepare()
                except md.NotPrivilegedError:
                    return "pinned"
                except md.WiringError as error:
                    return f"{error.reason.name} {held(buffer)} {command.active}"
        return "prepared"

    # What is wired and what is pinned count together on some kernels, apart on others.
    assert in_child(pin) in ("LIMIT (0, 0) 0", "pinned")


@pytest.mark.parametrize(
    ("call", "number", "reason"),
    [
        ("open_uring", errno.EPERM, md.WiringReason.NOT_PRIVILEGED),
        ("open_uring", errno.ENOSYS, md.WiringReason.NOT_PRIVILEGED),
        ("uring_update_buffer", errno.ENOMEM, md.WiringReason.LIMIT),
        ("uring_register_buffers", errno.EMFILE, md.WiringReason.NO_MEMORY),
        ("mlock", errno.ENOMEM, md.WiringReason.NO_MEMORY),
    ],
)
def test_what_can_not_be_pinned(
    buffer: BufferMemoryDescriptor, call: str, number: int, reason: md.WiringReason
) -> None:
    needs_uring()
    command = DMACommand(buffer)
    with failing(call, number) as fault, pytest.raises(md.WiringError) as caught:
        command.prepare()
    assert (fault.failures, caught.value.errno, caught.value.reason) == (1, number, reason)
    assert (command.active, held(buffer)) == (0, (0, 0))


def test_unprepared_memory_has_no_segments(buffer: BufferMemoryDescriptor) -> None:
    with pytest.raises(md.NotPreparedError):
        buffer.physical_segments()
    with pytest.raises(md.RangeError):
        buffer.physical_segments(0, buffer.length + 1)
    with pytest.raises(md.InvalidArgument):
        DMACommand(b"bytes")  # type: ignore[arg-type]
    buffer.close()
    with pytest.raises(md.ClosedError):
        DMACommand(buffer).prepare()


def test_a_fork_child_has_no_part_in_it(sees_frames: None, buffer: BufferMemoryDescriptor) -> None:
    with DMACommand(buffer) as command:
        segments = list(command.segments())

        def let_go() -> None:
            command._held = None  # dropped in the child, which has no pin
            os.getpid()

        in_child(let_go)
        assert list(command.segments()) == segments
        assert held(buffer) == (1, 1)
