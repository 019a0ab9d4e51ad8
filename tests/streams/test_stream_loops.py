"""Subscriptions in event loops that are several, that end first, or that reuse descriptors."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Iterator

import pytest

import memdesc as md
from memdesc.queues import notification_pair
from memdesc.streams import Stream, Subscription

LIMIT = 60


@pytest.fixture
def stream() -> Iterator[Stream]:
    with Stream(nbytes=8) as made:
        yield made


def subscribe(stream: Stream) -> Subscription:
    ours, theirs = notification_pair()
    with ours, theirs:
        seat = stream.admit(notify=ours, loans=1)
        return Subscription(
            stream.memory, seat.memory, stream.form, seat.depth, seat.loans, listen=theirs
        )


def test_a_number_that_is_another_sockets_by_now_stays_watched(stream: Stream) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        video = subscribe(stream)
        number = video.fileno()
        waiting = asyncio.ensure_future(video.take_async())
        while not video._sleepers:
            await asyncio.sleep(0)
        video.close()
        here, there = socket.socketpair()
        with here, there:
            for one in (here, there):
                if one.fileno() != number:
                    continue
                heard = asyncio.Event()
                loop.add_reader(number, heard.set)
                with pytest.raises(md.ClosedError):
                    await asyncio.wait_for(waiting, LIMIT)
                (there if one is here else here).send(b"x")
                await asyncio.wait_for(heard.wait(), LIMIT)
                loop.remove_reader(number)
                return
        pytest.skip("another thread took the number")

    asyncio.run(main())


def test_two_loops_on_one_subscription(stream: Stream) -> None:
    video = subscribe(stream)
    taken: list[int] = []

    async def one() -> None:
        with await video.take_async() as slot:
            taken.append(slot.sequence)

    threads = [threading.Thread(target=asyncio.run, args=(one(),), daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    while len(video._sleepers) < 2:
        pass
    for number, _ in enumerate(threads, 1):
        stream.publish(b"x")
        while len(taken) < number and any(thread.is_alive() for thread in threads):
            threads[0].join(0.01)
    for thread in threads:
        thread.join(LIMIT)
    assert taken == [1, 2]
    video.close()


def test_a_loop_that_was_closed_keeps_no_end_from_the_others(stream: Stream) -> None:
    """Neither that of the subscription, nor that of the publisher's task."""
    loop = asyncio.new_event_loop()
    video = subscribe(stream)
    waiting = loop.create_task(video.take_async())
    while not video._sleepers:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    video.peer_gone()
    with pytest.raises(md.PeerGoneError):
        video.take(LIMIT)
    video.close()
    assert video.closed
    assert not waiting.done()
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_a_byte_that_another_read_wakes_those_who_waited_for_it(stream: Stream) -> None:
    """What comes between a look and the reading of the socket is told to nobody else."""
    video = subscribe(stream)

    def clear_after_it_came() -> None:
        video._clear = plain  # type: ignore[method-assign]
        stream.publish(b"first")
        plain()

    async def main() -> None:
        waiting = asyncio.ensure_future(video.take_async())
        while not video._sleepers:
            await asyncio.sleep(0)
        video._clear = clear_after_it_came  # type: ignore[method-assign]
        with video.try_take() as slot:  # type: ignore[union-attr]
            assert slot.sequence == 1
        for _ in range(10):
            await asyncio.sleep(0)
        stream.publish(b"second")
        with await asyncio.wait_for(waiting, LIMIT) as slot:
            assert slot.sequence == 2

    plain = video._clear
    asyncio.run(main())
    video.close()


def test_a_loan_awaits_a_subscriber_who_blocks() -> None:
    with Stream(nbytes=8, slots=8, loans=2, policies=["block"]) as stream:
        seat = stream.admit("block", depth=3, loans=1)
        video = Subscription(stream.memory, seat.memory, stream.form, seat.depth, seat.loans)

        async def publish(number: int) -> None:
            with await stream.loan_async(LIMIT) as slot:
                slot.buffer[:] = bytes([number] * 8)

        async def main() -> None:
            for number in range(3):
                await publish(number)
            for timeout, why in ((0.01, errno.ETIMEDOUT), (0, errno.EAGAIN)):
                with pytest.raises(md.TimedOutError) as caught:
                    await stream.loan_async(timeout)
                assert caught.value.errno == why
            cancelled = asyncio.ensure_future(stream.loan_async())
            publishing = [asyncio.ensure_future(publish(number)) for number in (3, 4)]
            await asyncio.sleep(0.01)
            cancelled.cancel()
            seen = set()
            while len(seen) < 5:
                with await asyncio.to_thread(video.take, LIMIT) as slot:
                    seen.add(bytes(slot)[0])
            await asyncio.gather(*publishing)
            assert seen == set(range(5))
            assert stream.statistics().loaned == 0
            for number in range(3):
                await publish(number)
            waiting = asyncio.ensure_future(stream.loan_async())
            await asyncio.sleep(0.01)
            stream.close()
            with pytest.raises(md.ClosedError):
                await waiting

        asyncio.run(asyncio.wait_for(main(), LIMIT))
        video.close()
