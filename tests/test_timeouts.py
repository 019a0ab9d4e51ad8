"""What waiting calls take as a timeout: seconds from 0, or None. All else is refused alike."""

from __future__ import annotations

import asyncio
import errno
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from fractions import Fraction
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from letting_go import DidNotFail, lets_go, lets_go_async, no_collector
from puppets import Puppet

import memdesc as md
from memdesc import _core
from memdesc.copyio import copyin_into
from memdesc.queues import Consumer, Producer, notification_pair
from memdesc.vm.timeouts import check_timeout, deadline_of

BAD = ["5", -1, -0.001, math.nan, math.inf, True, b"1", [1], 1j, np.float32(1), Fraction(1), ...]
GOOD = [0, 0.0, 0.01, np.float64(0.001)]

# Each waits, or would where nothing is there yet; with 0 each comes to its end at once.
WAITING: dict[str, Callable[[Any, Any], Any]] = {
    "connect": lambda all_, timeout: md.connect("timeouts", timeout=timeout).close(),
    "Connection.map": lambda all_, timeout: all_.connection.map("none", timeout=timeout),
    "Connection.descriptor": lambda all_, timeout: all_.connection.descriptor("none", timeout),
    "Connection.shares": lambda all_, timeout: all_.connection.shares(timeout),
    "Connection.arrays": lambda all_, timeout: all_.connection.arrays(timeout=timeout),
    "Connection.wait_length": lambda all_, timeout: all_.connection.wait_length("b", 64, timeout),
    "Connection.wait_mapping": lambda all_, timeout: all_.connection.wait_mapping(timeout),
    "Connection.subscribe": lambda all_, timeout: all_.connection.subscribe("no", timeout=timeout),
    "Connection.queue": lambda all_, timeout: all_.connection.queue("none", timeout=timeout),
    "Connection.events": lambda all_, timeout: all_.connection.events("e", timeout=timeout).close(),
    "Connection.call": lambda all_, timeout: all_.connection.call("slow", timeout=timeout),
    "PendingCall.result": lambda all_, timeout: all_.pending.result(timeout),
    "PendingCall.exception": lambda all_, timeout: all_.pending.exception(timeout),
    "Events.get": lambda all_, timeout: all_.events.get(timeout),
    "Service.wait_client": lambda all_, timeout: all_.service.wait_client(timeout),
    "Service.wait_superseded": lambda all_, timeout: all_.service.wait_superseded(timeout),
    "Subscription.take": lambda all_, timeout: all_.subscription.take(timeout),
    "Subscription.latest": lambda all_, timeout: all_.subscription.latest(timeout),
    "Subscription.wait": lambda all_, timeout: all_.subscription.wait(timeout),
    "Stream.loan": lambda all_, timeout: all_.full.loan(timeout),
    "Stream.publish": lambda all_, timeout: all_.full.publish(bytes(8), timeout=timeout),
    "Consumer.dequeue": lambda all_, timeout: all_.consumer.dequeue(timeout),
    "Consumer.dequeue_into": lambda all_, timeout: all_.consumer.dequeue_into(
        bytearray(8), timeout
    ),
    "Consumer.dequeue_many": lambda all_, timeout: all_.consumer.dequeue_many(timeout=timeout),
    "Consumer.peek": lambda all_, timeout: all_.consumer.peek(timeout),
    "Consumer.wait": lambda all_, timeout: all_.consumer.wait(timeout),
    "Producer.enqueue": lambda all_, timeout: all_.producer.enqueue(bytes(3000), timeout),
    "Producer.enqueue_many": lambda all_, timeout: all_.producer.enqueue_many(
        [bytes(3000)], timeout
    ),
    "Producer.wait": lambda all_, timeout: all_.producer.wait(3000, timeout),
    "ServiceConsumer.get": lambda all_, timeout: all_.commands.get(timeout),
    "ServiceConsumer.get_many": lambda all_, timeout: all_.commands.get_many(timeout=timeout),
    "ServiceProducer.wait_client": lambda all_, timeout: all_.samples.wait_client(timeout),
    "Zone.alloc": lambda all_, timeout: all_.zone.alloc(timeout),
    "Zone.element": lambda all_, timeout: all_.zone.element(timeout).__enter__(),
    "copyin": lambda all_, timeout: md.copyin(all_.own, all_.place, 4, timeout=timeout),
    "copyin_into": lambda all_, timeout: copyin_into(
        all_.own, all_.place, bytearray(4), timeout=timeout
    ),
    "copyinstr": lambda all_, timeout: md.copyinstr(all_.own, all_.place, 4, timeout=timeout),
    "copyout": lambda all_, timeout: md.copyout(b"", all_.own, all_.place, timeout=timeout),
    "copy_between": lambda all_, timeout: md.copy_between(
        all_.own, all_.place, all_.own, all_.place, 0, timeout=timeout
    ),
    "Task.wait": lambda all_, timeout: all_.other.wait(timeout),
    "create_mapping_in_task": lambda all_, timeout: all_.buffer.create_mapping_in_task(
        all_.own, timeout=timeout
    ).unmap(),
}


AWAITED: dict[str, Callable[[Any, Any], Any]] = {
    "connect_async": lambda all_, timeout: _connected(timeout),
    "map_async": lambda all_, timeout: all_.connection.map_async("none", timeout=timeout),
    "descriptor_async": lambda all_, timeout: all_.connection.descriptor_async("none", timeout),
    "arrays_async": lambda all_, timeout: all_.connection.arrays_async(timeout=timeout),
    "wait_length_async": lambda all_, timeout: all_.connection.wait_length_async("b", 64, timeout),
    "wait_mapping_async": lambda all_, timeout: all_.connection.wait_mapping_async(timeout),
    "subscribe_async": lambda all_, timeout: all_.connection.subscribe_async("no", timeout=timeout),
    "queue_async": lambda all_, timeout: all_.connection.queue_async("none", timeout=timeout),
    "events_async": lambda all_, timeout: all_.connection.events_async("e", timeout=timeout),
    "call_async": lambda all_, timeout: all_.connection.call_async("slow", timeout=timeout),
    "Events.get_async": lambda all_, timeout: all_.events.get_async(timeout),
    "Service.wait_client_async": lambda all_, timeout: all_.service.wait_client_async(timeout),
    "wait_superseded_async": lambda all_, timeout: all_.service.wait_superseded_async(timeout),
    "take_async": lambda all_, timeout: all_.subscription.take_async(timeout),
    "loan_async": lambda all_, timeout: all_.full.loan_async(timeout),
    "dequeue_async": lambda all_, timeout: all_.consumer.dequeue_async(timeout),
    "Consumer.wait_async": lambda all_, timeout: all_.consumer.wait_async(timeout),
    "enqueue_async": lambda all_, timeout: all_.producer.enqueue_async(bytes(3000), timeout),
    "Producer.wait_async": lambda all_, timeout: all_.producer.wait_async(3000, timeout),
    "ServiceConsumer.get_async": lambda all_, timeout: all_.commands.get_async(timeout),
    "ServiceProducer.wait_client_async": lambda all_, timeout: all_.samples.wait_client_async(
        timeout
    ),
    "Task.wait_async": lambda all_, timeout: all_.other.wait_async(timeout),
}


async def _connected(timeout: Any) -> None:
    (await md.connect_async("timeouts", timeout=timeout)).close()


@pytest.fixture(scope="module")
def puppet() -> Iterator[Puppet]:
    with Puppet() as one:
        yield one


@pytest.fixture
def everything(puppet: Puppet) -> Iterator[SimpleNamespace]:
    """One of each that can be waited for, and nothing comes."""
    release = threading.Event()

    def slow() -> None:
        release.wait(60)

    with ExitStack() as stack:
        service = stack.enter_context(md.Service("timeouts"))
        stack.callback(release.set)
        service.method(slow)
        buffer = md.BufferMemoryDescriptor(64)
        service.share("b", buffer)
        service.stream("empty", nbytes=8, slots=8)
        full = service.stream("full", nbytes=8, slots=8, policies=["block"])
        commands = service.queue("commands", capacity=4096, direction=md.Direction.IN)
        samples = service.queue("samples", capacity=4096)
        connection = stack.enter_context(md.connect("timeouts"))
        service.wait_client(5)
        blocks = stack.enter_context(connection.subscribe("full", policy="block", depth=3))
        with suppress(md.TimedOutError):
            while True:
                full.publish(bytes(8), timeout=0)
        ends = [stack.enter_context(end) for end in notification_pair()]
        own_queue = md.create_data_queue(4096)
        other_queue = md.create_data_queue(4096)
        producer = stack.enter_context(Producer(own_queue, notify=ends[0]))
        producer.enqueue(bytes(3000))
        zone = md.Zone("timeouts", 4096, 4096)
        memory = bytearray(8)
        found = SimpleNamespace(
            service=service,
            connection=connection,
            buffer=buffer,
            full=full,
            blocks=blocks,
            commands=commands,
            samples=samples,
            subscription=stack.enter_context(connection.subscribe("empty")),
            pending=connection.begin("slow"),
            events=stack.enter_context(connection.events("told")),
            producer=producer,
            consumer=stack.enter_context(Consumer(other_queue, listen=ends[1])),
            zone=zone,
            element=zone.alloc(),
            other=stack.enter_context(md.Task(puppet.pid)),
            own=stack.enter_context(md.Task.current()),
            memory=memory,
            place=_core.buffer_address(memory)[0],
        )
        yield found
    vars(found).clear()


def ask(everything: SimpleNamespace, name: str, timeout: Any) -> None:
    if name in WAITING:
        WAITING[name](everything, timeout)
        return

    async def wait() -> None:
        await AWAITED[name](everything, timeout)

    asyncio.run(wait())


@pytest.mark.parametrize("name", [*WAITING, *AWAITED])
def test_what_a_waiting_call_takes(everything: SimpleNamespace, name: str) -> None:
    for timeout in BAD:
        with pytest.raises(md.InvalidArgument) as caught:
            ask(everything, name, timeout)
        assert (caught.value.errno, repr(timeout) in str(caught.value)) == (errno.EINVAL, True)
    for timeout in GOOD:  # it ends as it does when nothing came
        with suppress(md.TimedOutError, md.ShareNotFoundError, md.ZoneExhausted, TimeoutError):
            ask(everything, name, timeout)


NOTHING_CAME = TimeoutError, md.ShareNotFoundError, md.ZoneExhausted


def test_who_waited_in_vain_holds_nothing(everything: SimpleNamespace) -> None:
    waited = 0
    with no_collector():
        for name, wait in WAITING.items():
            with suppress(DidNotFail):
                assert lets_go(partial(wait, everything, 0), *NOTHING_CAME), name
                waited += 1
    assert waited > 20


def test_who_awaited_in_vain_holds_nothing(everything: SimpleNamespace) -> None:
    async def main() -> int:
        waited = 0
        for name, wait in AWAITED.items():
            with suppress(DidNotFail):  # it may have come in time
                action = partial(wait, everything, 0.001)
                assert await lets_go_async(action, *NOTHING_CAME), name
                waited += 1
        return waited

    with no_collector():
        assert asyncio.run(main()) > 10


def test_deadlines() -> None:
    assert deadline_of(None) is None
    before = time.monotonic()
    assert before + 5 <= deadline_of(5) <= time.monotonic() + 5  # type: ignore[operator]
    check_timeout(None)
