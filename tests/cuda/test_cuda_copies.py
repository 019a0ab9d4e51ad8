"""Copies: real bytes both ways, waited for and awaited, and what holds the memory meanwhile."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
from collections.abc import Callable, Iterator

import pytest
from fake_driver import FakeDriver, MemoryOf, mapped

import memdesc as md
from memdesc import Access, BufferMemoryDescriptor, MultiMemoryDescriptor, SubMemoryDescriptor
from memdesc.dma import Copy, CudaDevice, PinnedMemory
from memdesc.dma.cuda import copies
from memdesc.dma.cuda.driver import Kind
from memdesc.vm.pages import page_size

PAGES = 8
NBYTES = PAGES * page_size
DATA = bytes(range(256)) * (NBYTES // 256)


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(NBYTES, recycle=False) as made:
        made.write_bytes(0, DATA)
        yield made


def held(buffer: BufferMemoryDescriptor) -> int:
    return buffer.memory.lifecycle.registrations


@pytest.fixture
def far(fake: FakeDriver) -> Iterator[int]:
    """Memory of the fake device."""
    pointer = fake.allocate(NBYTES)
    yield pointer
    fake.let()
    while not fake.idle:
        pass
    fake.free(pointer)


def bytes_of(fake: FakeDriver, pointer: int, nbytes: int = NBYTES) -> bytes:
    return bytes(fake.allocated[pointer])[:nbytes]


# --- Bytes --------------------------------------------------------------------------------------


def test_there_and_back(
    device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    with BufferMemoryDescriptor(NBYTES) as other:
        with device.registered(buffer) as pinned, device.registered(other) as back:
            copy = pinned.copy_to_device(pointer)
            copy.wait(10)
            assert copy.done
            assert not copy.failed
            assert copy.nbytes == NBYTES
            back.copy_from_device(pointer).wait(10)
            assert other.read_bytes() == DATA
            # A part: from the middle, to somewhere else.
            pinned.copy_to_device(pointer + 7, 100, 50).wait(10)
            back.copy_from_device(pointer, 1, 60).wait(10)
            assert other.read_bytes(0, 61) == DATA[:1] + DATA[:7] + DATA[100:150] + DATA[57:60]
            pinned.copy_to_device(pointer, 5, 0).wait(10)
            assert pinned.in_flight == 0


def test_several_as_one(
    device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    with BufferMemoryDescriptor(1000) as other:
        several = MultiMemoryDescriptor(
            [SubMemoryDescriptor(buffer, 10, 90), other, SubMemoryDescriptor(buffer, 5000, 100)]
        )
        other.write_bytes(0, b"x" * 1000)
        whole = DATA[10:100] + b"x" * 1000 + DATA[5000:5100]
        with device.registered(several) as pinned, device.registered(buffer) as back:
            pinned.copy_to_device(pointer).wait(10)
            back.copy_from_device(pointer, 0, 1190).wait(10)
            assert buffer.read_bytes(0, 1190) == whole
            pinned.copy_from_device(pointer + 80, 80, 20).wait(10)
            assert other.read_bytes(0, 10) == whole[90:100]


def test_across_registrations(fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor) -> None:
    """CUDA does not say that it copies what lies in two registrations at once."""
    device = CudaDevice(driver=fake)
    with device.registered(SubMemoryDescriptor(buffer, page_size, 2 * page_size)):
        with device.registered(buffer) as pinned:
            fake.calls.clear()
            pinned.copy_to_device(far, 10, NBYTES - 20).wait(10)
            sizes = [page_size - 10, 2 * page_size, 5 * page_size - 10]
            assert [call for call in fake.calls if call.startswith("copy")] == [
                f"copy {size}" for size in sizes
            ]
            assert bytes_of(fake, far, NBYTES - 20) == DATA[10:-10]


def test_on_a_stream_of_the_callers(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    theirs = fake.create_stream()
    with device.registered(buffer) as pinned:
        pinned.copy_to_device(far, stream=theirs).wait(10)
        pinned.copy_to_device(far, stream=0).wait(10)
        assert len(fake.streams) == 2  # none of its own was made
        with pytest.raises(md.InvalidArgument) as caught:
            pinned.copy_to_device(far, stream=-1)
        assert caught.value.errno == errno.EINVAL
        with pytest.raises(md.DeviceError) as refused:
            pinned.copy_to_device(far, stream=77)
        assert refused.value.code == 400
        assert pinned.in_flight == 0


# --- What is refused ----------------------------------------------------------------------------


def test_read_only_memory_is_not_written(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    mapping = buffer.map(access=Access.READ_ONLY)
    with (
        device.registered(mapping) as seen,
        device.registered(buffer, access=Access.READ_ONLY) as kept,
    ):
        fake.calls.clear()
        for pinned in (seen, kept):
            with pytest.raises(md.SealedError) as caught:
                pinned.copy_from_device(far)
            assert caught.value.errno == errno.EACCES
        assert fake.calls == []
        seen.copy_to_device(far).wait(10)
        assert bytes_of(fake, far) == DATA
    with device.registered(buffer) as pinned, buffer.prepared(md.Direction.OUT):
        with pytest.raises(md.WiringError) as wired:
            pinned.copy_from_device(far)
        assert wired.value.reason is md.WiringReason.NOT_WRITABLE
    with device.registered(buffer) as pinned:
        buffer.close()
        pinned.copy_from_device(far, 0, 10).wait(10)


def test_a_read_only_view_spoils_no_pages_for_others(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    """Pages are registered as they are mapped, not as who asks first sees them."""
    device = CudaDevice(driver=fake)
    seen = md.MemoryDescriptor.with_buffer(memoryview(buffer).toreadonly(), md.Direction.OUT)
    with device.registered(seen) as reads, device.registered(buffer) as writes:
        assert (reads.access, writes.access) == (Access.READ_ONLY, Access.READ_WRITE)
        assert len(fake.registrations) == 1
        writes.copy_from_device(far).wait(10)
        with pytest.raises(md.SealedError):
            reads.copy_from_device(far)
    assert buffer.read_bytes() == bytes(NBYTES)


@pytest.mark.parametrize(
    ("pointer", "offset", "nbytes", "error"),
    [
        (0, 0, None, md.InvalidArgument),
        (-8, 0, None, md.InvalidArgument),
        (8, NBYTES + 1, None, md.RangeError),
        (8, 1, NBYTES, md.RangeError),
        (8, -1, 1, md.RangeError),
    ],
)
def test_ranges_and_pointers(
    fake: FakeDriver,
    buffer: BufferMemoryDescriptor,
    pointer: int,
    offset: int,
    nbytes: int | None,
    error: type[md.MemdescError],
) -> None:
    with CudaDevice(driver=fake).registered(buffer) as pinned:
        for copy in (pinned.copy_to_device, pinned.copy_from_device):
            with pytest.raises(error) as caught:
                copy(pointer, offset, nbytes)
            assert caught.value.errno == errno.EINVAL


def test_memory_that_is_not_registered_any_more(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    pinned = CudaDevice(driver=fake).registered(buffer)
    pinned.close()
    for copy in (pinned.copy_to_device, pinned.copy_from_device):
        with pytest.raises(md.NotPreparedError):
            copy(far)
    assert pinned.in_flight == 0


# --- Waiting ------------------------------------------------------------------------------------


def test_waiting_ends_in_time(fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor) -> None:
    fake.hold()
    with CudaDevice(driver=fake).registered(buffer) as pinned:
        copy = pinned.copy_to_device(far)
        assert not copy.done
        for timeout, number in ((0, errno.EAGAIN), (0.01, errno.ETIMEDOUT)):
            with pytest.raises(md.TimedOutError) as caught:
                copy.wait(timeout)
            assert caught.value.errno == number
        fake.let()
        copy.wait()
        copy.wait(0)


def test_awaited(device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor) -> None:
    pointer = memory_of(NBYTES)

    async def use(pinned: PinnedMemory) -> None:
        await asyncio.gather(*(pinned.copy_to_device(pointer) for _ in range(4)))
        copy = pinned.copy_from_device(pointer)
        await copy
        await copy
        assert copy.done

    with device.registered(buffer) as pinned:
        asyncio.run(use(pinned))
        assert buffer.read_bytes() == DATA


def test_the_loop_goes_on_meanwhile_and_cancelling_leaves_the_copy(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(1, driver=fake)

    async def use(pinned: PinnedMemory) -> Copy:
        fake.hold()
        copy = pinned.copy_to_device(far)
        fake.calls.clear()

        async def wait() -> None:
            await copy

        task = asyncio.create_task(wait())
        while "wait_event" not in fake.calls:  # by a thread of its own
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not copy.done
        assert pinned.in_flight == 1
        with pytest.raises(md.InvalidArgument) as caught:
            pinned.close()
        assert caught.value.errno == errno.EBUSY
        again = asyncio.create_task(wait())
        await asyncio.sleep(0)
        fake.let()
        await again
        return copy

    with device.registered(buffer) as pinned:
        copy = asyncio.run(asyncio.wait_for(use(pinned), 30))
        assert copy.done
        assert bytes_of(fake, far) == DATA


def test_streams_are_awaited_side_by_side(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    """A long copy of one stream holds up no news of another's."""
    device = CudaDevice(driver=fake)
    slow, quick = fake.create_stream(), fake.create_stream()
    told = threading.Event()

    async def use(pinned: PinnedMemory) -> None:
        first = pinned.copy_to_device(far, stream=slow)
        second = pinned.copy_to_device(far, stream=quick)

        async def long() -> None:
            await first

        task = asyncio.create_task(long())
        while "wait_event" not in fake.calls:
            await asyncio.sleep(0)
        fake.let_stream(quick)
        await second
        told.set()
        assert not first.done
        fake.let()
        await task

    with device.registered(buffer) as pinned:
        fake.hold()
        asyncio.run(asyncio.wait_for(use(pinned), 30))
    assert told.is_set()


def test_a_loop_that_ended_before_the_copy(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)

    async def leave(pinned: PinnedMemory) -> None:
        fake.hold()
        copy = pinned.copy_to_device(far)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(copy, 0.01)

    with device.registered(buffer) as pinned:
        asyncio.run(leave(pinned))
        assert pinned.in_flight == 1
        fake.let()
    assert bytes_of(fake, far) == DATA


def test_many_threads_copy_wait_and_await(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    devices = [CudaDevice(index, driver=fake) for index in (0, 1)]

    async def awaited(copy: Copy) -> None:
        await copy

    with devices[0].registered(buffer) as one, devices[1].registered(buffer) as two:

        def use(number: int) -> int:
            at = number % PAGES * page_size
            pinned = (one, two)[number % 2]
            copies_ = [pinned.copy_to_device(far + at, at, page_size) for _ in range(3)]
            if number % 3 == 0:
                asyncio.run(awaited(copies_[1]))
            copies_[-1].wait(30)
            return sum(copy.done for copy in copies_)

        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(use, range(80))) == {3}
    assert bytes_of(fake, far) == DATA


# --- What holds the memory ----------------------------------------------------------------------


def test_closing_under_a_copy_is_refused(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    pinned = device.registered(buffer)
    fake.hold()
    copies_ = [pinned.copy_to_device(far), pinned.copy_from_device(far)]
    with pytest.raises(md.InvalidArgument) as caught:
        pinned.close()
    assert caught.value.errno == errno.EBUSY
    assert "2 copies" in caught.value.message
    with device.registered(buffer) as other:  # which has none under way
        assert other.in_flight == 0
    assert not pinned.closed
    fake.let()
    copies_[-1].wait(10)
    pinned.close()
    assert fake.registrations == {}


def test_what_others_copy_is_waited_for_where_it_is_told(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    theirs = fake.create_stream()
    with device.registered(buffer) as pinned:
        fake.hold()
        fake.copy(far, pinned.address, NBYTES, Kind.TO_DEVICE, theirs)
        held_ = pinned.hold_for(theirs)
        with pytest.raises(md.InvalidArgument) as caught:
            pinned.close()
        assert caught.value.errno == errno.EBUSY
        timer = threading.Timer(0.02, fake.let)
        timer.start()
    assert held_.done  # else the fake would have seen it unregistered under the copy
    assert bytes_of(fake, far) == DATA
    timer.join()


def test_leaving_the_block_waits(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    fake.hold()
    timer = threading.Timer(0.05, fake.let)
    with pytest.raises(ZeroDivisionError):
        with device.registered(buffer) as pinned:
            copy = pinned.copy_to_device(far)
            timer.start()
            1 / 0
    assert copy.done
    assert bytes_of(fake, far) == DATA
    assert fake.registrations == {}
    timer.join()


@pytest.mark.parametrize("keep", [True, False])
def test_dropped_under_a_copy_nothing_goes(fake: FakeDriver, far: int, keep: bool) -> None:
    """Everything is dropped: handle, device, descriptor. The copy holds the pages to its end."""
    buffer = BufferMemoryDescriptor(NBYTES, recycle=False)
    buffer.write_bytes(0, DATA)
    address = buffer.address
    fake.hold()
    copy: Copy | None = CudaDevice(driver=fake).registered(buffer).copy_to_device(far)
    if not keep:
        copy = None
    buffer.close()
    del buffer
    gc.collect()
    assert mapped(address, NBYTES) is not None
    assert len(fake.registrations) == 1
    fake.let()
    if copy is not None:
        copy.wait(10)
    while copies._in_flight:
        copies.settle()
    assert bytes_of(fake, far) == DATA
    assert fake.registrations == {}
    assert mapped(address, NBYTES) is None


def test_the_next_call_lets_go_of_what_was_dropped(fake: FakeDriver, far: int) -> None:
    device = CudaDevice(driver=fake)
    with BufferMemoryDescriptor(NBYTES, recycle=False) as first:
        with BufferMemoryDescriptor(NBYTES, recycle=False) as second:
            device.registered(first).copy_to_device(far)
            while not fake.idle:
                pass
            assert len(fake.registrations) == 1
            with device.registered(second) as pinned:
                assert list(fake.registrations) == [second.address]
                pinned.copy_to_device(far).wait(10)
        assert held(first) == 0


def test_events_are_used_again_and_go_with_their_device(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    with device.registered(buffer) as pinned:
        for _ in range(5):
            pinned.copy_to_device(far).wait(10)
        assert fake.calls.count("create_event") == 1
        fake.hold()
        many = [pinned.copy_to_device(far, 0, 1) for _ in range(100)]
        assert fake.calls.count("create_event") == 100
        fake.let()
        many[-1].wait(10)
    del many
    assert len(fake.events) == 64
    del device, pinned
    assert (fake.events, fake.streams) == ({}, {})


# --- What fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "after"),
    [("create_stream", 0), ("create_event", 0), ("copy", 0), ("copy", 1), ("record_event", 0)],
)
def test_a_copy_that_is_refused_leaves_nothing_under_way(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor, call: str, after: int
) -> None:
    device = CudaDevice(driver=fake)
    parts = [SubMemoryDescriptor(buffer, 0, page_size), SubMemoryDescriptor(buffer, 9000, 100)]
    with device.registered(MultiMemoryDescriptor(parts)) as pinned:
        fake.fail(call, 700, after)
        with pytest.raises(md.DeviceError) as caught:
            pinned.copy_to_device(far)
        assert (caught.value.code, caught.value.errno) == (700, errno.EIO)
        assert pinned.in_flight == 0
        assert fake.idle
        pinned.copy_to_device(far).wait(10)
    assert held(buffer) == 0


def test_a_copy_that_fails_under_way(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)

    async def wait(copy: Copy) -> None:
        await copy

    def failing(asked: Callable[[Copy], object]) -> None:
        stream = fake.create_stream()
        fake.fail_next_copy_later(700)
        copy = pinned.copy_to_device(far, stream=stream)
        for _ in range(2):  # and whenever it is asked
            with pytest.raises(md.DeviceError) as caught:
                asked(copy)
            assert (caught.value.code, caught.value.errno) == (700, errno.EIO)
        assert copy.failed

    with device.registered(buffer) as pinned:
        failing(lambda copy: copy.wait(10))
        failing(lambda copy: asyncio.run(wait(copy)))
        assert bytes_of(fake, far) == bytes(NBYTES)


def test_a_question_that_cuda_does_not_allow_tells_nothing(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    """While somebody captures a graph: the copy is under way all the same."""
    with CudaDevice(driver=fake).registered(buffer) as pinned:
        fake.hold()
        copy = pinned.copy_to_device(far)
        fake.fail("event_done", 900)
        with pytest.raises(md.DeviceError) as caught:
            copy.wait(10)
        assert caught.value.code == 900
        fake.fail("event_done", 900)
        with pytest.raises(md.DeviceError):
            pinned.close()
        assert not pinned.closed
        assert pinned.in_flight == 1
        fake.let()
        copy.wait(10)


def test_a_failure_that_nobody_asked_for_is_raised_on_leaving(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    fake.fail_next_copy_later(700)
    with pytest.raises(md.DeviceError) as caught:
        with device.registered(buffer) as pinned:
            pinned.copy_to_device(far)
    assert caught.value.code == 700
    assert (fake.registrations, held(buffer)) == ({}, 0)


def test_what_it_was_used_for(fake: FakeDriver, buffer: BufferMemoryDescriptor, far: int) -> None:
    device = CudaDevice(driver=fake)
    with device.registered(buffer) as pinned:
        told = pinned.statistics()
        assert (told.nbytes, told.parts) == (NBYTES, 1)
        assert (told.copies, told.copied_bytes, told.in_flight) == (0, 0, 0)
        pinned.copy_to_device(far).wait(30)
        pinned.copy_to_device(far, 0, 10).wait(30)
        told = pinned.statistics()
        assert (told.copies, told.copied_bytes, told.in_flight) == (2, NBYTES + 10, 0)
    assert pinned.statistics() == told
