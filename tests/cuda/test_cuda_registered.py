"""What is registered, how often, how long; and that nothing stays where it fails."""

from __future__ import annotations

import errno
import gc
from collections.abc import Iterator

import pytest
from fake_driver import FakeDriver, mapped

import memdesc as md
from memdesc import Access, BufferMemoryDescriptor, MultiMemoryDescriptor, SubMemoryDescriptor
from memdesc.dma import CudaDevice, PinnedMemory
from memdesc.dma.cuda.driver import READ_ONLY, Attribute, Driver
from memdesc.dma.cuda.registrations import books
from memdesc.vm.pages import page_size

PAGES = 8


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(PAGES * page_size, recycle=False) as made:
        yield made


def held(buffer: BufferMemoryDescriptor) -> tuple[int, int]:
    return buffer.prepare_count, buffer.memory.lifecycle.registrations


def sizes(fake: FakeDriver) -> list[int]:
    """Of what is registered, by address; in pages."""
    return [known.nbytes // page_size for _, known in sorted(fake.registrations.items())]


# --- Where it lies ------------------------------------------------------------------------------


def test_the_pages_of_the_view_are_registered(
    device: CudaDevice, buffer: BufferMemoryDescriptor
) -> None:
    with device.registered(buffer) as pinned:
        assert (pinned.address, pinned.nbytes) == (buffer.address, buffer.length)
        assert pinned.access is Access.READ_WRITE
        assert pinned.device_segments() == [(pinned.device_pointer, buffer.length)]
        pinned.array()[0] = 7
        assert buffer.read_bytes(0, 1) == b"\7"
        assert held(buffer) == (0, 1)
        assert len(books) == 1
        with buffer.snapshot() as frozen:
            assert frozen.reason is md.SnapshotReason.REGISTERED
    assert (pinned.closed, len(books), held(buffer)) == (True, 0, (0, 0))
    for ask in (lambda: pinned.address, lambda: pinned.device_pointer, pinned.array):
        with pytest.raises(md.NotPreparedError):
            ask()
    pinned.close()
    with buffer.snapshot() as frozen:
        assert frozen.copied_bytes == 0


def test_a_part_is_whole_pages(fake: FakeDriver, buffer: BufferMemoryDescriptor) -> None:
    device = CudaDevice(driver=fake)
    part = SubMemoryDescriptor(buffer, page_size + 100, page_size)
    with device.registered(part) as pinned:
        assert sizes(fake) == [2]
        assert list(fake.registrations) == [buffer.address + page_size]
        assert (pinned.address, pinned.nbytes) == (buffer.address + page_size + 100, page_size)
        assert pinned.device_pointer - 100 in [
            fake.device_pointer(start) for start in fake.registrations
        ]
        buffer.write_bytes(page_size + 100, b"here")
        assert bytes(pinned.array()[:4]) == b"here"


def test_several_lie_in_several_places(device: CudaDevice, buffer: BufferMemoryDescriptor) -> None:
    with BufferMemoryDescriptor(100, recycle=False) as other:
        several = MultiMemoryDescriptor([SubMemoryDescriptor(buffer, 50, 100), other])
        with device.registered(several) as pinned:
            assert [nbytes for _, nbytes in pinned.device_segments()] == [100, 100]
            for ask in (lambda: pinned.address, lambda: pinned.device_pointer, pinned.array):
                with pytest.raises(md.InvalidArgument) as caught:
                    ask()
                assert caught.value.errno == errno.EINVAL
            assert held(other) == (0, 1)
        assert held(other) == held(buffer) == (0, 0)


def test_a_mapping_is_registered_where_it_lies(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    mapping = buffer.map(unique=True, access=Access.READ_ONLY)
    with device.registered(buffer), device.registered(mapping) as pinned:
        assert pinned.address == mapping.address != buffer.address
        assert held(buffer) == (0, 2)
        assert sizes(fake) == [PAGES, PAGES]
        with pytest.raises(BufferError):
            mapping.unmap()
    assert held(buffer) == (0, 0)
    mapping.unmap()


def test_memory_of_any_kind(device: CudaDevice, buffer: BufferMemoryDescriptor) -> None:
    plain = bytearray(3 * page_size)
    with BufferMemoryDescriptor(100) as other:
        frozen = other.snapshot()
    for memory in (
        md.MemoryDescriptor.with_buffer(plain, md.Direction.OUT_IN),
        md.MemoryDescriptor.with_address_range(buffer.address, 100, md.Direction.OUT_IN),
        SubMemoryDescriptor(buffer, 1, 2),
    ):
        with device.registered(memory) as pinned:
            assert pinned.access is Access.READ_WRITE
    if device.registers_read_only:
        with device.registered(frozen) as pinned:
            assert pinned.access is Access.READ_ONLY
            assert not pinned.array().flags.writeable
    frozen.close()


# --- Counting -----------------------------------------------------------------------------------


def test_pages_are_registered_once_and_shared(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    first, second = CudaDevice(0, driver=fake), CudaDevice(1, driver=fake)
    middle = first.registered(SubMemoryDescriptor(buffer, 2 * page_size, 2 * page_size))
    whole = second.registered(buffer)
    again = second.registered(buffer)
    assert sizes(fake) == [2, 2, 4]
    assert whole.address == buffer.address
    assert len(whole.device_segments()) == 1
    middle.close()
    assert sizes(fake) == [2, 2, 4]  # whole has them all the same
    again.close()
    assert len(fake.registrations) == 3
    assert held(buffer)[1] > 0
    whole.close()
    assert fake.registrations == {}
    assert held(buffer) == (0, 0)


def test_a_buffer_that_grows_registers_what_is_new(fake: FakeDriver) -> None:
    device = CudaDevice(driver=fake)
    with BufferMemoryDescriptor(page_size, reserve=4 * page_size) as buffer:
        with device.registered(buffer) as before:
            buffer.grow(3 * page_size)
            assert before.nbytes == page_size
            with device.registered(buffer) as after:
                assert after.nbytes == 3 * page_size
                assert sizes(fake) == [1, 2]
                assert after.device_segments() == [(after.device_pointer, 3 * page_size)]


def test_many_threads_share_it(fake: FakeDriver, buffer: BufferMemoryDescriptor) -> None:
    from concurrent.futures import ThreadPoolExecutor

    device = CudaDevice(1, driver=fake)

    def use(number: int) -> int:
        start = number % PAGES * page_size
        with device.registered(SubMemoryDescriptor(buffer, start, buffer.length - start)) as pinned:
            return pinned.nbytes

    with ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(use, range(64)))) == 64
    assert fake.registrations == {}
    assert held(buffer) == (0, 0)


# --- Lifetime -----------------------------------------------------------------------------------


def test_the_memory_outlives_its_descriptor(fake: FakeDriver) -> None:
    device = CudaDevice(driver=fake)
    buffer = BufferMemoryDescriptor(page_size, recycle=False)
    address = buffer.address
    pinned = device.registered(buffer)
    buffer.close()
    del buffer
    gc.collect()
    assert mapped(address, page_size) is not None
    pinned.array()[0] = 1
    pinned.close()  # the fake sees whether it was unmapped before
    del pinned
    assert mapped(address, page_size) is None


def test_dropped_it_is_unregistered(fake: FakeDriver, buffer: BufferMemoryDescriptor) -> None:
    device = CudaDevice(driver=fake)
    device.registered(buffer)
    assert (fake.registrations, held(buffer)) == ({}, (0, 0))
    cycle: list[object] = [device.registered(buffer)]
    cycle.append(cycle)
    del cycle
    assert sizes(fake) == [PAGES]
    gc.collect()
    assert (fake.registrations, held(buffer)) == ({}, (0, 0))


def test_dropped_by_whoever_is_in_the_books(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    """The collector may strike in the midst of another registration, in the same thread."""
    device = CudaDevice(driver=fake)
    with BufferMemoryDescriptor(page_size, recycle=False) as other:
        dropped: list[PinnedMemory] = [device.registered(other)]
        register = fake.register

        def collecting(address: int, nbytes: int, flags: int) -> None:
            dropped.clear()
            register(address, nbytes, flags)

        fake.register = collecting  # type: ignore[method-assign]
        with device.registered(buffer):
            assert sizes(fake) == [PAGES]
        assert held(other) == (0, 0)


# --- Read-only ----------------------------------------------------------------------------------


def test_read_only_memory_asks_for_the_flag(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    mapping = buffer.map(access=Access.READ_ONLY)
    with device.registered(mapping) as pinned:
        (known,) = fake.registrations.values()
        assert known.flags & READ_ONLY
        assert pinned.access is Access.READ_ONLY
    with device.registered(buffer, access=Access.READ_ONLY) as pinned:
        assert pinned.access is Access.READ_ONLY
        (known,) = fake.registrations.values()
        assert not known.flags & READ_ONLY  # another may register the same pages for writing
    with pytest.raises(md.SealedError) as caught:
        device.registered(mapping, access=Access.READ_WRITE)
    assert caught.value.errno == errno.EACCES
    fake.attributes[Attribute.READ_ONLY_REGISTER] = 0
    assert device.registers_read_only
    fake.strict = False  # the device walks this process's own page tables
    with device.registered(mapping):
        (known,) = fake.registrations.values()
        assert not known.flags & READ_ONLY
    del mapping


def test_read_only_memory_where_the_device_can_not(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    fake.attributes[Attribute.READ_ONLY_REGISTER] = 0
    fake.attributes[Attribute.HOST_PAGE_TABLES] = 0
    device = CudaDevice(driver=fake)
    assert not device.registers_read_only
    mapping = buffer.map(access=Access.READ_ONLY)
    with pytest.raises(md.UnsupportedError) as caught:
        device.registered(mapping)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert (fake.registrations, held(buffer)) == ({}, (0, 0))
    fake.attributes[Attribute.HOST_REGISTER] = 0
    with pytest.raises(md.UnsupportedError) as caught:
        device.registered(buffer)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert held(buffer) == (0, 0)
    mapping.unmap()


# --- What fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [2, 712, 700])
@pytest.mark.parametrize(
    ("call", "after"), [("register", 0), ("register", 1), ("device_pointer", 0)]
)
def test_registering_that_fails_leaves_nothing(
    fake: FakeDriver, buffer: BufferMemoryDescriptor, call: str, after: int, code: int
) -> None:
    device = CudaDevice(driver=fake)
    with BufferMemoryDescriptor(page_size, recycle=False) as other:
        several = MultiMemoryDescriptor([other, buffer])
        fake.fail(call, code, after)
        with pytest.raises(md.DeviceError) as caught:
            device.registered(several)
        assert (caught.value.code, caught.value.errno) == (
            code,
            {2: errno.ENOMEM, 712: errno.EBUSY, 700: errno.EIO}[code],
        )
        assert (fake.registrations, held(buffer), held(other)) == ({}, (0, 0), (0, 0))
        with device.registered(several):
            assert sorted(sizes(fake)) == [1, PAGES]


def test_pages_that_something_else_has_registered(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    fake.register(buffer.address + page_size, page_size, 3)
    with pytest.raises(md.DeviceError) as caught:
        device.registered(buffer)
    assert (caught.value.code, caught.value.errno) == (712, errno.EBUSY)
    assert (sizes(fake), held(buffer)) == ([1], (0, 0))
    fake.unregister(buffer.address + page_size)


def test_pages_that_cuda_does_not_let_go_of_stay_mapped(fake: FakeDriver) -> None:
    device = CudaDevice(driver=fake)
    buffer = BufferMemoryDescriptor(page_size, recycle=False)
    address = buffer.address
    pinned = device.registered(buffer)
    fake.fail("unregister", 700)
    with pytest.raises(md.DeviceError) as caught:
        pinned.close()
    assert caught.value.errno == errno.EIO
    assert pinned.closed
    assert held(buffer) == (0, 1)
    del caught  # its frames hold the pages too
    # Whoever registers the same pages next has them, and unregisters them.
    fake.fail("unregister", 700, after=1)
    with device.registered(buffer):
        assert sizes(fake) == [1]
    assert held(buffer) == (0, 0)
    pinned = device.registered(buffer)
    buffer.close()
    with pytest.raises(md.DeviceError):
        pinned.close()
    del buffer, pinned
    gc.collect()
    assert mapped(address, page_size) is not None
    assert len(books) == 1
    books._all[0].stuck = False
    books.settle()
    assert mapped(address, page_size) is None


def test_pages_that_somebody_unregistered(fake: FakeDriver) -> None:
    device = CudaDevice(driver=fake)
    with BufferMemoryDescriptor(page_size, recycle=False) as buffer:
        pinned = device.registered(buffer)
        fake.unregister(buffer.address)
        with pytest.raises(md.DeviceError) as caught:
            pinned.close()
        assert (caught.value.code, caught.value.errno) == (713, errno.ENOENT)
        assert (len(books), held(buffer)) == (0, (0, 0))


@pytest.mark.parametrize("memory", [b"bytes", None, 4096])
def test_what_is_no_memory_of_ours(fake: FakeDriver, memory: object) -> None:
    with pytest.raises(md.InvalidArgument):
        CudaDevice(driver=fake).registered(memory)  # type: ignore[arg-type]


def test_closed_and_empty(fake: FakeDriver, buffer: BufferMemoryDescriptor) -> None:
    device = CudaDevice(driver=fake)
    buffer.set_length(0)
    with pytest.raises(md.InvalidArgument) as caught:
        device.registered(buffer)
    assert caught.value.errno == errno.EINVAL
    mapping = buffer.map(length=None) if buffer.length else None
    assert mapping is None
    buffer.close()
    with pytest.raises(md.ClosedError):
        device.registered(buffer)
    assert fake.registrations == {}


# --- Devices ------------------------------------------------------------------------------------


def test_a_device_tells_what_it_is(device: CudaDevice, driver: Driver) -> None:
    assert device.name
    assert str(device.index) in repr(device)
    assert device.attribute(Attribute.HOST_REGISTER) in (0, 1)
    with pytest.raises(md.InvalidArgument) as caught:
        CudaDevice(driver.device_count(), driver=driver)
    assert caught.value.errno == errno.ENODEV
    with pytest.raises(md.InvalidArgument):
        CudaDevice(-1, driver=driver)


@pytest.mark.parametrize(("code", "words"), [(35, "driver"), (100, "GPU"), (3, "spawn")])
def test_no_gpu_says_why(fake: FakeDriver, code: int, words: str) -> None:
    fake.fail("device_count", code)
    with pytest.raises(md.UnsupportedError) as caught:
        CudaDevice(driver=fake)
    assert isinstance(caught.value.__cause__, md.DeviceError)
    assert caught.value.__cause__.code == code
    assert words in caught.value.message
    fake.fail("device_count", 700)
    with pytest.raises(md.DeviceError) as other:
        CudaDevice(driver=fake)
    assert other.value.code == 700


def test_the_threads_own_device_stays_current(
    fake: FakeDriver, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(1, driver=fake)
    with device.registered(buffer):
        assert fake.get_device() == 0
        fake.fail("device_pointer", 700)
        with pytest.raises(md.DeviceError):
            device.registered(buffer)
        assert fake.get_device() == 0
    assert "set_device 1" in fake.calls
    fake.fail("set_device", 101)
    with pytest.raises(md.DeviceError) as caught:
        device.registered(buffer)
    assert caught.value.errno == errno.ENODEV
    assert fake.get_device() == 0
    assert held(buffer) == (0, 0)
