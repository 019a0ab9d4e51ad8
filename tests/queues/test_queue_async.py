"""Queues in event loops: waiting for entries and for room, cancelled, several, in several loops."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Iterator

import pytest

import memdesc as md
from memdesc.queues import notification_pair
from memdesc.queues.notify import clear

LIMIT = 60

Ends = tuple[md.Producer, md.Consumer]


@pytest.fixture
def ends() -> Iterator[Ends]:
    notify, listen = notification_pair()
    with notify, listen, md.create_data_queue(4096) as memory:
        producer, consumer = md.Producer(memory, notify=notify), md.Consumer(memory, listen=listen)
        with producer, consumer:
            notify.close()
            listen.close()
            yield producer, consumer


async def asleep(end: md.Producer | md.Consumer, number: int = 1) -> None:
    """Let so many wait on a descriptor."""
    while len(end._sleepers) < number:
        await asyncio.sleep(0)


def test_entries_and_room_are_awaited(ends: Ends) -> None:
    producer, consumer = ends
    sent = [number.to_bytes(2, "little") * (1 + number * 37 % 700) for number in range(500)]

    async def put() -> None:
        for entry in sent:
            await producer.enqueue_async(entry)
        producer.close()

    async def main() -> list[bytes]:
        putting = asyncio.ensure_future(put())
        taken = [entry async for entry in consumer]
        await putting
        return taken

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == sent


def test_ends_in_loops_of_two_threads(ends: Ends) -> None:
    producer, consumer = ends
    taken: list[bytes] = []

    async def put() -> None:
        for number in range(2000):
            await producer.enqueue_async(number.to_bytes(400, "little"))
        producer.close()

    async def take() -> None:
        async for entry in consumer:
            taken.append(entry)

    threads = [
        threading.Thread(target=asyncio.run, args=(one(),), daemon=True) for one in (put, take)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert [int.from_bytes(entry, "little") for entry in taken] == list(range(2000))


def test_many_tasks_of_two_loops_take_each_entry_once(ends: Ends) -> None:
    producer, consumer = ends
    taken: list[bytes] = []

    async def take() -> None:
        async for entry in consumer:
            taken.append(entry)

    async def main() -> None:
        await asyncio.gather(*[take() for _ in range(3)])

    threads = [threading.Thread(target=asyncio.run, args=(main(),), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(500):
        producer.enqueue(number.to_bytes(2, "little"), LIMIT)
    producer.close()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()
    assert sorted(int.from_bytes(entry, "little") for entry in taken) == list(range(500))


def test_many_tasks_put_entries_of_many_sizes(ends: Ends) -> None:
    producer, consumer = ends
    sizes = [1, 4000, 100, 2000, 8, 3000]

    async def main() -> list[int]:
        putting = [asyncio.ensure_future(producer.enqueue_async(bytes(size))) for size in sizes]
        taken = [len(await consumer.dequeue_async()) for _ in sizes]
        await asyncio.gather(*putting)
        return taken

    assert sorted(asyncio.run(asyncio.wait_for(main(), LIMIT))) == sorted(sizes)


def test_who_is_cancelled_takes_and_puts_nothing(ends: Ends) -> None:
    producer, consumer = ends

    async def main() -> None:
        waiting = asyncio.ensure_future(consumer.dequeue_async())
        await asleep(consumer)
        producer.enqueue(b"first")  # it is there, and then the task is cancelled
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await consumer.dequeue_async(LIMIT) == b"first"
        producer.enqueue(bytes(producer.largest))
        waiting = asyncio.ensure_future(producer.enqueue_async(b"second"))
        await asleep(producer)
        consumer.dequeue()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert consumer.try_dequeue() is None
        await producer.enqueue_async(b"third", LIMIT)
        assert await consumer.dequeue_async(LIMIT) == b"third"

    asyncio.run(main())
    assert not producer._sleepers
    assert not consumer._sleepers


def test_the_time_runs_out(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(bytes(producer.largest))

    async def main() -> None:
        assert not await producer.wait_async(0, timeout=0.01)
        for timeout, why in ((0.01, errno.ETIMEDOUT), (0, errno.EAGAIN)):
            with pytest.raises(md.TimedOutError) as caught:
                await producer.enqueue_async(b"", timeout)
            assert caught.value.errno == why
        assert await consumer.wait_async(timeout=0)
        consumer.dequeue()
        assert not await consumer.wait_async(timeout=0.01)
        for timeout, why in ((0.01, errno.ETIMEDOUT), (0, errno.EAGAIN)):
            with pytest.raises(md.TimedOutError) as caught:
                await consumer.dequeue_async(timeout)
            assert caught.value.errno == why
        with pytest.raises(md.InvalidArgument):
            await consumer.dequeue_async(-1)
        with pytest.raises(md.RangeError):
            await producer.wait_async(producer.largest + 1)
        with pytest.raises(md.RangeError):
            await producer.enqueue_async(bytes(producer.largest + 1))

    asyncio.run(main())


def test_calls_without_a_twin_follow_a_wait(ends: Ends) -> None:
    producer, consumer = ends

    async def main() -> list[bytes]:
        waiting = asyncio.ensure_future(consumer.wait_async())
        await asleep(consumer)
        producer.enqueue_many([b"a", b"b"])
        assert await waiting
        taken = consumer.dequeue_many(timeout=0)
        producer.enqueue(bytes(producer.largest))
        room = asyncio.ensure_future(producer.wait_async(8))
        await asleep(producer)
        consumer.dequeue()
        assert await room
        assert producer.enqueue_many([b"c"], timeout=0) == 1
        return taken

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == [b"a", b"b"]


def test_an_end_without_a_socket_waits_in_no_loop() -> None:
    with md.create_data_queue(4096) as memory:
        producer, consumer = md.Producer(memory), md.Consumer(memory)
        producer.enqueue(bytes(producer.largest))
        with pytest.raises(md.InvalidArgument) as caught:
            asyncio.run(producer.enqueue_async(b""))
        assert caught.value.errno == errno.EINVAL
        assert asyncio.run(consumer.dequeue_async()) == bytes(producer.largest)  # it was there
        with pytest.raises(md.InvalidArgument):
            asyncio.run(consumer.dequeue_async())
        with pytest.raises(md.InvalidArgument):
            producer.fileno()


def test_closing_wakes_who_awaits_room(ends: Ends) -> None:
    producer, consumer = ends

    async def full() -> None:
        producer.enqueue(bytes(producer.largest))
        waiting = asyncio.ensure_future(producer.enqueue_async(b""))
        await asleep(producer)
        threading.Thread(target=producer.close).start()
        with pytest.raises(md.ClosedError):
            await asyncio.wait_for(waiting, LIMIT)
        assert len(await consumer.dequeue_async(LIMIT)) == producer.largest
        with pytest.raises(md.PeerGoneError):
            await consumer.dequeue_async(LIMIT)

    asyncio.run(full())


def test_closing_wakes_who_awaits_an_entry(ends: Ends) -> None:
    _, consumer = ends

    async def main() -> None:
        waiting = asyncio.ensure_future(consumer.dequeue_async())
        await asleep(consumer)
        threading.Thread(target=consumer.close).start()
        with pytest.raises(md.ClosedError):
            await asyncio.wait_for(waiting, LIMIT)

    asyncio.run(main())


@pytest.mark.parametrize("told", [True, False])
def test_the_other_end_has_gone(told: bool) -> None:
    notify, listen = notification_pair()
    with md.create_data_queue(4096) as memory:
        producer, consumer = md.Producer(memory, notify=notify), md.Consumer(memory, listen=listen)
        producer.enqueue(bytes(producer.largest))

        async def fails(end: md.Producer | md.Consumer, call: object, other: object) -> int | None:
            waiting = asyncio.ensure_future(call)  # type: ignore[call-overload]
            await asleep(end)
            if told:
                end.peer_gone()
            else:
                other.close()  # type: ignore[attr-defined]
            with pytest.raises(md.PeerGoneError) as caught:
                await asyncio.wait_for(waiting, LIMIT)
            return caught.value.errno  # type: ignore[no-any-return]

        gone = fails(producer, producer.enqueue_async(b""), consumer)
        assert asyncio.run(gone) == (errno.ECONNRESET if told else errno.EPIPE)
        notify.close()
        listen.close()
        producer.close()
        consumer.close()


@pytest.mark.parametrize("produces", [True, False])
def test_a_socket_that_ends_is_a_death(produces: bool) -> None:
    """As a SIGKILL leaves it: no word, but the kernel closes the socket."""
    notify, listen = notification_pair()
    with notify, listen, md.create_data_queue(4096) as memory, md.Producer(memory) as filling:
        end: md.Producer | md.Consumer
        if produces:
            filling.enqueue(bytes(filling.largest))
            end, other = md.Producer(memory, notify=notify), listen
        else:
            end, other = md.Consumer(memory, listen=listen), notify

        async def main() -> None:
            call = end.enqueue_async(b"") if isinstance(end, md.Producer) else end.dequeue_async()
            waiting = asyncio.ensure_future(call)
            await asleep(end)
            other.close()
            with pytest.raises(md.PeerGoneError) as caught:
                await asyncio.wait_for(waiting, LIMIT)
            assert caught.value.errno == errno.ECONNRESET

        with end:
            asyncio.run(main())


def test_a_byte_that_another_read_wakes_those_who_waited_for_it(ends: Ends) -> None:
    """What comes between a look and the reading of the socket is told to nobody else."""
    producer, consumer = ends

    def clear_after_it_came(socket: object = consumer._socket) -> None:
        producer.enqueue(b"first")
        consumer._clear = plain  # type: ignore[method-assign]
        assert clear(socket)  # type: ignore[arg-type]

    async def main() -> None:
        waiting = asyncio.ensure_future(consumer.dequeue_async())
        await asleep(consumer)
        consumer._clear = clear_after_it_came  # type: ignore[method-assign]
        assert consumer.try_dequeue() == b"first"
        while not waiting.done():
            await asyncio.sleep(0)
            if len(consumer._sleepers) == 1:
                producer.try_enqueue(b"second")
        assert await asyncio.wait_for(waiting, LIMIT) == b"second"

    plain = consumer._clear
    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_room_that_another_found_wakes_those_who_asked_for_more(ends: Ends) -> None:
    producer, consumer = ends
    producer.enqueue(bytes(1000))
    producer.enqueue(bytes(2900))

    def clear_after_it_came() -> None:
        producer._clear = plain  # type: ignore[method-assign]
        consumer.dequeue()
        plain()

    async def main() -> None:
        waiting = asyncio.ensure_future(producer.enqueue_async(bytes(3500)))
        await asleep(producer)
        producer._clear = clear_after_it_came  # type: ignore[method-assign]
        assert producer.try_enqueue(bytes(900))  # and what it asked for was reached already
        taken = [len(await consumer.dequeue_async(LIMIT)) for _ in range(3)]
        await asyncio.wait_for(waiting, LIMIT)
        assert taken == [2900, 900, 3500]

    plain = producer._clear
    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_thread_that_waits_too_keeps_nobody_from_hearing(ends: Ends) -> None:
    """An end has one wish at a time: the thread's is written over that of who awaits."""
    producer, consumer = ends
    producer.enqueue(bytes(3000))

    async def main() -> None:
        waiting = asyncio.ensure_future(producer.enqueue_async(bytes(2000)))
        await asleep(producer)
        thread = threading.Thread(target=producer.enqueue, args=(bytes(4000), LIMIT), daemon=True)
        thread.start()
        taken = sorted([len(await consumer.dequeue_async(LIMIT)) for _ in range(3)])
        await waiting
        thread.join(LIMIT)
        assert taken == [2000, 3000, 4000]

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_loop_that_was_closed_keeps_nothing_from_the_others(ends: Ends) -> None:
    producer, consumer = ends
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(consumer.dequeue_async())
    while not consumer._sleepers:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    producer.enqueue(b"here")
    assert asyncio.run(consumer.dequeue_async(LIMIT)) == b"here"
    consumer.peer_gone()
    with pytest.raises(md.PeerGoneError):
        asyncio.run(consumer.dequeue_async(LIMIT))
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_select_loop_puts(ends: Ends) -> None:
    import select

    producer, consumer = ends
    producer.enqueue(bytes(producer.largest))
    fd = producer.fileno()
    assert not producer.try_enqueue(b"more")  # the look before the first wait
    assert select.select([fd], [], [], 0)[0] == []
    consumer.dequeue()
    assert select.select([fd], [], [], LIMIT)[0] == [fd]
    assert producer.try_enqueue(b"more")


def test_an_entry_that_another_thread_takes_meanwhile_is_not_taken_twice(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between finding it and taking it: where the sleepers are woken, Python code runs."""
    producer, consumer = ends
    taken: list[bytes | None] = []
    cleared = consumer._clear

    def comes() -> None:
        cleared()
        if not taken:
            producer.enqueue(b"one")

    def is_taken() -> None:
        if not taken:
            taken.append(None)  # once
            taken.append(consumer.try_dequeue())

    monkeypatch.setattr(consumer, "_clear", comes)
    monkeypatch.setattr(consumer, "_wake", is_taken)
    assert consumer.try_dequeue() is None
    assert taken == [None, b"one"]
    monkeypatch.undo()

    async def main() -> bytes:  # and it asked anew
        waiting = asyncio.ensure_future(consumer.dequeue_async())
        await asleep(consumer)
        producer.enqueue(b"two")
        return await waiting

    assert asyncio.run(asyncio.wait_for(main(), LIMIT)) == b"two"


def test_room_that_another_thread_fills_meanwhile_is_not_filled_twice(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer, consumer = ends
    producer._socket_fileno()
    for number in range(4):
        producer.enqueue(bytes([number]) * 1000)
    taken: list[bytes | None] = []
    cleared = producer._clear

    def is_made() -> None:
        cleared()
        if not taken:
            taken.append(consumer.try_dequeue())

    def is_filled() -> None:
        if len(taken) == 1:
            taken.append(None)  # once
            producer.enqueue(b"4" * 1000)

    monkeypatch.setattr(producer, "_clear", is_made)
    monkeypatch.setattr(producer, "_wake", is_filled)
    assert not producer.try_enqueue(b"5" * 1000)
    monkeypatch.undo()
    there = consumer.dequeue_many()
    assert there == [bytes([number]) * 1000 for number in range(1, 4)] + [b"4" * 1000]


def test_an_entry_that_another_thread_takes_before_the_buffer_is_had(ends: Ends) -> None:
    producer, consumer = ends

    class Slow(md.BufferMemoryDescriptor):
        """Its bytes are given by Python code, while which another thread runs."""

        def _export(self) -> object:  # type: ignore[override]
            taken.append(consumer.try_dequeue())
            return super()._export()

    taken: list[bytes | None] = []
    with Slow(64) as buffer:
        producer.enqueue(b"one")
        producer.enqueue(b"two")
        assert consumer.dequeue_into(buffer) == 3
        assert taken == [b"one"]
        assert bytes(buffer)[:3] == b"two"
        producer.enqueue(b"three")
        with pytest.raises(md.TimedOutError):
            consumer.dequeue_into(buffer, timeout=0)


def test_an_end_that_is_closed_while_the_buffer_is_had(ends: Ends) -> None:
    """Its memory has gone then."""
    producer, consumer = ends

    class Closing(md.BufferMemoryDescriptor):
        """Its bytes are given by Python code, while which another thread runs."""

        def _export(self) -> object:  # type: ignore[override]
            end.close()
            return super()._export()

    with Closing(64) as buffer:
        end: md.Producer | md.Consumer = producer
        with pytest.raises(md.ClosedError):
            producer.enqueue(buffer)
        end = consumer
        with pytest.raises(md.ClosedError):
            consumer.dequeue_into(buffer)
