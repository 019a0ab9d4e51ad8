"""An error that was handled holds nothing: neither the frames that it came through, nor what those
had. Else arrays, slots and descriptors would stay until the collector runs.
"""

import gc
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest

import memdesc as md
from memdesc.mapping import LocalMemoryMap
from memdesc.streams import Stream, Subscription


class Local:
    """What a function that fails has."""


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def lets_go(action: Callable[[], object], *kinds: type[BaseException]) -> bool:
    seen = []

    def program() -> None:
        local = Local()
        seen.append(weakref.ref(local))
        action()

    action_failed = False
    try:
        program()
    except kinds:
        action_failed = True
    assert action_failed
    return seen[0]() is None


def test_streams() -> None:
    stream = Stream(nbytes=10, slots=4)
    seat = stream.admit(loans=1)
    subscription = Subscription(stream.memory, seat.memory, stream.form, seat.depth, seat.loans)
    kept = stream.loan()
    assert lets_go(stream.loan, md.AllocationError)
    kept.publish()
    taken = subscription.take()
    assert lets_go(subscription.take, md.AllocationError)
    taken.release()
    assert lets_go(subscription.take_nowait, md.TimedOutError)
    stream.close()
    assert lets_go(subscription.take, md.PeerGoneError)
    subscription.close()
    assert lets_go(subscription.take, md.ClosedError)


def test_memory() -> None:
    buffer = md.BufferMemoryDescriptor(100)
    mapping = buffer.map()
    assert isinstance(mapping, LocalMemoryMap)
    view = memoryview(mapping)
    assert lets_go(mapping.unmap, BufferError)
    view.release()
    assert lets_go(lambda: buffer.map(length=101), md.MappingError)
    assert lets_go(lambda: md.BufferMemoryDescriptor(1 << 46), md.AllocationError)
    zone = md.Zone("errors", element_size=64, capacity=4096)
    element = zone.alloc()
    view = memoryview(element)
    assert lets_go(lambda: zone.free(element), BufferError)
    view.release()
    zone.free(element)
    assert lets_go(lambda: zone.free(element), md.DoubleFreeError)
    block = md.io_malloc_aligned(8192, 4096)
    view = memoryview(block)
    assert lets_go(lambda: md.io_free(block), BufferError)
    view.release()
    md.io_free(block)


def test_services(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else pytest keeps the records, and they what the handler failed with.
    monkeypatch.setattr(logging.getLogger("memdesc.services"), "disabled", True)
    with md.Service("errors", limits=md.Limits(loans=0)) as service:

        @service.method
        def fail() -> None:
            raise ZeroDivisionError

        @service.method
        def add(one: int, other: int) -> int:
            return one + other

        service.stream("video", nbytes=10)
        with md.connect("errors") as connection:
            for action, kind in {
                lambda: connection.map("nothing", timeout=0): md.ShareNotFoundError,
                lambda: connection.subscribe("nothing", timeout=0): md.ShareNotFoundError,
                lambda: connection.subscribe("video", timeout=0): md.LimitError,
                lambda: connection.call("nothing"): md.MethodNotFoundError,
                lambda: connection.call("add", "one", 2): md.InvalidArgument,
                lambda: connection.call("fail"): md.RemoteError,
                lambda: connection.begin("fail").result(10): md.RemoteError,
            }.items():
                assert lets_go(action, kind), kind
        assert lets_go(lambda: connection.call("fail"), md.ClosedError)
