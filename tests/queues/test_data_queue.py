"""A queue in one process: entries, wrap, full, peek, batches, errors."""

from __future__ import annotations

import errno
import os
import pickle
import random
import signal
import socket as sockets
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from children import in_child

import memdesc as md
from memdesc import _core
from memdesc.queues import layout, notification_pair
from memdesc.testing.faults import failing
from memdesc.vm.pages import page_size

SOON = 0.02


@pytest.fixture
def memory() -> Iterator[md.BufferMemoryDescriptor]:
    with md.create_data_queue(page_size) as memory:
        yield memory


Ends = tuple[md.Producer, md.Consumer]


@pytest.fixture
def ends(memory: md.BufferMemoryDescriptor) -> Iterator[Ends]:
    with md.Producer(memory) as producer, md.Consumer(memory) as consumer:
        yield producer, consumer


# --- Entries ----------------------------------------------------------------------------------


def test_entries_come_as_they_went(ends: Ends) -> None:
    producer, consumer = ends
    entries = [b"", b"1", b"12345678", bytes(range(256)), memoryview(b"view"), np.arange(4)]
    for entry in entries:
        producer.enqueue(entry)
    assert [consumer.dequeue() for _ in entries] == [bytes(entry) for entry in entries]
    assert consumer.try_dequeue() is None
    assert (producer.free, consumer.used) == (producer.largest, 0)


def test_the_capacity_is_whole_pages(memory: md.BufferMemoryDescriptor) -> None:
    assert memory.max_access is md.Access.READ_WRITE
    with md.create_data_queue(page_size + 1) as larger:
        producer = md.Producer(larger)
        assert producer.capacity == 2 * page_size
        assert producer.largest == 2 * page_size - layout.ENTRY_HEADER


@pytest.mark.parametrize("before", [0, 1, 8, 100, page_size // 2, page_size - 16])
def test_an_empty_queue_takes_the_largest_entry_wherever_it_stands(ends: Ends, before: int) -> None:
    producer, consumer = ends
    producer.enqueue(bytes(before))
    consumer.dequeue()
    largest = random.Random(before).randbytes(producer.largest)
    producer.enqueue_nowait(largest)
    assert producer.free == -1
    assert consumer.peek() == largest
    assert consumer.dequeue() == largest


def test_a_full_queue_refuses_and_keeps_what_it_has(ends: Ends) -> None:
    producer, consumer = ends
    put = 0
    while producer.try_enqueue(put.to_bytes(24, "little")):
        put += 1
    assert put == page_size // 32
    with pytest.raises(md.TimedOutError) as caught:
        producer.enqueue_nowait(b"")
    assert caught.value.errno == errno.EAGAIN
    with pytest.raises(md.TimedOutError) as caught:
        producer.enqueue(b"", SOON)
    assert caught.value.errno == errno.ETIMEDOUT
    assert [int.from_bytes(entry, "little") for entry in consumer.dequeue_many()] == [*range(put)]
    producer.enqueue_nowait(b"again")


def test_an_empty_queue_has_nothing(ends: Ends) -> None:
    _, consumer = ends
    for take in (consumer.dequeue, consumer.peek, consumer.dequeue_many):
        with pytest.raises(md.TimedOutError) as caught:
            take(timeout=SOON)
        assert caught.value.errno == errno.ETIMEDOUT
    with pytest.raises(md.TimedOutError) as caught:
        consumer.dequeue_nowait()
    assert caught.value.errno == errno.EAGAIN
    with pytest.raises(md.TimedOutError):
        consumer.dequeue_into(bytearray(8), 0)
    assert not consumer.wait(SOON)


def test_too_large_an_entry_is_an_error_at_once(ends: Ends) -> None:
    producer, consumer = ends
    for put in (
        lambda: producer.enqueue(bytes(producer.largest + 1)),
        lambda: producer.try_enqueue(bytes(producer.largest + 1)),
        lambda: producer.wait(producer.largest + 1),
    ):
        with pytest.raises(md.RangeError) as caught:
            put()
        assert caught.value.errno == errno.EMSGSIZE
    with pytest.raises(md.RangeError):
        producer.enqueue_many([b"good", bytes(producer.largest + 1)])
    assert consumer.dequeue() == b"good"


def test_a_batch_goes_as_far_as_there_is_room(ends: Ends) -> None:
    producer, consumer = ends
    entries = [bytes([number]) * 1000 for number in range(6)]
    assert producer.enqueue_many(entries, 0) == 4
    assert consumer.dequeue_many(3) == entries[:3]
    assert producer.enqueue_many(iter(entries[4:]), SOON) == 2
    assert consumer.dequeue_many() == entries[3:]
    assert producer.enqueue_many([]) == 0


def test_into_a_buffer(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(b"0123456789")
    with pytest.raises(md.RangeError) as caught:
        consumer.dequeue_into(bytearray(9))
    assert caught.value.errno == errno.ENOBUFS
    with pytest.raises(BufferError):
        consumer.dequeue_into(bytes(10))
    into = bytearray(12)
    assert consumer.dequeue_into(into) == 10
    assert into == b"0123456789\0\0"


def test_long_entries() -> None:
    with md.create_data_queue(1 << 20) as memory:
        producer, consumer = md.Producer(memory), md.Consumer(memory)
        into = bytearray(300_000)
        for number in range(10):
            entry = random.Random(number).randbytes(300_000)
            producer.enqueue(entry)
            producer.enqueue(entry)
            assert consumer.dequeue() == entry
            consumer.dequeue_into(into)
            assert into == entry
        producer.enqueue_many([entry] * 3)
        assert consumer.dequeue_many() == [entry] * 3


# --- In place ---------------------------------------------------------------------------------


def test_peek_shows_and_release_gives_back(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue_many([b"first", b"second"])
    view = consumer.peek()
    assert view.readonly
    assert (bytes(view), bytes(consumer.peek())) == (b"first", b"first")
    consumer.release()
    with pytest.raises(ValueError, match="released"):
        bytes(view)
    assert consumer.dequeue() == b"second"
    with pytest.raises(md.InvalidArgument):
        consumer.release()


def test_what_peek_shows_can_be_taken_out(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(b"entry")
    with consumer.peek() as view:
        assert view == b"entry"
    assert consumer.dequeue() == b"entry"
    with pytest.raises(md.InvalidArgument):
        consumer.release()


@pytest.mark.parametrize("make", [np.asarray, lambda view: view[1:3]])
def test_an_entry_stays_while_it_is_viewed(
    ends: Ends, make: Callable[[memoryview], object]
) -> None:
    producer, consumer = ends
    producer.enqueue(b"entry")
    view = make(consumer.peek())
    for take in (consumer.release, consumer.dequeue, consumer.try_dequeue, consumer.dequeue_many):
        with pytest.raises(BufferError):
            take()
    assert consumer.used == 16
    del view
    consumer.release()
    assert consumer.used == 0


def test_a_view_outlives_its_end(memory: md.BufferMemoryDescriptor) -> None:
    producer, consumer = md.Producer(memory), md.Consumer(memory)
    producer.enqueue(b"entry")
    view = consumer.peek()
    consumer.close()
    memory.close()
    del consumer, producer
    assert view == b"entry"


# --- Ends -------------------------------------------------------------------------------------


def test_what_was_put_before_the_close_still_comes(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue_many([b"1", b"2"])
    producer.close()
    producer.close()
    assert list(consumer) == [b"1", b"2"]
    for take in (consumer.dequeue, consumer.try_dequeue, consumer.wait, consumer.peek):
        with pytest.raises(md.PeerGoneError) as caught:
            take()
        assert caught.value.errno == errno.EPIPE


def test_a_consumer_that_is_gone_is_an_error(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(bytes(producer.largest))
    consumer.close()
    for put in (producer.enqueue, producer.try_enqueue, lambda entry: producer.wait(1)):
        with pytest.raises(md.PeerGoneError) as caught:
            put(b"1")
        assert caught.value.errno == errno.EPIPE
    with pytest.raises(md.PeerGoneError):
        producer.enqueue_many([b"1"])


def test_a_dropped_end_is_closed(memory: md.BufferMemoryDescriptor) -> None:
    producer, consumer = md.Producer(memory), md.Consumer(memory)
    del producer
    with pytest.raises(md.PeerGoneError):
        consumer.dequeue()


def test_a_dropped_end_rings_only_at_its_own_socket(memory: md.BufferMemoryDescriptor) -> None:
    """Its descriptor's number can be another's by the time that the memory goes."""
    notify, listen = notification_pair()
    mine, others = sockets.socketpair()

    class Reused:
        """Gives the number away the moment it is free, as another thread might."""

        def __init__(self, own: sockets.socket) -> None:
            self.own, self.number = own, own.fileno()
            self.close, self.fileno = self.take, own.fileno

        def take(self) -> None:
            self.own.close()
            os.dup2(mine.fileno(), self.number)

        def __del__(self) -> None:
            if self.own.fileno() >= 0:
                self.take()

    with notify, listen, mine, others, md.Consumer(memory, listen=listen):
        producer = md.Producer(memory, notify=notify)
        producer._socket = Reused(producer._socket)  # type: ignore[assignment]
        number = producer._socket.number
        del producer
        os.close(number)
        others.setblocking(False)
        with pytest.raises(BlockingIOError):
            others.recv(1)
        listen.settimeout(10)
        assert listen.recv(1) == b"\0"


def test_told_of_a_death(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(b"last")
    consumer.peer_gone()
    assert consumer.dequeue() == b"last"
    with pytest.raises(md.PeerGoneError) as caught:
        consumer.dequeue()
    assert caught.value.errno == errno.ECONNRESET
    with pytest.raises(md.PeerGoneError):
        next(iter(consumer))


def test_a_closed_end_says_so(ends: Ends) -> None:
    producer, consumer = ends
    producer.close()
    consumer.close()
    assert (producer.closed, consumer.closed) == (True, True)
    assert ["closed" in repr(end) for end in ends] == [True, True]
    for call in (
        lambda: producer.enqueue(b""),
        lambda: producer.enqueue_many([b""]),
        lambda: producer.wait(),
        lambda: producer.free,
        consumer.dequeue,
        consumer.peek,
        consumer.release,
        consumer.dequeue_many,
        consumer.wait,
    ):
        with pytest.raises(md.ClosedError):
            call()
    assert consumer.statistics().entries == 0


def test_another_producer_goes_on_where_one_stopped(memory: md.BufferMemoryDescriptor) -> None:
    first = md.Producer(memory)
    consumer = md.Consumer(memory)
    first.enqueue_many([bytes(100)] * 50, 0)
    assert len(consumer.dequeue_many(20)) == 20
    first._inherit()  # lost, without a word
    second = md.Producer(memory)
    second.enqueue(b"second")
    assert [len(entry) for entry in consumer.dequeue_many()][-1] == 6
    again = md.Consumer(memory)
    second.enqueue(b"third")
    assert again.dequeue() == b"third"


def test_statistics(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue_many([b"12", b"345"])
    consumer.dequeue()
    put, taken = producer.statistics(), consumer.statistics()
    assert (put.entries, put.nbytes, taken.entries, taken.nbytes) == (2, 5, 1, 2)
    assert (put.waits, put.sleeps, put.notifications) == (0, 0, 0)
    consumer.dequeue()
    waits = 0
    while not consumer.statistics().sleeps:  # the time may run out before
        assert not consumer.wait(SOON)
        waits += 1
    assert (consumer.statistics().waits, consumer.statistics().sleeps) == (waits, 1)
    with pytest.raises(AttributeError):
        put.entries = 0  # type: ignore[misc]


# --- Bad input --------------------------------------------------------------------------------


def test_what_is_no_queue() -> None:
    with md.BufferMemoryDescriptor(page_size, max_access=md.Access.READ_WRITE) as small:
        with pytest.raises(md.InvalidArgument):
            md.Producer(small)
    with md.BufferMemoryDescriptor(3 * page_size, max_access=md.Access.READ_WRITE) as other:
        for end in (md.Producer, md.Consumer):
            with pytest.raises(md.ProtocolError) as caught:
                end(other)
            assert caught.value.errno == errno.EPROTO
    with md.BufferMemoryDescriptor(3 * page_size) as sealed:
        with pytest.raises(md.MappingError) as refused:
            md.Consumer(sealed)
        assert refused.value.reason is md.MappingReason.ACCESS
    private = md.MemoryDescriptor.with_buffer(bytearray(3 * page_size), md.Direction.OUT_IN)
    with pytest.raises((md.InvalidArgument, md.MappingError)):
        md.Producer(private)
    with pytest.raises(md.InvalidArgument):
        md.Producer(b"no descriptor")  # type: ignore[arg-type]


@pytest.mark.parametrize("capacity", [0, -1, layout.MAX_CAPACITY + 1])
def test_bad_capacities(capacity: int) -> None:
    with pytest.raises(md.InvalidArgument):
        md.create_data_queue(capacity)


def test_bad_arguments(memory: md.BufferMemoryDescriptor, ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(bytes(producer.largest))
    for call in (
        lambda: md.Producer(memory, spin=-1),
        lambda: md.Producer(memory, peer="no task"),  # type: ignore[arg-type]
        lambda: md.Consumer(memory, listen=0),  # type: ignore[arg-type]
        lambda: producer.enqueue(b"", -1),
        lambda: producer.enqueue(b"", float("nan")),
        lambda: consumer.dequeue_many(0),
        consumer.fileno,
    ):
        with pytest.raises(md.InvalidArgument):
            call()
    with pytest.raises(BufferError):
        producer.try_enqueue(memoryview(b"0123")[::2])
    with pytest.raises(TypeError):
        producer.try_enqueue("text")  # type: ignore[arg-type]


def test_an_end_is_not_pickled(ends: Ends) -> None:
    for end in ends:
        with pytest.raises(TypeError):
            pickle.dumps(end)


def test_an_end_that_was_never_opened() -> None:
    for kind in (_core.RingProducer, _core.RingConsumer):
        end = kind()
        with pytest.raises((AttributeError, SystemError)):
            end._look()


def test_where_it_can_not_be_mapped(memory: md.BufferMemoryDescriptor) -> None:
    with failing("reserve_memory", errno.ENOMEM), pytest.raises(md.MappingError) as caught:
        md.Producer(memory)
    assert caught.value.errno == errno.ENOMEM


# --- Waiting ----------------------------------------------------------------------------------


def test_threads_wait_for_each_other() -> None:
    with md.create_data_queue(page_size) as memory:
        producer, consumer = md.Producer(memory, spin=0), md.Consumer(memory, spin=0)
        count = 3000

        def put() -> None:
            with producer:
                for number in range(count):
                    producer.enqueue(number.to_bytes(8, "little") * (number % 50 + 1))

        thread = threading.Thread(target=put, daemon=True)
        thread.start()
        for number, entry in enumerate(consumer):
            assert entry == number.to_bytes(8, "little") * (number % 50 + 1)
        thread.join()
        assert number == count - 1


def test_several_threads_may_share_an_end() -> None:
    with md.create_data_queue(1 << 18) as memory:
        producer, consumer = md.Producer(memory), md.Consumer(memory)
        taken: list[bytes] = []

        def put(worker: int) -> None:
            for number in range(100):
                size = 70_000 if number % 10 == 0 else number
                producer.enqueue(bytes([worker, number]) + bytes(size), 60)

        def take() -> None:
            for _ in range(100):
                taken.append(consumer.dequeue(60))

        workers = [threading.Thread(target=put, args=(n,), daemon=True) for n in range(3)]
        workers += [threading.Thread(target=take, daemon=True) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(100)
        assert sorted((entry[0], entry[1]) for entry in taken) == [
            (worker, number) for worker in range(3) for number in range(100)
        ]


def test_a_close_ends_a_wait_of_another_thread(ends: Ends) -> None:
    _, consumer = ends
    seen: list[BaseException] = []

    def take() -> None:
        try:
            consumer.dequeue()
        except md.ClosedError as error:
            seen.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    while not consumer.statistics().sleeps:
        time.sleep(0.001)
    consumer.close()
    thread.join(60)
    assert len(seen) == 1


def test_a_signal_handler_that_raises_ends_a_wait(ends: Ends) -> None:
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stop):
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            ends[1].dequeue()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    ends[0].enqueue(b"after")
    assert ends[1].dequeue() == b"after"


def test_a_signal_handler_that_returns_does_not(ends: Ends) -> None:
    producer, consumer = ends
    before = signal.signal(signal.SIGALRM, lambda *_: producer.enqueue(b"of the handler"))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        assert consumer.dequeue(60) == b"of the handler"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_fork_child_has_closed_ends(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(b"parents")

    def child() -> list[str]:
        said = []
        for call in (lambda: producer.enqueue(b""), consumer.dequeue):
            try:
                call()
            except md.ClosedError as error:
                said.append(str(error))
        producer.close()
        return said

    said = in_child(child)
    assert len(said) == 2
    assert all("parent" in text for text in said)
    assert consumer.dequeue() == b"parents"
    producer.enqueue(b"still open")
    assert consumer.dequeue() == b"still open"
