"""Waiting without sleeping: what ends it, and what it counts.

A timer's signal comes while a call spins, for up to a second: its handler runs after 10 ms at most.
"""

from __future__ import annotations

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import memdesc as md
from memdesc.vm.pages import page_size

SOON = 0.02  # seconds
LIMIT = 60


@pytest.fixture
def memory() -> Iterator[md.BufferMemoryDescriptor]:
    with md.create_data_queue(page_size) as memory:
        yield memory


Ends = tuple[md.Producer, md.Consumer]


@pytest.fixture
def ends(memory: md.BufferMemoryDescriptor) -> Iterator[Ends]:
    with md.Producer(memory, spin=1) as producer, md.Consumer(memory, spin=1) as consumer:
        yield producer, consumer


def waited(end: md.Producer | md.Consumer) -> tuple[int, int]:
    told = end.statistics()
    return told.waits, told.sleeps


@contextmanager
def soon(action: Callable[[], object]) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: action())
    try:
        signal.setitimer(signal.ITIMER_REAL, SOON)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fill(producer: md.Producer) -> None:
    producer.enqueue(bytes(producer.largest))


def test_an_entry_ends_it(ends: Ends) -> None:
    producer, consumer = ends
    with soon(lambda: producer.enqueue(b"entry")):
        assert consumer.dequeue() == b"entry"
    assert waited(consumer) == (1, 0)


def test_room_ends_it(ends: Ends) -> None:
    producer, consumer = ends
    fill(producer)
    with soon(consumer.dequeue):
        producer.enqueue(b"entry")
    assert waited(producer) == (1, 0)
    assert consumer.dequeue() == b"entry"


@pytest.mark.parametrize("take", [md.Consumer.dequeue_many, md.Consumer.peek, md.Consumer.wait])
def test_so_it_does_for_all_that_waits(ends: Ends, take: Callable[[md.Consumer], object]) -> None:
    producer, consumer = ends
    with soon(lambda: producer.enqueue(b"entry")):
        assert take(consumer)
    assert waited(consumer) == (1, 0)
    consumer.try_dequeue()  # what peek showed is let go of


def test_a_handler_that_raises_ends_it(ends: Ends) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    producer, consumer = ends
    with soon(stop), pytest.raises(KeyboardInterrupt):
        consumer.dequeue()
    assert waited(consumer) == (1, 0)
    producer.enqueue(b"after")
    assert consumer.dequeue() == b"after"


def test_an_entry_that_the_handler_takes_itself(ends: Ends) -> None:
    """What was waited for came, and is gone: it is waited for the next one."""
    producer, consumer = ends

    def act() -> None:
        producer.enqueue(b"handler's")
        assert consumer.dequeue() == b"handler's"

    with soon(act), pytest.raises(md.TimedOutError) as caught:
        consumer.dequeue(4 * SOON)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_peer_that_closes_ends_it(ends: Ends) -> None:
    producer, consumer = ends
    with soon(producer.close), pytest.raises(md.PeerGoneError) as caught:
        consumer.dequeue()
    assert caught.value.errno == errno.EPIPE
    assert waited(consumer) == (1, 0)


def test_closing_this_end_ends_it(ends: Ends) -> None:
    consumer, seen = ends[1], []

    def take() -> None:
        try:
            consumer.dequeue(LIMIT)
        except md.ClosedError as error:
            seen.append(error)

    thread = threading.Thread(target=take, daemon=True)
    thread.start()
    while not consumer.statistics().waits:
        time.sleep(0.001)
    consumer.close()
    thread.join(LIMIT)
    assert len(seen) == 1


def test_the_time_given_ends_it(ends: Ends) -> None:
    producer, consumer = ends
    with pytest.raises(md.TimedOutError) as caught:
        consumer.dequeue(SOON)
    assert caught.value.errno == errno.ETIMEDOUT
    assert waited(consumer) == (1, 0)
    fill(producer)
    with pytest.raises(md.TimedOutError) as caught:
        producer.enqueue(b"", SOON)
    assert caught.value.errno == errno.ETIMEDOUT
    assert waited(producer) == (1, 0)


def test_who_lost_the_cpu_does_not_spin_next_time(ends: Ends) -> None:
    producer, consumer = ends

    def be_long() -> None:
        time.sleep(2 * SOON)  # as if another program had had the CPU
        producer.enqueue(b"entry")

    with soon(be_long):
        assert consumer.dequeue() == b"entry"
    assert waited(consumer) == (1, 0)
    with pytest.raises(md.TimedOutError):
        consumer.dequeue(5 * SOON)
    assert waited(consumer) == (2, 1)


def test_no_time_is_no_wait(ends: Ends) -> None:
    with pytest.raises(md.TimedOutError) as caught:
        ends[1].dequeue(0)
    assert caught.value.errno == errno.EAGAIN
    assert waited(ends[1]) == (0, 0)


@pytest.mark.parametrize("spin", [0, 1e-6])
def test_it_sleeps_when_it_has_spun(memory: md.BufferMemoryDescriptor, spin: float) -> None:
    with md.Producer(memory, spin=spin) as producer, md.Consumer(memory, spin=spin) as consumer:
        waits = 0
        while not waited(consumer)[1]:  # somebody may have the CPU until the timer rings
            with soon(lambda: producer.enqueue(b"entry")):
                assert consumer.dequeue(LIMIT) == b"entry"
            waits += 1
        assert waited(consumer)[0] == waits
