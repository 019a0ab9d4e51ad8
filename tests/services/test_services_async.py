"""What services and connections wait for, awaited: found, cancelled, too late, and ended."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from puppets import wait_until

import memdesc as md

LIMIT = 60
Both = tuple[md.Service, md.Connection]


@pytest.fixture
def both() -> Iterator[Both]:
    with md.Service("window") as service, md.connect("window") as connection:
        yield service, connection
    connection.task.close()  # pytest keeps the fixture's value a little longer


async def cancelled(waiting: Awaitable[Any]) -> None:
    """Begin to wait, and be cancelled."""
    task = asyncio.ensure_future(waiting)
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_what_is_offered_later_is_awaited(both: Both) -> None:
    service, connection = both
    frames = md.BufferMemoryDescriptor(64)

    async def main() -> None:
        asking = [
            asyncio.ensure_future(call)
            for call in (
                connection.map_async("frames", length=32),
                connection.descriptor_async("frames"),
                connection.queue_async("samples", spin=0),
                connection.subscribe_async("video", loans=1),
            )
        ]
        await asyncio.sleep(0.01)
        service.share("frames", frames)
        samples = service.queue("samples")
        stream = service.stream("video", nbytes=8)
        mapping, descriptor, consumer, video = await asyncio.gather(*asking)
        assert (mapping.length, descriptor.length) == (32, 64)
        assert (await samples.wait_client_async(LIMIT)) in service.clients()
        samples.put(b"21.5")
        assert await consumer.dequeue_async(LIMIT) == b"21.5"
        with await stream.loan_async(LIMIT) as slot:
            slot.buffer[:] = b"8 bytes!"
        with await video.take_async(LIMIT) as taken:
            assert bytes(taken) == b"8 bytes!"
        for one in (mapping, descriptor, consumer, video):
            getattr(one, "unmap", getattr(one, "close", None))()

    with frames:
        asyncio.run(asyncio.wait_for(main(), LIMIT))


@pytest.mark.parametrize("what", ["map", "descriptor", "arrays", "queue", "subscribe"])
def test_what_never_comes_is_not_waited_for_longer(both: Both, what: str) -> None:
    _, connection = both
    ask: Callable[..., Awaitable[Any]] = getattr(connection, f"{what}_async")

    async def main() -> None:
        told: list[int | None] = []
        while not told:
            try:
                await ask("nothing", timeout=0.02)
            except md.TimedOutError:  # no answer in so short a time: all is busy
                continue
            except md.ShareNotFoundError as error:
                told.append(error.errno)
        assert told == [errno.ENOENT]
        await cancelled(ask("nothing", timeout=None))
        connection.close()
        with pytest.raises(md.ClosedError):
            await ask("nothing")

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert not connection._pending


def test_what_came_for_one_who_was_cancelled_is_closed(both: Both) -> None:
    """The client is let have it once: who was cancelled before the answer has no end of it."""
    service, connection = both
    samples = service.queue("samples")

    async def main() -> None:
        for _ in range(20):
            await cancelled(connection.queue_async("samples"))

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    wait_until(lambda: not connection._late)
    with connection.queue("samples", timeout=LIMIT) as consumer:
        assert samples.put(b"only one") == 1
        assert consumer.dequeue(LIMIT) == b"only one"  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_service_that_does_not_answer(puppet: Any) -> None:
    one = puppet("service = md.Service('window')")
    with md.connect("window") as connection:
        one.stop()

        async def main() -> None:
            for call in (connection.map_async, connection.events_async):
                with pytest.raises(md.TimedOutError) as caught:
                    await call("frames", timeout=0.05)
                assert caught.value.errno == errno.ETIMEDOUT
            waiting = asyncio.ensure_future(connection.queue_async("samples", timeout=None))
            await asyncio.sleep(0)
            one.kill()
            with pytest.raises(md.PeerGoneError):
                await waiting

        asyncio.run(asyncio.wait_for(main(), LIMIT))
    with md.Service("window"):  # sweeps what the killed one left
        pass


def test_clients_are_awaited_and_none_is_lost(both: Both) -> None:
    service, _ = both

    async def main() -> None:
        first = await service.wait_client_async(LIMIT)
        assert first in service.clients()
        with pytest.raises(md.TimedOutError):
            await service.wait_client_async(0.01)
        await cancelled(service.wait_client_async())
        waiting = [asyncio.ensure_future(service.wait_client_async()) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        async with await md.connect_async("window"):
            assert await waiting[1] is not first
        waiting = [asyncio.ensure_future(service.wait_client_async())]
        await asyncio.sleep(0)
        await asyncio.to_thread(service.close)
        with pytest.raises(md.ClosedError):
            await waiting[0]

    asyncio.run(asyncio.wait_for(main(), LIMIT))


@pytest.mark.slow
def test_arrays_are_awaited(tmp_path: Path) -> None:
    np.save(tmp_path / "weights.npy", np.arange(6.0))
    with md.files.FileServer("model", [tmp_path / "weights.npy"]):

        async def main() -> dict[str, Any]:
            async with await md.connect_async("model") as model:
                return dict(await model.arrays_async())

        assert asyncio.run(main())["weights"].sum() == 15


def test_lengths_are_awaited(both: Both) -> None:
    service, connection = both
    buffer = md.BufferMemoryDescriptor(4096, reserve=1 << 16)
    service.share("log", buffer)

    async def main() -> None:
        await cancelled(connection.wait_length_async("log", 4096))
        with pytest.raises(md.TimedOutError):
            await connection.wait_length_async("log", 4096, timeout=0.05)
        waiting = asyncio.ensure_future(connection.wait_length_async("log", 4096))
        await asyncio.sleep(0.01)
        buffer.grow(8192)
        assert await waiting == 8192
        waiting = asyncio.ensure_future(connection.wait_length_async("log", 8192))
        ended = asyncio.ensure_future(connection.wait_mapping_async())
        await asyncio.sleep(0.01)
        connection.close()
        for one in (waiting, ended):
            with pytest.raises(md.ClosedError):
                await one

    with buffer:
        asyncio.run(asyncio.wait_for(main(), LIMIT))


@pytest.mark.slow
def test_mappings_are_awaited(puppet: Any) -> None:
    with md.Service("window") as service:
        one = puppet("c = md.connect('window', timeout=30)", "b = md.BufferMemoryDescriptor(5000)")

        async def main() -> None:
            client = await service.wait_client_async(LIMIT)
            await cancelled(client.wait_mapping_async())
            waiting = asyncio.ensure_future(client.wait_mapping_async())
            await asyncio.sleep(0)
            pushed = await asyncio.to_thread(one.do, "b.create_mapping_in_task(c.task).address")
            with await waiting as mapping:
                assert mapping.address == pushed
            with pytest.raises(md.TimedOutError):
                await client.wait_mapping_async(0.01)

        asyncio.run(asyncio.wait_for(main(), LIMIT))


@pytest.mark.slow
def test_mappings_are_made_in_another_task_and_unmapped(puppet: Any) -> None:
    """Not in `cancelled`'s way: one who was cancelled leaves nothing mapped there."""
    frames = md.BufferMemoryDescriptor(5000, name="frames")
    with md.Service("window") as service:
        one = puppet("c = md.connect('window', timeout=30)")
        client = service.wait_client(LIMIT)

        async def main() -> None:
            with await frames.create_mapping_in_task_async(md.Task.current()) as here:
                await here.unmap_async()
                assert not here.is_mapped
            mapping = await frames.create_mapping_in_task_async(client.task, offset=8, length=100)
            assert (mapping.length, mapping.offset, mapping.task) == (100, 8, client.task)
            await asyncio.to_thread(one.do, "m = c.wait_mapping(30)")
            assert one.do("m.address") == mapping.address
            await asyncio.to_thread(one.do, "view = memoryview(m)")
            with pytest.raises(BufferError):
                await mapping.unmap_async()
            await asyncio.to_thread(one.do, "view.release(); del m")
            await mapping.unmap_async()
            await mapping.unmap_async()  # a no-op
            assert frames.mappings() == []
            for _ in range(10):
                await cancelled(frames.create_mapping_in_task_async(client.task))
            with pytest.raises(md.MappingError) as caught:
                await frames.create_mapping_in_task_async(client.task, length=6000)
            assert caught.value.reason is md.MappingReason.OUT_OF_RANGE

        asyncio.run(asyncio.wait_for(main(), LIMIT))
        wait_until(lambda: not client._late)
        wait_until(lambda: one.do("c.mappings()") == [])  # what was cancelled went there
        assert client.statistics().remote_mappings == 0


@pytest.mark.slow
def test_a_client_that_does_not_answer_is_not_waited_for_longer(puppet: Any) -> None:
    frames = md.BufferMemoryDescriptor(5000)
    with md.Service("window") as service:
        one = puppet("c = md.connect('window', timeout=30)")
        client = service.wait_client(LIMIT)
        mapping = frames.create_mapping_in_task(client.task)
        one.stop()

        async def main() -> None:
            for call in (
                frames.create_mapping_in_task_async(client.task, timeout=0.05),
                mapping.unmap_async(timeout=0.05),  # type: ignore[call-arg]
            ):
                with pytest.raises(md.MappingError) as caught:
                    await call
                assert caught.value.reason is md.MappingReason.NOT_ANSWERING
                assert caught.value.errno == errno.ETIMEDOUT
            assert mapping.is_mapped
            await cancelled(mapping.unmap_async())
            making = frames.create_mapping_in_task_async(client.task, timeout=None)
            waiting = asyncio.ensure_future(making)
            await asyncio.sleep(0.01)
            one.go_on()
            late = await waiting
            assert not mapping.is_mapped  # as was asked for before this
            assert late.is_mapped
            making = frames.create_mapping_in_task_async(client.task, timeout=None)
            one.stop()
            waiting = asyncio.ensure_future(making)
            await asyncio.sleep(0.01)
            one.kill()
            with pytest.raises(md.MappingError) as caught:
                await waiting
            assert caught.value.reason is md.MappingReason.PEER_GONE
            await late.unmap_async()  # it went with its task

        asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_shares_are_awaited(both: Both) -> None:
    service, connection = both
    for number in range(300):  # more than one message has
        service.share(str(number), md.BufferMemoryDescriptor(8))

    async def main() -> None:
        await cancelled(connection.shares_async())
        assert await connection.shares_async(LIMIT) == connection.shares()
        assert len(await connection.shares_async()) == 300

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_events_and_entries_of_clients_are_awaited(both: Both) -> None:
    service, connection = both
    commands = service.queue("commands", direction=md.Direction.IN)

    async def main() -> None:
        with await connection.events_async("resized", "closing") as events:
            with pytest.raises(md.TimedOutError) as caught:
                await events.get_async(0.01)
            assert caught.value.errno == errno.ETIMEDOUT
            await cancelled(events.get_async())
            service.notify("resized", 7)
            assert (await events.get_async(LIMIT)).value == 7
        with pytest.raises(md.InvalidArgument):
            await connection.events_async()
        producer = await connection.queue_async("commands")
        assert isinstance(producer, md.Producer)
        await cancelled(commands.get_async())
        waiting = asyncio.ensure_future(commands.get_async())
        await asyncio.sleep(0)
        await producer.enqueue_async(b"start")
        assert (await waiting)[1] == b"start"
        with pytest.raises(md.TimedOutError):
            await commands.get_async(0)
        producer.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_successor_is_awaited() -> None:
    with md.Service("window") as service:

        async def main() -> None:
            assert not await service.wait_superseded_async(0.01)
            await cancelled(service.wait_superseded_async())
            waiting = asyncio.ensure_future(service.wait_superseded_async())
            await asyncio.sleep(0)
            service.close()
            assert await waiting is False

        asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_the_end_of_a_task_is_awaited(puppet: Any) -> None:
    one = puppet()
    with md.Task(one.pid) as task:

        async def main() -> None:
            assert not await task.wait_async(0.01)
            await cancelled(task.wait_async())
            waiting = asyncio.ensure_future(task.wait_async())
            await asyncio.sleep(0)
            one.kill()
            assert await waiting

        asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_who_waits_for_what_never_comes_takes_nothing_from_others() -> None:
    """More than there are threads at most; cancelled ones leave none behind."""

    async def main() -> None:
        for _ in range(2):
            waiting = [
                asyncio.ensure_future(md.connect_async(f"nobody-{number}", timeout=None))
                for number in range(40)
            ]
            with md.Service("window"):
                async with await md.connect_async("window", timeout=LIMIT):
                    pass
            with pytest.raises(md.ServiceNotFoundError) as caught:
                await md.connect_async("nobody", timeout=0.01)
            assert caught.value.errno == errno.ENOENT
            assert not any(one.done() for one in waiting)
            for one in waiting:
                one.cancel()
            await asyncio.wait(waiting)
        while any("memdesc-wait" in one.name for one in threading.enumerate()):
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_service_that_appears_later_is_connected_to() -> None:
    async def main() -> None:
        connecting = asyncio.ensure_future(md.connect_async("window", timeout=LIMIT))
        await asyncio.sleep(0.02)
        assert not connecting.done()
        with md.Service("window"):
            async with await connecting as connection:
                assert connection.name == "window"

    asyncio.run(asyncio.wait_for(main(), LIMIT))


def test_a_service_that_does_not_greet_is_not_waited_for_longer() -> None:
    """Nor by a task that was cancelled; and what it would have been connected by is closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        with md.Service("window") as service:
            path = service.path
        listener.bind(str(path))
        listener.listen(0)

        async def main() -> None:
            with pytest.raises(md.TimedOutError) as caught:
                await md.connect_async("window", timeout=0.02)
            assert caught.value.errno == errno.ETIMEDOUT
            listener.accept()[0].close()
            connecting = asyncio.ensure_future(md.connect_async("window", timeout=None))
            other, _ = await asyncio.to_thread(listener.accept)
            with other:
                other.settimeout(LIMIT)
                hello = await asyncio.to_thread(other.recv, 4096)
                connecting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await connecting
                assert hello
                assert await asyncio.to_thread(other.recv, 4096) == b""

        asyncio.run(asyncio.wait_for(main(), LIMIT))
    path.unlink()
