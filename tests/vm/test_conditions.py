"""Conditions that an interrupt leaves unlocked, whenever it comes."""

from __future__ import annotations

import sys
import threading
from types import FrameType, SimpleNamespace
from typing import Any

import pytest

import memdesc as md
from memdesc.loop import loop
from memdesc.services.calls.pending import PendingCall
from memdesc.vm import forks
from memdesc.vm.forks import Condition, Flag

LIMIT = 60
WHERE = (threading.__file__, forks.__file__)


class Interrupted(Exception):
    pass


def interrupted_everywhere(call: Any) -> int:
    """Call, and raise at the first line of a condition's methods, at the second, …: how often."""
    count = 0
    while True:
        left = count

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename in WHERE:
                if not left:
                    sys.settrace(None)
                    raise Interrupted
                left -= 1
            return trace

        sys.settrace(trace)
        try:
            call()
        except Interrupted:
            count += 1
        except RuntimeError as error:  # interrupted before it had the lock back
            assert "release" in str(error)
            count += 1
        else:
            return count
        finally:
            sys.settrace(None)


def is_free(condition: Any) -> bool:
    found = []
    thread = threading.Thread(target=lambda: found.append(condition.acquire(timeout=1)))
    thread.start()
    thread.join(LIMIT)
    return found == [True]


def test_no_interrupt_leaves_a_condition_locked() -> None:
    kept = []

    def wait() -> None:
        kept.append(Condition())
        with kept[-1]:
            kept[-1].wait(0)

    assert interrupted_everywhere(wait) > 5
    assert all(is_free(one) for one in kept)


def test_no_interrupt_leaves_a_calls_future_locked() -> None:
    """Else the I/O thread, which tells of the result, would wait for ever."""
    kept: list[PendingCall] = []
    of_nobody = SimpleNamespace(credentials=SimpleNamespace(uid=0))
    nobody: Any = SimpleNamespace(closed=False, task=of_nobody, _cancel_call=lambda number: None)

    def ask() -> None:
        kept.append(PendingCall(nobody, 1, lambda answer, fds: None))
        with pytest.raises(TimeoutError):
            kept[-1].result(0)

    interrupted_everywhere(lambda: _quietly(ask))
    assert kept
    assert all(is_free(one._condition) for one in kept)


def _quietly(call: Any) -> None:
    try:
        call()
    except TimeoutError:
        pass


def test_conditions_and_flags_wake_who_waits() -> None:
    condition, flag, woken = Condition(), Flag(), []

    def wait() -> None:
        with condition:
            woken.append(condition.wait(LIMIT))
        woken.append(flag.wait(LIMIT))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while len(condition._waiters) < 3:
        pass
    with condition:
        condition.notify()
        condition.notify_all()
        condition.notify()
    flag.set()
    for thread in threads:
        thread.join(LIMIT)
    assert woken == [True] * 6
    assert flag.is_set()
    with condition:
        assert not condition.wait(0.001)
    assert not Flag().wait(0.001)


def test_a_call_that_was_interrupted_after_it_was_sent_ends_no_connection() -> None:
    with md.Service("calls") as service, md.connect("calls") as client:
        service.method(lambda: 1, name="one")
        put = type(client)._put

        def interrupted(self: Any, message: Any, fds: Any) -> bool:
            put(self, message, fds)
            raise Interrupted

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(client), "_put", interrupted)
            with pytest.raises(Interrupted):
                client.begin("one")
        assert client.call("one", timeout=LIMIT) == 1
        loop().run(lambda: None)
        assert not client.closed
