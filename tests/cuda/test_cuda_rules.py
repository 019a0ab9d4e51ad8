"""The rules that the fake driver is held to, asked of CUDA too where there is a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from children import in_child
from fake_driver import MemoryOf

import memdesc as md
from memdesc import Access, BufferMemoryDescriptor, SubMemoryDescriptor
from memdesc.dma import CudaDevice
from memdesc.dma.cuda.driver import (
    ALREADY_REGISTERED,
    INVALID_VALUE,
    MAPPED,
    NOT_REGISTERED,
    PORTABLE,
    READ_ONLY,
    Driver,
    Kind,
)
from memdesc.dma.cuda.registrations import books
from memdesc.vm.pages import page_size

PAGES = 8
NBYTES = PAGES * page_size
DATA = bytes(range(256)) * (NBYTES // 256)


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(NBYTES, max_access=Access.READ_WRITE, recycle=False) as made:
        made.write_bytes(0, DATA)
        yield made


@pytest.fixture
def register(driver: Driver, buffer: BufferMemoryDescriptor) -> Iterator[Callable[..., None]]:
    """Registers so many pages of the buffer from one on, by a bare call; undone after the test."""
    registered: list[int] = []

    def call(page: int, pages: int) -> None:
        start = buffer.address + page * page_size
        driver.register(start, pages * page_size, PORTABLE | MAPPED)
        registered.append(start)

    yield call
    for start in registered:
        with contextlib.suppress(md.DeviceError):  # the test did it
            driver.unregister(start)


def refused(call: Callable[[], object]) -> int:
    with pytest.raises(md.DeviceError) as caught:
        call()
    return caught.value.code


# --- Registering --------------------------------------------------------------------------------


def test_no_page_is_registered_twice(
    driver: Driver, buffer: BufferMemoryDescriptor, register: Callable[..., None]
) -> None:
    register(0, 2)
    for page, pages in ((0, 2), (1, 1), (1, 3)):
        assert refused(partial(register, page, pages)) == ALREADY_REGISTERED
    with pytest.raises(md.DeviceError) as caught:
        CudaDevice(driver=driver).registered(buffer)
    assert (caught.value.code, len(books)) == (ALREADY_REGISTERED, 0)
    register(2, 1)  # beside it
    driver.unregister(buffer.address)
    driver.unregister(buffer.address + 2 * page_size)
    register(0, 4)


def test_it_is_unregistered_as_it_was_registered(
    driver: Driver, buffer: BufferMemoryDescriptor, register: Callable[..., None]
) -> None:
    start = buffer.address
    assert refused(lambda: driver.unregister(start)) == NOT_REGISTERED
    register(0, 2)
    assert refused(lambda: driver.unregister(start + page_size)) in (INVALID_VALUE, NOT_REGISTERED)
    driver.unregister(start)
    assert refused(lambda: driver.unregister(start)) == NOT_REGISTERED


def test_what_is_not_mapped_is_not_registered(driver: Driver) -> None:
    with BufferMemoryDescriptor(NBYTES, recycle=False) as gone:
        start = gone.address
    refused(lambda: driver.register(start, NBYTES, PORTABLE | MAPPED))
    assert refused(lambda: driver.unregister(start)) == NOT_REGISTERED


def test_read_only_memory_needs_its_flag(
    driver: Driver, device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    seen = buffer.map(access=Access.READ_ONLY)
    if not device.registers_read_only:
        with pytest.raises(md.UnsupportedError):
            device.registered(seen)
        pytest.skip(f"{device.name} registers no read-only memory")
    if not device.attribute(md.dma.cuda.Attribute.HOST_PAGE_TABLES):
        refused(lambda: driver.register(seen.address, NBYTES, PORTABLE | MAPPED))
    driver.register(seen.address, NBYTES, PORTABLE | MAPPED | READ_ONLY)
    driver.unregister(seen.address)
    pointer = memory_of(NBYTES)
    with BufferMemoryDescriptor(NBYTES) as other:
        with device.registered(seen) as pinned, device.registered(other) as back:
            pinned.copy_to_device(pointer).wait(10)
            back.copy_from_device(pointer).wait(10)
            assert other.read_bytes() == DATA


# --- Copies -------------------------------------------------------------------------------------


def test_no_copy_is_of_registered_memory_in_part(
    driver: Driver, device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    with device.registered(SubMemoryDescriptor(buffer, 0, 2 * page_size)), device.current():
        stream = driver.create_stream()
        code = refused(lambda: driver.copy(pointer, buffer.address, NBYTES, Kind.TO_DEVICE, stream))
        driver.destroy_stream(stream)
        assert code == INVALID_VALUE


def test_memory_in_two_registrations_is_copied(
    device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    first = SubMemoryDescriptor(buffer, 0, 2 * page_size)
    with BufferMemoryDescriptor(NBYTES) as other, device.registered(first):
        with device.registered(buffer) as pinned, device.registered(other) as back:
            assert pinned.statistics().parts == 2
            pinned.copy_to_device(pointer).wait(10)
            back.copy_from_device(pointer).wait(10)
            assert other.read_bytes() == DATA


def test_the_device_sees_what_another_process_wrote(
    device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    with BufferMemoryDescriptor(NBYTES, max_access=Access.READ_WRITE) as other:
        with device.registered(buffer) as pinned, device.registered(other) as back:
            in_child(lambda: buffer.write_bytes(0, DATA[::-1]))
            pinned.copy_to_device(pointer).wait(10)
            back.copy_from_device(pointer).wait(10)
            assert in_child(other.read_bytes) == DATA[::-1]


def test_many_copies_by_several_threads(
    device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    failures: list[Exception] = []
    with BufferMemoryDescriptor(NBYTES) as other:
        with device.registered(buffer) as pinned, device.registered(other) as back:

            def use(page: int) -> None:
                at = page * page_size
                try:
                    for _ in range(50):
                        pinned.copy_to_device(pointer + at, at, page_size)
                        last = back.copy_from_device(pointer + at, at, page_size)
                    last.wait(30)
                except Exception as error:  # noqa: BLE001 (shown by the test)
                    failures.append(error)

            threads = [threading.Thread(target=use, args=(page,)) for page in range(PAGES)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert (failures, pinned.in_flight) == ([], 0)
        assert other.read_bytes() == DATA


def test_a_copy_that_nobody_waits_for_ends_with_the_block(
    device: CudaDevice, memory_of: MemoryOf
) -> None:
    """Of some size: it is under way still when the block is left."""
    nbytes = 16 << 20
    pointer = memory_of(nbytes)
    with BufferMemoryDescriptor(nbytes) as buffer, BufferMemoryDescriptor(nbytes) as other:
        buffer.array(dtype="u4")[:] = 0x12345678
        with device.registered(buffer) as pinned:
            pinned.copy_to_device(pointer)
        with device.registered(other) as back:
            last = back.copy_from_device(pointer)
        assert last.done
        assert (other.array(dtype="u4") == 0x12345678).all()
    assert len(books) == 0


def test_the_default_stream(
    device: CudaDevice, memory_of: MemoryOf, buffer: BufferMemoryDescriptor
) -> None:
    pointer = memory_of(NBYTES)
    with device.registered(buffer) as pinned:
        pinned.copy_to_device(pointer, stream=0).wait(10)
        buffer.write_bytes(0, bytes(NBYTES))
        held = pinned.hold_for(0)
        pinned.copy_from_device(pointer, stream=0).wait(10)
        assert held.done
        assert buffer.read_bytes() == DATA
