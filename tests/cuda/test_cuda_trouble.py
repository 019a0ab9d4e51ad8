"""Interrupts, forks, a driver that is not there; the boundary, as far as it goes without one."""

from __future__ import annotations

import asyncio
import builtins
import errno
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from children import in_child
from fake_driver import FakeDriver
from interrupts import interrupted

import memdesc as md
from memdesc import BufferMemoryDescriptor
from memdesc.dma import Copy, CudaDevice, PinnedMemory
from memdesc.dma.cuda import CudaDriver, copies, driver as boundary
from memdesc.dma.cuda.registrations import books
from memdesc.vm.pages import page_size

NBYTES = 4 * page_size


@pytest.fixture
def buffer() -> Iterator[BufferMemoryDescriptor]:
    with BufferMemoryDescriptor(NBYTES, recycle=False) as made:
        yield made


@pytest.fixture
def far(fake: FakeDriver) -> Iterator[int]:
    pointer = fake.allocate(NBYTES)
    yield pointer
    fake.let()
    while not fake.idle:
        pass
    fake.free(pointer)


def held(buffer: BufferMemoryDescriptor) -> int:
    return buffer.memory.lifecycle.registrations


# --- Interrupts ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_struck_anywhere_nothing_stays(fake: FakeDriver, far: int) -> None:
    with BufferMemoryDescriptor(NBYTES, recycle=False) as buffer:
        device: list[CudaDevice] = []

        def work() -> None:
            with device[0].registered(buffer) as pinned:
                pinned.copy_to_device(far)
                pinned.copy_from_device(far).wait(10)

        def prepare() -> Callable[[], object]:
            device[:] = [CudaDevice(driver=fake)]
            return work

        gc.collect()
        gc.disable()  # what others left behind is not to be finalized under a strike
        try:
            for number in interrupted(prepare):
                while not fake.idle:
                    pass
                copies.settle()
                books.settle()
                assert copies._in_flight == {}, number
                assert (fake.registrations, len(books), held(buffer)) == ({}, 0, 0), number
        finally:
            gc.enable()
            device.clear()


def test_an_interrupt_while_waiting_leaves_the_copy_to_its_end(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    fake.hold()
    asked = threading.Event()
    event_done = fake.event_done

    def asking(event: int) -> bool:
        asked.set()
        return event_done(event)

    fake.event_done = asking  # type: ignore[method-assign]

    def strike() -> None:
        asked.wait(30)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    striker = threading.Thread(target=strike)
    with pytest.raises(KeyboardInterrupt):
        with device.registered(buffer) as pinned:
            pinned.copy_to_device(far)
            striker.start()
            # Leaving the block waits, and is struck.
    striker.join(30)
    assert pinned.closed
    assert (len(fake.registrations), held(buffer)) == (1, 1)
    with pytest.raises(md.NotPreparedError):
        pinned.copy_to_device(far)
    fake.let()
    while copies._in_flight:
        copies.settle()
    assert (fake.registrations, held(buffer)) == ({}, 0)


def test_a_copy_that_nobody_knows_the_end_of_holds_the_memory(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    """Struck before its event was recorded, and again while it waits for the stream."""
    device = CudaDevice(driver=fake)
    fake.hold()

    def struck(*_: object) -> Any:
        raise KeyboardInterrupt

    stream_done = fake.stream_done
    fake.record_event = fake.stream_done = struck  # type: ignore[assignment, method-assign]
    with device.registered(buffer) as pinned:
        with pytest.raises(KeyboardInterrupt):
            pinned.copy_to_device(far)
        fake.stream_done = stream_done  # type: ignore[method-assign]
        assert pinned.in_flight == 1
        with pytest.raises(md.InvalidArgument) as caught:
            pinned.close()
        assert caught.value.errno == errno.EBUSY
        fake.let()
    assert (fake.registrations, held(buffer)) == ({}, 0)


# --- Fork ---------------------------------------------------------------------------------------


def test_a_fork_child_has_no_part_in_it(
    fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor
) -> None:
    device = CudaDevice(driver=fake)
    with BufferMemoryDescriptor(page_size) as other:
        dropped = [device.registered(other)]
        with device.registered(buffer) as pinned:
            fake.hold()
            copy = pinned.copy_to_device(far)
            device.registered(other).copy_to_device(far, 0, 10)  # which nobody holds

            def ask() -> list[str]:
                told = []
                calls: list[Callable[[], object]] = [
                    lambda: device.registered(buffer),
                    lambda: pinned.copy_to_device(far),
                    lambda: pinned.copy_from_device(far),
                    lambda: pinned.address,
                    lambda: pinned.device_pointer,
                    lambda: device.registers_read_only,
                    copy.wait,
                    lambda: copy.done,
                    lambda: asyncio.run(awaited(copy)),
                    lambda: CudaDevice(driver=fake),
                ]
                before = len(fake.calls)
                for call in calls[:-1]:
                    try:
                        call()
                    except md.MemdescError as error:
                        told.append(type(error).__name__)
                assert pinned.closed
                pinned.close()
                with pinned:
                    pass
                dropped.clear()
                assert fake.calls[before:] == []  # nothing of that reached the driver
                try:
                    calls[-1]()
                except md.UnsupportedError as error:
                    told.append(type(error).__name__)
                assert len(books) == 0
                buffer.write_bytes(0, b"the child's")  # the memory itself is as ever
                return told

            assert in_child(ask) == ["ClosedError"] * 9 + ["UnsupportedError"]
            assert not pinned.closed
            assert pinned.in_flight == 1
            assert len(fake.registrations) == 2
            fake.let()
            copy.wait(10)
        assert buffer.read_bytes(0, 11) == b"the child's"
        dropped.clear()


async def awaited(copy: Copy) -> None:
    await copy


# --- Drivers that are not there -----------------------------------------------------------------


class Answer(int):
    """As cudaError_t: a number with a name."""

    name = "cudaErrorThatThereIsNot"


def runtime(**calls: Callable[..., tuple[Any, ...]]) -> ModuleType:
    """A module as cuda.bindings.runtime is: each call gives (error, ...)."""
    module = ModuleType("cuda.bindings.runtime")
    module.cudaGetLastError = lambda: (Answer(0),)  # type: ignore[attr-defined]
    kinds = {kind.value: kind for kind in boundary.Kind}
    module.cudaMemcpyKind = SimpleNamespace(**kinds)  # type: ignore[attr-defined]
    for name, call in calls.items():
        setattr(module, name, call)
    return module


def reached(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> CudaDriver:
    monkeypatch.setattr(boundary, "_import_runtime", lambda: module)
    return CudaDriver()


def test_the_boundary_turns_answers_into_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    forgotten: list[int] = []
    code = [712]

    def answer(*arguments: object) -> tuple[Any, ...]:
        return (Answer(code[0]),)

    driver = reached(
        runtime(cudaHostRegister=answer, cudaEventQuery=answer, cudaStreamQuery=answer),
        monkeypatch,
    )
    driver._runtime.cudaGetLastError = lambda: forgotten.append(1)
    for number, wanted in (
        (712, errno.EBUSY),
        (713, errno.ENOENT),
        (2, errno.ENOMEM),
        (1, errno.EINVAL),
        (801, errno.EOPNOTSUPP),
        (719, errno.EIO),
    ):
        code[0] = number
        with pytest.raises(md.DeviceError) as caught:
            driver.register(4096, 4096, 3)
        error = caught.value
        assert (error.errno, error.code, error.name) == (wanted, number, Answer.name)
        assert "cudaHostRegister" in error.message
    assert len(forgotten) == 6  # else the next kernel of somebody else would seem to have failed
    code[0] = 600
    assert not driver.event_done(1)
    assert not driver.stream_done(1)
    assert len(forgotten) == 8
    code[0] = 0
    assert driver.event_done(1)
    assert driver.stream_done(1)
    driver.register(4096, 4096, 3)
    code[0] = 700
    with pytest.raises(md.DeviceError):
        driver.event_done(1)
    assert len(forgotten) == 9


def test_a_library_that_can_not_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> tuple[Any, ...]:
        raise RuntimeError("Failed to dlopen libcudart")

    driver = reached(runtime(cudaGetDeviceCount=missing), monkeypatch)
    with pytest.raises(md.UnsupportedError) as caught:
        CudaDevice(driver=driver)
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_boundary_in_a_fork_child(monkeypatch: pytest.MonkeyPatch) -> None:
    reached_cuda: list[int] = []
    driver = reached(runtime(cudaGetDeviceCount=lambda: reached_cuda.append(1)), monkeypatch)

    def ask() -> tuple[int, int]:
        with pytest.raises(md.DeviceError) as caught:
            driver.device_count()
        with pytest.raises(md.UnsupportedError):
            CudaDevice(driver=driver)
        return caught.value.code, len(reached_cuda)

    assert in_child(ask) == (3, 0)


def test_without_cuda_bindings_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "cuda":
            raise ModuleNotFoundError("No module named 'cuda'")
        return real(name, *rest)

    monkeypatch.setattr(boundary, "_loaded", None)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(md.UnsupportedError) as caught:
        CudaDevice()
    assert "pip install 'memdesc[cuda]'" in caught.value.message
    assert isinstance(caught.value.__cause__, ImportError)


@pytest.mark.parametrize(("version", "works"), [("12.9.0", False), ("12.9.1.post1", True)])
def test_a_cuda_bindings_that_holds_the_gil_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str, works: bool
) -> None:
    package, bindings = ModuleType("cuda"), ModuleType("cuda.bindings")
    package.bindings = bindings  # type: ignore[attr-defined]
    bindings.__version__ = version  # type: ignore[attr-defined]
    bindings.runtime = runtime()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", package)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", bindings.runtime)
    if works:
        assert boundary._import_runtime() is bindings.runtime
        return
    with pytest.raises(md.UnsupportedError):
        boundary._import_runtime()


def test_the_calls_are_those_of_cuda_bindings() -> None:
    """Every name and number that we use is in the package that is installed, if one is."""
    installed = pytest.importorskip("cuda.bindings.runtime")
    driver = CudaDriver()
    names = [
        constant
        for method in vars(CudaDriver).values()
        if callable(method)
        for constant in method.__code__.co_consts
        if isinstance(constant, str) and constant.startswith("cuda") and " " not in constant
    ]
    assert len(names) > 15
    for name in names:
        if not name.startswith("cudaError"):
            assert callable(getattr(installed, name)), name
    for attribute in boundary.Attribute:
        assert hasattr(installed.cudaDeviceAttr, attribute.value)
    for kind in boundary.Kind:
        assert hasattr(installed.cudaMemcpyKind, kind.value)
    assert (
        installed.cudaHostRegisterPortable,
        installed.cudaHostRegisterMapped,
        installed.cudaHostRegisterReadOnly,
        installed.cudaStreamNonBlocking,
        installed.cudaEventBlockingSync,
        installed.cudaEventDisableTiming,
    ) == (
        boundary.PORTABLE,
        boundary.MAPPED,
        boundary.READ_ONLY,
        boundary.NON_BLOCKING,
        boundary.BLOCKING_SYNC,
        boundary.NO_TIMING,
    )
    numbers = {
        "cudaErrorInvalidValue": boundary.INVALID_VALUE,
        "cudaErrorMemoryAllocation": boundary.OUT_OF_MEMORY,
        "cudaErrorInitializationError": boundary.NOT_INITIALIZED,
        "cudaErrorCudartUnloading": boundary.UNLOADING,
        "cudaErrorStubLibrary": boundary.STUB,
        "cudaErrorInsufficientDriver": boundary.OLD_DRIVER,
        "cudaErrorNoDevice": boundary.NO_DEVICE,
        "cudaErrorInvalidDevice": boundary.NO_SUCH_DEVICE,
        "cudaErrorNotReady": boundary.NOT_READY,
        "cudaErrorHostMemoryAlreadyRegistered": boundary.ALREADY_REGISTERED,
        "cudaErrorHostMemoryNotRegistered": boundary.NOT_REGISTERED,
        "cudaErrorNotSupported": boundary.NOT_SUPPORTED,
    }
    for name, number in numbers.items():
        assert int(getattr(installed.cudaError_t, name)) == number
    try:
        # Each call, with arguments of its kinds: without a driver CUDA answers all of them alike.
        driver.device_count()
    except md.DeviceError as error:
        assert error.code in (boundary.OLD_DRIVER, boundary.NO_DEVICE, boundary.STUB)
        for call in every_call(driver):
            with pytest.raises(md.DeviceError) as caught:
                call()
            assert caught.value.code == error.code


def every_call(driver: CudaDriver) -> list[Callable[[], object]]:
    return [
        driver.get_device,
        lambda: driver.set_device(0),
        lambda: driver.device_name(0),
        lambda: driver.attribute(boundary.Attribute.HOST_REGISTER, 0),
        lambda: driver.register(4096, 4096, 3),
        lambda: driver.unregister(4096),
        lambda: driver.device_pointer(4096),
        lambda: driver.allocate(1),
        lambda: driver.free(1),
        lambda: driver.allocate_host(1),
        lambda: driver.free_host(1),
        lambda: driver.copy(1, 1, 1, boundary.Kind.TO_DEVICE, 0),
        driver.create_stream,
        lambda: driver.stream_done(1),
        lambda: driver.destroy_stream(1),
        driver.create_event,
        lambda: driver.record_event(1, 0),
        lambda: driver.event_done(1),
        lambda: driver.wait_event(1),
        lambda: driver.destroy_event(1),
    ]


@pytest.mark.slow
def test_importing_asks_for_no_gpu() -> None:
    # cuda-bindings 12 has a hook by which every interpreter imports a part of it.
    code = """
import sys
before = set(sys.modules)
import memdesc.dma, memdesc.dma.cuda
print(any(name.partition(".")[0] == "cuda" for name in set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "False\n"


def test_repr_tells_the_state(fake: FakeDriver, far: int, buffer: BufferMemoryDescriptor) -> None:
    pinned: PinnedMemory = CudaDevice(driver=fake).registered(buffer)
    copy = pinned.copy_to_device(far)
    copy.wait(10)
    assert "over" in repr(copy)
    assert f"{NBYTES:,}" in repr(pinned)
    pinned.close()
    assert "closed" in repr(pinned)
