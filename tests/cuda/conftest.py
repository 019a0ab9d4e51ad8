"""The drivers that the tests run against: a fake one kept to CUDA's rules, and CUDA where it is."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
from fake_driver import FakeDriver, MemoryOf
from fake_runtime import FakeRuntime

import memdesc as md
from memdesc.dma.cuda import CudaDevice, CudaDriver, copies, driver as boundary, registrations
from memdesc.dma.cuda.driver import Driver


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


@pytest.fixture(scope="module", autouse=True)
def no_gpu() -> str:
    """Why there is none, or "". CUDA opens files and starts threads when it is first used: now,
    before the leak guard of any test looks.
    """
    try:
        device = CudaDevice()
    except md.UnsupportedError as error:
        return error.message
    with md.BufferMemoryDescriptor(4096) as buffer, device.registered(buffer) as pinned:
        with device.current() as driver:
            pointer = driver.allocate(4096)
        pinned.copy_to_device(pointer).wait(60)
        pinned.copy_from_device(pointer).wait(60)
        with device.current() as driver:
            driver.free(pointer)
    return ""


OPENED_WHEN_NEEDED = pytest.mark.leaves("fd", "mapping", reason="CUDA opens its devices at need")


@pytest.fixture(
    params=["fake", "boundary", pytest.param("cuda", marks=OPENED_WHEN_NEEDED)],
)
def driver(
    request: pytest.FixtureRequest, no_gpu: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Driver]:
    """The fake driver, that one behind the boundary to CUDA, and CUDA.

    CUDA is skipped with what it says where it has no GPU.
    """
    if request.param == "cuda":
        if no_gpu:
            pytest.skip(f"no GPU: {no_gpu}")
        yield CudaDriver()
        return
    fake: FakeDriver = request.getfixturevalue("fake")
    if request.param == "fake":
        yield fake
        return
    pytest.importorskip("cuda.bindings.runtime")
    runtime = FakeRuntime(fake)
    monkeypatch.setattr(boundary, "_import_runtime", lambda: runtime)
    yield CudaDriver()
    assert int(runtime.cudaGetLastError()[0]) == 0  # nobody finds an error of ours


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
