"""The drivers that the tests run against: a fake one kept to CUDA's rules, and CUDA where it is."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
from fake_driver import FakeDriver

import memdesc as md
from memdesc.dma.cuda import CudaDevice, CudaDriver, copies, registrations
from memdesc.dma.cuda.driver import Driver

MemoryOf = Callable[[int], int]


@pytest.fixture(autouse=True)
def nothing_registered() -> Iterator[None]:
    assert (len(registrations.books), copies._in_flight) == (0, {})
    yield
    gc.collect()
    copies.settle()
    assert (len(registrations.books), copies._in_flight) == (0, {})


@pytest.fixture
def fake(nothing_registered: None) -> Iterator[FakeDriver]:
    """A driver with two devices; no rule of CUDA's may be broken."""
    driver = FakeDriver()
    yield driver
    driver.let()
    for thread in threading.enumerate():
        if thread.name == "memdesc-cuda":
            thread.join(30)
    gc.collect()
    copies.settle()
    assert driver.violations == []
    assert (driver.registrations, driver.allocated) == ({}, {})
    for stream in driver.streams.values():
        if stream.thread is not None:
            stream.thread.join(10)


@pytest.fixture(params=["fake", "cuda"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """Both, one after the other; skipped with what CUDA says where it has no GPU."""
    if request.param == "fake":
        fake: FakeDriver = request.getfixturevalue("fake")
        return fake
    try:
        CudaDevice()
        return CudaDriver()
    except md.UnsupportedError as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture
def device(driver: Driver) -> CudaDevice:
    return CudaDevice(driver=driver)


@pytest.fixture
def memory_of(device: CudaDevice) -> Iterator[MemoryOf]:
    """Allocates memory of the device, which is freed after the test."""
    allocated: list[int] = []

    def allocate(nbytes: int) -> int:
        with device.current() as driver:
            allocated.append(driver.allocate(nbytes))
        return allocated[-1]

    yield allocate
    copies.settle()
    with device.current() as driver:
        for pointer in allocated:
            driver.free(pointer)
