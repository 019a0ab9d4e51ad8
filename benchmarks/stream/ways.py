"""The ways on which blocks go from one process to others, one class each.

Made in the parent; `produce` and `consume` run in children, each in one of its own. All fill and
read a block by the same two C functions, in place where the way allows that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sysconfig
import tempfile
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

import memdesc as md
from memdesc.streams import Stream, Subscription

HERE = Path(__file__).parent
LIMIT = 60.0  # seconds that anybody waits for a block


def library(folder: Path) -> Any:
    """Compile what fills and reads."""
    target = folder / "ring.so"
    include = sysconfig.get_path("include")
    command = ["gcc", "-O3", "-shared", "-fPIC", f"-I{include}"]
    subprocess.run([*command, "-o", target, HERE / "ring.c"], check=True)
    spec = importlib.util.spec_from_file_location("ring", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Way:
    """Blocks are numbered from 0 on. Each side is entered, has some pass, then more, is left."""

    package = "memdesc"  # what has to be installed
    ring: Any  # set once it is compiled

    def __init__(self, nbytes: int, slots: int, readers: int) -> None:
        self.nbytes, self.slots, self.readers = nbytes, slots, readers
        self.open()

    def open(self) -> None:
        """Make what both sides need, in the parent, which fills."""

    def enter(self, reader: int | None) -> None:
        """Make ready to read as that one, or to fill."""

    def produce(self, first: int, count: int) -> None:
        raise NotImplementedError

    def consume(self, first: int, count: int) -> int:
        """How many blocks were not as they should be."""
        raise NotImplementedError

    def leave(self) -> None:
        """Undo `enter`."""

    def close(self) -> None:
        """Undo `open`."""

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.package) is not None


class Ring(Way):
    """A bare ring in C, which spins: what there is to reach."""

    def open(self) -> None:
        self.memory = md.BufferMemoryDescriptor(
            md.page_size + self.slots * self.nbytes, max_access=md.Access.READ_WRITE
        )

    def enter(self, reader: int | None) -> None:
        self.base = self.memory.map(unique=True, prefault=True)
        self.who = self.readers if reader is None else reader + 1

    def call(self, function: Any, first: int, count: int) -> int:
        sides, slots = self.base.address, self.base.address + md.page_size
        size = self.nbytes
        return int(function(sides, self.who, slots, self.slots, size, size, first, count))

    def produce(self, first: int, count: int) -> None:
        self.call(self.ring.produce, first, count)

    def consume(self, first: int, count: int) -> int:
        return self.call(self.ring.consume, first, count)

    def leave(self) -> None:
        self.base.unmap()

    def close(self) -> None:
        self.memory.close()


class CalledRing(Ring):
    """The bare ring, called from Python once a block: the least that any loop in Python can do."""

    def call(self, function: Any, first: int, count: int) -> int:
        sides, slots = self.base.address, self.base.address + md.page_size
        who, number_of_slots, size, sum_ = self.who, self.slots, self.nbytes, 0
        for number in range(first, first + count):
            sum_ += function(sides, who, slots, number_of_slots, size, size, number, 1)
        return sum_


class OurStream(Way):
    """memdesc: loan, fill in place, publish; each subscriber reads in place."""

    def open(self) -> None:
        # As many slots as the others have, and one for each reader to hold.
        self.stream = Stream(
            nbytes=self.nbytes, slots=self.slots + self.readers, policies=md.Backpressure
        )
        self.seats = [
            self.stream.admit(md.Backpressure.BLOCK, depth=self.slots - 2, loans=1)
            for _ in range(self.readers)
        ]

    def enter(self, reader: int | None) -> None:
        if reader is not None:
            seat = self.seats[reader]
            self.video = Subscription(
                self.stream.memory, seat.memory, self.stream.form, seat.depth, seat.loans
            )

    def produce(self, first: int, count: int) -> None:
        fill, nbytes, loan = self.ring.fill, self.nbytes, self.stream.loan
        for number in range(first, first + count):
            slot = loan(LIMIT)
            fill(slot.address, nbytes, number)
            slot.publish()

    def consume(self, first: int, count: int) -> int:
        read, nbytes, wrong = self.ring.read, self.nbytes, 0
        for number, slot in zip(range(first, first + count), self.video, strict=False):
            wrong += read(slot.address, nbytes, number)
        return wrong

    def close(self) -> None:
        self.stream.close()


class SharedMemory(Way):
    """multiprocessing.shared_memory, as it is mostly done: a ring, and two semaphores a reader."""

    def open(self) -> None:
        self.memory = shared_memory.SharedMemory(create=True, size=self.slots * self.nbytes)
        context = multiprocessing.get_context("fork")
        self.free = [context.Semaphore(self.slots) for _ in range(self.readers)]
        self.full = [context.Semaphore(0) for _ in range(self.readers)]

    def enter(self, reader: int | None) -> None:
        assert self.memory.buf is not None
        self.view = (ctypes.c_char * (self.slots * self.nbytes)).from_buffer(self.memory.buf)
        base = ctypes.addressof(self.view)
        self.addresses = [base + slot * self.nbytes for slot in range(self.slots)]
        self.who = reader

    def produce(self, first: int, count: int) -> None:
        fill, nbytes, addresses, slots = self.ring.fill, self.nbytes, self.addresses, self.slots
        for number in range(first, first + count):
            for free in self.free:
                free.acquire()
            fill(addresses[number % slots], nbytes, number)
            for full in self.full:
                full.release()

    def consume(self, first: int, count: int) -> int:
        assert self.who is not None
        read, nbytes, addresses, slots = self.ring.read, self.nbytes, self.addresses, self.slots
        free, full, wrong = self.free[self.who], self.full[self.who], 0
        for number in range(first, first + count):
            full.acquire()
            wrong += read(addresses[number % slots], nbytes, number)
            free.release()
        return wrong

    def leave(self) -> None:
        del self.view

    def close(self) -> None:
        self.memory.close()
        self.memory.unlink()


class Zmq(Way):
    """pyzmq over Unix sockets, a PUSH to a PULL for each reader: filled once, copied on the way."""

    package = "zmq"

    def open(self) -> None:
        self.folder = tempfile.mkdtemp()

    def enter(self, reader: int | None) -> None:
        import zmq

        self.context = zmq.Context()
        self.block = ctypes.create_string_buffer(self.nbytes)
        numbers = range(self.readers) if reader is None else [reader]
        self.sockets = []
        for number in numbers:
            socket = self.context.socket(zmq.PUSH if reader is None else zmq.PULL)
            socket.set_hwm(self.slots)
            join = socket.connect if reader is None else socket.bind
            join(f"ipc://{self.folder}/{number}")
            self.sockets.append(socket)

    def produce(self, first: int, count: int) -> None:
        fill, nbytes, address = self.ring.fill, self.nbytes, ctypes.addressof(self.block)
        for number in range(first, first + count):
            fill(address, nbytes, number)
            for socket in self.sockets:
                socket.send(self.block)  # a copy, as it is filled anew while that is sent

    def consume(self, first: int, count: int) -> int:
        read, nbytes, wrong = self.ring.read, self.nbytes, 0
        address, block = ctypes.addressof(self.block), self.block
        (socket,) = self.sockets
        for number in range(first, first + count):
            socket.recv_into(block)
            wrong += read(address, nbytes, number)
        return wrong

    def leave(self) -> None:
        for socket in self.sockets:
            socket.close()
        self.context.term()

    def close(self) -> None:
        shutil.rmtree(self.folder)


class Iceoryx(Way):
    """iceoryx2: loaned, filled in place and sent; received and read in place, by polling.

    Small blocks have more room than with the others: it waits for room in steps of its own, long
    ones.
    """

    package = "iceoryx2"

    def open(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="memdesc-iceoryx2-"))

    def enter(self, reader: int | None) -> None:
        import iceoryx2 as iox

        iox.set_log_level(iox.LogLevel.Error)
        fields = {"_fields_": [("bytes", ctypes.c_uint8 * self.nbytes)]}
        config = iox.config.default()
        config.global_cfg.root_path = iox.Path.new(f"{self.folder}/")
        config.global_cfg.prefix = iox.FileName.new(self.folder.name)
        self.node = iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)
        self.service = (
            self.node.service_builder(iox.ServiceName.new("blocks"))
            .publish_subscribe(type("Payload", (ctypes.Structure,), fields))
            .max_publishers(1)
            .max_subscribers(self.readers)
            .subscriber_max_borrowed_samples(1)
            .subscriber_max_buffer_size(max(self.slots - 2, min(1024, (32 << 20) // self.nbytes)))
            .history_size(0)
            .enable_safe_overflow(False)
            .open_or_create()
        )
        if reader is None:
            keep = iox.BackpressureStrategy.RetryUntilDelivered
            self.port = self.service.publisher_builder().backpressure_strategy(keep).create()
        else:
            self.port = self.service.subscriber_builder().create()

    def produce(self, first: int, count: int) -> None:
        fill, nbytes, loan = self.ring.fill, self.nbytes, self.port.loan_uninit
        for number in range(first, first + count):
            sample = loan()
            fill(sample.payload_ptr, nbytes, number)
            sample.assume_init().send()

    def consume(self, first: int, count: int) -> int:
        read, nbytes, receive, wrong = self.ring.read, self.nbytes, self.port.receive, 0
        crowded = self.readers >= len(os.sched_getaffinity(0))
        for number in range(first, first + count):
            while (sample := receive()) is None:
                if crowded:
                    os.sched_yield()
            wrong += read(sample.payload_ptr, nbytes, number)
            sample.delete()
        return wrong

    def leave(self) -> None:
        del self.port, self.service, self.node

    def close(self) -> None:
        """It leaves an object for its nodes behind."""
        for file in Path("/dev/shm").glob(f"{self.folder.name}*"):
            file.unlink()
        shutil.rmtree(self.folder)


WAYS: dict[str, type[Way]] = {
    "C ring": Ring,
    "called C ring": CalledRing,
    "stream": OurStream,
    "shared_memory": SharedMemory,
    "iceoryx2": Iceoryx,
    "pyzmq": Zmq,
}
