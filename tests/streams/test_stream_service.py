"""Streams of a service: clients subscribe by name, live, leave and die."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from children import finish, is_idle, kill, start
from stream_tools import ALL, LIMIT, publish, taken

import memdesc as md
from memdesc.services import protocol
from memdesc.services.streams import StreamingClient
from memdesc.streams import Stream


@pytest.fixture
def service() -> Iterator[md.Service]:
    with md.Service("camera") as service:
        yield service


@pytest.fixture
def stream(service: md.Service) -> Stream:
    return service.stream("video", nbytes=64, slots=24, policies=ALL)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what is sure to come."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("name", ["x" * 1024, "é" * 200, "a\0b"], ids=["long", "wide", "NUL"])
def test_names_that_no_memfd_can_have(service: md.Service, name: str) -> None:
    stream = service.stream(name, nbytes=64)
    with md.connect("camera") as connection, connection.subscribe(name) as video:
        stream.publish(b"it")
        with video.take(LIMIT) as slot:
            assert bytes(slot) == b"it"
    assert stream.name == name
    assert name[0] in stream.memory.name  # as much of it as the maps file can show


def test_a_client_subscribes_by_name(service: md.Service) -> None:
    with md.connect("camera") as connection:
        with pytest.raises(md.ShareNotFoundError):
            connection.subscribe("video", timeout=0)
        stream = service.stream("video", shape=(3, 4), dtype="<f4")
        assert service.streams() == {"video": stream}
        with pytest.raises(md.InvalidArgument) as caught:
            service.stream("video", nbytes=1)
        assert caught.value.errno == errno.EEXIST
        with connection.subscribe("video") as video:
            assert (video.name, video.form) == ("video", stream.form)
            stream.publish([[0.5] * 4] * 3, metadata={"n": 1})
            with video.take(LIMIT) as slot:
                assert slot.array.sum() == 6
                assert slot.metadata == {"n": 1}
            stream.close()
            with pytest.raises(md.PeerGoneError) as gone:
                video.take(LIMIT)
            assert gone.value.errno == errno.EPIPE
        service.stream("video", nbytes=1).close()  # the name is free again
        with pytest.raises(md.ShareNotFoundError):
            connection.subscribe("video", timeout=0)


def test_who_may_subscribe(service: md.Service) -> None:
    service.stream("private", nbytes=1, allow=lambda task: task.pid != os.getpid())
    with md.connect("camera") as connection, pytest.raises(md.ShareNotFoundError):
        connection.subscribe("private", timeout=0)


def test_what_a_client_asks_is_checked(service: md.Service) -> None:
    service.stream("video", nbytes=1, slots=100)
    with md.connect("camera") as connection:
        with pytest.raises(md.InvalidArgument, match="BLOCK"):
            connection.subscribe("video", policy="block")
        for options in ({"loans": 0}, {"depth": 0}, {"depth": 101}):
            with pytest.raises(md.InvalidArgument):
                connection.subscribe("video", **options)  # type: ignore[arg-type]
        with pytest.raises(md.LimitError, match="loans") as caught:
            connection.subscribe("video", loans=65)
        assert caught.value.errno == errno.EDQUOT
        subscriptions = [connection.subscribe("video", loans=16) for _ in range(4)]
        with pytest.raises(md.LimitError):
            connection.subscribe("video", loans=1)
        subscriptions[0].close()
        connection.subscribe("video", loans=16).close()


def test_a_stream_that_is_full_says_so(service: md.Service) -> None:
    service.stream("video", nbytes=1, slots=4)
    with md.connect("camera") as connection, connection.subscribe("video"):
        with pytest.raises(md.AllocationError, match="slots=6") as caught:
            connection.subscribe("video")
        assert caught.value.errno == errno.EDQUOT


# --- Other processes --------------------------------------------------------------------------


def read_all(policy: str, count: int) -> None:
    """Take all from 1 on, without a gap."""
    with md.connect("camera") as connection:
        expected = 1
        for slot in connection.subscribe("video", policy=policy, latest=False):
            assert slot.metadata == slot.sequence == expected
            assert (slot.array == expected & 0xFF).all()
            expected += 1
        assert expected == count + 1


def test_several_processes_see_every_slot_under_block(service: md.Service, stream: Stream) -> None:
    count = 2000
    pids = [start(read_all, "block", count) for _ in range(2)]
    until(lambda: len(stream.subscribers()) == 2)
    publish(stream, *range(1, count + 1))
    stream.close()
    assert [finish(pid) for pid in pids] == [0, 0]


def hold_and_hang(count: int) -> None:
    with md.connect("camera") as connection:
        video = connection.subscribe("video", policy="block", depth=2)
        slots = [video.take(LIMIT) for _ in range(count)]
        signal.pause()
        del slots


@pytest.mark.parametrize("held", [0, 2])
def test_a_killed_subscriber_holds_nobody_up(
    service: md.Service, stream: Stream, held: int
) -> None:
    reader = start(read_all, "block", 300)
    until(lambda: len(stream.subscribers()) == 1)
    victim = start(hold_and_hang, held)
    until(lambda: len(stream.subscribers()) == 2)
    publish(stream, *range(1, held + 3))
    thread = threading.Thread(target=publish, args=(stream, *range(held + 3, 301)))
    thread.start()
    until(lambda: stream._waits > 0)
    kill(victim)
    thread.join(LIMIT)
    assert not thread.is_alive()
    until(lambda: len(stream.subscribers()) == 1)
    stream.close()
    assert finish(reader) == 0
    assert stream.statistics().published == 300


def test_what_a_killed_subscriber_held_comes_back(service: md.Service, stream: Stream) -> None:
    for _ in range(5):
        pid = start(hold_and_hang, 2)
        until(lambda: len(stream.subscribers()) == 1)
        publish(stream, 1, 2)
        until(lambda: stream.statistics().subscribers[0].held == 2)
        kill(pid)
        until(lambda: stream.subscribers() == [])
        assert stream.statistics().free == 23


def serve_and_die(ready: int) -> None:
    service = md.Service("other")
    stream = service.stream("video", nbytes=64)
    os.write(ready, b"x")
    until(lambda: len(stream.subscribers()) == 1)
    publish(stream, 1, 2, 3)
    signal.pause()


def test_a_killed_publisher_leaves_what_it_published() -> None:
    ready, ours = os.pipe()
    pid = start(serve_and_die, ours)
    assert os.read(ready, 1)
    with md.connect("other") as connection, connection.subscribe("video") as video:
        held = video.take(LIMIT)
        until(lambda: video.pending == 2)
        waiter_outcome: list[int | None] = []

        def wait() -> None:
            try:
                for slot in video:
                    waiter_outcome.append(slot.metadata)
            except md.PeerGoneError as error:
                waiter_outcome.append(error.errno)

        thread = threading.Thread(target=wait)
        thread.start()
        until(lambda: len(waiter_outcome) == 2)
        kill(pid)
        thread.join(LIMIT)
        assert waiter_outcome == [2, 3, errno.ECONNRESET]
        assert (held.array == 1).all()
        assert select.select([video.fileno()], [], [], LIMIT)[0]
    md.Service("other").close()  # sweeps the dead one's socket
    os.close(ready)
    os.close(ours)


# --- Leaving ----------------------------------------------------------------------------------


def test_a_client_that_leaves_keeps_what_it_looks_at(stream: Stream) -> None:
    with md.connect("camera") as connection, connection.subscribe("video") as video:
        publish(stream, 1, 2)
        array = video.take(LIMIT).array
    publish(stream, *range(3, 40))
    until(lambda: stream.statistics().subscribers[0].pending == 0)
    assert (array == 1).all()
    assert stream.statistics().subscribers[0].held == 1
    del array
    until(lambda: stream.subscribers() == [])
    assert stream.statistics().free == 23


def test_who_left_makes_room_for_who_comes(service: md.Service) -> None:
    stream = service.stream("small", nbytes=64, slots=4)
    with md.connect("camera") as connection:
        publish(stream, 1, 2)
        slot = connection.subscribe("small").take(LIMIT)
    with md.connect("camera") as connection, connection.subscribe("small") as video:
        assert taken(video) == [2]
    assert slot.held  # but is no longer safe: its place was needed


def test_a_client_that_is_thrown_out_keeps_nothing(service: md.Service, stream: Stream) -> None:
    with md.connect("camera") as connection, connection.subscribe("video") as video:
        publish(stream, 1, 2)
        slot = video.take(LIMIT)
        service.clients()[0].close()
        until(lambda: stream.subscribers() == [])
        assert stream.statistics().free == 23
        with pytest.raises(md.PeerGoneError) as caught:
            video.take(LIMIT)
            video.take(LIMIT)
        assert caught.value.errno == errno.ECONNRESET
        slot.release()


def test_a_client_that_corrupts_its_line_is_dropped(service: md.Service, stream: Stream) -> None:
    with md.connect("camera") as connection, connection.subscribe("video") as video:
        good = md.connect("camera")
        other = good.subscribe("video")
        publish(stream, 1)
        stream.subscribers()[0].memory.write_bytes(64, b"\xff" * 8)
        publish(stream, 2)
        stream.look()
        until(lambda: connection.closed)
        assert taken(other) == [1, 2]
        with pytest.raises(md.ProtocolError):
            video.take(LIMIT)
        assert service.clients() == [service.clients()[-1]]
        other.close()
        good.close()


def lies() -> dict[str, Callable[[protocol.Subscribed, list[int]], protocol.Subscribed]]:
    """What a service may answer that is not so."""

    def says(**changes: Any) -> Callable[[protocol.Subscribed, list[int]], protocol.Subscribed]:
        return lambda answer, fds: msgspec.structs.replace(answer, **changes)

    def fewer(answer: protocol.Subscribed, fds: list[int]) -> protocol.Subscribed:
        os.close(fds.pop())
        return answer

    def swapped(answer: protocol.Subscribed, fds: list[int]) -> protocol.Subscribed:
        fds.reverse()
        return msgspec.structs.replace(answer, pool=answer.line, line=answer.pool)

    return {
        "more slots": says(slots=4000),
        "slots without end": says(slots=1 << 62),
        "no slots": says(slots=0),
        "larger slots": says(nbytes=1 << 20),
        "an array of another size": says(shape=(3,), dtype="<f8"),
        "objects": says(shape=(8,), dtype="O"),
        "no dtype": says(shape=(8,), dtype="what?"),
        "a shape alone": says(shape=(64,)),
        "a descriptor less": fewer,
        "the one for the other": swapped,
    }


@pytest.mark.parametrize("lie", lies())
def test_a_service_that_lies(stream: Stream, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = StreamingClient._answer_of

    def answer_of(*arguments: Any) -> tuple[protocol.Subscribed, list[int]]:
        answer, fds = honest(*arguments)
        return lies()[lie](answer, fds), fds

    monkeypatch.setattr(StreamingClient, "_answer_of", answer_of)
    with md.connect("camera") as connection:
        with pytest.raises((md.ProtocolError, md.SealedError, md.MappingError)):
            connection.subscribe("video")
        monkeypatch.undo()
        with connection.subscribe("video") as video:
            publish(stream, 1)
            assert taken(video) == [1]
    until(lambda: stream.subscribers() == [])


def test_a_service_that_ends_closes_its_streams() -> None:
    with md.Service("short") as service:
        stream = service.stream("video", nbytes=1)
        connection = md.connect("short")
        video = connection.subscribe("video")
        stream.publish(b"x")
    assert stream.closed
    assert [bytes(slot) for slot in video] == [b"x"]
    video.close()
    connection.close()


# --- asyncio ----------------------------------------------------------------------------------


def test_async_for_sees_every_slot_and_ends(stream: Stream) -> None:
    count = 200

    async def read(video: md.Subscription) -> list[int]:
        return [slot.metadata async for slot in video]

    async def both() -> list[list[int]]:
        with md.connect("camera") as connection:
            videos = [connection.subscribe("video", policy="block", depth=2) for _ in range(2)]
            thread = threading.Thread(target=put)
            thread.start()
            found = await asyncio.wait_for(asyncio.gather(*map(read, videos)), LIMIT)
            thread.join()
            for video in videos:
                video.close()
            return found

    def put() -> None:
        publish(stream, *range(count))
        stream.close()

    assert asyncio.run(both()) == [list(range(count))] * 2


def test_async_timeouts_cancellation_and_close(stream: Stream) -> None:
    async def main() -> None:
        with md.connect("camera") as connection:
            video = connection.subscribe("video")
            for timeout, number in ((0.01, errno.ETIMEDOUT), (0, errno.EAGAIN)):
                with pytest.raises(md.TimedOutError) as caught:
                    await video.take_async(timeout)
                assert caught.value.errno == number
            task = asyncio.ensure_future(video.take_async())
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            publish(stream, 1)
            assert (await video.take_async(LIMIT)).metadata == 1
            task = asyncio.ensure_future(video.take_async())
            await asyncio.sleep(0.01)
            video.close()
            with pytest.raises(md.ClosedError):
                await asyncio.wait_for(task, LIMIT)

    asyncio.run(main())


def test_the_socket_is_readable_only_while_there_may_be_slots(stream: Stream) -> None:
    with md.connect("camera") as connection, connection.subscribe("video") as video:

        def ready(timeout: float = 0) -> bool:
            return bool(select.select([video.fileno()], [], [], timeout)[0])

        assert video.try_take() is None
        assert video.fileno() >= 0
        assert video.try_take() is None
        assert not ready()
        publish(stream, 1, 2)
        assert ready(LIMIT)
        assert stream.statistics().subscribers[0].notifications == 1
        assert taken(video) == [1, 2]
        assert video.try_take() is None
        assert not ready()
        stream.close()
        assert ready(LIMIT)


@pytest.mark.slow
def test_an_idle_subscriber_uses_no_time(stream: Stream) -> None:
    pid = start(read_all, "block", 0)
    until(lambda: len(stream.subscribers()) == 1)
    until(lambda: is_idle(pid))
    stream.close()
    assert finish(pid) == 0
