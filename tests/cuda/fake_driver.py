"""A driver that is no CUDA: what `CudaDevice` calls, kept to CUDA's rules, and watched.

Copies are real: a thread of the stream's moves the bytes between real addresses, when it is let.
Memory of the "device" is memory of this process. Whatever breaks a rule is a violation.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from memdesc.dma.cuda.driver import (
    ALREADY_REGISTERED,
    INVALID_VALUE,
    MAPPED,
    NOT_INITIALIZED,
    NOT_REGISTERED,
    PORTABLE,
    READ_ONLY,
    Attribute,
    Kind,
    device_error,
)

MemoryOf = Callable[[int], int]
"""Of the fixture `memory_of`."""

INVALID_HANDLE = 400
_AWAY = 1 << 46
"""What the device adds to an address of registered memory: its pointers are its own."""

NAMES = {
    1: "cudaErrorInvalidValue",
    2: "cudaErrorMemoryAllocation",
    3: "cudaErrorInitializationError",
    4: "cudaErrorCudartUnloading",
    35: "cudaErrorInsufficientDriver",
    100: "cudaErrorNoDevice",
    400: "cudaErrorInvalidResourceHandle",
    700: "cudaErrorIllegalAddress",
    712: "cudaErrorHostMemoryAlreadyRegistered",
    713: "cudaErrorHostMemoryNotRegistered",
}


@dataclass
class Registered:
    nbytes: int
    flags: int


@dataclass
class Work:
    """What a stream is given: moving bytes, or noting that an event has happened."""

    run: Callable[[], None]
    ranges: list[tuple[int, int]] = field(default_factory=list)


class FakeStream:
    def __init__(self, driver: FakeDriver, device: int) -> None:
        self.device, self.driver = device, driver
        self.works: deque[Work] = deque()
        self.failed = 0
        self.let = False
        self.thread: threading.Thread | None = None

    def give(self, work: Work) -> None:
        with self.driver.changed:
            self.works.append(work)
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, daemon=True)
                self.thread.start()
            self.driver.changed.notify_all()

    def _run(self) -> None:
        while True:
            with self.driver.changed:
                while self.works and not (self.driver.running or self.let):
                    self.driver.changed.wait()
                if not self.works:
                    self.thread = None
                    self.driver.changed.notify_all()
                    return
                self.works[0].run()
                self.works.popleft()
                self.driver.changed.notify_all()


class FakeEvent:
    def __init__(self, device: int) -> None:
        self.device = device
        self.stream: FakeStream | None = None
        self.happened = True
        self.destroyed = False
        self.failed = 0


class FakeDriver:
    """Kept to CUDA's rules.

    Attributes
    ----------
    calls : list of str
        In their order; with arguments where that matters.
    violations : list of str
        What CUDA would not have survived, or not told.
    running : bool
        Whether streams work; `hold` and `let` change it.
    strict : bool
        Whether read-only memory needs its flag.
    allows_pageable : bool
        Whether memory that is not registered may be copied, as CUDA lets it be, slowly.
    """

    def __init__(self, devices: int = 2) -> None:
        self.devices = devices
        self.attributes = dict.fromkeys(Attribute, 1)
        self.calls: list[str] = []
        self.violations: list[str] = []
        self.registrations: dict[int, Registered] = {}
        self.streams: dict[int, FakeStream] = {}
        self.events: dict[int, FakeEvent] = {}
        self.allocated: dict[int, ctypes.Array[ctypes.c_char]] = {}
        self.changed = threading.Condition()
        self.running = True
        self.strict = True
        self.allows_pageable = False
        self.current = threading.local()
        self._pid = os.getpid()
        self._next = 1000
        self._faults: dict[str, tuple[int, int]] = {}
        self._breaks = 0
        self._at_last: threading.Timer | None = None

    # -- for tests -------------------------------------------------------------------------------

    def fail(self, call: str, code: int, after: int = 0) -> None:
        """Have a call fail once, after so many that do not."""
        self._faults[call] = code, after

    def fail_next_copy_later(self, code: int) -> None:
        """Have the next copy be accepted, and fail under way."""
        self._breaks = code

    def hold(self) -> None:
        """Have streams stop before what they do next."""
        with self.changed:
            self.running = False
        self._at_last = threading.Timer(20, self.let)  # a test that failed meanwhile is to end
        self._at_last.daemon = True
        self._at_last.start()

    def let(self) -> None:
        """Have them go on."""
        with self.changed:
            self.running = True
            self.changed.notify_all()
        if self._at_last is not None:
            self._at_last.cancel()

    def let_stream(self, handle: int) -> None:
        """Have one of them go on."""
        with self.changed:
            self.streams[handle].let = True
            self.changed.notify_all()

    @property
    def idle(self) -> bool:
        return not any(stream.works for stream in list(self.streams.values()))

    # -- the rules -------------------------------------------------------------------------------

    def _enter(self, call: str, said: str = "") -> None:
        self.calls.append(said or call)
        if os.getpid() != self._pid:
            self.violations.append(f"{call} in a fork child")
            raise self._error(call, NOT_INITIALIZED)
        code, after = self._faults.get(call, (0, 0))
        if code and not after:
            del self._faults[call]
            raise self._error(call, code)
        if code:
            self._faults[call] = code, after - 1

    def _error(self, call: str, code: int) -> Exception:
        return device_error(call, code, NAMES.get(code, f"error {code}"))

    def _new(self) -> int:
        self._next += 1
        return self._next

    def _device(self) -> int:
        return getattr(self.current, "index", 0)

    # -- devices ---------------------------------------------------------------------------------

    def device_count(self) -> int:
        self._enter("device_count")
        return self.devices

    def get_device(self) -> int:
        return self._device()

    def set_device(self, index: int) -> None:
        self._enter("set_device", f"set_device {index}")
        self.current.index = index

    def device_name(self, index: int) -> str:
        self._enter("device_name")
        return f"Fake {index}"

    def attribute(self, attribute: Attribute, index: int) -> int:
        self._enter("attribute")
        return self.attributes[attribute]

    # -- memory ----------------------------------------------------------------------------------

    def register(self, address: int, nbytes: int, flags: int) -> None:
        self._enter("register", f"register {nbytes}")
        if not nbytes or (address | nbytes) % mmap.PAGESIZE or flags & 3 != PORTABLE | MAPPED:
            self.violations.append(f"register {address:#x} {nbytes} {flags}")
        access = mapped(address, nbytes)
        if access is None:
            raise self._error("register", INVALID_VALUE)
        if self.strict and "w" not in access and not flags & READ_ONLY:
            raise self._error("register", INVALID_VALUE)
        for start, known in list(self.registrations.items()):
            if start < address + nbytes and address < start + known.nbytes:
                raise self._error("register", ALREADY_REGISTERED)
        self.registrations[address] = Registered(nbytes, flags)

    def unregister(self, address: int) -> None:
        self._enter("unregister", "unregister")
        known = self.registrations.get(address)
        if known is None:
            within = any(
                start < address < start + other.nbytes
                for start, other in list(self.registrations.items())
            )
            raise self._error("unregister", INVALID_VALUE if within else NOT_REGISTERED)
        if mapped(address, known.nbytes) is None:
            self.violations.append(f"{address:#x} was unmapped before it was unregistered")
        with self.changed:
            for stream in list(self.streams.values()):
                for work in stream.works:
                    if any(
                        start < address + known.nbytes and address < start + size
                        for start, size in work.ranges
                    ):
                        self.violations.append(f"{address:#x} was unregistered under a copy")
        del self.registrations[address]

    def device_pointer(self, address: int) -> int:
        self._enter("device_pointer")
        for start, known in list(self.registrations.items()):
            if start <= address < start + known.nbytes:
                return address + _AWAY
        raise self._error("device_pointer", INVALID_VALUE)

    def allocate(self, nbytes: int) -> int:
        self._enter("allocate")
        memory = ctypes.create_string_buffer(nbytes)
        self.allocated[ctypes.addressof(memory)] = memory
        return ctypes.addressof(memory)

    def free(self, pointer: int) -> None:
        self._enter("free")
        del self.allocated[pointer]

    def allocate_host(self, nbytes: int) -> int:
        return self.allocate(nbytes)

    def free_host(self, address: int) -> None:
        self.free(address)

    def copy(self, to: int, source: int, nbytes: int, kind: Kind, stream: int) -> None:
        self._enter("copy", f"copy {nbytes}")
        here, there = (source, to) if kind is Kind.TO_DEVICE else (to, source)
        if not self.allows_pageable and not any(
            start <= here and here + nbytes <= start + known.nbytes
            for start, known in list(self.registrations.items())
        ):
            raise self._error("copy", INVALID_VALUE)  # none, or more than one
        for start, known in list(self.registrations.items()):
            within = start <= here < start + known.nbytes
            if within and known.flags & READ_ONLY and kind is Kind.FROM_DEVICE:
                self.violations.append("a copy into pages that the device may only read")
        if not any(
            start <= there and there + nbytes <= start + len(memory)
            for start, memory in list(self.allocated.items())
        ):
            raise self._error("copy", INVALID_VALUE)
        line, code = self._stream(stream), self._breaks
        self._breaks = 0

        def run() -> None:
            if code:
                line.failed = code
            if not line.failed:
                ctypes.memmove(to, source, nbytes)

        line.give(Work(run, [(here, nbytes)]))

    # -- streams and events ----------------------------------------------------------------------

    def _stream(self, handle: int) -> FakeStream:
        if handle == 0:
            self.streams.setdefault(0, FakeStream(self, self._device()))
        if handle not in self.streams:
            raise self._error("stream", INVALID_HANDLE)
        return self.streams[handle]

    def create_stream(self) -> int:
        self._enter("create_stream")
        handle = self._new()
        self.streams[handle] = FakeStream(self, self._device())
        return handle

    def stream_done(self, stream: int) -> bool:
        self._enter("stream_done")
        line = self._stream(stream)
        if line.failed:
            raise self._error("stream_done", line.failed)
        return not line.works

    def destroy_stream(self, stream: int) -> None:
        self._enter("destroy_stream")
        del self.streams[stream]

    def create_event(self) -> int:
        self._enter("create_event")
        handle = self._new()
        self.events[handle] = FakeEvent(self._device())
        return handle

    def record_event(self, event: int, stream: int) -> None:
        self._enter("record_event")
        known, line = self.events[event], self._stream(stream)
        if known.device != line.device:
            raise self._error("record_event", INVALID_HANDLE)
        if not known.happened:
            self.violations.append("an event was recorded for two at a time")
        known.happened, known.failed = False, 0

        def run() -> None:
            known.happened, known.failed = True, line.failed

        line.give(Work(run))

    def event_done(self, event: int) -> bool:
        self._enter("event_done")
        known = self.events[event]
        if known.failed:
            raise self._error("event_done", known.failed)
        return known.happened

    def wait_event(self, event: int) -> None:
        self._enter("wait_event")
        known = self.events[event]
        with self.changed:
            while not known.happened:
                self.changed.wait()
        if known.destroyed:
            self.violations.append("an event was destroyed while somebody slept for it")
        if known.failed:
            raise self._error("wait_event", known.failed)

    def destroy_event(self, event: int) -> None:
        self._enter("destroy_event")
        self.events.pop(event).destroyed = True


def mapped(address: int, nbytes: int) -> str | None:
    """Tell the rights that all of a range is mapped with; None where some of it is not."""
    rights: set[str] = set()
    at = address
    with open("/proc/self/maps") as maps:
        for line in maps:
            where, what = line.split(maxsplit=2)[:2]
            start, end = (int(part, 16) for part in where.split("-"))
            if start <= at < end:
                rights.add(what)
                at = end
            if at >= address + nbytes:
                return min(rights, key=lambda what: "w" in what)
    return None
