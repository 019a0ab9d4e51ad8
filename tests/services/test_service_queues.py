"""Queues of a service: one for each client, either way; their quotas, ends and waits."""

from __future__ import annotations

import asyncio
import errno
import gc
import select
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from children import in_child
from puppets import Puppet, count_fds, full_table, memfds_mapped, wait_until

import memdesc as md
from memdesc.queues.layout import memory_for
from memdesc.testing.faults import failing

SOON = 20  # seconds in which everything comes
SIZE = 4 * md.page_size
IN, OUT = md.Direction.IN, md.Direction.OUT
Both = tuple[md.Service, md.Connection]


@pytest.fixture
def both() -> Iterator[Both]:
    with md.Service("gauge") as service, md.connect("gauge") as connection:
        yield service, connection
    connection.task.close()  # pytest keeps the fixture's value a little longer


def queues_mapped() -> int:
    """Regions of memory of the queues that these tests make."""
    return memfds_mapped("self", "samples") + memfds_mapped("self", "commands")


def refusal(call: Callable[[], object]) -> tuple[str, int | None]:
    with pytest.raises(md.MemdescError) as caught:
        call()
    return type(caught.value).__name__, caught.value.errno


# --- The service produces -----------------------------------------------------------------------


def test_every_client_has_its_own_and_gets_all(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    assert (samples.capacity, samples.largest, samples.direction) == (SIZE, SIZE - 8, OUT)
    assert samples.put(b"before anyone came") == 0
    mine = connection.queue("samples")
    assert isinstance(mine, md.Consumer)
    with md.connect("gauge") as other, other.queue("samples") as theirs:
        clients = [samples.wait_client(SOON), samples.wait_client(SOON)]
        assert samples.clients() == clients == list(samples.producers()) == service.clients()
        assert samples.put(b"one") == 2
        assert samples.put_many([b"two", bytearray(b"three"), memoryview(b"")]) == 2
        assert mine.dequeue_many(timeout=SOON) == [b"one", b"two", b"three", b""]
        samples[clients[1]].enqueue(b"for you alone", SOON)
        assert theirs.dequeue_many(timeout=SOON) == [
            b"one",
            b"two",
            b"three",
            b"",
            b"for you alone",
        ]
        assert mine.try_dequeue() is None
        told = samples.statistics()
        assert [(one.entries, one.nbytes, one.dropped) for one in told.values()] == [
            (4, 11, 0),
            (5, 24, 0),
        ]
    wait_until(lambda: samples.clients() == clients[:1])
    assert refusal(lambda: samples[clients[1]]) == ("ShareNotFoundError", errno.ENOENT)
    assert refusal(lambda: samples.wait_client(0)) == ("TimedOutError", errno.ETIMEDOUT)


def test_who_is_slow_misses_entries_and_nobody_waits(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    slow = connection.queue("samples")
    with md.connect("gauge") as other, other.queue("samples") as quick:
        taken = []
        for _ in range(20):
            taken.append(samples.put(bytes(1016)))
            quick.dequeue()
        assert taken == [2] * 16 + [1] * 4  # 1,024 bytes each in all
        assert samples.put_many([bytes(1016)] * 3) == 1
        slow.dequeue()
        assert samples.put_many([b"", bytes(1000)]) == 2
        first, second = samples.statistics().values()
        assert first.dropped == 4 + 3
        assert second.dropped == 0
        assert len(slow.dequeue_many()) == 17
    assert refusal(lambda: samples.put(bytes(SIZE - 7))) == ("RangeError", errno.EMSGSIZE)
    assert refusal(lambda: samples.put_many([b"first", bytes(SIZE)]))[0] == "RangeError"
    assert refusal(lambda: samples.put("text"))[0] == "InvalidArgument"  # type: ignore[arg-type]
    assert slow.try_dequeue() is None  # of those nothing was put


def test_a_service_that_waits_for_one_client_learns_of_its_end(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    consumer = connection.queue("samples")
    producer = samples[samples.wait_client(SOON)]
    producer.enqueue(bytes(producer.largest))
    closing = threading.Timer(0.02, connection.close)
    closing.start()
    assert refusal(lambda: producer.enqueue(b"", SOON))[0] == "PeerGoneError"
    closing.join()
    assert samples.clients() == []
    assert len(consumer.dequeue(0)) == producer.largest
    assert refusal(lambda: consumer.dequeue(SOON)) == ("PeerGoneError", errno.ECONNRESET)


# --- The clients produce ------------------------------------------------------------------------


def test_entries_of_clients_come_with_who_put_them(both: Both) -> None:
    service, connection = both
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    assert refusal(lambda: commands.get(0)) == ("TimedOutError", errno.ETIMEDOUT)
    assert refusal(lambda: commands.get_many(0))[0] == "InvalidArgument"
    assert commands.try_get() is None
    mine = connection.queue("commands")
    assert isinstance(mine, md.Producer)
    with md.connect("gauge") as other, other.queue("commands") as theirs:
        one, two = commands.wait_client(SOON), commands.wait_client(SOON)
        theirs.enqueue(b"theirs")
        assert commands.get(SOON) == (two, b"theirs")
        mine.enqueue_many([b"1", b"2"])
        assert [commands.get(SOON), commands.get(SOON)] == [(one, b"1"), (one, b"2")]
        assert commands.try_get() is None
        mine.enqueue(b"3")
        theirs.enqueue(b"4")
        assert sorted(commands.get_many(timeout=SOON), key=lambda it: it[1]) == [
            (one, b"3"),
            (two, b"4"),
        ]
        assert [s.entries for s in commands.statistics().values()] == [3, 2]
        assert select.select([commands.fileno()], [], [], 0)[0] == []
        mine.enqueue(b"5")
        assert select.select([commands.fileno()], [], [], SOON)[0] == [commands.fileno()]
        assert commands.get(0)[1] == b"5"
        # A producer that waits for room is woken by who takes.
        mine.enqueue(bytes(mine.largest))
        taker = threading.Timer(0.02, lambda: commands.get(SOON))
        taker.start()
        mine.enqueue(bytes(mine.largest), SOON)
        taker.join()
        assert len(commands.get(SOON)[1]) == mine.largest


def test_a_flood_leaves_the_others_their_turns(both: Both) -> None:
    service, connection = both
    commands = service.queue("commands", direction=IN)
    flood = connection.queue("commands")
    with md.connect("gauge") as other, other.queue("commands") as quiet:
        flood.enqueue_many([b"flood"] * 10_000)
        assert commands.get(SOON)[1] == b"flood"
        quiet.enqueue(b"quiet")
        before = 0
        while commands.get(SOON)[1] != b"quiet":
            before += 1
        assert before <= 2 * 32
        quiet.enqueue(b"quiet")
        flood.enqueue_many([b"flood"] * 100)
        assert b"quiet" in [entry for _, entry in commands.get_many(100)]
        assert len(commands.get_many(5)) == 5
        rest = len(commands.get_many(1 << 20))
        assert rest == 10_000 - 1 - before - 100 - 5 + 100 + 1
        assert commands.try_get() is None


def test_what_a_client_put_before_its_end_still_comes(both: Both) -> None:
    service, connection = both
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    with md.connect("gauge") as other:
        producer = other.queue("commands")
        client = commands.wait_client(SOON)
        producer.enqueue_many([b"last", b"words"])
    wait_until(lambda: commands.clients() == [])
    assert client.closed
    assert select.select([commands.fileno()], [], [], SOON)[0]
    assert commands.get(SOON) == (client, b"last")
    assert commands.get_many() == [(client, b"words")]
    assert commands.try_get() is None
    assert select.select([commands.fileno()], [], [], 0)[0] == []
    # One that closed its end and stays gets a new queue when the old one is empty.
    producer = connection.queue("commands")
    producer.enqueue(b"left")
    producer.close()
    assert refusal(lambda: connection.queue("commands")) == ("InvalidArgument", errno.EBUSY)
    assert commands.get(SOON)[1] == b"left"
    with connection.queue("commands") as producer:
        producer.enqueue(b"anew")
        assert commands.get(SOON)[1] == b"anew"


def test_what_the_gone_left_is_bounded() -> None:
    """As much as one client may have is kept of them all; the oldest goes."""
    limits = md.Limits(queue_bytes=2 * memory_for(SIZE))
    with md.Service("gauge", limits=limits) as service:
        commands = service.queue("commands", capacity=SIZE, direction=IN)
        for number in range(5):
            with md.connect("gauge") as one, one.queue("commands") as producer:
                client = commands.wait_client(SOON)
                producer.enqueue(b"%d" % number)
            kept = min(number + 1, 2)
            wait_until(lambda: [o.client for o in commands._orphans][kept - 1 :] == [client])  # noqa: B023
        assert [entry for _, entry in commands.get_many(timeout=SOON)] == [b"3", b"4"]
        wait_until(lambda: queues_mapped() == 0)
        for _ in range(2):
            with md.connect("gauge") as one:
                one.queue("commands").enqueue(b"never taken")
                client = commands.wait_client(SOON)
            wait_until(lambda: commands._orphans[-1:] and commands._orphans[-1].client is client)  # noqa: B023
        assert len(commands._orphans) == 2
    gc.collect()
    wait_until(lambda: queues_mapped() == 0)


# --- Waiting ------------------------------------------------------------------------------------


def test_iteration_and_a_close_from_another_thread(both: Both) -> None:
    service, connection = both
    commands = service.queue("commands", direction=IN)
    producer = connection.queue("commands")
    got: list[bytes] = []
    raised: list[tuple[str, int | None]] = []

    def take() -> None:
        got.extend(entry for _, entry in commands)

    def wait() -> None:
        raised.append(refusal(lambda: commands.get_many(timeout=SOON)))

    threads = [threading.Thread(target=take)]
    threads[0].start()
    producer.enqueue_many([b"1", b"2", b"3"])
    wait_until(lambda: len(got) == 3)
    threads.append(threading.Thread(target=wait))
    threads[1].start()
    commands.close()
    for thread in threads:
        thread.join(SOON)
    assert (got, raised) == ([b"1", b"2", b"3"], [("ClosedError", None)])
    assert refusal(commands.try_get) == refusal(commands.fileno) == ("ClosedError", None)
    assert refusal(commands.wait_client) == ("ClosedError", None)
    assert refusal(lambda: producer.enqueue(b"")) == ("PeerGoneError", errno.EPIPE)
    commands.close()
    with service.queue("commands", direction=IN) as again:  # the name is free
        with connection.queue("commands") as producer:
            producer.enqueue(b"again")
            assert again.get(SOON)[1] == b"again"


def test_in_asyncio(both: Both) -> None:
    service, connection = both
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    samples = service.queue("samples", capacity=SIZE)
    producer, consumer = connection.queue("commands"), connection.queue("samples")

    async def serve() -> int:
        served = 0
        async for client, entry in commands:
            await asyncio.sleep(0)
            samples[client].enqueue(entry.upper())
            served += 1
        return served

    async def main() -> tuple[list[bytes], int]:
        loop = asyncio.get_running_loop()
        servers = [asyncio.create_task(serve()) for _ in range(2)]
        arrived: asyncio.Queue[bytes] = asyncio.Queue()

        def take() -> None:
            while (entry := consumer.try_dequeue()) is not None:
                arrived.put_nowait(entry)

        loop.add_reader(consumer.fileno(), take)
        take()
        answers = []
        for word in (b"a", b"b", b"c"):
            producer.enqueue(word)
            answers.append(await asyncio.wait_for(arrived.get(), SOON))
        loop.remove_reader(consumer.fileno())
        commands.close()
        return answers, sum(await asyncio.wait_for(asyncio.gather(*servers), SOON))

    assert asyncio.run(main()) == ([b"A", b"B", b"C"], 3)


# --- Opening, quotas, ends ------------------------------------------------------------------------


def test_what_can_not_be_opened(both: Both, caplog: pytest.LogCaptureFixture) -> None:
    service, connection = both
    assert refusal(lambda: connection.queue("none", timeout=0)) == (
        "ShareNotFoundError",
        errno.ENOENT,
    )
    assert refusal(lambda: connection.queue(""))[0] == "InvalidArgument"

    def raises(_: md.Task) -> bool:
        raise RuntimeError("of the rule")

    for name, rule in (("not for you", lambda _: False), ("for nobody", raises)):
        service.queue(name, allow=rule)
        assert refusal(lambda: connection.queue(name, timeout=0))[0] == "ShareNotFoundError"  # noqa: B023
    assert service.queue("for you", allow=lambda task: task.pid > 0).put(b"") == 0
    later = threading.Timer(0.05, lambda: service.queue("late", capacity=SIZE))
    later.start()
    with connection.queue("late", timeout=SOON):
        assert refusal(lambda: connection.queue("late")) == ("InvalidArgument", errno.EBUSY)
    later.join()
    connection.queue("late").close()
    caplog.clear()  # records hold the frames
    assert sorted(service.queues()) == ["for nobody", "for you", "late", "not for you"]


BAD: list[tuple[Callable[[md.Service], object], int]] = [
    (lambda s: s.queue("samples"), errno.EEXIST),
    (lambda s: s.queue("samples", direction=IN), errno.EEXIST),
    (lambda s: s.queue(""), errno.EINVAL),
    (lambda s: s.queue("x", capacity=0), errno.EINVAL),
    (lambda s: s.queue("x", capacity=1 << 41), errno.EINVAL),
    (lambda s: s.queue("x", capacity=65 << 20), errno.EDQUOT),
    (lambda s: s.queue("x", capacity=5 << 20, wired=True), errno.EDQUOT),
    (lambda s: s.queue("x", direction=md.Direction.OUT_IN), errno.EINVAL),  # type: ignore[call-overload]
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_queues_that_can_not_be(both: Both, number: int) -> None:
    call, code = BAD[number]
    both[0].queue("samples")
    assert refusal(lambda: call(both[0])) == ("InvalidArgument", code)


def test_quotas_count_what_is_open() -> None:
    limits = md.Limits(queue_bytes=2 * memory_for(SIZE), wired_bytes=memory_for(SIZE))
    with md.Service("gauge", limits=limits) as service, md.connect("gauge") as connection:
        for name in "abc":
            service.queue(name, capacity=SIZE)
        first, second = connection.queue("a"), connection.queue("b")
        assert refusal(lambda: connection.queue("c")) == ("LimitError", errno.EDQUOT)
        first.close()
        third = connection.queue("c")  # what was closed counts no more
        with md.connect("gauge") as other:  # nor does another's
            other.queue("a").close()
        for one in (second, third):
            one.close()
        for name in ("w", "x"):
            service.queue(name, capacity=SIZE, wired=True)
        try:
            wired = connection.queue("w")
        except md.AllocationError as error:
            pytest.skip(f"memory can not be wired here: {error}")
        assert refusal(lambda: connection.queue("x")) == ("LimitError", errno.EDQUOT)
        wired.close()
        connection.queue("x").close()


def test_memory_that_can_not_be_had_or_wired(both: Both, caplog: pytest.LogCaptureFixture) -> None:
    service, connection = both
    service.queue("a", capacity=SIZE)
    service.queue("w", capacity=SIZE, wired=True)
    with failing("mlock", errno.ENOMEM):
        kind, code = refusal(lambda: connection.queue("w"))
    assert (kind, code) == ("AllocationError", errno.ENOMEM)
    assert [record.message for record in caplog.records] == ["service.queue_not_wired"]
    with failing("fallocate", errno.ENOMEM):
        assert refusal(lambda: connection.queue("a"))[0] == "AllocationError"
    before = count_fds()
    with full_table() as fillers:
        assert refusal(lambda: connection.queue("a"))[0] in ("AllocationError", "MappingError")
        del fillers
    wait_until(lambda: count_fds() <= before)
    with connection.queue("a") as consumer:
        assert service.queues()["a"].put(b"it goes on") == 1  # type: ignore[union-attr]
        assert consumer.dequeue(SOON) == b"it goes on"


def test_no_thread_for_it(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    start = threading.Thread.start

    def none_left(self: threading.Thread) -> None:
        if self.name == "memdesc-errands":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        assert refusal(lambda: connection.queue("samples")) == ("AllocationError", errno.EAGAIN)
    consumer = connection.queue("samples")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", none_left)
        consumer.close()
        assert samples.put(b"") == 0  # and freed on this very thread
    wait_until(lambda: queues_mapped() == 0)


def test_an_answer_that_comes_too_late_leaves_nothing(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    gate = threading.Event()
    service._errands.add(lambda: gate.wait(SOON) and None)
    before = count_fds()
    assert refusal(lambda: connection.queue("samples", timeout=0.02)) == (
        "TimedOutError",
        errno.ETIMEDOUT,
    )
    gate.set()
    samples.wait_client(SOON)
    wait_until(lambda: next(iter(samples._slots.values())).is_over)
    with connection.queue("samples") as consumer:
        assert samples.put(b"on") == 1
        assert consumer.dequeue(SOON) == b"on"
    assert samples.put(b"") == 0
    service._errands.finish()
    del consumer
    wait_until(lambda: count_fds() <= before)


def test_an_orderly_end_lets_the_clients_finish(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    consumer, producer = connection.queue("samples"), connection.queue("commands")
    samples.put_many([b"1", b"2"])
    service.close()
    wait_until(lambda: connection.closed)
    assert list(consumer) == [b"1", b"2"]
    assert refusal(lambda: consumer.dequeue()) == ("PeerGoneError", errno.EPIPE)
    assert refusal(lambda: producer.enqueue(b"")) == ("PeerGoneError", errno.EPIPE)
    assert refusal(lambda: samples.put(b"")) == refusal(commands.get) == ("ClosedError", None)
    assert refusal(lambda: service.queue("more")) == ("ClosedError", None)
    assert refusal(lambda: connection.queue("samples"))[0] == "PeerGoneError"


def test_an_end_keeps_its_connection(both: Both) -> None:
    service, _ = both
    samples = service.queue("samples", capacity=SIZE)
    consumer: md.Consumer | None = md.connect("gauge").queue("samples")
    gc.collect()
    samples.put(b"still there")
    assert consumer is not None
    assert consumer.dequeue(SOON) == b"still there"
    del consumer
    wait_until(lambda: len(service.clients()) == 1)
    assert samples.put(b"") == 0


def test_in_a_fork_child_all_are_closed(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    consumer, producer = connection.queue("samples"), connection.queue("commands")
    producer.enqueue(b"parents")

    def child() -> list[str]:
        calls: list[Callable[[], object]] = [
            lambda: samples.put(b"childs"),
            commands.get,
            commands.fileno,
            lambda: next(iter(commands)),
            consumer.dequeue,
            lambda: producer.enqueue(b""),
            lambda: service.queue("more"),
            samples.wait_client,
        ]
        said = [refusal(call)[0] for call in calls]
        samples.close()
        commands.close()
        return said

    assert in_child(child) == ["ClosedError"] * 8
    assert commands.get(SOON)[1] == b"parents"
    samples.put(b"on")
    assert consumer.dequeue(SOON) == b"on"


# --- Other processes ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_client_and_a_stopped_one(both: Both) -> None:
    service, connection = both
    samples = service.queue("samples", capacity=SIZE)
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    mine = connection.queue("samples")
    with Puppet() as one:
        service._errands.finish()
        before = count_fds(), queues_mapped()
        one.do("c = md.connect('gauge')")
        one.do("samples, commands = c.queue('samples'), c.queue('commands')")
        one.do("commands.enqueue(b'here')")
        client, entry = commands.get(SOON)
        assert (client.task.pid, entry) == (one.pid, b"here")
        samples.put(b"for both")
        assert one.do("samples.dequeue(20).decode()") == "for both"
        one.begin("samples.dequeue(20).decode()")
        samples.put(b"waited for")
        assert one.result() == "waited for"
        assert mine.dequeue_many(timeout=SOON) == [b"for both", b"waited for"]
        one.stop()
        while samples.put(bytes(1000)) == 2:
            assert mine.dequeue(SOON) == bytes(1000)
        assert mine.dequeue(SOON) == bytes(1000)
        one.go_on()
        assert one.do("len(samples.dequeue_many())") == 16
        one.do("commands.enqueue_many([b'last', b'words'])")
        one.kill()
        wait_until(lambda: commands.clients() == [])
        assert client.closed
        assert samples.put(b"on") == 1
        assert commands.get_many(timeout=SOON) == [(client, b"last"), (client, b"words")]
        assert mine.dequeue(SOON) == b"on"
        client.task.close()
        del client, entry
        wait_until(lambda: count_fds() <= before[0] and queues_mapped() == before[1])


@pytest.mark.slow
def test_a_killed_service_is_known_at_once() -> None:
    with Puppet() as one:
        one.do("s = md.Service('gauge')")
        one.do("samples = s.queue('samples')")
        one.do("commands = s.queue('commands', direction=md.Direction.IN)")
        with md.connect("gauge") as connection:
            consumer, producer = connection.queue("samples"), connection.queue("commands")
            one.do("samples.put_many([b'1', b'2'])")
            assert consumer.dequeue(SOON) == b"1"
            raised: list[tuple[str, int | None]] = []

            def fill() -> None:
                while True:
                    try:
                        producer.enqueue(bytes(1 << 16), SOON)
                    except md.PeerGoneError as error:
                        raised.append(("PeerGoneError", error.errno))
                        return

            thread = threading.Thread(target=fill)
            thread.start()
            wait_until(lambda: producer.statistics().sleeps)
            one.kill()
            assert consumer.dequeue(SOON) == b"2"
            start = time.monotonic()
            assert refusal(lambda: consumer.dequeue(SOON)) == ("PeerGoneError", errno.ECONNRESET)
            thread.join(SOON)
            assert raised == [("PeerGoneError", errno.ECONNRESET)]
            assert time.monotonic() - start < SOON / 2
            assert select.select([consumer.fileno()], [], [], SOON)[0]
        md.Service("gauge").close()  # sweeps what the killed one left


def test_the_total_of_a_queue_never_falls(both: Both) -> None:
    """Of a client that has gone too, and of what it left behind and is taken afterwards."""
    service, _ = both
    samples = service.queue("samples", capacity=SIZE)
    commands = service.queue("commands", capacity=SIZE, direction=IN)
    with Puppet() as one:
        one.do("c = md.connect('gauge')")
        one.do("samples, commands = c.queue('samples'), c.queue('commands')")
        one.do("commands.enqueue_many([b'one', b'three'])")
        assert samples.put(b"12") == 1
        assert commands.get(SOON)[1] == b"one"
        assert (samples.total().entries, samples.total().nbytes) == (1, 2)
        assert (commands.total().entries, commands.total().nbytes) == (1, 3)
        one.kill()
    wait_until(lambda: samples.clients() == [] and commands.clients() == [])
    assert (samples.total().entries, samples.total().nbytes) == (1, 2)
    assert commands.total().entries == 1
    assert commands.get(SOON)[1] == b"three"
    assert (commands.total().entries, commands.total().nbytes) == (2, 8)
    with pytest.raises(md.TimedOutError):
        commands.get(0)
    assert (commands.total().entries, commands.total().nbytes) == (2, 8)
    samples.close()
    commands.close()
    assert (samples.total().entries, commands.total().entries) == (1, 2)
    assert service.statistics().entries == 0  # of the queues that there are
