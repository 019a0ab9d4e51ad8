"""The other side writes whatever it likes: this side never reaches outside, nor hangs, nor dies."""

from __future__ import annotations

import errno
import os
import random
import struct
import time
from collections.abc import Callable

import pytest
from children import in_child, kill, start

import memdesc as md
from memdesc.queues import layout
from memdesc.vm.pages import page_size

NASTY = [0, 1, 7, 8, 9, 2**31, 2**32, 2**63 - 8, 2**63, 2**64 - 8, 2**64 - 1, page_size,
         page_size + 8, page_size - 8]  # fmt: skip


def write(memory: md.MemoryDescriptor, offset: int, value: int) -> None:
    memory.write_bytes(offset, struct.pack("=Q", value))


@pytest.mark.parametrize("tail", [value for value in NASTY if value not in (0, 8, 16)])
def test_a_tail_that_can_not_be(tail: int) -> None:
    with md.create_data_queue(page_size) as memory:
        consumer = md.Consumer(memory)
        write(memory, 0, 16)
        assert consumer.used == 16
        write(memory, 0, tail)
        if tail in (page_size, page_size - 8):
            assert consumer.used == tail  # it could be
            return
        for _ in range(2):
            with pytest.raises(md.ProtocolError) as caught:
                consumer.wait(1)
            assert caught.value.errno == errno.EPROTO
        write(memory, 0, 16)  # for ever after
        with pytest.raises(md.ProtocolError):
            consumer.try_dequeue()


@pytest.mark.parametrize("head", [value for value in NASTY if value not in (0, 8)])
def test_a_head_that_can_not_be(head: int) -> None:
    with md.create_data_queue(page_size) as memory:
        producer = md.Producer(memory)
        producer.enqueue(bytes(producer.largest - 1024))
        write(memory, page_size, head)
        for _ in range(2):
            with pytest.raises(md.ProtocolError):
                producer.enqueue(bytes(2048))
        write(memory, page_size, 0)
        with pytest.raises(md.ProtocolError):
            producer.try_enqueue(b"")


@pytest.mark.parametrize("size", [9, 16, *(value for value in NASTY if value > 8)])
def test_a_size_that_can_not_be(size: int) -> None:
    with md.create_data_queue(page_size) as memory:
        consumer = md.Consumer(memory)
        write(memory, layout.CONTROL, size)
        write(memory, 0, 16)
        takes: list[Callable[[], object]] = [
            consumer.try_dequeue,
            consumer.dequeue,
            consumer.peek,
            consumer.dequeue_many,
            lambda: consumer.dequeue_into(bytearray(100)),
        ]
        for take in takes:
            with pytest.raises(md.ProtocolError):
                take()


def test_good_entries_before_a_bad_one_are_given() -> None:
    with md.create_data_queue(page_size) as memory:
        producer, consumer = md.Producer(memory), md.Consumer(memory)
        producer.enqueue_many([b"12345678", b"x"])
        write(memory, layout.CONTROL + 16, 1 << 40)
        assert consumer.dequeue_many() == [b"12345678"]
        with pytest.raises(md.ProtocolError):
            consumer.dequeue_many()


def test_an_end_is_not_opened_on_nonsense() -> None:
    for offset, value in ((0, 4), (0, 1 << 63), (page_size, 8), (0, 2 * page_size), (24, 0)):
        with md.create_data_queue(page_size) as memory:
            write(memory, offset, value)
            for end in (md.Producer, md.Consumer):
                with pytest.raises(md.ProtocolError):
                    end(memory)


def scribble(memory: md.MemoryDescriptor, seed: int) -> None:
    """Overwrite everything, at random, with noise and with what nearly makes sense."""
    rng = random.Random(seed)
    view = memoryview(memory)
    words = view.cast("Q")
    while True:
        kind = rng.random()
        value = rng.choice(NASTY) if kind < 0.5 else rng.randrange(4 * page_size) & ~7
        words[rng.choice((0, 1, 2, page_size // 8, page_size // 8 + 1))] = value
        words[rng.randrange(len(words))] = value
        if kind > 0.98:
            view[rng.randrange(len(view))] = rng.randrange(256)


def work(memory: md.MemoryDescriptor, seconds: float, seed: int) -> int:
    """Use both ends while they are written over; open them anew when they break."""
    rng = random.Random(seed)
    allowed = (md.ProtocolError, md.TimedOutError, md.PeerGoneError, md.ClosedError)
    into = bytearray(page_size)
    producer: md.Producer | None = None
    consumer: md.Consumer | None = None
    outcomes = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if producer is None:
                producer = md.Producer(memory, spin=0)
            producer.enqueue_many([bytes(rng.randrange(page_size - 8)), b"1"], 0.0005)
            producer.try_enqueue(b"")
            producer.wait(100, 0)
        except allowed:
            outcomes += 1
            producer = None
        try:
            if consumer is None:
                consumer = md.Consumer(memory, spin=0)
            for take in (
                lambda end: bytes(end.peek(0.0005)),
                lambda end: end.dequeue_into(into, 0),
                lambda end: end.dequeue_many(100, 0),
                lambda end: end.try_dequeue(),
                lambda end: end.wait(0.0005),
            ):
                take(consumer)
        except allowed:
            outcomes += 1
            consumer = None
        for offset in (layout.CONTROL // 2 + 20, 20):  # both are open again
            memory.write_bytes(offset, bytes(4))
        memory.write_bytes(24, struct.pack("=Q", md._core.RING_MAGIC))
        if rng.random() < 0.2:
            write(memory, 0, 0)
            write(memory, page_size, 0)
    return outcomes


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_peer_that_scribbles_over_everything(seed: int) -> None:
    """In a child, so that a crash of it fails this test alone."""
    seconds = float(os.environ.get("MEMDESC_SCRIBBLE", "1.5"))
    with md.create_data_queue(page_size) as memory:
        pid = start(scribble, memory, seed)
        try:
            assert in_child(work, memory, seconds, seed, timeout=60 + seconds) > 10
        finally:
            kill(pid)


def test_a_huge_size_of_the_peer_costs_no_memory() -> None:
    with md.create_data_queue(page_size) as memory:
        consumer = md.Consumer(memory)
        write(memory, layout.CONTROL, 1 << 60)
        write(memory, 0, 8)
        with pytest.raises(md.ProtocolError):
            consumer.dequeue()
