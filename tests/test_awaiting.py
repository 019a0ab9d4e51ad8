"""What all awaiting comes to: conditions, descriptors, threads; cancelled, refused, abandoned."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import deque

import pytest

import memdesc as md
from memdesc.vm import awaiting
from memdesc.vm.awaiting import Sleepers, happens, in_thread, readable, time_limit
from memdesc.vm.forks import Condition, Flag

LIMIT = 60


def late() -> md.TimedOutError:
    return md.TimedOutError("late", errno=errno.ETIMEDOUT)


def test_who_is_cancelled_after_being_told_tells_another() -> None:
    changed, there = Condition(), deque[int]()

    async def wait() -> int:
        return await changed.wait_for_async(lambda: there.popleft() if there else None, None, late)

    async def main() -> None:
        first, second = asyncio.ensure_future(wait()), asyncio.ensure_future(wait())
        while len(changed._waiters) < 2:
            await asyncio.sleep(0)
        with changed:
            there.append(7)
            changed.notify()
        first.cancel()
        assert await asyncio.wait_for(second, LIMIT) == 7
        assert first.cancelled()

    asyncio.run(main())
    assert not changed._waiters


def test_a_loop_that_was_closed_is_told_nothing_in_the_place_of_a_thread() -> None:
    changed, there = Condition(), deque[int]()

    def look() -> int | None:
        return there.popleft() if there else None

    loop = asyncio.new_event_loop()
    waiting = loop.create_task(changed.wait_for_async(look, None, late))
    while not changed._waiters:
        loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(changed.wait_for(look, LIMIT, late)))
    thread.start()
    while len(changed._waiters) < 2:
        pass
    with changed:
        there.append(7)
        changed.notify()
    thread.join(LIMIT)
    assert found == [7]
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_the_time_of_a_condition_and_of_a_flag_runs_out() -> None:
    changed, flag = Condition(), Flag()
    with pytest.raises(md.TimedOutError):
        changed.wait_for(lambda: None, 0.01, late)
    with pytest.raises(md.TimedOutError):
        asyncio.run(changed.wait_for_async(lambda: None, 0.01, late))
    for call in (
        lambda: changed.wait_for(lambda: 1, float("nan"), late),
        lambda: asyncio.run(changed.wait_for_async(lambda: 1, -1, late)),
    ):
        with pytest.raises(md.InvalidArgument):
            call()
    assert not asyncio.run(flag.wait_async(0))
    flag.set()
    assert asyncio.run(flag.wait_async())
    assert not changed._waiters


def test_a_timeout_of_the_body_is_its_own() -> None:
    async def main() -> None:
        async with time_limit(LIMIT, late):
            raise TimeoutError("of something else")

    with pytest.raises(TimeoutError) as caught:
        asyncio.run(main())
    assert not isinstance(caught.value, md.TimedOutError)


def test_no_descriptor_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> int:
        raise OSError(why, os.strerror(why))

    here, there = os.pipe()
    sleepers = Sleepers()
    monkeypatch.setattr(os, "dup", refuse)
    why = errno.EMFILE
    with pytest.raises(md.AllocationError) as caught:
        asyncio.run(readable(lambda: here, sleepers))
    assert caught.value.errno == errno.EMFILE
    why = errno.EBADF  # closed meanwhile: who waits looks, and finds out
    asyncio.run(readable(lambda: here, sleepers))
    assert not sleepers
    monkeypatch.undo()
    os.close(here)
    os.close(there)


def test_what_comes_out_of_a_thread_too_late_is_unwanted() -> None:
    go, unwanted = threading.Event(), list[int]()

    def work() -> int:
        go.wait(LIMIT)
        return 7

    async def main() -> None:
        assert await in_thread(lambda: 8, unwanted.append) == 8
        with pytest.raises(ZeroDivisionError):
            await in_thread(lambda: 1 // 0, unwanted.append)
        waiting = asyncio.ensure_future(in_thread(work, unwanted.append))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go.set()
        while not unwanted:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert unwanted == [7]


def test_a_loop_that_ends_first_wants_nothing() -> None:
    go, told = threading.Event(), threading.Event()
    unwanted: list[int] = []

    def work() -> int:
        go.wait(LIMIT)
        return 7

    def drop(number: int) -> None:
        unwanted.append(number)
        told.set()

    loop = asyncio.new_event_loop()
    waiting = loop.create_task(in_thread(work, drop))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    go.set()
    assert told.wait(LIMIT)
    assert unwanted == [7]
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_more_than_there_are_threads_for_take_turns() -> None:
    lock, running, most = threading.Lock(), 0, 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.001)
        with lock:
            running -= 1

    async def main() -> None:
        await asyncio.gather(*[in_thread(work) for _ in range(3 * awaiting._MOST)])

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    assert 1 <= most <= awaiting._MOST


def test_several_wait_for_one_descriptor() -> None:
    here, there = os.pipe()
    written = threading.Event()

    async def main() -> None:
        waiting = [
            asyncio.ensure_future(happens(written.is_set, lambda: readable(lambda: here), None))
            for _ in range(3)
        ]
        await asyncio.sleep(0)
        waiting[0].cancel()
        written.set()
        os.write(there, b"x")
        assert await asyncio.gather(*waiting[1:]) == [True, True]

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    os.close(here)
    os.close(there)
