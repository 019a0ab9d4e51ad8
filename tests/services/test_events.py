"""Events: what a service tells its clients of, the latest of each name, without ever waiting."""

from __future__ import annotations

import asyncio
import datetime
import errno
import gc
import os
import select
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
from children import in_child
from puppets import Puppet, full_table, wait_until
from strangers import Stranger

import memdesc as md
from memdesc.services import protocol

Both = tuple[md.Service, md.Connection]
SOON = 20  # seconds in which everything comes


@pytest.fixture
def both() -> Iterator[Both]:
    with md.Service("window") as service, md.connect("window") as connection:
        yield service, connection
    connection.task.close()  # pytest keeps the fixture's value a little longer


def refusal(call: Callable[[], object]) -> tuple[str, int | None]:
    with pytest.raises(md.MemdescError) as caught:
        call()
    return type(caught.value).__name__, caught.value.errno


# --- Telling and hearing ------------------------------------------------------------------------


class Size(msgspec.Struct):
    width: int
    height: int


VALUES = [
    (None, None),
    (True, True),
    (-(2**63), -(2**63)),
    (1.5, 1.5),
    ("grün", "grün"),
    (b"\x00\xff", b"\x00\xff"),
    ([1, (2, 3)], [1, [2, 3]]),
    ({"a": {1: None}}, {"a": {1: None}}),
    (Size(640, 480), {"width": 640, "height": 480}),
    (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),) * 2,
    (bytes(protocol.MAX_VALUE - 3), bytes(protocol.MAX_VALUE - 3)),
]


def test_values_arrive_as_they_were(both: Both) -> None:
    service, connection = both
    with connection.events("resized", "stopped") as events:
        for value, arrived in VALUES:
            assert service.notify("resized", value) == 1
            assert events.get(SOON) == md.Event("resized", arrived, 1)
        service.notify("stopped")
        assert events.get(SOON) == md.Event("stopped", None, 1)
        assert events.try_get() is None
        assert refusal(lambda: events.get(0)) == ("TimedOutError", errno.ETIMEDOUT)
        assert refusal(lambda: events.get(0.01)) == ("TimedOutError", errno.ETIMEDOUT)
        assert refusal(lambda: events.get(-1))[0] == "InvalidArgument"


def test_those_that_were_not_read_become_one(both: Both) -> None:
    service, connection = both
    with connection.events("a", "b") as events:
        for number in range(100):
            service.notify("a", number)
            service.notify("b", -number)
        heard: dict[str, int] = {"a": 0, "b": 0}
        latest: dict[str, int] = {}
        while heard != {"a": 100, "b": 100}:
            event = events.get(SOON)
            heard[event.name] += event.count
            latest[event.name] = event.value
        assert latest == {"a": 99, "b": -99}
        assert events.try_get() is None


def test_each_gets_what_it_listens_to(both: Both) -> None:
    service, connection = both
    with (
        md.connect("window") as other,
        connection.events("a", "b", "a") as first,
        connection.events("b") as second,
        other.events("b") as third,
    ):
        assert first.names == ("a", "b")
        assert service.notify("a", 1) == 1
        assert service.notify("b", [2]) == 2
        assert service.notify("c") == 0
        one, two, three = first.get(SOON), second.get(SOON), third.get(SOON)
        assert (one.name, two, three) == ("a", md.Event("b", [2], 1), md.Event("b", [2], 1))
        got = first.get(SOON)
        assert got == two
        assert got.value is not two.value  # each its own
        for client in service.clients():
            assert service.notify("a", 3, to=client) == (client is service.clients()[0])
        assert first.get(SOON).value == 3
        second.close()
        assert service.notify("b", 4) == 2  # the first listens to it still
        assert (first.get(SOON).value, third.get(SOON).value) == (4, 4)
        first.close()
        wait_until(lambda: service.notify("b", 5) == 1)
        assert third.get(SOON).value == 5
    assert service.notify("b") == 0


def test_what_nobody_asked_for_is_not_sent(both: Both) -> None:
    service, _ = both
    with Stranger(service.path) as one:
        one.greet()
        service.notify("a")
        assert one.answer(protocol.Listen(1, "a")) == protocol.Done(1)
        service.notify("b")
        service.notify("a", "it")
        told = one.receive()[0]
        assert (told.name, told.count, bytes(told.value)) == ("a", 1, b"\xa2it")
        assert one.answer(protocol.Unlisten(2, "a")) == protocol.Done(2)
        service.notify("a")
        assert one.answer(protocol.Unlisten(3, "a")) == protocol.Done(3)


BAD = [
    (lambda s, c: s.notify("a", bytes(protocol.MAX_VALUE - 2)), "InvalidArgument", errno.EMSGSIZE),
    (lambda s, c: s.notify("a", object()), "InvalidArgument", errno.EINVAL),
    (lambda s, c: s.notify("a", 2**64), "InvalidArgument", errno.EINVAL),
    (lambda s, c: s.notify("a", "\ud800"), "InvalidArgument", errno.EINVAL),
    (lambda s, c: s.notify(""), "InvalidArgument", errno.EINVAL),
    (lambda s, c: s.notify("x" * 1025), "InvalidArgument", errno.EINVAL),
    (lambda s, c: s.notify("a", to=c), "InvalidArgument", errno.EINVAL),
    (lambda s, c: c.events(), "InvalidArgument", errno.EINVAL),
    (lambda s, c: c.events("a", ""), "InvalidArgument", errno.EINVAL),
    (lambda s, c: c.events("a", timeout=float("nan")), "InvalidArgument", errno.EINVAL),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_arguments(both: Both, number: int) -> None:
    call, kind, code = BAD[number]
    assert refusal(lambda: call(*both)) == (kind, code)


def test_a_value_that_holds_itself(both: Both) -> None:
    endless: list[object] = []
    endless.append(endless)
    assert refusal(lambda: both[0].notify("a", endless))[0] == "InvalidArgument"


def test_a_client_listens_to_so_many_names() -> None:
    with (
        md.Service("window", limits=md.Limits(events=3)) as service,
        md.connect("window") as connection,
        connection.events("a", "b") as events,
    ):
        with connection.events("b", "a"):  # listened to already
            pass
        assert refusal(lambda: connection.events("b", "c", "d")) == (
            "LimitError",
            errno.EDQUOT,
        )
        wait_until(lambda: service.notify("c") == 0)  # what it had got of them is given back
        with connection.events("d") as more:
            service.notify("d")
            service.notify("b")
            assert (more.get(SOON).name, events.get(SOON).name) == ("d", "b")
        with md.connect("window") as other, other.events("x", "y", "z"):
            assert service.notify("z") == 1


# --- Ends ---------------------------------------------------------------------------------------


def waiting(events: md.Events) -> tuple[threading.Thread, list[BaseException]]:
    """A thread that waits for an event and keeps what that raises."""
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            events.get(SOON)
        except md.MemdescError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread, raised


ENDS: dict[str, tuple[Callable[..., object], type[BaseException]]] = {
    "these": (lambda s, c, e: e.close(), md.ClosedError),
    "the connection": (lambda s, c, e: c.close(), md.ClosedError),
    "the service": (lambda s, c, e: s.close(), md.PeerGoneError),
}


@pytest.mark.parametrize("what", ENDS)
@pytest.mark.parametrize("first", [False, True])
def test_who_waits_is_told_of_the_end(both: Both, what: str, first: bool) -> None:
    end, kind = ENDS[what]
    events = both[1].events("a")
    if first:
        end(*both, events)
    thread, raised = waiting(events)
    if not first:
        end(*both, events)
    thread.join(SOON)
    assert [type(error) for error in raised] == [kind]
    if what == "these":
        assert list(events) == []
        assert refusal(events.fileno)[0] == "ClosedError"
    else:
        with pytest.raises(kind):
            next(events)
        wait_until(lambda: select.select([events.fileno()], [], [], 0)[0])
    events.close()
    events.close()


def test_what_came_before_the_end_is_given_first(both: Both) -> None:
    service, connection = both
    events = connection.events("a", "b")
    service.notify("a", 1)
    service.notify("b", 2)
    wait_until(lambda: len(events._waiting) == 2)
    service.close()
    wait_until(lambda: connection.closed)
    assert select.select([events.fileno()], [], [], 0)[0]
    assert [events.get(0).name, events.get(0).name] == ["a", "b"]
    assert select.select([events.fileno()], [], [], 0)[0]
    assert refusal(events.try_get) == ("PeerGoneError", errno.ECONNRESET)
    assert refusal(lambda: connection.events("a"))[0] == "PeerGoneError"
    assert refusal(lambda: service.notify("a"))[0] == "ClosedError"


def test_events_keep_their_connection_and_dropped_ones_listen_no_longer(both: Both) -> None:
    service, connection = both
    events: md.Events | None = connection.events("a")
    assert service.notify("a") == 1
    number = events.fileno()
    del events
    wait_until(lambda: service.notify("a") == 0)
    with pytest.raises(OSError):
        os.eventfd_read(number)
    events = md.connect("window").events("a")  # nobody else holds that connection
    gc.collect()
    assert len(service.clients()) == 2
    service.notify("a", "still")
    assert events.get(SOON).value == "still"
    del events
    wait_until(lambda: len(service.clients()) == 1)


def test_listening_and_leaving_in_many_threads(both: Both) -> None:
    """No Unlisten of one thread takes the ears of another that listens to the same."""
    service, connection = both
    failures: list[BaseException] = []

    def listen(number: int) -> None:
        try:
            for turn in range(15):
                with connection.events("a") as events:
                    while service.notify("a", [number, turn]) != 1:
                        raise AssertionError("nobody listens")
                    while events.get(SOON).value is None:
                        pass
        except BaseException as error:  # noqa: BLE001 (the test shows it)
            failures.append(error)

    threads = [threading.Thread(target=listen, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    wait_until(lambda: not connection._asked and not connection._leaving)


def test_in_a_fork_child_they_are_closed(both: Both) -> None:
    service, connection = both
    events = connection.events("a")
    number = events.fileno()
    service.notify("a", 1)

    def child() -> list[str]:
        said = [refusal(call)[0] for call in (events.get, events.try_get, events.fileno)]
        said += [refusal(lambda: connection.events("b"))[0], refusal(lambda: next(events))[0]]
        said.append(refusal(lambda: service.notify("a"))[0])
        assert events.closed and service.closed
        events.close()
        assert not os.path.exists(f"/proc/self/fd/{number}")
        return said

    assert in_child(child) == ["ClosedError"] * 6
    assert not events.closed
    assert events.get(SOON).value == 1
    service.notify("a", 2)
    assert events.get(SOON).value == 2
    events.close()
    assert events.closed


# --- Event loops --------------------------------------------------------------------------------


def test_the_descriptor_is_readable_while_something_waits(both: Both) -> None:
    service, connection = both

    def ready(timeout: float) -> bool:
        return bool(select.select([events.fileno()], [], [], timeout)[0])

    with connection.events("a", "b") as events:
        assert not ready(0)
        service.notify("a")
        service.notify("b")
        assert ready(SOON)
        wait_until(lambda: len(events._waiting) == 2)
        events.get(0)
        assert ready(0)
        events.get(0)
        assert not ready(0)
    with connection.events("a") as events:  # that is asked for only when something waits already
        service.notify("a")
        wait_until(lambda: events._waiting)
        assert ready(0)


def test_no_descriptor_left(both: Both) -> None:
    with both[1].events("a") as events, full_table():
        assert refusal(events.fileno) == ("AllocationError", errno.EMFILE)


def test_in_asyncio(both: Both) -> None:
    service, connection = both
    events = connection.events("a", "b")

    async def hear(until: str) -> int:
        heard = 0
        async for event in events:
            heard += event.count
            if event.value == until:
                break
        return heard

    async def main() -> list[int]:
        # Two tasks wait for the same, and one that is given up.
        given_up = asyncio.create_task(anext(events))
        hearers = [asyncio.create_task(hear("end")) for _ in range(2)]
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        service.notify("a", "end")
        service.notify("b", "end")
        heard = await asyncio.wait_for(asyncio.gather(*hearers), SOON)
        loop = asyncio.get_running_loop()
        loop.call_later(0.01, events.close)
        assert [event async for event in events] == []
        other = connection.events("a")
        loop.call_later(0.01, service.close)
        with pytest.raises(md.PeerGoneError):
            await anext(other)
        return heard

    assert asyncio.run(main()) == [1, 1]


# --- Clients that do not read, and hostile ones ---------------------------------------------------


def test_a_client_that_does_not_read_costs_one_value_of_each_name(both: Both) -> None:
    service, connection = both
    with Stranger(service.path) as slow, connection.events("a") as events:
        slow.greet()
        for number, name in enumerate("abc"):
            slow.answer(protocol.Listen(number, name))
        client = next(one for one in service.clients() if len(one._listens) == 3)
        value, rounds = bytes(3000), 500
        for number in range(rounds):
            for name in "abc":
                service.notify(name, [number, value])
        assert events.get(SOON).count <= rounds  # others hear meanwhile
        assert len(client._untold) == 3
        assert not client._queue
        heard = dict.fromkeys("abc", 0)
        latest: dict[str, int] = {}
        while set(heard.values()) != {rounds}:
            told = slow.receive()[0]
            heard[told.name] += told.count
            latest[told.name] = protocol.decode_value(bytes(told.value))[0]
        assert latest == dict.fromkeys("abc", rounds - 1)
        wait_until(lambda: not client._untold)
        # Nothing is left that would keep the I/O thread awake.
        assert service._loop._selector.get_key(client._sock.fileno()).events == 1


@pytest.mark.slow
def test_a_client_that_is_stopped_hears_the_latest_when_it_goes_on(both: Both) -> None:
    service, connection = both
    with Puppet() as one, connection.events("a") as events:
        one.do("c = md.connect('window')")
        one.do("events = c.events('a', 'end')")
        one.stop()
        for number in range(2000):
            service.notify("a", [number, bytes(1000)])
        service.notify("end")
        heard = 0
        while heard < 2000:
            heard += events.get(SOON).count
        one.go_on()
        one.do("heard = {}")
        one.do(
            "while sum(e[0] for e in heard.values()) < 2001:\n"
            "    e = events.get(20)\n"
            "    heard[e.name] = (heard.get(e.name, (0,))[0] + e.count, e.value and e.value[0])"
        )
        assert one.do("heard") == {"a": [2000, 1999], "end": [1, None]}
        # Killed while it listens: it is told no more, and nobody waits.
        one.kill()
        wait_until(lambda: service.notify("end") == 0)


def test_a_flood_of_questions_gets_refusals_and_holds_nobody_up() -> None:
    with (
        md.Service("window", limits=md.Limits(events=8)) as service,
        md.connect("window") as honest,
        honest.events("a") as events,
        Stranger(service.path) as hostile,
    ):
        hostile.greet()
        hostile.sock.setblocking(False)
        sent = 0
        try:
            while sent < 20_000:
                hostile.send(protocol.Listen(sent, f"{sent}" * 100))
                sent += 1
        except (BlockingIOError, BrokenPipeError, ConnectionResetError):
            pass  # it does not read the answers: at last its own are not read, or it is dropped
        assert sent > 100
        service.notify("a", "on")
        assert events.get(SOON).value == "on"
        for client in service.clients():
            assert len(client._listens) <= 8


@pytest.mark.slow
def test_nothing_idle_takes_time(both: Both) -> None:
    """Neither process, with events, queues and whoever waits for them."""
    service, _ = both
    samples = service.queue("samples")
    commands = service.queue("commands", direction=md.Direction.IN)
    with Puppet() as one:
        one.do("c = md.connect('window')")
        one.do("events, samples, commands = c.events('a'), c.queue('samples'), c.queue('commands')")
        one.do("threading.Thread(target=lambda: [None for _ in events], daemon=True).start()")
        one.do("threading.Thread(target=lambda: samples.wait(), daemon=True).start()")
        samples.wait_client(SOON)
        taker = threading.Thread(target=lambda: list(commands))
        taker.start()
        spent = "(lambda t: (time.sleep(0.6), time.process_time() - t)[1])(time.process_time())"

        def nothing_is_done() -> bool:
            before = time.process_time()
            return one.do(spent) < 0.02 > time.process_time() - before

        wait_until(nothing_is_done)  # what began has to come to rest
        commands.close()
        taker.join(SOON)
        one.kill()
