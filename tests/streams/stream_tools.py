"""Streams of a test, and forked processes at the other end: ended by their number."""

from __future__ import annotations

import os
import signal
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from children import die_with_parent

from memdesc.streams import Backpressure, Stream, Subscriber, Subscription

LIMIT = 30.0
"""Seconds: how long a test waits for what is sure to come."""

ALL = frozenset(Backpressure)


def subscribe(stream: Stream, seat: Subscriber | None = None, **options: Any) -> Subscription:
    """Subscribe in this process."""
    if seat is None:
        seat = stream.admit(**options)
        options = {}
    return Subscription(
        stream.memory, seat.memory, stream.form, seat.depth, seat.loans, name=stream.name, **options
    )


def publish(stream: Stream, *values: int, timeout: float | None = LIMIT) -> None:
    """Publish slots whose every byte, and metadata, is that value."""
    for value in values:
        with stream.loan(timeout) as slot:
            slot.array.view("u1")[...] = value & 0xFF
            slot.metadata = value


def taken(subscription: Subscription) -> list[int]:
    """Take all that is offered: the metadata of each; the contents are checked."""
    found = []
    while subscription.pending:
        with subscription.take(LIMIT) as slot:
            assert (slot.array.view("u1") == slot.metadata & 0xFF).all()
            found.append(slot.metadata)
    return found


def start(function: Callable[..., object], *arguments: Any) -> int:
    """Run a function in a forked child, which exits with 0 if it returns."""
    with warnings.catch_warnings():
        # CPython 3.12 warns where threads are about (the watchdog of the tests is one).
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent()
        function(*arguments)
        code = 0
    except BaseException:  # noqa: BLE001 (shown, and told by the exit code)
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a child: its exit code; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    assert finish(pid) == -signal.SIGKILL
