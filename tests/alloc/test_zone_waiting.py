"""Waiting for an element: woken by a free, by a drop, by a close; timeouts; signals."""

from __future__ import annotations

import errno
import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from zone_tools import balanced, make, poke, settled, wait_until

from memdesc import ClosedError, InvalidArgument, UseAfterFreeError, Zone, ZoneExhausted


class Waiter(threading.Thread):
    """Allocates in a thread of its own; holds what it got or what it raised."""

    def __init__(self, zone: Zone, timeout: float | None = 60) -> None:
        super().__init__(daemon=True)
        self.zone, self.timeout = zone, timeout
        self.element: object = None
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self.element = self.zone.alloc(timeout=self.timeout)
        except Exception as error:  # noqa: BLE001 (the test looks at it)
            self.error = error

    def end(self) -> None:
        self.join(30)
        assert not self.is_alive(), "it still waits"


def waiting(zone: Zone, count: int) -> None:
    wait_until(lambda: zone.statistics().waiting == count)


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_free_wakes_a_waiter(timeout: float | None) -> None:
    zone = make(elements=1)
    element = zone.alloc()
    waiter = Waiter(zone, timeout)
    waiting(zone, 1)
    zone.free(element)
    waiter.end()
    assert waiter.error is None
    assert bytes(waiter.element) == bytes(256)  # type: ignore[call-overload]
    told = zone.statistics()
    assert (told.waits, told.waiting, told.failures, told.in_use) == (1, 0, 0, 1)


def test_a_drop_wakes_a_waiter() -> None:
    zone = make(elements=1)
    element = zone.alloc()
    waiter = Waiter(zone)
    waiting(zone, 1)
    del element
    waiter.end()
    assert waiter.error is None
    assert zone.statistics().drops == 1


def test_the_last_view_wakes_a_waiter() -> None:
    zone = make(elements=1)
    with zone.element() as element:
        view = memoryview(element)
    waiter = Waiter(zone)
    waiting(zone, 1)
    view.release()
    waiter.end()
    assert waiter.error is None


def test_the_last_view_that_an_exception_takes_along_wakes_a_waiter_too() -> None:
    """A call of the core under a raised exception would fail, and undo both."""
    zone = make(elements=1)
    context = zone.element()
    element = context.__enter__()
    waiter = Waiter(zone)
    waiting(zone, 1)

    def leave() -> int:
        context.__exit__(None, None, None)
        assert not element.living
        return 1 // 0

    with pytest.raises(ZeroDivisionError):
        max(memoryview(element), leave())  # the view is on the stack that is unwound
    waiter.end()
    assert waiter.error is None
    assert zone.statistics().frees == 1


def test_each_free_wakes_one_of_several_and_none_is_lost() -> None:
    zone = make(elements=4)
    elements = [zone.alloc() for _ in range(4)]
    waiters = [Waiter(zone) for _ in range(4)]
    waiting(zone, 4)
    for element in elements:
        zone.free(element)
    for waiter in waiters:
        waiter.end()
        assert waiter.error is None
    assert len({waiter.element.address for waiter in waiters}) == 4  # type: ignore[attr-defined]


@pytest.mark.slow
def test_many_threads_over_few_elements_lose_no_wake_up() -> None:
    zone = make(elements=2)
    each = 2_000

    def work() -> None:
        for _ in range(each):
            zone.free(zone.alloc(timeout=60))

    threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
        assert not thread.is_alive(), "a wake-up was lost"
    told = zone.statistics()
    assert (told.allocs, told.in_use, told.waiting, told.failures) == (6 * each, 0, 0, 0)
    assert balanced(zone)


def test_a_timeout_that_runs_out() -> None:
    zone = make(elements=1)
    element = zone.alloc()
    with pytest.raises(ZoneExhausted) as caught:
        zone.alloc(timeout=0.02)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "0.02 s" in str(caught.value)
    with pytest.raises(ZoneExhausted) as at_once:
        zone.alloc(timeout=0)
    assert at_once.value.errno == errno.ENOMEM
    told = zone.statistics()
    assert (told.failures, told.waits, told.waiting) == (2, 1, 0)
    zone.free(element)
    zone.alloc(timeout=0.02)


@pytest.mark.parametrize("bad", [-1, -0.5, float("nan"), float("inf"), "1", [], 1j])
def test_what_is_no_timeout(bad: object) -> None:
    zone = make(elements=1)
    element = zone.alloc()
    with pytest.raises(InvalidArgument):
        zone.alloc(timeout=bad)  # type: ignore[arg-type]
    zone.free(element)


def test_closing_wakes_all_and_they_are_told() -> None:
    zone = make(elements=1)
    element = zone.alloc()
    waiters = [Waiter(zone, None) for _ in range(3)]
    waiting(zone, 3)
    zone.close()
    for waiter in waiters:
        waiter.end()
        assert isinstance(waiter.error, ClosedError)
    zone.free(element)


def test_a_waiter_that_meets_a_changed_element_passes_the_wake_up_on() -> None:
    zone = make(elements=2)
    elements = [zone.alloc() for _ in range(2)]
    waiters = [Waiter(zone) for _ in range(2)]
    waiting(zone, 2)
    # Both come free at once for the waiters: the interpreter's lock is not given up in between.
    first, second = (element.address for element in elements)
    zone.free(elements[0])
    zone.free(elements[1])
    for waiter in waiters:
        waiter.end()
        assert waiter.error is None
    assert {first, second} == {waiter.element.address for waiter in waiters}  # type: ignore[attr-defined]
    poke(first)
    del waiters, waiter
    # Dropped and so cleared: nothing is wrong any more.
    assert len([zone.alloc() for _ in range(2)]) == 2


def test_a_changed_element_is_told_to_who_waits_too() -> None:
    zone = make(elements=1)
    element = zone.alloc()
    address = element.address
    zone.free(element)
    poke(address)
    with pytest.raises(UseAfterFreeError):
        zone.alloc(timeout=60)
    with pytest.raises(ZoneExhausted):
        zone.alloc(timeout=0.01)


class Interrupted(Exception):
    pass


@contextmanager
def raising_on(number: signal.Signals) -> Iterator[None]:
    def handler(*_: object) -> None:
        raise Interrupted

    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("timeout", [None, 60])
def test_a_signal_gets_through_and_the_element_to_the_next(timeout: float | None) -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run in the main thread alone, and this is another")
    zone = make(elements=1)
    element = zone.alloc()

    def interrupt() -> None:
        waiting(zone, 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    helper = threading.Thread(target=interrupt)
    with raising_on(signal.SIGUSR1):
        helper.start()
        with pytest.raises(Interrupted):
            zone.alloc(timeout=timeout)
        helper.join()
    assert zone.statistics().waiting == 0
    waiter = Waiter(zone)
    waiting(zone, 1)
    zone.free(element)
    waiter.end()
    assert waiter.error is None


def test_a_handler_that_returns_does_not_end_the_wait() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run in the main thread alone, and this is another")
    zone = make(elements=1)
    element = zone.alloc()
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: seen.append(number))

    def interrupt() -> None:
        waiting(zone, 1)
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: bool(seen))
        zone.free(element)

    helper = threading.Thread(target=interrupt)
    try:
        helper.start()
        zone.free(zone.alloc(timeout=60))
        helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_a_handler_may_free_what_its_own_thread_waits_for() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run in the main thread alone, and this is another")
    zone = make(elements=1)
    held = [zone.alloc()]
    before = signal.signal(signal.SIGUSR1, lambda *_: zone.free(held.pop()))

    def interrupt() -> None:
        waiting(zone, 1)
        os.kill(os.getpid(), signal.SIGUSR1)

    helper = threading.Thread(target=interrupt)
    try:
        helper.start()
        zone.free(zone.alloc(timeout=60))
        helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert zone.statistics().in_use == 0


def test_who_is_woken_and_leaves_passes_the_wake_up_on() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run in the main thread alone, and this is another")
    zone = make(elements=1)
    held = [zone.alloc()]
    second: list[Waiter] = []

    def free_and_raise(*_: object) -> None:
        zone.free(held.pop())  # wakes the thread that this interrupts, which is first
        raise Interrupted

    def interrupt() -> None:
        waiting(zone, 1)
        second.append(Waiter(zone, None))
        waiting(zone, 2)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, free_and_raise)
    helper = threading.Thread(target=interrupt)
    try:
        helper.start()
        with pytest.raises(Interrupted):
            zone.alloc(timeout=60)
        helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)
    second[0].end()
    assert second[0].error is None
    assert zone.statistics().waiting == 0


def _work_until_interrupted(zone: Zone, held: list[object]) -> None:
    while True:
        held.append(zone.alloc(timeout=0.001))
        if len(held) > 600:
            held.clear()
            zone.collect()
        with zone.element() as element:
            memoryview(element)[0] = 1


@pytest.mark.slow
def test_interrupts_anywhere_lose_no_element_and_no_memory() -> None:
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("signal handlers run in the main thread alone, and this is another")
    before = settled().used
    zone = Zone("interrupted", 256, 4 * (64 << 10))
    held: list[object] = []
    rng = random.Random(7)
    with raising_on(signal.SIGALRM):
        for _ in range(500):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
                _work_until_interrupted(zone, held)
            except Interrupted:
                continue
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    held.clear()
    gc.collect()
    zone.collect()
    told = zone.statistics()
    assert (told.in_use, told.current_size, told.waiting, told.quarantined) == (0, 0, 0, 0)
    assert balanced(zone)
    # Of chunks that an interrupt met between two steps, addresses may be lost, never bytes.
    elements = [zone.alloc() for _ in range(1024)]
    assert len({element.address for element in elements}) == 1024  # type: ignore[attr-defined]
    with pytest.raises(ZoneExhausted):
        zone.alloc()
    elements.clear()
    zone.collect()
    assert settled().used == before
