"""A queue between real processes: order, waiting, event loops, deaths at any moment."""

from __future__ import annotations

import asyncio
import errno
import multiprocessing
import os
import random
import select
import signal
import socket as sockets
import time
from collections.abc import Iterator

import pytest
from children import finish, is_idle, kill, start
from puppets import wait_until

import memdesc as md
from memdesc.queues import notification_pair
from memdesc.vm.pages import page_size

LIMIT = 60  # seconds that nothing here takes


@pytest.fixture
def memory() -> Iterator[md.BufferMemoryDescriptor]:
    with md.create_data_queue(4 * page_size) as memory:
        yield memory


def entry(number: int) -> bytes:
    """An entry that shows whether it is torn: a number, and a length and bytes that follow it."""
    stamp = number.to_bytes(8, "little")
    return stamp * (1 + number * 7919 % 97)


def check(data: bytes, number: int) -> None:
    assert data == entry(number), f"entry {number} is lost, doubled or torn"


def put_all(memory: md.MemoryDescriptor, count: int, spin: float, batch: int) -> None:
    with md.Producer(memory, spin=spin) as producer:
        for number in range(0, count, batch):
            entries = [entry(n) for n in range(number, min(number + batch, count))]
            assert producer.enqueue_many(entries, LIMIT) == len(entries)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.parametrize("spin", [0, 50e-6])
def test_nothing_is_lost_between_processes(
    memory: md.BufferMemoryDescriptor, spin: float, batch: int
) -> None:
    count = 20_000
    pid = start(put_all, memory, count, spin, batch)
    number = 0
    with md.Consumer(memory, spin=spin) as consumer:
        while True:
            try:
                entries = consumer.dequeue_many(timeout=LIMIT)
            except md.PeerGoneError as error:
                assert error.errno == errno.EPIPE
                break
            for data in entries:
                check(data, number)
                number += 1
    assert number == count
    assert finish(pid) == 0


def echo(there: md.MemoryDescriptor, back: md.MemoryDescriptor) -> None:
    with md.Producer(back, spin=0) as producer, md.Consumer(there, spin=0) as consumer:
        for data in consumer:
            producer.enqueue(data, LIMIT)


@pytest.mark.slow
def test_every_waking_arrives() -> None:
    """Both sides sleep at every step; a lost waking costs the quarter of a second of a glance."""
    with md.create_data_queue(page_size) as there, md.create_data_queue(page_size) as back:
        pid = start(echo, there, back)
        with md.Producer(there) as producer, md.Consumer(back, spin=0) as consumer:
            for number in range(3000):
                producer.enqueue(number.to_bytes(8, "little"))
                assert consumer.dequeue(LIMIT) == number.to_bytes(8, "little")
        assert finish(pid) == 0


def serve_child(memory: md.MemoryDescriptor, count: int) -> None:
    put_all(memory, count, 0, 1)


@pytest.mark.slow
def test_through_multiprocessing(memory: md.BufferMemoryDescriptor) -> None:
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=serve_child, args=(memory, 200), daemon=True)
    child.start()
    with md.Consumer(memory) as consumer:
        for number in range(200):
            check(consumer.dequeue(LIMIT), number)
    child.join(LIMIT)
    assert child.exitcode == 0
    child.close()


# --- Deaths -----------------------------------------------------------------------------------


def put_for_ever(memory: md.MemoryDescriptor) -> None:
    producer = md.Producer(memory)
    number = 0
    while True:
        number += producer.enqueue_many([entry(n) for n in range(number, number + 7)])


def take_for_ever(memory: md.MemoryDescriptor) -> None:
    consumer = md.Consumer(memory)
    while True:
        consumer.dequeue_many(5)


@pytest.mark.slow
def test_a_producer_killed_at_any_moment_leaves_whole_entries() -> None:
    rng = random.Random(1)
    for _ in range(25):
        with md.create_data_queue(page_size) as memory:
            pid = start(put_for_ever, memory)
            number = 0
            with md.Task(pid) as task, md.Consumer(memory, peer=task, spin=0) as consumer:
                end = time.monotonic() + rng.random() * 0.02
                while time.monotonic() < end or not number:
                    check(consumer.dequeue(LIMIT), number)
                    number += 1
                kill(pid)
                with pytest.raises(md.PeerGoneError) as caught:
                    while True:
                        check(consumer.dequeue(LIMIT), number)
                        number += 1
                assert caught.value.errno == errno.ECONNRESET
                successor = md.Producer(memory)
                successor.enqueue(b"of another")
                del successor


@pytest.mark.slow
def test_a_consumer_killed_at_any_moment_is_noticed() -> None:
    rng = random.Random(2)
    for _ in range(15):
        with md.create_data_queue(page_size) as memory:
            pid = start(take_for_ever, memory)
            with md.Task(pid) as task, md.Producer(memory, peer=task, spin=0) as producer:
                end = time.monotonic() + rng.random() * 0.02
                number = 0
                while time.monotonic() < end:
                    producer.enqueue(entry(number), LIMIT)
                    number += 1
                kill(pid)
                with pytest.raises(md.PeerGoneError) as caught:
                    while True:
                        producer.enqueue(entry(number), LIMIT)
                        number += 1
                assert caught.value.errno == errno.ECONNRESET
            # Another consumer takes up what the dead one left: whole entries, in order.
            with md.Consumer(memory) as consumer:
                left = list(consumer)
            first = int.from_bytes(left[0][:8], "little")
            assert [*left] == [entry(n) for n in range(first, number)]


def sleep_in_wait(memory: md.MemoryDescriptor) -> None:
    md.Consumer(memory).wait()


@pytest.mark.slow
def test_a_sleeping_process_uses_no_time(memory: md.BufferMemoryDescriptor) -> None:
    pid = start(sleep_in_wait, memory)
    producer = md.Producer(memory)
    wait_until(lambda: is_idle(pid))
    producer.enqueue(b"")
    assert finish(pid) == 0


def stop_and_go(memory: md.MemoryDescriptor) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    put_all(memory, 3, 0, 1)


def test_a_stopped_producer_costs_only_the_time_given(memory: md.BufferMemoryDescriptor) -> None:
    pid = start(stop_and_go, memory)
    os.waitpid(pid, os.WUNTRACED)
    with md.Task(pid) as task, md.Consumer(memory, peer=task) as consumer:
        with pytest.raises(md.TimedOutError):
            consumer.dequeue(0.05)
        os.kill(pid, signal.SIGCONT)
        assert [*consumer] == [entry(number) for number in range(3)]
    assert finish(pid) == 0


# --- Event loops ------------------------------------------------------------------------------


def notify_all(memory: md.MemoryDescriptor, socket: sockets.socket, count: int) -> None:
    producer = md.Producer(memory, notify=socket)
    for number in range(count):
        producer.enqueue(entry(number), LIMIT)
        if number % 100 == 0:
            time.sleep(0.001)
    producer.close()


@pytest.fixture
def pair() -> Iterator[tuple[sockets.socket, sockets.socket]]:
    notify, listen = notification_pair()
    with notify, listen:
        yield notify, listen


@pytest.mark.slow
def test_an_event_loop_hears_of_every_entry(
    memory: md.BufferMemoryDescriptor, pair: tuple[sockets.socket, sockets.socket]
) -> None:
    notify, listen = pair
    count = 3000

    async def receive() -> int:
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        consumer = md.Consumer(memory, listen=listen)
        number = 0

        def take() -> None:
            nonlocal number
            try:
                while (data := consumer.try_dequeue()) is not None:
                    check(data, number)
                    number += 1
            except md.PeerGoneError as error:
                done.set_result(error.errno)
            except BaseException as error:  # noqa: BLE001 (the test shows it)
                done.set_exception(error)

        loop.add_reader(consumer.fileno(), take)
        pid = start(notify_all, memory, notify, count)
        notify.close()
        take()
        assert await asyncio.wait_for(done, LIMIT) in (errno.EPIPE, errno.ECONNRESET)
        loop.remove_reader(consumer.fileno())
        consumer.close()
        assert finish(pid) == 0
        return number

    assert asyncio.run(receive()) == count


def test_the_socket_is_readable_only_while_there_may_be_entries(
    memory: md.BufferMemoryDescriptor, pair: tuple[sockets.socket, sockets.socket]
) -> None:
    with (
        md.Producer(memory, notify=pair[0]) as producer,
        md.Consumer(memory, listen=pair[1]) as consumer,
    ):

        def ready() -> bool:
            return bool(select.select([consumer.fileno()], [], [], 0)[0])

        assert consumer.try_dequeue() is None
        assert not ready()
        producer.enqueue_many([b"1", b"2"])
        assert ready()
        assert producer.statistics().notifications == 1
        assert consumer.try_dequeue() == b"1"
        assert ready()
        assert consumer.dequeue_many() == [b"2"]
        assert consumer.try_dequeue() is None
        assert not ready()
        producer.close()
        assert ready()


def die_at_once(memory: md.MemoryDescriptor, socket: sockets.socket) -> None:
    producer = md.Producer(memory, notify=socket)
    producer.enqueue(b"last")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_loop_hears_of_a_death(
    memory: md.BufferMemoryDescriptor, pair: tuple[sockets.socket, sockets.socket]
) -> None:
    notify, listen = pair
    with md.Consumer(memory, listen=listen) as consumer:
        pid = start(die_at_once, memory, notify)
        notify.close()
        assert finish(pid) == -signal.SIGKILL
        assert select.select([consumer.fileno()], [], [], LIMIT)[0]
        assert consumer.try_dequeue() == b"last"
        with pytest.raises(md.PeerGoneError) as caught:
            while consumer.try_dequeue() is None:
                assert select.select([consumer.fileno()], [], [], LIMIT)[0]
        assert caught.value.errno == errno.ECONNRESET


def test_a_consumer_that_never_reads_its_socket_holds_nobody_up(
    memory: md.BufferMemoryDescriptor, pair: tuple[sockets.socket, sockets.socket]
) -> None:
    notify, listen = pair
    notify.setblocking(True)
    with md.Producer(memory, notify=notify) as producer, md.Consumer(memory) as consumer:
        consumer._listen()
        for number in range(2000):
            consumer._want(number * 8 + 1)
            producer.enqueue(b"")
            consumer.dequeue()
        assert producer.statistics().notifications == 2000
    assert listen.recv(1) == b"\0"
