"""connect(…, reconnect=True): the next service of the name, and what is not done again."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time

import pytest
from children import in_child
from puppets import wait_until

import memdesc as md

SHARE = "service = md.Service('camera'); b = md.BufferMemoryDescriptor(8); service.share('it', b)"

LATER = """
time.sleep(0.1)
s = md.Service("camera")
@s.method
def add(a: int) -> int:
    return a + 1
"""


def test_the_next_operation_finds_the_next_service():
    with md.Service("camera") as service:
        service.share("it", md.BufferMemoryDescriptor(8))
        connection = md.connect("camera", reconnect=True)
        assert isinstance(connection, md.Connection)
        assert (len(connection.map("it")), connection.generation) == (8, 1)
        assert (connection.name, connection.task) == ("camera", md.Task.current())
    assert not connection.closed
    with md.Service("camera") as service:
        service.share("it", md.BufferMemoryDescriptor(9))
        assert (len(connection.map("it")), connection.generation) == (9, 2)
        assert len(service.clients()) == 1
        connection.close()
        wait_until(lambda: service.clients() == [])
        assert connection.closed
        connection.close()
        for operation in (connection.shares, lambda: connection.task, lambda: connection.map("it")):
            with pytest.raises(md.ClosedError):
                operation()
    assert "closed" in repr(connection)


def test_no_next_service_within_the_timeout():
    with md.Service("camera"):
        connection = md.connect("camera", timeout=0.05, reconnect=True)
    wait_until(lambda: connection._alive() is None)
    for _ in range(2):
        with pytest.raises(md.ServiceNotFoundError):
            connection.shares()
    with md.Service("camera"), connection:
        assert (connection.shares(), connection.generation) == ([], 2)


@pytest.mark.slow
def test_who_waits_is_told_at_once_and_mappings_stay(puppet):
    one = puppet(SHARE, "b.write_bytes(0, b'old')")
    with md.connect("camera", reconnect=True) as connection:
        mapping = connection.map("it")
        caught: list[BaseException] = []

        def wait() -> None:
            try:
                connection.wait_length("it", 8)
            except md.MemdescError as error:
                caught.append(error)

        connection.wait_length("it", 0)  # it is watched
        threads = [threading.Thread(target=wait) for _ in range(3)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(connection._current._arrived._waiters) == 3)
        one.kill()
        for thread in threads:
            thread.join(30)
        assert [type(error) for error in caught] == [md.PeerGoneError] * 3
        assert bytes(mapping)[:3] == b"old"
        other = puppet()
        other.begin(f"time.sleep(0.1); {SHARE}")  # it is waited for
        assert len(connection.map("it")) == 8
        other.result()
        assert (connection.task.pid, connection.generation) == (other.pid, 2)
        other.do("service.close()")
        caught.clear()


def test_many_threads_find_one_next_service():
    with md.Service("camera"):
        connection = md.connect("camera", reconnect=True)
    wait_until(lambda: connection._alive() is None)
    seen: list[int] = []

    def ask() -> None:
        assert connection.shares() == []
        seen.append(connection.generation)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    with md.Service("camera") as service:
        for thread in threads:
            thread.join(30)
        assert seen == [2] * 8
        assert len(service.clients()) == 1
        connection.close()


def test_a_fork_child_connects_for_itself():
    with md.Service("camera") as service, md.connect("camera", reconnect=True) as connection:

        def child():
            return connection.shares(), connection.generation, os.getpid()

        assert in_child(child)[:2] == ([], 2)
        assert (connection.shares(), connection.generation) == ([], 1)
        wait_until(lambda: len(service.clients()) == 1)


def test_what_is_no_error_of_the_connection_does_not_reconnect():
    with md.Service("camera"), md.connect("camera", reconnect=True) as connection:
        with pytest.raises(md.ShareNotFoundError) as caught:
            connection.map("nothing", timeout=0)
        assert (caught.value.errno, connection.generation) == (errno.ENOENT, 1)


def test_everything_that_a_connection_has_is_forwarded():
    """A method that were not would run on an object without a socket."""
    public = {name for name in dir(md.Connection) if not name.startswith("__")}
    own = vars(md.ReconnectingConnection)
    missing = {
        name
        for name in public - set(own)
        if callable(getattr(md.Connection, name))
        or isinstance(getattr(md.Connection, name), property)
    }
    assert missing == set()
    assert md.ReconnectingConnection.map.__doc__ == md.Connection.map.__doc__


@pytest.mark.slow
def test_asyncio_goes_on_while_it_connects_again(puppet):
    async def work() -> None:
        connection = await md.connect_async("camera", reconnect=True)
        service.close()
        turns = 0
        other = puppet()
        other.begin(LATER)
        answer = asyncio.ensure_future(connection.call_async("add", 4, timeout=20))
        while not answer.done():
            await asyncio.sleep(0.002)
            turns += 1
        assert (await answer, connection.generation) == (5, 2)
        assert turns > 5  # the loop was never held up
        other.result()
        connection.close()
        other.do("s.close()")

    with md.Service("camera") as service:
        asyncio.run(work())


def test_tasks_that_wait_for_the_next_service_can_be_cancelled_and_connect_once():
    """None is left waiting in a thread, which the end of the loop would wait for."""

    async def work() -> None:
        connection = await md.connect_async("camera", reconnect=True, timeout=None)
        first.close()
        cancelled = asyncio.ensure_future(connection.map_async("frames"))
        waiting = [asyncio.ensure_future(connection.map_async("frames")) for _ in range(20)]
        await asyncio.sleep(0.02)
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        with md.Service("camera") as service, md.BufferMemoryDescriptor(64) as frames:
            service.share("frames", frames)
            for mapping in await asyncio.gather(*waiting):
                mapping.unmap()
            assert connection.generation == 2
            assert len(service.clients()) == 1
        left = asyncio.ensure_future(connection.map_async("frames"))
        await asyncio.sleep(0.02)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        connection.close()
        with pytest.raises(md.ClosedError):
            await connection.map_async("frames")

    with md.Service("camera") as first:
        asyncio.run(asyncio.wait_for(work(), 60))


def test_dropping_it_closes_the_connection():
    with md.Service("camera") as service:
        connection = md.connect("camera", reconnect=True)
        assert len(service.clients()) == 1
        del connection
        wait_until(lambda: service.clients() == [])
        begun = time.monotonic()
        with pytest.raises(md.ServiceNotFoundError):
            md.connect("other", timeout=0.02, reconnect=True)
        assert time.monotonic() - begun >= 0.013  # it sleeps no pause that is longer than the rest


def test_close_waits_for_no_thread_that_connects():
    with md.Service("camera"):
        connection = md.connect("camera", timeout=None, reconnect=True)
    wait_until(lambda: connection._alive() is None)  # else the question goes to who has gone
    errors = []

    def ask():
        try:
            connection.shares()
        except md.MemdescError as error:
            errors.append(type(error))

    asking = threading.Thread(target=ask)
    asking.start()
    wait_until(lambda: not connection._lock.acquire(blocking=False) or connection._lock.release())
    connection.close()
    assert connection.closed
    with md.Service("camera") as service:
        asking.join(60)
        wait_until(lambda: service.clients() == [])
    assert errors == [md.ClosedError]
