"""Calls in time: many at once, late, cancelled, cut off by an end on either side."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from children import in_child
from puppets import Puppet, Told, wait_until

import memdesc as md
from memdesc.services.calls.lent import LentMemory

LARGE = 200_000


@pytest.fixture
def held(service: md.Service) -> Any:
    """A service with handlers that wait until they are let go."""
    gate = threading.Event()
    begun: list[int] = []
    ended: list[str] = []

    @service.method
    def wait(number: int = 0) -> int:
        begun.append(number)
        assert gate.wait(30)
        return number

    @service.method
    async def sleep(number: int = 0) -> int:
        begun.append(number)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise
        return number

    @service.method
    async def soon(number: int) -> int:
        await asyncio.sleep(0)
        return number

    service.method(lambda: os.getpid(), name="pid")
    held = type("Held", (), {})()
    held.gate, held.begun, held.ended, held.service = gate, begun, ended, service
    yield held
    gate.set()


# -- futures and threads -------------------------------------------------------------------------


def test_many_calls_are_in_flight(held: Any, client: md.Connection) -> None:
    slow = [client.begin("wait", number) for number in range(3)]
    quick = [client.begin("soon", number) for number in range(20)]
    assert [one.result(20) for one in quick] == list(range(20))
    assert not any(one.done() for one in slow)
    held.gate.set()
    done, rest = concurrent.futures.wait(slow, 20)
    assert {one.result() for one in done} == {0, 1, 2}
    assert not rest


def test_a_future_tells_errors_once_and_for_all(held: Any, client: md.Connection) -> None:
    missing = client.begin("nope")
    assert isinstance(missing.exception(20), md.MethodNotFoundError)
    for _ in range(2):
        with pytest.raises(md.MethodNotFoundError):
            missing.result(20)
    odd = client.begin("pid", returns=str)
    assert isinstance(odd.exception(20), md.InvalidArgument)
    with pytest.raises(md.InvalidArgument):
        odd.result()
    right = client.begin("pid")
    called = []
    right.add_done_callback(called.append)
    assert (right.result(20), right.exception()) == (os.getpid(), None)
    wait_until(lambda: called == [right])


def test_a_result_that_nobody_asks_for_leaves_nothing(
    service: md.Service, client: md.Connection
) -> None:
    service.method(lambda: bytes(LARGE), name="blob")
    concurrent.futures.wait([client.begin("blob")], 20)
    assert len(client.begin("blob").result(20)) == LARGE


def test_calls_on_the_io_thread_are_refused(held: Any, client: md.Connection) -> None:
    """Where callbacks run: a call there would wait for itself."""
    raised: list[BaseException] = []
    over = threading.Event()

    def callback(_: object) -> None:
        for method in (client.call, client.begin):
            try:
                method("pid")
            except md.MemdescError as error:
                raised.append(error)
        over.set()

    pending = client.begin("wait")
    pending.add_done_callback(callback)
    held.gate.set()
    assert over.wait(20)
    assert len(raised) == 2


def test_threads_share_a_connection(service: md.Service, client: md.Connection) -> None:
    @service.method
    def add(left: int, right: np.ndarray[Any, Any]) -> int:
        return left + int(right.sum())

    values = np.ones(3000)
    wrong: list[object] = []

    def work(start: int) -> None:
        for number in range(start, start + 20):
            got = client.call("add", number, values, timeout=30)
            if got != number + 3000:
                wrong.append(got)

    threads = [threading.Thread(target=work, args=(1000 * index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


# -- too late, and cancelled ---------------------------------------------------------------------


def test_a_call_that_takes_too_long_is_cancelled_there(held: Any, client: md.Connection) -> None:
    for method in ("sleep", "wait"):
        with pytest.raises(md.TimedOutError) as caught:
            client.call(method, timeout=0.5)
        assert caught.value.errno == errno.ETIMEDOUT
        assert method in str(caught.value)
    wait_until(lambda: held.ended == ["cancelled"])
    held.gate.set()
    wait_until(lambda: not client._late)  # both were answered all the same
    assert client.call("pid") == os.getpid()


def test_cancelling_a_future_cancels_the_call(held: Any, client: md.Connection) -> None:
    pending = client.begin("sleep")
    wait_until(lambda: held.begun)
    assert pending.cancel()
    assert pending.cancel()
    assert pending.cancelled()
    assert concurrent.futures.wait([pending], 20).done == {pending}
    with pytest.raises(concurrent.futures.CancelledError):
        pending.result()
    wait_until(lambda: held.ended == ["cancelled"])
    finished = client.begin("pid")
    finished.result(20)
    assert not finished.cancel()


def test_a_call_that_waits_for_a_worker_is_withdrawn(held: Any, client: md.Connection) -> None:
    """A client has half of the eight workers: the fifth call waits, and never begins."""
    calls = [client.begin("wait", number) for number in range(5)]
    wait_until(lambda: len(held.begun) == 4)
    assert calls[4].cancel()
    wait_until(lambda: not client._late)
    held.gate.set()
    assert [one.result(20) for one in calls[:4]] == [0, 1, 2, 3]
    assert 4 not in held.begun


def test_what_a_late_call_may_fill_is_kept_until_it_is_answered(
    service: md.Service, client: md.Connection
) -> None:
    gate, begun = threading.Event(), threading.Event()

    @service.method
    def late() -> bytes:
        begun.set()
        assert gate.wait(30)
        return b"answer"

    room = bytearray(6)
    while not begun.is_set():  # else it was withdrawn, and answered so
        with pytest.raises(md.TimedOutError):
            client.call("late", into=room, timeout=0.05)
    with pytest.raises(BufferError):
        room.append(1)  # else its memory could become somebody else's
    gate.set()
    wait_until(lambda: client._lent.is_empty)
    room.append(1)


@pytest.mark.parametrize("end", ["closed", "dropped"])
def test_what_a_late_call_may_fill_is_kept_while_the_service_lives(
    remote: Callable[..., Any], end: str
) -> None:
    """Its connection is gone, and the service still at work: it stores where it was told to."""
    one = remote(
        "gate, begun = threading.Event(), threading.Event()",
        "@s.method\ndef late() -> bytes: begun.set(); gate.wait(30); return b'answer'",
    )
    connection = md.connect("remote")
    room = bytearray(6)
    pending = connection.begin("late", into=room)
    assert one.puppet.do("begun.wait(20)")
    assert pending.cancel()
    del pending
    if end == "closed":
        connection.close()
    del connection
    with pytest.raises(BufferError):
        room.append(1)
    one.puppet.do("gate.set()")
    one.puppet.kill()
    LentMemory().abandon(one.connection.task)  # as the next connection that ends does
    room.append(1)


# -- the end of either side ----------------------------------------------------------------------


def test_the_end_of_the_service_ends_every_waiting_call(remote: Callable[..., Any]) -> None:
    one = remote("@s.method\ndef wait(x: int) -> None: time.sleep(60)")
    connection = one.connection
    raised: list[BaseException] = []

    def work() -> None:
        try:
            connection.call("wait", 1, timeout=60)
        except md.MemdescError as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    pending = [connection.begin("wait", 1) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(connection._pending) == 6)
    one.puppet.kill()
    for thread in threads:
        thread.join(30)
    raised += [future.exception(30) for future in pending]
    assert [type(error) for error in raised] == [md.PeerGoneError] * 6
    with pytest.raises(md.PeerGoneError):
        connection.call("wait", 1)


def test_closing_ends_every_waiting_call(held: Any) -> None:
    with md.connect("calls") as connection:
        pending = connection.begin("wait")
        wait_until(lambda: held.begun)
        connection.close()
        with pytest.raises(md.ClosedError):
            pending.result(20)
        with pytest.raises(md.ClosedError):
            connection.begin("pid")


def test_a_dead_client_cancels_its_async_handlers(held: Any) -> None:
    with Puppet() as one:
        one.do("c = md.connect('calls')")
        one.do("f = [c.begin('sleep', i) for i in range(3)]; None", 30)
        wait_until(lambda: len(held.begun) == 3)
        one.kill()
        wait_until(lambda: held.ended == ["cancelled"] * 3)


def test_a_stopped_client_holds_nobody_up(service: md.Service, client: md.Connection) -> None:
    service.method(lambda: bytes(60_000), name="blob")
    with Puppet() as one:
        one.do("c = md.connect('calls')")
        one.do("f = [c.begin('blob') for i in range(60)]; None")
        one.stop()
        for _ in range(5):
            assert len(client.call("blob", timeout=30)) == 60_000
        one.go_on()
        assert one.do("{len(x.result(30)) for x in f} == {60_000}")


def test_a_handlers_call_after_close_is_answered_by_the_end(held: Any) -> None:
    with md.connect("calls") as connection:
        waiting = connection.begin("wait")
        sleeping = connection.begin("sleep")
        wait_until(lambda: len(held.begun) == 2)
        held.gate.set()
        held.service.close()
        assert isinstance(sleeping.exception(20), md.PeerGoneError)
        assert waiting.exception(20) is None or isinstance(waiting.exception(), md.PeerGoneError)
        with pytest.raises(md.ClosedError):
            held.service.method(lambda: None, name="late")


def test_calls_in_a_fork_child_are_refused(held: Any, client: md.Connection) -> None:
    assert client.call("pid") == os.getpid()
    pending = client.begin("wait")

    def refused() -> int:
        asked = 0
        for ask in (lambda: client.call("pid"), lambda: client.begin("pid"), pending.result):
            with pytest.raises(md.ClosedError):
                ask()
            asked += 1
        held.service.close()
        return asked

    assert in_child(refused) == 3
    held.gate.set()
    assert pending.result(20) == 0
    assert client.call("pid") == os.getpid()


# -- bounds ------------------------------------------------------------------------------------


def test_one_client_has_so_many_calls_in_flight(held: Any, client: md.Connection) -> None:
    calls = [client.begin("sleep", number) for number in range(64)]
    with pytest.raises(md.LimitError) as caught:
        client.call("sleep")
    assert caught.value.errno == errno.EDQUOT
    assert "64" in str(caught.value)
    with md.connect("calls") as other:
        assert other.call("pid") == os.getpid()
    wait_until(lambda: len(held.begun) == 64)  # cancelled before, its handler would never run
    calls.pop().cancel()
    wait_until(lambda: held.ended)
    wait_until(lambda: not client._late)
    assert client.call("pid") == os.getpid()
    for one in calls:
        one.cancel()


def test_a_client_whose_calls_never_end_leaves_workers_to_others(
    held: Any, client: md.Connection
) -> None:
    """Also one that connects several times: it is one task."""
    with Puppet() as hog:
        hog.do("c = [md.connect('calls') for _ in range(2)]")
        hog.do("f = [each.begin('wait', i) for i in range(30) for each in c]; None")
        wait_until(lambda: len(held.begun) == 4)
        assert [client.call("pid", timeout=30) for _ in range(10)] == [os.getpid()] * 10
        assert len(held.begun) == 4
        held.gate.set()
        assert hog.do("[one.result(30) for one in f] == [i for i in range(30) for _ in c]")


def test_an_async_handler_that_exits_ends_no_loop(
    held: Any, client: md.Connection, caplog: pytest.LogCaptureFixture
) -> None:
    @held.service.method
    async def leave() -> None:
        raise SystemExit(3)

    for _ in range(2):
        with pytest.raises(md.RemoteError):
            client.call("leave")
    assert client.call("soon", 4) == 4
    caplog.clear()


def test_no_thread_for_a_method_is_an_error(
    held: Any, client: md.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        for method in ("pid", "sleep"):
            with pytest.raises(md.AllocationError) as caught:
                client.call(method)
            assert caught.value.errno == errno.EAGAIN
    assert (client.call("pid"), client.call("soon", 3)) == (os.getpid(), 3)


def test_no_descriptor_for_an_event_loop_is_an_error(
    held: Any, client: md.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left() -> None:
        raise OSError(errno.EMFILE, "epoll_create1: Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(asyncio, "new_event_loop", none_left)
        with pytest.raises(md.AllocationError) as caught:
            client.call("soon", 3)
        assert caught.value.errno == errno.EMFILE
    assert client.call("soon", 3) == 3


def test_workers_are_as_many_as_asked_for() -> None:
    with md.Service("few", workers=1) as service:
        names = []

        @service.method
        def name() -> None:
            names.append(threading.current_thread().name)

        with md.connect("few") as connection:
            for one in [connection.begin("name") for _ in range(9)]:
                one.result(20)
        assert set(names) == {"memdesc-worker-0"}
    for count in (0, -1, 1.5):
        with pytest.raises(md.InvalidArgument):
            md.Service("none", workers=count)  # type: ignore[arg-type]


# -- asyncio -----------------------------------------------------------------------------------


def test_asyncio_on_both_sides() -> None:
    async def main() -> None:
        here = asyncio.get_running_loop()
        async with md.Service("both") as service:

            @service.method
            async def where(values: np.ndarray[Any, Any]) -> list[Any]:
                await asyncio.sleep(0)
                return [asyncio.get_running_loop() is here, int(values.sum())]

            async with await md.connect_async("both") as client:
                for size in (10, LARGE):
                    assert await client.call_async("where", np.ones(size)) == [True, size]
                with pytest.raises(md.TimedOutError):
                    await client.call_async("slow", timeout=0.0)
                room = bytearray(8)
                service.method(lambda: b"in place", name="put")
                assert await client.call_async("put", into=room) == 8
                assert room == b"in place"
                with pytest.raises(md.MethodNotFoundError):
                    await client.call_async("nope")
            with pytest.raises(md.ServiceNotFoundError):
                await md.connect_async("nobody", timeout=0.01)

    asyncio.run(main())


def test_a_handler_that_has_the_service_end_answers_first() -> None:
    async def main() -> None:
        done = asyncio.Event()
        async with md.Service("both") as service:

            @service.method
            async def finish() -> str:
                done.set()
                return "the end"

            client = await md.connect_async("both")
            pending = client.begin("finish")
            await done.wait()
        assert pending.result(10) == "the end"
        client.close()

    asyncio.run(main())


def test_cancelling_the_task_that_waits_cancels_the_call(held: Any, client: md.Connection) -> None:
    async def main() -> None:
        waiting = asyncio.create_task(client.call_async("sleep", timeout=None))
        while not held.begun:
            await asyncio.sleep(0.001)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())
    wait_until(lambda: held.ended == ["cancelled"])


def test_connecting_without_a_thread_fails_each_time(
    service: md.Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        if thread.name == "memdesc-wait":
            raise RuntimeError("can't start new thread")
        start(thread)

    start = threading.Thread.start

    async def main() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            for _ in range(33):  # one more than there are threads at most
                with pytest.raises(md.AllocationError) as caught:
                    await asyncio.wait_for(md.connect_async("calls"), 60)
                assert caught.value.errno == errno.EAGAIN
        async with await asyncio.wait_for(md.connect_async("calls"), 60):
            pass

    asyncio.run(main())


def test_a_cancelled_connect_leaves_nothing(service: md.Service) -> None:
    async def main() -> None:
        connecting = asyncio.create_task(md.connect_async("calls"))
        await asyncio.sleep(0)
        connecting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await connecting
        while any("memdesc-wait" in one.name for one in threading.enumerate()):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)

    asyncio.run(main())
    wait_until(lambda: not service.clients())


def test_a_loop_that_was_closed_is_told(service: md.Service, client: md.Connection) -> None:
    async def make() -> None:
        @service.method
        async def gone() -> None:
            pass

    asyncio.run(make())
    with pytest.raises(md.ClosedError):
        client.call("gone")


def test_a_signal_interrupts_a_waiting_call(held: Any, client: md.Connection) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def send() -> None:
        wait_until(lambda: held.begun)
        signal.pthread_kill(main, signal.SIGALRM)

    main = threading.get_ident()
    thread = threading.Thread(target=send)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            thread.start()
            client.call("sleep", timeout=None)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)
    wait_until(lambda: held.ended == ["cancelled"])


def test_a_call_of_a_puppet_that_fails_tells_no_stack(remote: Callable[..., Any]) -> None:
    one = remote("@s.method\ndef bad() -> int: return [][secret_index := 3]")
    with pytest.raises(md.RemoteError) as caught:
        one.connection.call("bad")
    assert "secret" not in str(caught.value)
    with pytest.raises(Told) as told:
        one.puppet.do("md.connect('remote').call('nope')")
    assert told.value.kind == "MethodNotFoundError"


def test_a_reconnecting_client_calls_the_next_service(held: Any, client: md.Connection) -> None:
    with md.connect("calls", reconnect=True) as connection:
        assert connection.call("pid") == os.getpid()
        waiting = connection.begin("sleep")
        wait_until(lambda: held.begun)
        held.service.close()
        assert isinstance(waiting.exception(20), md.PeerGoneError)
        with md.Service("calls") as following:
            following.method(lambda: "next", name="pid")
            assert connection.call("pid") == "next"
            assert connection.begin("pid").result(20) == "next"
            assert asyncio.run(connection.call_async("pid")) == "next"


def test_connecting_from_asyncio_takes_all_that_connect_does(service: md.Service) -> None:
    service.method(lambda: 1, name="one")

    async def main() -> None:
        async with await md.connect_async("calls", reconnect=True, timeout=20) as connection:
            assert await connection.call_async("one") == 1
            assert connection.generation == 1  # type: ignore[attr-defined]

    asyncio.run(main())
