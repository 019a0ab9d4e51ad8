"""The ways on which messages go from one process to another, one class each.

Made in the parent; `sender` and `receiver` are called in the two children, and `leave` there when
both are done; `close` in the parent when they have ended.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import memdesc as md

BATCH = 256

Send = Callable[[bytes], object]
Receive = Callable[[], Any]


class Way:
    package = "memdesc"  # what has to be installed
    weight = 1.0  # times as many messages a round, so that a round of each takes about as long

    def __init__(self, size: int) -> None:
        raise NotImplementedError

    def sender(self) -> Send:
        raise NotImplementedError

    def receiver(self) -> Receive:
        raise NotImplementedError

    def send_all(self, send: Send, message: bytes, count: int) -> None:
        for _ in range(count):
            send(message)

    def receive_all(self, receive: Receive, count: int) -> None:
        for _ in range(count):
            receive()

    def sleeps(self) -> int:
        """How often this side has slept; 0 where nobody counts."""
        return 0

    def leave(self) -> None:
        """Let go of what `sender` or `receiver` made."""

    def close(self) -> None:
        """Let go of what the parent made."""

    @classmethod
    def installed(cls) -> bool:
        return importlib.util.find_spec(cls.package) is not None


class Queue(Way):
    """Our queue, one entry at a time; waits in the default form: spins 50 us, then sleeps."""

    weight = 4.0
    options: ClassVar[dict[str, float]] = {}

    def __init__(self, size: int) -> None:
        self.memory = md.create_data_queue(max(1 << 16, 64 * size))

    def sender(self) -> Send:
        self.end: Any = md.Producer(self.memory, **self.options)
        return self.end.enqueue

    def receiver(self) -> Receive:
        self.end = md.Consumer(self.memory, **self.options)
        return self.end.dequeue

    def sleeps(self) -> int:
        return int(self.end.statistics().sleeps)

    def close(self) -> None:
        self.memory.close()


class Batches(Queue):
    """Our queue, 256 entries a call."""

    weight = 16.0

    def send_all(self, send: Send, message: bytes, count: int) -> None:
        messages = [message] * BATCH
        for _ in range(count // BATCH):
            self.end.enqueue_many(messages)

    def receive_all(self, receive: Receive, count: int) -> None:
        left = count // BATCH * BATCH
        while left:
            left -= len(self.end.dequeue_many(left))


class Spinning(Queue):
    """Our queue, which spins a second before it would sleep."""

    options: ClassVar = {"spin": 1.0}


class Asleep(Queue):
    """Our queue, which sleeps at once where it has to wait."""

    options: ClassVar = {"spin": 0.0}
    weight = 0.5


class Pipe(Way):
    weight = 0.5

    def __init__(self, size: int) -> None:
        self.reader, self.writer = multiprocessing.Pipe(duplex=False)

    def sender(self) -> Send:
        return self.writer.send_bytes

    def receiver(self) -> Receive:
        return self.reader.recv_bytes

    def close(self) -> None:
        self.reader.close()
        self.writer.close()


class MultiprocessingQueue(Way):
    weight = 0.25

    def __init__(self, size: int) -> None:
        self.queue: multiprocessing.Queue[bytes] = multiprocessing.Queue()

    def sender(self) -> Send:
        return self.queue.put

    def receiver(self) -> Receive:
        return self.queue.get

    def close(self) -> None:
        self.queue.close()
        self.queue.join_thread()


class Zmq(Way):
    """pyzmq: PUSH to PULL over a Unix socket, without limits on what waits in it."""

    package = "zmq"
    weight = 0.5

    def __init__(self, size: int) -> None:
        self.folder = tempfile.mkdtemp()

    def open(self, kind: str) -> Any:
        import zmq

        self.context = zmq.Context()
        self.socket = self.context.socket(getattr(zmq, kind))
        self.socket.set_hwm(0)
        return self.socket

    def sender(self) -> Send:
        self.open("PUSH").connect(f"ipc://{self.folder}/socket")
        return self.socket.send

    def receiver(self) -> Receive:
        self.open("PULL").bind(f"ipc://{self.folder}/socket")
        return self.socket.recv

    def leave(self) -> None:
        self.socket.close()
        self.context.term()

    def close(self) -> None:
        shutil.rmtree(self.folder)


class Iceoryx(Way):
    """iceoryx2: publish and subscribe, the subscriber polling.

    Its shortest way in Python: a sample is loaned, the bytes are copied to its address, it is sent;
    the receiver copies them out of it and gives it back. None is dropped, for the publisher waits;
    but only for a subscriber that has received before (0.10.0): so there has to be a warm-up.
    """

    package = "iceoryx2"

    def __init__(self, size: int) -> None:
        self.size, self.folder = size, Path(tempfile.mkdtemp(prefix="memdesc-iceoryx2-"))

    def service(self) -> Any:
        import iceoryx2 as iox

        iox.set_log_level(iox.LogLevel.Error)
        fields = {"_fields_": [("bytes", ctypes.c_uint8 * self.size)]}
        config = iox.config.default()
        config.global_cfg.root_path = iox.Path.new(f"{self.folder}/")
        config.global_cfg.prefix = iox.FileName.new(self.folder.name)
        self.node = iox.NodeBuilder.new().config(config).create(iox.ServiceType.Ipc)
        return (
            self.node.service_builder(iox.ServiceName.new("messages"))
            .publish_subscribe(type("Payload", (ctypes.Structure,), fields))
            .max_publishers(1)
            .max_subscribers(1)
            .subscriber_max_buffer_size(1024)
            .enable_safe_overflow(False)
            .open_or_create()
        )

    def sender(self) -> Send:
        import iceoryx2 as iox

        keep = iox.BackpressureStrategy.RetryUntilDelivered
        self.publisher = self.service().publisher_builder().backpressure_strategy(keep).create()
        loan, move, size = self.publisher.loan_uninit, ctypes.memmove, self.size

        def send(message: bytes) -> None:
            sample = loan()
            move(sample.payload_ptr, message, size)
            sample.assume_init().send()

        return send

    def receiver(self) -> Receive:
        self.subscriber = self.service().subscriber_builder().create()
        take, copy, size = self.subscriber.receive, ctypes.string_at, self.size

        def receive() -> bytes:
            while (sample := take()) is None:
                pass
            message = copy(sample.payload_ptr, size)
            sample.delete()
            return message

        return receive

    def leave(self) -> None:
        for name in set(vars(self)) - {"size", "folder"}:
            delattr(self, name)

    def close(self) -> None:
        """It leaves an object for its nodes behind, and more where a child was killed."""
        for file in Path("/dev/shm").glob(f"{self.folder.name}*"):
            file.unlink()
        shutil.rmtree(self.folder)


class IceoryxEvents(Iceoryx):
    """iceoryx2, the subscriber sleeping until an event, a service of its own, tells of a sample."""

    weight = 0.25

    def event(self) -> Any:
        import iceoryx2 as iox

        return self.node.service_builder(iox.ServiceName.new("news")).event().open_or_create()

    def sender(self) -> Send:
        put = super().sender()
        self.notifier = self.event().notifier_builder().create()
        notify = self.notifier.notify

        def send(message: bytes) -> None:
            put(message)
            notify()

        return send

    def receiver(self) -> Receive:
        super().receiver()
        self.listener = self.event().listener_builder().create()
        take, copy, size = self.subscriber.receive, ctypes.string_at, self.size
        wait = self.listener.blocking_wait

        def receive() -> bytes:
            while (sample := take()) is None:
                wait()
            message = copy(sample.payload_ptr, size)
            sample.delete()
            return message

        return receive
